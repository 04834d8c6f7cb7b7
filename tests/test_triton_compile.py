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
    (80, "qwen3-30b-a3b", "bfloat16"),
    (100, "gpt-oss-120b", "bfloat16"),
    *(
        pytest.param(capability, ALL_MODELS, dtype, marks=pytest.mark.slow)
        for capability in (80, 89, 90, 100)
        for dtype in ("bfloat16", "float16")
    ),
]


@cache
def compiled(capability: int, models: str, dtype: str) -> list[dict[str, Any]]:
    """What the script says."""
    script = ROOT / "scripts" / "kernel_resources.py"
    command = [sys.executable, str(script), str(capability), "--models", models, "--dtype", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=600
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


ROUTERS = [
    (90, ROUTING),
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
    text = DOCUMENT.read_text(encoding="utf-8")
    found = text.partition(BEGIN)[2].partition(END)[0]
    assert found == table(rows), "run python scripts/kernel_resources.py --write"
