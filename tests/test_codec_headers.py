"""Headers that nobody has written: a codec reads a matrix of the right shape, or names the fault.

Every golden file's headers are changed at random. What is accepted must be what the format itself
says of the shape, so that decoding never meets a part of another dtype or shape.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import read_headers
from mixtura.hf.stored import STORED_DTYPES
from mixtura.quant.codecs import Header, codec_for
from mixtura.quant.codecs.decoding import parts_of

GOLDEN = Path(__file__).parent / "golden" / "quant"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())["files"]
NAMES = [
    name
    for name, entry in INDEX.items()
    if "expected" in entry["tensors"] and "quant_method" in entry["quantization_config"]
]
"""GGUF files have headers of their own: `test_gguf_file.py`."""

PARTS = (
    "weight",
    "scales",
    "qzeros",
    "weight_scale",
    "weight_scale_2",
    "g_idx",
    "absmax",
    "blocks",
)
SIZES = st.one_of(st.integers(0, 4), st.sampled_from([8, 16, 31, 64, 2**31, 2**62]))
HEADERS = st.builds(
    Header,
    st.sampled_from(list(STORED_DTYPES.values())),
    st.lists(SIZES, max_size=5).map(tuple),
)


@cache
def headers_of(name: str) -> tuple[str, dict[str, Header]]:
    """A golden matrix's dense name and headers."""
    entry = INDEX[name]
    tensors = load_file(GOLDEN / entry["file"])
    given = {part: value for part, value in tensors.items() if not part.startswith("expected")}
    matrix, parts = parts_of(codec_for(entry["quantization_config"]), given)
    return matrix, {part: Header.of(value) for part, value in parts.items()}


@st.composite
def changed(draw: st.DrawFn, headers: dict[str, Header]) -> dict[str, Header]:
    """Headers with one to three changes: a part gone, another one, a dtype, or a size."""
    found = dict(headers)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["drop", "put", "dtype", "size"]))
        if kind == "put" or not found:
            found[draw(st.sampled_from([*headers, *PARTS]))] = draw(HEADERS)
            continue
        part = draw(st.sampled_from(sorted(found)))
        dtype, shape = found[part].dtype, list(found[part].shape)
        if kind == "drop":
            del found[part]
        elif kind == "dtype":
            found[part] = Header(draw(st.sampled_from(list(STORED_DTYPES.values()))), tuple(shape))
        elif shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
            found[part] = Header(dtype, tuple(shape))
    return found


@pytest.mark.filterwarnings("ignore:qzeros")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_headers_fit_or_are_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    matrix, sound = headers_of(name)
    codec = codec_for(INDEX[name]["quantization_config"])
    headers = data.draw(changed(sound))
    shape = data.draw(st.sampled_from([None, tuple(INDEX[name]["tensors"]["expected"]["shape"])]))
    try:
        format = codec.format_of(matrix, headers)
        if format is None:
            assert headers.keys() == {"weight"}
            return
        found = format.check_headers(matrix, headers, shape)
    except CheckpointError as error:
        assert "; got " in str(error)
        return
    needed = format.parts(found)
    assert shape in (None, found)
    assert headers.keys() <= needed.keys()
    for part, header in headers.items():
        assert header.dtype in needed[part].dtypes
        assert header.shape in (needed[part].shape, *needed[part].other_shapes)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_changed_files_have_headers_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}, file)
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    file.write_bytes(content[:cut])
    try:
        headers = read_headers([file])
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    for header in headers.values():
        assert all(size >= 0 for size in header.shape)
