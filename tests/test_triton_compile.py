"""Every kernel that is shipped compiles for GPUs that are not there, and fits them.

Compiled in a process of its own: this one's kernels belong to Triton's interpreter.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gpu_device import triton
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
TABLE_OF = "3.7.1"
"""The version of Triton that the table in the documentation is of."""

MAX_SPILLED = 0 if Version(triton.__version__) < Version("3.9") else 32
"""Bytes of a router's kernel: 3.9, which torch does not bring yet, spills 16 of one."""

MODELS = "qwen3-30b-a3b,gpt-oss-120b,odd"
"""Those of the table: rows by descriptor, transposed ones, and sizes that no step divides."""

ALL_MODELS = MODELS + ",slim,ungated,normed"
ROUTING = "routing"

CASES = [
    (90, MODELS, "bfloat16"),
    pytest.param(80, "qwen3-30b-a3b", "bfloat16", marks=pytest.mark.slow),
    pytest.param(100, "gpt-oss-120b", "bfloat16", marks=pytest.mark.slow),
    *(
        pytest.param(capability, ALL_MODELS, dtype, marks=pytest.mark.slow)
        for capability in (80, 89, 90, 100)
        for dtype in ("bfloat16", "float16")
    ),
]


PACKED = (
    "qwen3-30b-a3b/int4-g128,gpt-oss-120b/mxfp4,qwen3-30b-a3b/fp8-block x fp8,"
    "qwen3-30b-a3b/int8 x int8"
)
"""Those of the table: codes of integers and of small floats that become 16 bits, bytes that are
multiplied in groups and as they are."""


def case_of(case: Any) -> tuple[Any, ...]:
    """A case's values, marked or not."""
    values: tuple[Any, ...] = getattr(case, "values", case)
    return values


PACKED_CASES = [
    (90, PACKED, "bfloat16", "0,32"),
    pytest.param(100, "gpt-oss-120b/mxfp4", "bfloat16", "128", marks=pytest.mark.slow),
    *(
        pytest.param(capability, "all-packed", dtype, "", marks=pytest.mark.slow)
        for capability, dtype in (
            (90, "bfloat16"),
            (90, "float16"),
            (80, "bfloat16"),
            (89, "bfloat16"),
            (100, "bfloat16"),
        )
    ),
]

TENSOR_COLUMNS = 512
"""Of the memory that Blackwell's products have of their own."""

MAX_PER_WEIGHT = {
    **dict.fromkeys(("int4-g128", "int4-g32", "int4-g128-zeros", "int4-channel"), 4.3),
    **{"mxfp4": 4.3, "nvfp4": 5.5},
    **dict.fromkeys(("int8", "fp8", "fp8-block"), 5.0),
    **dict.fromkeys(("int8 x int8", "fp8 x fp8", "fp8-block x fp8"), 2.2),
}
"""Instructions of a lane for a weight, in small tiles on a Hopper.

While an H200's processor reads a weight of 4 bits with its scale it issues 3.7 for each, and for
one of 8 bits 6.9 (4.3 TB/s, 132 processors, 1.755 GHz, 4 times 32 lanes): with so many, reading is
what takes the time, or nearly."""

MAX_IN_GROUPS = 4.0
"""The same where sums of 64 rows are scaled for every 128 columns."""


HOPPER = 90
MAX_SPILLED_ELSEWHERE = 1400
"""Bytes of a thread: the up projection of fp8 blocks wants more registers on other GPUs."""


@cache
def compiled(
    capability: int, models: str, dtype: str = "bfloat16", tiles: str = ""
) -> list[dict[str, Any]]:
    """What the script says."""
    script = ROOT / "scripts" / "kernel_resources.py"
    command = [sys.executable, str(script), str(capability), "--models", models, "--dtype", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--tiles", tiles],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability, models, dtype", CASES)
def test_kernels_compile_without_spills_and_fit(capability: int, models: str, dtype: str) -> None:
    rows = compiled(capability, models, dtype)
    assert {row["model"] for row in rows} >= set(models.split(","))
    kernels = {"gate_up", "down", "combine", "direct_gate_up", "direct_down"}
    assert {row["kernel"] for row in rows} >= kernels
    assert {row["tile_rows"] for row in rows} >= {1, 16, 32, 64, 128}
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        if row["estimated_bytes"] is not None:
            assert row["shared_bytes"] <= row["estimated_bytes"], row


@pytest.mark.parametrize("capability, models, dtype, tiles", PACKED_CASES)
def test_quantized_kernels_compile_without_spills_and_fit(
    capability: int, models: str, dtype: str, tiles: str
) -> None:
    rows = compiled(capability, models, dtype, tiles)
    assert {row["kernel"] for row in rows} >= {"packed_gate_up", "packed_down"}
    if models == "all-packed" or PACKED in models:
        assert "round_rows" in {row["kernel"] for row in rows}
        assert capability == 80 or "round_groups" in {row["kernel"] for row in rows}
    for row in rows:
        most = 0 if capability == HOPPER else MAX_SPILLED_ELSEWHERE
        assert row["spilled_bytes"] <= most, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["tensor_columns"] <= TENSOR_COLUMNS, row
        if row["estimated_bytes"] is not None:
            assert row["shared_bytes"] <= row["estimated_bytes"], row


@pytest.mark.parametrize("capability, models, dtype, tiles", PACKED_CASES)
def test_quantized_products_use_the_widest_instructions(
    capability: int, models: str, dtype: str, tiles: str
) -> None:
    for row in compiled(capability, models, dtype, tiles):
        if not row["kernel"].startswith("packed"):
            continue
        codes = row["weights"].partition(" x ")[2]
        # Four warps make a wide product; Triton has none of int8 for Blackwell.
        is_wide = capability == 90 or (capability == 100 and codes != "int8")
        is_wide = is_wide and row["num_warps"] >= 4
        kind = "wide products" if is_wide else "narrow products"
        kind += f" of {codes}" if codes else ""
        assert row["instructions"][kind] > 0, row
        assert row["instructions"]["asynchronous copies"] > 0, row


@pytest.mark.parametrize(
    "capability, models, dtype, tiles", [case for case in PACKED_CASES if case_of(case)[0] == 90]
)
def test_quantized_weights_take_few_instructions(
    capability: int, models: str, dtype: str, tiles: str
) -> None:
    """Of the products of small tiles, in sizes that steps divide."""
    rows = [
        row
        for row in compiled(capability, models, dtype, tiles)
        if row["tile_rows"] in (16, 32, 64) and row["model"] != "odd"
    ]
    assert rows
    for row in rows:
        most = MAX_PER_WEIGHT.get(row["weights"])
        if row["weights"] == "fp8-block x fp8" and row["tile_rows"] == 64:
            most = MAX_IN_GROUPS
        if most is not None:
            assert 0 < row["lane_instructions"] <= most, row


ROUTERS = [
    pytest.param(90, ROUTING, marks=pytest.mark.slow),
    *(pytest.param(cap, "all-routing", marks=pytest.mark.slow) for cap in (80, 90, 100)),
]


@pytest.mark.parametrize("capability, models", ROUTERS)
def test_routers_compile_without_spills(capability: int, models: str) -> None:
    rows = compiled(capability, models, "bfloat16")
    assert {row["kernel"] for row in rows} == {
        "route_blocks", "route_and_place", "_place", "_count", "_scan", "_scatter"
    }  # fmt: skip
    for row in rows:
        assert row["spilled_bytes"] <= MAX_SPILLED, row
        # A program's threads share 65536 registers, and it wants no leave for shared memory.
        assert row["registers"] * 32 * row["num_warps"] <= 65536, row
        assert row["shared_bytes"] <= 48 * 1024, row


@pytest.mark.parametrize("capability, models, dtype", CASES)
def test_products_use_the_widest_instructions(capability: int, models: str, dtype: str) -> None:
    rows = compiled(capability, models, dtype)
    products = [row for row in rows if row["kernel"] in ("gate_up", "down")]
    assert products
    kind = "wide products" if capability in (90, 100) else "narrow products"
    for row in products:
        assert row["instructions"][kind] > 0, row
        assert row["instructions"]["asynchronous copies"] > 0, row
        if row["read"] in ("rows", "columns"):
            assert row["instructions"]["tiles copied by descriptor"] > 0, row


def test_nan_is_no_maximum_of_anything() -> None:
    """The interpreter's maximum keeps NaN; a GPU's does where it is told to."""
    from mixtura.kernels.triton import steps

    source = inspect.getsource(steps).partition("def apply_function(")[2]
    asked = len(re.findall(r"tl\.(?:maximum|minimum)\(", source))
    assert asked == source.count("propagate_nan=tl.PropagateNan.ALL") > 0


def test_unsorted_slots_have_loads_in_flight() -> None:
    """Triton runs loads ahead in a loop without products only where it is told to."""
    rows = compiled(90, MODELS, "bfloat16")
    direct = [row for row in rows if row["kernel"].startswith("direct")]
    assert direct
    assert all(row["instructions"]["asynchronous copies"] > 0 for row in direct)


@pytest.mark.skipif(triton.__version__ != TABLE_OF, reason=f"the table is Triton {TABLE_OF}'s")
def test_the_table_in_the_documentation_is_what_the_compiler_says() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from kernel_resources import BEGIN, END, table

    rows = [*compiled(90, MODELS, "bfloat16"), *compiled(90, ROUTING, "bfloat16")]
    assert between(BEGIN, END) == table(rows), RENEW


RENEW = "run python scripts/kernel_resources.py --write"


def between(begin: str, end: str) -> str:
    """A part of the documentation."""
    return DOCUMENT.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


@pytest.mark.skipif(triton.__version__ != TABLE_OF, reason=f"the table is Triton {TABLE_OF}'s")
@pytest.mark.parametrize("tiles", ["0,32", pytest.param("", marks=pytest.mark.slow)])
def test_the_table_of_quantized_kernels_is_what_the_compiler_says(tiles: str) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from kernel_resources import BEGIN_PACKED, END_PACKED, PACKED_TABLE, packed_line, packed_table

    assert ",".join(PACKED_TABLE) == PACKED
    rows = compiled(90, PACKED, "bfloat16", tiles)
    found = between(BEGIN_PACKED, END_PACKED)
    assert {packed_line(row) for row in rows} <= set(found.splitlines()), RENEW
    if not tiles:
        assert found == packed_table(rows), RENEW
