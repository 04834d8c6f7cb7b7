"""GGUF files: what is read, that nothing is read too early, and that any bytes at all are safe."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.errors import CheckpointError
from mixtura.quant import gguf_file
from mixtura.quant.ggml_types import GgmlType
from mixtura.quant.gguf_file import GgufFile, open_gguf, parse_gguf

KEYS: dict[str, Any] = {
    "count": 7,
    "rate": 0.5,
    "flag": True,
    "word": "naïve",
    "words": ["a", "", "世界"],
    "numbers": [1, 2, 3],
    ":general.alignment": 64,
}
TENSORS = {
    "blk.0.ffn_gate_exps.weight": torch.arange(2 * 3 * 64.0).reshape(2, 3, 64) / 10,
    "blk.0.attn_norm.weight": torch.arange(5.0),
    "blk.0.attn_q.weight": torch.randn(4, 32, generator=torch.Generator().manual_seed(0)),
}
KINDS = {"blk.0.ffn_gate_exps.weight": Kind.Q4_0, "blk.0.attn_q.weight": Kind.BF16}


def kind_of(name: str) -> Kind:
    return KINDS.get(name, Kind.F32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, "olmoe", KEYS, TENSORS, kind_of)


def test_metadata_is_plain(path: Path) -> None:
    metadata = dict(open_gguf(path).metadata)
    assert metadata == {
        "general.architecture": "olmoe",
        "olmoe.count": 7,
        "olmoe.rate": 0.5,
        "olmoe.flag": True,
        "olmoe.word": "naïve",
        "olmoe.words": ["a", "", "世界"],
        "olmoe.numbers": [1, 2, 3],
        "general.alignment": 64,
    }


def test_every_kind_of_number(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "olmoe")
    values = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1}
    values |= {"int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63)}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float64("float64", 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m.gguf")
    assert {key: file.metadata[key] for key in values} == values
    assert file.metadata["float64"] == 0.1
    assert file.tensors == {}


def test_tensors_are_what_the_gguf_package_reads(path: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = open_gguf(path).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.name == name
        assert tensor.type.number == theirs[name].tensor_type.value
        assert tensor.shape == tuple(TENSORS[name].shape)
        assert tensor.data.dtype is torch.uint8
        raw = torch.from_numpy(theirs[name].data.view("uint8").copy())
        assert torch.equal(tensor.data, raw.flatten())
    assert ours["blk.0.ffn_gate_exps.weight"].blocks.shape == (2, 3, 36)
    assert ours["blk.0.attn_norm.weight"].blocks.shape == (20,)


def test_types_are_those_of_the_gguf_package() -> None:
    for type in GgmlType:
        if type is GgmlType.Q2_0:  # newer than the package
            continue
        kind = Kind[type.name]
        assert (type.number, gguf.GGML_QUANT_SIZES[kind]) == (
            kind.value,
            (type.block_columns, type.block_bytes),
        )


def test_tensors_are_views_of_one_mapping(path: Path) -> None:
    tensors = open_gguf(path).tensors
    storages = {tensor.data.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == 1
    starts = [tensor.data.storage_offset() for tensor in tensors.values()]
    assert all(start % 64 == 0 for start in starts)


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """A file of 8 GB, all of it a hole: it opens in no time and takes no memory."""
    num_bytes = 8 * 2**30
    header = tensor_file([("w", (num_bytes // 4,), 0, 0)])
    big = tmp_path / "big.gguf"
    with big.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + num_bytes)
    start = time.perf_counter()
    tensor = open_gguf(big).tensors["w"]
    assert time.perf_counter() - start < 2
    assert tensor.data.numel() == num_bytes
    assert tensor.data[-1] == 0


# --- split models --------------------------------------------------------------------------------


def write_parts(directory: Path, count: int = 2, **changed: Any) -> Path:
    paths = [directory / f"m-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        keys = {":split.no": number, ":split.count": count, ":split.tensors.count": count}
        keys |= {k: v for k, v in changed.items() if k.startswith(":")}
        name = changed.get("name", f"w{number}")
        write_gguf(path, "olmoe", keys, {name: torch.full((2, 32), float(number))})
    return paths[0]


def test_the_first_part_opens_all(tmp_path: Path) -> None:
    file = open_gguf(write_parts(tmp_path, 3))
    assert list(file.tensors) == ["w0", "w1", "w2"]
    assert [path.name for path in file.paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert file.tensors["w2"].data.view(torch.float32)[0] == 2


def test_a_part_is_missing(tmp_path: Path) -> None:
    first = write_parts(tmp_path, 3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="all 3 parts of the model; got no m-00002-of-00003"):
        open_gguf(first)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({":split.no": 0}, r"split.no \(0\) in .* must be 1"),
        ({":split.count": 5}, "the file's name .* must be named NAME-00001-of-00005.gguf"),
        ({":split.count": "x"}, "must be split"),
        ({":split.tensors.count": 3}, r"split.tensors.count \(3\) in .* must be 2"),
        ({"name": "w"}, r"the tensor|tensor \('w'\) in .* must be in one part only"),
    ],
)
def test_parts_that_contradict_each_other(
    tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_gguf(write_parts(tmp_path, **changed))


def test_another_part_is_opened(tmp_path: Path) -> None:
    write_parts(tmp_path)
    with pytest.raises(CheckpointError, match=r"Open m-00001-of-00002\.gguf"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")


# --- broken files --------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = string(name.encode()) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def tensor_file(infos: list[tuple[str, tuple[int, ...], int, int]], data: int = 0) -> bytes:
    found = header(len(infos)) + b"".join(info(*each) for each in infos)
    return found + bytes(-len(found) % 32 + data)


def key_file(key: bytes, kind: int, value: bytes) -> bytes:
    return header(0, 1) + string(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + values


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be a readable GGUF file"),
    "short magic": (b"GG", "the first four bytes .* must be GGUF"),
    "magic": (b"GGML" + bytes(20), "the first four bytes .* must be GGUF"),
    "nothing but magic": (b"GGUF", "is truncated at byte 4"),
    "version 1": (header(version=1), r"the version \(1\) .* must be 2 or 3; got"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "must be 2 or 3, little endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "is truncated"),
    "too many keys": (header(0, 2**63), "is truncated at byte 24"),
    "too many tensors": (header(2**64 - 1), "is truncated at byte 24"),
    "long key": (header(0, 1) + struct.pack("<Q", 2**64 - 1), "is truncated at byte 32"),
    "key not utf-8": (key_file(b"\xff", 4, bytes(4)), "a key .* must be UTF-8"),
    "key twice": (
        header(0, 2) + 2 * (string(b"a") + struct.pack("<II", 4, 1)),
        r"the key \('a'\) .* must be there once",
    ),
    "value kind": (key_file(b"a", 13, bytes(8)), r"the type of a \(13\)"),
    "value cut": (key_file(b"a", 10, bytes(7)), "is truncated"),
    "text not utf-8": (key_file(b"a", 8, string(b"\xc3")), "a .* must be UTF-8"),
    "array kind": (key_file(b"a", 9, array(9, 1)), r"the type of items of a \(9\)"),
    "long array": (key_file(b"a", 9, array(0, 2**62)), "is truncated"),
    "very long array": (key_file(b"a", 9, array(12, 2**64 - 1)), "is truncated"),
    "long array of texts": (key_file(b"a", 9, array(8, 2**62, string(b"x"))), "is truncated"),
    "alignment 0": (
        key_file(b"general.alignment", 4, struct.pack("<I", 0)),
        r"general.alignment \(0\) .* must be a power of two",
    ),
    "alignment 48": (
        key_file(b"general.alignment", 4, struct.pack("<I", 48)),
        r"general.alignment \(48\)",
    ),
    "alignment text": (key_file(b"general.alignment", 8, string(b"x")), "general.alignment"),
    "alignment list": (key_file(b"general.alignment", 9, array(4, 0)), "general.alignment"),
    "alignment true": (key_file(b"general.alignment", 7, b"\1"), "general.alignment"),
    "type": (tensor_file([("w", (32,), 31, 0)], 999), r"the ggml type of w \(31\)"),
    "type of a fork": (tensor_file([("w", (32,), 139, 0)], 999), r"w \(139\) .* must be one of 0"),
    "no dims": (tensor_file([("w", (), 0, 0)], 999), r"the number of dims of w \(0\)"),
    "five dims": (tensor_file([("w", (1,) * 5, 0, 0)], 999), r"the number of dims of w \(5\)"),
    "many dims": (
        header(1) + string(b"w") + struct.pack("<I", 2**32 - 1),
        "the number of dims of w",
    ),
    "a size of 0": (tensor_file([("w", (32, 0), 0, 0)], 999), "have positive sizes"),
    "half a block": (
        tensor_file([("w", (48, 2), 2, 0)], 999),
        r"the shape of w \(\(2, 48\)\) .* the last a multiple of 32 \(Q4_0\)",
    ),
    "overflow": (tensor_file([("w", (2**32, 2**32, 2**32), 0, 0)], 999), r"w \(316912650057"),
    "past the end": (tensor_file([("w", (32,), 0, 0)], 127), r"w \(128 bytes at 64\) must lie"),
    "far offset": (tensor_file([("w", (32,), 0, 2**64 - 32)], 128), "must lie within"),
    "odd offset": (tensor_file([("w", (8,), 0, 8)], 128), r"the offset of w \(8\)"),
    "twice": (tensor_file([("w", (8,), 0, 0), ("w", (8,), 0, 32)], 64), "must be there once"),
    "overlap": (
        tensor_file([("a", (16,), 0, 0), ("b", (8,), 0, 32)], 128),
        r"the tensor \('b'\) .* must lie outside a",
    ),
    "name not utf-8": (header(1) + string(b"\xff") + bytes(99), "a tensor's name .* must be UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    data, match = BROKEN[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        open_gguf(tmp_path / "m.gguf")


def test_whole_files_of_the_same_making(tmp_path: Path) -> None:
    """The helpers above write files that open where nothing is wrong with them."""
    infos = [("a", (8,), 0, 0), ("b", (32, 2), 2, 32)]
    (tmp_path / "m.gguf").write_bytes(tensor_file(infos, 32 + 36))
    file = open_gguf(tmp_path / "m.gguf")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        "a": (8,),
        "b": (2, 32),
    }
    (tmp_path / "m.gguf").write_bytes(key_file(b"a", 9, array(8, 2, 2 * string(b"x"))))
    assert open_gguf(tmp_path / "m.gguf").metadata == {"a": ["x", "x"]}
    (tmp_path / "m.gguf").write_bytes(header(version=2))
    assert open_gguf(tmp_path / "m.gguf").metadata == {}


@pytest.mark.parametrize("name", ["nothing.gguf", ".", "a\0b"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="must be a readable GGUF file"):
        open_gguf(tmp_path / name)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_gguf(tmp_path / "pipe")


def test_a_header_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 1000)
    (tmp_path / "m.gguf").write_bytes(key_file(b"a", 9, array(0, 2000, bytes(2000))))
    with pytest.raises(CheckpointError, match="a header above 64 MiB"):
        open_gguf(tmp_path / "m.gguf")


# --- fuzz ----------------------------------------------------------------------------------------


def opens_or_fails(data: bytes) -> GgufFile | None:
    """Open these bytes; whatever is in them, the end is a file whose tensors can be read, or one
    kind of error."""
    try:
        file = parse_gguf(Path("m.gguf"), data)
    except CheckpointError as error:
        assert str(error).endswith((".", ")")) and "; got" in str(error)
        return None
    for tensor in file.tensors.values():
        assert tensor.blocks.numel() == tensor.data.numel()
        assert int(tensor.data[-1]) >= 0
    return file


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Cut a file, or change one to four places by a bit, a byte or a number of eight bytes."""
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(changed), 700))
        kind = draw.randrange(3)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at] = draw.randrange(256)
        else:
            number = draw.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, draw.getrandbits(64)])
            changed[at : at + 8] = struct.pack("<Q", number)
    return bytes(changed)


def fuzz(data: bytes, count: int, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    found = {"opened": 0, "failed": 0}
    for _ in range(count):
        opened = opens_or_fails(mutate(data, draw))
        found["failed" if opened is None else "opened"] += 1
    return found


def test_changed_files_open_or_fail(path: Path) -> None:
    found = fuzz(path.read_bytes(), 10_000, seed=0)
    assert min(found.values()) > 500


def test_every_truncation(path: Path) -> None:
    data = path.read_bytes()
    used = max(t.data.storage_offset() + t.data.numel() for t in open_gguf(path).tensors.values())
    for length in range(used):
        assert opens_or_fails(data[:length]) is None, length
    assert opens_or_fails(data[:used]) is not None


def test_changed_files_on_a_disk(tmp_path: Path, path: Path) -> None:
    draw = random.Random(2)
    data = path.read_bytes()
    for _ in range(50):
        changed = mutate(data, draw)
        (tmp_path / "m.gguf").write_bytes(changed)
        try:
            opened: GgufFile | None = open_gguf(tmp_path / "m.gguf")
        except CheckpointError:
            opened = None
        in_memory = opens_or_fails(changed)
        assert (opened is None) is (in_memory is None)


@settings(max_examples=200, deadline=None)
@given(rest=st.binary(max_size=200), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_any_bytes_open_or_fail(rest: bytes, counts: tuple[int, int]) -> None:
    opens_or_fails(rest)
    opens_or_fails(header(*counts) + rest)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: key_file(b"a", 9, array(7, n, bytes(n))),
        lambda n: key_file(b"a", 9, array(10, n // 8, bytes(range(1, 9)) * (n // 8))),
        lambda n: key_file(b"a", 9, array(8, n // 8, bytes(n))),
        lambda n: key_file(b"a", 9, array(8, n // 9, string(b"\x7f") * (n // 9))),
        lambda n: key_file(b"a", 9, array(0, 2**40, bytes(n))),
        lambda n: header(2**40) + bytes(n),
    ],
)
def test_memory_is_bounded_by_the_file(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    data = make(100_000)
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        open_gguf(tmp_path / "m.gguf")
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000 + 16 * len(data)
