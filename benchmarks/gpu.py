"""Time layers on a GPU beside peers and the device's limits: `mixtura bench --device cuda`.

Runs from a source tree that is not installed, with torch, Triton and numpy alone; contenders that
need more are left out with that reason.

python benchmarks/gpu.py --shape qwen3-30b-a3b --tokens 1,512,8192 --out results.jsonl --minutes 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtura.bench.cases import SHAPES
from mixtura.bench.gpu.batches import Spread
from mixtura.bench.gpu.command import (
    DEFAULT_SECONDS,
    DEFAULT_SHAPE,
    DEFAULT_TOKENS,
    DEFAULT_WEIGHTS,
    GpuOptions,
    bench_gpu,
)
from mixtura.config import ActivationDtype
from mixtura.errors import MixturaError


def read_arguments(arguments: list[str]) -> GpuOptions:
    """The options of `mixtura bench --device cuda`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shape", action="append", metavar="NAME", help=f"repeatable: {', '.join(SHAPES)}")
    add("--weights", action="append", help="weight formats, with commas or repeatable")
    add("--activation-dtype", help=f"with quantized weights: {', '.join(ActivationDtype)}")
    add("--tokens", default=DEFAULT_TOKENS, help="numbers of tokens, with commas")
    add("--routing", default=Spread.UNIFORM.value, help=" or ".join(Spread))
    add("--contender", action="append", metavar="NAME", help="repeatable")
    add("--seconds", type=float, default=DEFAULT_SECONDS, help="for the timing of a case")
    add("--minutes", type=float, help="begin no case that would end later")
    add("--out", type=Path, help="the file of results; a run goes on with what is in it")
    add("--png", type=Path, help="draw the results here")
    add("--json", action="store_true", help="print a line of JSON for each result")
    found = parser.parse_args(arguments)
    return GpuOptions(
        shapes=found.shape or [DEFAULT_SHAPE],
        weights=",".join(found.weights or [DEFAULT_WEIGHTS]),
        activation_dtype=found.activation_dtype,
        tokens=found.tokens,
        routing=found.routing,
        contenders=found.contender or (),
        seconds=found.seconds,
        minutes=found.minutes,
        out=found.out,
        png=found.png,
        as_json=found.json,
    )


def main() -> int:
    try:
        return bench_gpu(read_arguments(sys.argv[1:]))
    except MixturaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
