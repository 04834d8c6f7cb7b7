"""Compile the Triton kernels for GPUs that are not there, and say what they take.

Prints a line of JSON for each kernel; `--write` renews the tables of docs/gpu.md. Needs Triton and
no GPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from mixtura.kernels.triton.offline import compile_launch  # noqa: E402
from mixtura.kernels.triton.sass import lane_instructions  # noqa: E402
from mixtura.kernels.triton.shipped import DEVICES, MODELS, Shipped, shipped  # noqa: E402
from mixtura.kernels.triton.shipped_packed import (  # noqa: E402
    SHIPPED,
    is_possible,
    shipped_packed,
)
from mixtura.kernels.triton.shipped_routing import routing_launches  # noqa: E402

DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: scripts/kernel_resources.py -->\n", "<!-- end of kernels -->"
BEGIN_PACKED = "<!-- quantized kernels: scripts/kernel_resources.py -->\n"
END_PACKED = "<!-- end of quantized kernels -->"
CAPABILITY = 90
"""Of the table."""

TABLE = ("qwen3-30b-a3b", "gpt-oss-120b", "odd")
"""Models of the table."""

PACKED_TABLE = (
    "qwen3-30b-a3b/int4-g128",
    "gpt-oss-120b/mxfp4",
    "qwen3-30b-a3b/fp8-block x fp8",
    "qwen3-30b-a3b/int8 x int8",
)
"""The same of quantized kernels, with what their weights and rows are."""

INSTRUCTIONS = {
    "wide products": r"\b(HGMMA|UTCHMMA)\b",
    "narrow products": r"\bHMMA\b",
    "wide products of fp8": r"\b(QGMMA|UTCQMMA)\b",
    "narrow products of fp8": r"\bQMMA\b",
    "wide products of int8": r"\b(IGMMA|UTCIMMA)\b",
    "narrow products of int8": r"\bIMMA\b",
    "tiles copied by descriptor": r"\bUTMALDG\b",
    "asynchronous copies": r"\bLDGSTS\b",
}
"""What is counted in the machine code: products of warp groups that read shared memory, of warps
that read registers, and the two kinds of copy."""


READ = {"rows": "by descriptor", "columns": "by descriptor, transposed", "pointer": "by pointer"}


ROUTING, ALL_ROUTING = "routing", "all-routing"
"""Stand beside models for the kernels of routers, some and all."""

ALL_PACKED = "all-packed"
"""Stands beside models for all quantized kernels that the GPU has products for."""


def launches(capability: int, models: tuple[str, ...], dtype: torch.dtype) -> Iterator[Shipped]:
    """What models, or routers, launch."""
    yield from shipped(capability, tuple(name for name in models if name in MODELS), dtype)
    for model, name in SHIPPED:
        is_asked = f"{model}/{name}" in models
        if is_asked or (ALL_PACKED in models and is_possible(name, capability)):
            yield from shipped_packed(capability, model, name, dtype)
    if ROUTING in models or ALL_ROUTING in models:
        for name, launch in routing_launches(is_full=ALL_ROUTING in models):
            yield Shipped(name, 0, None, launch)


def resources(
    capability: int, models: tuple[str, ...], dtype: torch.dtype, tiles: Sequence[int] = ()
) -> Iterator[dict[str, Any]]:
    """What every kernel takes that these models launch, on all tiles or on some."""
    for found in launches(capability, models, dtype):
        if tiles and found.tile_rows not in tiles:
            continue
        constants = found.launch.constants
        taken = compile_launch(found.launch, capability)
        sass = taken.sass
        yield {
            "capability": capability,
            "model": found.model,
            "weights": found.weights,
            "kernel": found.kernel,
            "tile_rows": found.tile_rows,
            "block": found.block,
            "num_warps": constants["num_warps"],
            "num_stages": constants.get("num_stages", 0),
            "read": constants.get("READ"),
            "registers": taken.registers,
            "spilled_bytes": taken.spilled_bytes,
            "shared_bytes": taken.shared_bytes,
            "tensor_columns": taken.tensor_columns,
            "estimated_bytes": found.estimated_bytes,
            "lane_instructions": per_weight(found, sass),
            "shared_limit": DEVICES[capability].shared_bytes,
            "instructions": {
                name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()
            },
        }


def per_weight(found: Shipped, sass: str) -> float | None:
    """Instructions of a lane for a quantized weight; None where they cannot be told."""
    if found.step is None:
        return None
    count = lane_instructions(sass, found.step, found.launch.constants["num_warps"])
    return None if count is None else round(count, 2)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| kernel | for | rows of a tile | block | warps | stages | weights read | registers | "
        "shared KiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["kernel"],
            row["model"],
            row["tile_rows"] or "-",
            row["block"] or "-",
            row["num_warps"],
            row["num_stages"] or "-",
            READ.get(row["read"], "-"),
            row["registers"],
            f"{row['shared_bytes'] / 1024:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def packed_line(row: dict[str, Any]) -> str:
    """A quantized kernel's line of the table."""
    count = row["lane_instructions"]
    cells = (
        row["kernel"],
        row["model"],
        row["weights"],
        row["tile_rows"] or "-",
        row["block"] or "-",
        row["num_warps"],
        row["num_stages"] or "-",
        row["registers"],
        f"{row['shared_bytes'] / 1024:.0f}",
        "-" if count is None else f"{count:.1f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def packed_table(rows: list[dict[str, Any]]) -> str:
    """The rows of quantized kernels in Markdown."""
    lines = [
        "| kernel | for | weights x rows | rows of a tile | block | warps | stages | registers | "
        "shared KiB | instructions per weight |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(packed_line, rows),
    ]
    return "\n".join(lines) + "\n"


def written(text: str, begin: str, end: str, table: str) -> str:
    """A document with another table between two marks."""
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return head + begin + table + end + tail


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, nargs="?", default=CAPABILITY, choices=DEVICES)
    parser.add_argument(
        "--models",
        default=",".join((*TABLE, *PACKED_TABLE, ROUTING)),
        help=f"with commas; MODEL/FORMAT: quantized, {ALL_PACKED}: all of these, {ROUTING}: of "
        f"routers",
    )
    parser.add_argument("--tiles", default="", help="rows of a tile, with commas; all unless given")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--write", action="store_true", help="renew the tables of docs/gpu.md")
    given = parser.parse_args()
    rows = []
    models = tuple(given.models.split(","))
    tiles = [int(rows) for rows in given.tiles.split(",") if rows]
    for row in resources(given.capability, models, getattr(torch, given.dtype), tiles):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if given.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        dense = table([row for row in rows if row["weights"] is None])
        packed = packed_table([row for row in rows if row["weights"] is not None])
        text = written(text, BEGIN, END, dense)
        text = written(text, BEGIN_PACKED, END_PACKED, packed)
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
