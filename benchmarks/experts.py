"""Time the experts of one layer: our kernels, Transformers' implementations, the machine's limits.

python benchmarks/experts.py --shape olmoe --shape qwen3-30b-a3b --tokens 1,16,256 --dtype bfloat16

The table goes to standard error; one JSON line for the machine and one per result to --json, else
to standard output. The exit status is 1 where a contender's result is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from mixtura.bench.cases import SHAPES, Case, find_shape
from mixtura.bench.contenders import TRANSFORMERS, find_contenders
from mixtura.bench.experts import machine_json, run_case
from mixtura.bench.machine import probe_machine
from mixtura.bench.report import machine_summary, results_table

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(
    shape: Annotated[list[str], typer.Option(help=f"One of {', '.join(SHAPES)}; repeatable.")],
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas.")] = "1,16,256",
    dtype: Annotated[list[str], typer.Option(help=f"One of {', '.join(DTYPES)}.")] = ["bfloat16"],  # noqa: B006
    contender: Annotated[
        list[str], typer.Option(help="A kernel, or an implementation of Transformers.")
    ] = ["torch", *TRANSFORMERS],  # noqa: B006
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; all cores if not given.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each case.")] = 20.0,
    json: Annotated[Path | None, typer.Option(help="Write JSON lines here.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True, width=200)
    dtypes = tuple(DTYPES[name] for name in dtype)
    contenders = find_contenders(contender)
    cases = [
        Case(shape=find_shape(name), num_tokens=int(count), dtype=kind)
        for name in shape
        for kind in dtypes
        for count in tokens.split(",")
    ]
    machine = probe_machine(dtypes)
    console.print(machine_summary(machine))
    stream = json.open("w") if json is not None else sys.stdout
    results = []
    try:
        print(machine_json(machine), file=stream, flush=True)
        for case in cases:
            for result in run_case(case, contenders, machine, seconds=seconds):
                results.append(result)
                print(result.to_json(), file=stream, flush=True)
    finally:
        if json is not None:
            stream.close()
    console.print(results_table(results))
    if any(result.is_correct is False for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
