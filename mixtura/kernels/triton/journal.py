"""What a sweep has measured, a line of JSON each, so that an interrupted one goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixtura.kernels.triton.candidates import Case
from mixtura.kernels.triton.device import Device, triton_version
from mixtura.kernels.triton.table import Blocks, blocks_for
from mixtura.kernels.triton.trials import Failed, Timed, Trial
from mixtura.kernels.triton.tuned import device_data, kernels_digest, key_data, tuned_path

MICROSECONDS = 1e6
PLACE = ("top_k", "rows")
"""What an entry does not depend on."""


def journal_path(device: Device) -> Path:
    """Where the measurements on a GPU are kept: beside its tuned blocks."""
    return tuned_path(device).with_suffix(".journal.jsonl")


class Journal:
    """Measurements by what was measured and where: the rest, and rows with their K.

    What: GPU, Triton, kernels, product, and both contenders' blocks. A line that was torn off is
    left out, and measured again; lines of another GPU, Triton or kernels are never found.
    """

    def __init__(self, path: Path, device: Device, *, is_fresh: bool = False) -> None:
        """Read a file, which need not be there; `is_fresh` forgets what it says.

        Raises:
            OSError: it cannot be read or written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._device = device
        self._found: dict[str, dict[str, Trial]] = {}
        text = ""
        if not is_fresh and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            self._read(line)
        self._file = path.open("w" if is_fresh else "a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def _read(self, line: str) -> None:
        try:
            data = json.loads(line)
            self._keep(data["what"], _trial_from(data))
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def _keep(self, what: dict[str, Any], trial: Trial) -> None:
        thing, place = _names(what)
        self._found.setdefault(thing, {})[place] = trial

    def find(self, case: Case, blocks: Blocks, is_final: bool) -> Trial | None:
        """What was measured, or None."""
        thing, place = _names(self._what(case, blocks, is_final))
        return self._found.get(thing, {}).get(place)

    def elsewhere(self, case: Case, blocks: Blocks, is_final: bool) -> list[Trial]:
        """What was measured for the same entry in other cases: at other rows, or with another K."""
        thing, here = _names(self._what(case, blocks, is_final))
        return [trial for place, trial in self._found.get(thing, {}).items() if place != here]

    def add(self, case: Case, blocks: Blocks, is_final: bool, trial: Trial) -> None:
        """Write a measurement down at once."""
        what = self._what(case, blocks, is_final)
        self._keep(what, trial)
        data: dict[str, Any] = {"what": what}
        if isinstance(trial, Timed):
            for name, seconds in (("shipped", trial.shipped), ("tried", trial.tried)):
                data[f"{name}_us"] = [round(one * MICROSECONDS, 3) for one in seconds]
        else:
            data["failed"] = trial.reason
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()

    def _what(self, case: Case, blocks: Blocks, is_final: bool) -> dict[str, Any]:
        return {
            "device": device_data(self._device),
            "triton": triton_version(),
            "kernels": kernels_digest(),
            "key": key_data(case.key),
            "top_k": case.shape.top_k,
            "rows": list(case.rows),
            "shipped": asdict(blocks_for(case.key, self._device)),
            "blocks": asdict(blocks),
            "is_final": is_final,
        }


def _names(what: dict[str, Any]) -> tuple[str, str]:
    """(what was measured, where)."""
    thing = {name: value for name, value in what.items() if name not in PLACE}
    place = {name: what[name] for name in PLACE}
    return json.dumps(thing, sort_keys=True), json.dumps(place, sort_keys=True)


def _trial_from(data: dict[str, Any]) -> Trial:
    if "failed" in data:
        return Failed(str(data["failed"]))
    shipped, tried = (
        tuple(float(one) / MICROSECONDS for one in data[f"{name}_us"])
        for name in ("shipped", "tried")
    )
    if len(shipped) != len(tried) or not shipped:
        raise ValueError("times")
    if not all(0 < one < math.inf for one in (*shipped, *tried)):
        raise ValueError("times")
    return Timed(shipped, tried)
