"""The demo model's corpus: source files of the Python standard library, pinned by a manifest.

    python examples/demo_corpus.py                   # verify, count, gzip and xz bits per byte
    python examples/demo_corpus.py --write-manifest  # choose the files anew on this Python

Whole packages are held out, with their tests kept out of training too; a training file that
shares more than `MAX_SHARED` of its line sequences with the held-out files is dropped. The manifest
`demo_corpus.json` names every file with its sha256, so that another machine trains on the same
bytes or is told the first file that differs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mixtura.errors import MixturaError

MANIFEST = Path(__file__).with_name("demo_corpus.json")
HELD_OUT_PACKAGES = (
    "concurrent",
    "curses",
    "dbm",
    "http",
    "json",
    "logging",
    "sqlite3",
    "tomllib",
    "venv",
    "wsgiref",
    "xmlrpc",
    "zoneinfo",
)
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
"""Installed packages, caches, and tables that hold data more than code."""
MACHINE_FILES = re.compile(r"^(config-|.*/?_sysconfigdata)")
"""What the build of an interpreter writes: it differs between machines."""
MIN_BYTES = 200
"""Smaller files are empty package markers."""
SHINGLE_LINES = 5
MAX_SHARED = 0.02
"""A training file may share this part of its 5-line sequences with the held-out files."""

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
WORDS = r"[ \t]+(?=[^\s])| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|\n[ \t]*|\s+"
"""Pieces that the tokenizer never merges across: indentation, names, single digits, operators."""


class CorpusMismatchError(MixturaError):
    """The files of this Python are not those of the manifest."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the standard library; `path` is relative to its root, with forward slashes."""

    path: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files to train on and files to measure with, each in the order of their paths."""

    train: list[SourceFile]
    held_out: list[SourceFile]


def stdlib_root() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_of(path: str) -> str:
    """The package that a file belongs to; tests belong to what they test.

    >>> package_of("json/decoder.py"), package_of("test/test_json/test_dump.py")
    ('json', 'json')
    """
    parts = PurePosixPath(path).parts
    if parts[0] == "test" and len(parts) > 1:
        return parts[1].removesuffix(".py").removeprefix("test_").lstrip("_")
    return parts[0].removesuffix(".py")


def is_of_held_out_package(path: str) -> bool:
    """Whether a file, or the package that a test file tests, is held out."""
    return package_of(path).startswith(HELD_OUT_PACKAGES)


def _is_candidate(path: PurePosixPath, data: bytes) -> bool:
    if SKIPPED_DIRECTORIES.intersection(path.parts) or MACHINE_FILES.match(str(path)):
        return False
    if path.parts[0] == "test" and "bad" in path.name:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(data) >= MIN_BYTES


def scan(root: Path) -> Iterator[SourceFile]:
    """The library's own source files that decode as UTF-8."""
    for file in sorted(root.rglob("*.py")):
        path, data = PurePosixPath(file.relative_to(root).as_posix()), file.read_bytes()
        if _is_candidate(path, data):
            yield SourceFile(str(path), data)


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of `SHINGLE_LINES` lines of more than three characters, stripped."""
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 3]
    runs = range(len(lines) - SHINGLE_LINES + 1)
    return {tuple(lines[start : start + SHINGLE_LINES]) for start in runs}


def select(root: Path) -> Corpus:
    """Choose the corpus from a standard library: held out by package, no near-duplicates."""
    files = list(scan(root))
    held_out = [
        file
        for file in files
        if is_of_held_out_package(file.path) and not file.path.startswith("test/")
    ]
    held_out_shingles = set().union(*(shingles(file.text) for file in held_out))
    train: dict[str, SourceFile] = {}
    for file in files:
        if is_of_held_out_package(file.path) or file.sha256 in train:
            continue
        own = shingles(file.text)
        if len(own & held_out_shingles) <= MAX_SHARED * len(own):
            train[file.sha256] = file
    return Corpus(list(train.values()), held_out)


def write_manifest(corpus: Corpus, manifest: Path = MANIFEST) -> None:
    """Write every file's path and sha256."""
    content = {
        "source": "Python standard library, Lib/, under the PSF License Version 2",
        "python": platform.python_version(),
        "held_out_packages": HELD_OUT_PACKAGES,
        "held_out": {file.path: file.sha256 for file in corpus.held_out},
        "train": {file.path: file.sha256 for file in corpus.train},
    }
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(manifest: Path = MANIFEST) -> dict[str, Any]:
    """The manifest's content: `python`, `held_out_packages`, and path -> sha256 for each list."""
    content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    return content


def _verified(root: Path, path: str, sha256: str, python: str) -> SourceFile:
    full = root / path
    file = SourceFile(path, full.read_bytes() if full.is_file() else b"")
    if file.sha256 != sha256:
        fact = file.sha256 if full.is_file() else "no such file"
        raise CorpusMismatchError(
            f"{path} ({full}) must have sha256 {sha256}; got {fact}. "
            f"Run with the standard library of Python {python}, its tests included, or choose the "
            f"files anew with --write-manifest."
        )
    return file


def load(root: Path | None = None, manifest: Path = MANIFEST) -> Corpus:
    """Read the manifest's files.

    Raises:
        CorpusMismatchError: a file is missing or differs; the first one is named.
    """
    content = read_manifest(manifest)
    root = root or stdlib_root()
    train, held_out = (
        [_verified(root, path, sha256, content["python"]) for path, sha256 in content[part].items()]
        for part in ("train", "held_out")
    )
    return Corpus(train, held_out)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` entries; entry 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def compressed_bits_per_byte(files: Iterable[SourceFile]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` over the files as one stream."""
    stream = b"".join(file.data for file in files)
    sizes = {
        "gzip -9": len(gzip.compress(stream, 9)),
        "xz -9": len(lzma.compress(stream, preset=9)),
    }
    return {name: 8 * size / len(stream) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--write-manifest", action="store_true", help=f"choose the files anew, into {MANIFEST.name}"
    )
    if parser.parse_args().write_manifest:
        write_manifest(select(stdlib_root()))
    try:
        corpus = load()
    except CorpusMismatchError as error:
        raise SystemExit(str(error)) from None
    for name, files in (("train", corpus.train), ("held out", corpus.held_out)):
        print(f"{name}: {len(files)} files, {sum(len(file.data) for file in files)} bytes")
    for name, bits in compressed_bits_per_byte(corpus.held_out).items():
        print(f"{name}: {bits:.3f} bits/byte")


if __name__ == "__main__":
    main()
