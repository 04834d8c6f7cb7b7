"""Compile the Triton kernels for GPUs that are not there, and say what they take.

Prints a line of JSON for each kernel; `--write` renews the table of docs/gpu.md. Needs Triton and
no GPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from mixtura.kernels.triton.offline import compile_launch  # noqa: E402
from mixtura.kernels.triton.shipped import DEVICES, MODELS, Shipped, shipped  # noqa: E402
from mixtura.kernels.triton.shipped_routing import routing_launches  # noqa: E402

DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: scripts/kernel_resources.py -->\n", "<!-- end of kernels -->"
CAPABILITY = 90
"""Of the table."""

TABLE = ("qwen3-30b-a3b", "gpt-oss-120b", "odd")
"""Models of the table."""

INSTRUCTIONS = {
    "wide products": r"\b(HGMMA|UTCHMMA)\b",
    "narrow products": r"\bHMMA\b",
    "tiles copied by descriptor": r"\bUTMALDG\b",
    "asynchronous copies": r"\bLDGSTS\b",
}
"""What is counted in the machine code: products of warp groups that read shared memory, of warps
that read registers, and the two kinds of copy."""


READ = {"rows": "by descriptor", "columns": "by descriptor, transposed", "pointer": "by pointer"}


ROUTING, ALL_ROUTING = "routing", "all-routing"
"""Stand beside models for the kernels of routers, some and all."""


def launches(capability: int, models: tuple[str, ...], dtype: torch.dtype) -> Iterator[Shipped]:
    """What models, or routers, launch."""
    yield from shipped(capability, tuple(name for name in models if name in MODELS), dtype)
    if ROUTING in models or ALL_ROUTING in models:
        for name, launch in routing_launches(is_full=ALL_ROUTING in models):
            yield Shipped(name, 0, None, launch)


def resources(
    capability: int, models: tuple[str, ...], dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """What every kernel takes that these models launch."""
    for found in launches(capability, models, dtype):
        constants = found.launch.constants
        taken = compile_launch(found.launch, capability)
        sass = taken.sass
        yield {
            "capability": capability,
            "model": found.model,
            "kernel": found.kernel,
            "tile_rows": found.tile_rows,
            "block": found.block,
            "num_warps": constants["num_warps"],
            "num_stages": constants.get("num_stages", 0),
            "read": constants.get("READ"),
            "registers": taken.registers,
            "spilled_bytes": taken.spilled_bytes,
            "shared_bytes": taken.shared_bytes,
            "estimated_bytes": found.estimated_bytes,
            "shared_limit": DEVICES[capability].shared_bytes,
            "instructions": {
                name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()
            },
        }


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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, nargs="?", default=CAPABILITY, choices=DEVICES)
    parser.add_argument(
        "--models", default=",".join((*TABLE, ROUTING)), help=f"with commas; {ROUTING}: of routers"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--write", action="store_true", help="renew the table of docs/gpu.md")
    given = parser.parse_args()
    rows = []
    models = tuple(given.models.split(","))
    for row in resources(given.capability, models, getattr(torch, given.dtype)):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if given.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        DOCUMENT.write_text(head + BEGIN + table(rows) + END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
