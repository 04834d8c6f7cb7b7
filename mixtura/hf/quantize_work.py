"""The work directory of `quantize`: finished files, a journal of them, and the final rename.

    OUT.partial/journal.jsonl      one line of what is made, then one for each finished file
    OUT.partial/moments.safetensors   what calibration found
    OUT.partial/files/             becomes OUT, whole, at the end

A file counts when its line is in the journal and its content has the digest written there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtura.errors import InputError
from mixtura.hf.tensor_io import file_digest

JOURNAL, MOMENTS, FILES = "journal.jsonl", "moments.safetensors", "files"
UNFINISHED = ".part"


class WorkDirectory:
    """Where a checkpoint is put together.

    Args:
        out: the directory that it becomes.
        settings: of the run, as JSON; an unfinished run goes on with the same ones only.

    Attributes:
        kept: by name of a finished file, what the journal says of it.

    Raises:
        InputError: `out` holds something, or the work directory belongs to another run, or to one
            that is still going on.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        check_output(out)
        self.out = out
        self.path = work_path(out)
        self.files = self.path / FILES
        self.kept: dict[str, dict[str, Any]] = {}
        try:
            self.files.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / JOURNAL).open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"the output directory ({out}) must be one that can be written; got "
                f"{error.strerror} for {self.path}. Choose another --out."
            ) from None
        self._lock()
        lines = self._read_journal()
        if len(lines) == 1 and lines[0] != {"settings": dict(settings)}:
            lines = self._start_anew()
        if not lines:
            self._append({"settings": dict(settings)})
            return
        self._check_same(lines[0].get("settings"), dict(settings))
        for line in lines[1:]:
            path = self.files / line["file"]
            if path.is_file() and file_digest(path) == line["sha256"]:
                self.kept[line["file"]] = line

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise InputError(
                f"the work directory ({self.path}) must belong to one run at a time; got another "
                f"that is going on. Wait for it, or choose another --out."
            ) from None

    def _read_journal(self) -> list[dict[str, Any]]:
        """The whole lines; a last one that a kill has cut short is taken off."""
        self._journal.seek(0)
        lines, stop = [], 0
        for line in self._journal.read().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            stop += len(line.encode())
        os.truncate(self._journal.fileno(), stop)
        return lines

    def _start_anew(self) -> list[dict[str, Any]]:
        """Forget another run, which has finished no file."""
        self._journal.truncate(0)
        (self.path / MOMENTS).unlink(missing_ok=True)
        return []

    def _check_same(self, found: Any, settings: dict[str, Any]) -> None:
        if found == settings:
            return
        found = found if isinstance(found, dict) else {}
        odd = next(key for key in settings if found.get(key) != settings[key])
        self._journal.close()
        raise InputError(
            f"the work directory ({self.path}) must be of the same run to go on; got one with "
            f"another {odd}. Remove it, or choose another --out."
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def unfinished(self, name: str) -> Path:
        """Where a file is written until it is whole."""
        return self.files / f"{name}{UNFINISHED}"

    def finish_file(self, name: str, sha256: str, facts: Mapping[str, Any]) -> None:
        """Give a whole file its name, and write it down along with facts about it."""
        os.replace(self.unfinished(name), self.files / name)
        line = {"file": name, "sha256": sha256, **facts}
        self._append(line)
        self.kept[name] = line

    def finish(self) -> None:
        """Make the output directory, in one step, and remove the rest."""
        for path in self.files.iterdir():
            assert path.suffix != UNFINISHED, f"{path} has been left"
        _sync_directory(self.files)
        os.rename(self.files, self.out)  # an empty directory may be there already
        _sync_directory(self.out.parent)
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let another run have the directory."""
        self._journal.close()


def work_path(out: Path) -> Path:
    """The work directory beside an output directory."""
    return out.with_name(f"{out.name}.partial")


def check_output(out: Path) -> None:
    """Raise `InputError` where an output directory cannot be made."""
    if not out.name:
        raise InputError(
            f"the output directory ({out}) must have a name; got none. Choose another --out."
        )
    if out.exists() and not out.is_dir():
        raise InputError(
            f"the output directory ({out}) must be new or empty; got a file. Choose another --out."
        )
    if out.is_dir():
        first = next(iter(sorted(path.name for path in out.iterdir())), None)
        if first is not None:
            raise InputError(
                f"the output directory ({out}) must be new or empty; got {first} in it. Choose "
                f"another --out, or empty it."
            )


def check_disk(out: Path, num_bytes: int) -> None:
    """Raise `InputError` where the disk has no room for so many more bytes."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise InputError(
            f"the disk of {out} must have {num_bytes / 1e9:,.2f} GB free for the files; got "
            f"{free / 1e9:,.2f} GB. Free some space, or choose another --out."
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
