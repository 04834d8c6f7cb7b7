"""`mixtura bench`: how near the machine's limits the experts of a layer, or a whole model, run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli.loading import quiet
from mixtura.cli.options import Debug, model_or_demo

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.bench.results import CaseResult

DEFAULT_SHAPE = "olmoe"
DEFAULT_WEIGHTS = "bf16,int8,int4,mxfp4"
DEFAULT_TOKENS = "1,4,16,64,256,1024"
DEFAULT_SECONDS = 5.0
DEFAULT_PROMPT, DEFAULT_NEW = 512, 64
WIDTH = 240
"""Columns of the table where it does not go to a terminal."""


class Subject(StrEnum):
    """What is measured."""

    EXPERTS = "experts"
    GENERATE = "generate"


class DeviceType(StrEnum):
    """Where it is measured."""

    CPU = "cpu"
    CUDA = "cuda"


def bench(
    subject: Annotated[
        Subject, typer.Argument(help="The experts of one layer, or text from a whole model.")
    ] = Subject.EXPERTS,
    device: Annotated[
        DeviceType | None,
        typer.Option(
            help="experts: cuda measures layers, from router logits on, in CUDA graphs. Default: "
            "cpu."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"experts: a layer's shape, repeatable. Default: {DEFAULT_SHAPE}; cuda: "
            "qwen3-30b-a3b."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight formats, with commas or repeatable; generate: one. Default: "
            f"{DEFAULT_WEIGHTS}; cuda: bf16; generate: as stored."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"experts: numbers of tokens. Default: {DEFAULT_TOKENS}; cuda: 1 to 16384."
        ),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="experts: a kernel, or a peer to compare with; repeatable. Default: the preferred "
            "kernel and the peers that are installed; cuda: every kernel for GPUs, and "
            "Transformers'."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0, help=f"experts: for each case. Default: {DEFAULT_SECONDS:g}; cuda: 4."
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="experts: draw the results here.")] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="cuda: how choices spread over experts, uniform or zipf. Default: uniform."
        ),
    ] = None,
    activation_dtype: Annotated[
        str | None,
        typer.Option(
            help="cuda: the arithmetic with quantized weights, int8, fp8 or bf16. Default: what "
            "the format means, fp8 of fp8 weights, else bf16."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="cuda: the file of results; a run goes on with what is in it."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="cuda: begin no case that would end later.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="generate: a directory or hub id. Default: the model in the box."),
    ] = None,
    linears: Annotated[
        str | None,
        typer.Option(help="generate: weight format of attention and head. Default: as stored."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"generate: default {DEFAULT_PROMPT}.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help=f"generate: default {DEFAULT_NEW}.")
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic", help="generate: with and without it in turns, and the slowdown."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch. Default: as torch decides.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(help="Another instruction set of the C++ kernels, as doctor names them."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a line of JSON for each result; tables go to stderr."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure experts, or a whole model, beside the machine's limits.

    Results are checked first. The floor is the longer of reading the weights at the rate that
    memory gives, and of the products at the arithmetic's peak, both measured in the same run.
    """
    for_experts = {
        "--shape": shape, "--tokens": tokens, "--contender": contender, "--seconds": seconds,
        "--png": png, "--device": device,
    }  # fmt: skip
    for_generate = {
        "--model": model, "--linears": linears, "--prompt-tokens": prompt_tokens,
        "--new-tokens": new_tokens, "--deterministic": deterministic,
    }  # fmt: skip
    for_cpu = {"--threads": threads, "--path": path}
    for_cuda = {
        "--routing": routing, "--out": out, "--minutes": minutes,
        "--activation-dtype": activation_dtype,
    }  # fmt: skip
    formats = ",".join(weights) if weights else None
    is_experts, is_cuda = subject is Subject.EXPERTS, device is DeviceType.CUDA
    other = Subject.GENERATE if is_experts else Subject.EXPERTS
    refuse(for_generate if is_experts else for_experts, f"mixtura bench {other}")
    refuse(for_cpu if is_cuda else for_cuda, f"--device {'cpu' if is_cuda else 'cuda'}")
    if is_cuda:
        asked = {
            "shapes": shape, "weights": formats, "tokens": tokens, "contenders": contender,
            "seconds": seconds, "png": png, "routing": routing, "out": out, "minutes": minutes,
            "activation_dtype": activation_dtype,
        }  # fmt: skip
        return bench_cuda(asked, as_json=as_json)
    with quiet(debug):
        import torch
    if threads is not None:
        torch.set_num_threads(threads)
    with on_path(path):
        if is_experts:
            bench_experts(
                shape or [DEFAULT_SHAPE],
                formats or DEFAULT_WEIGHTS,
                tokens or DEFAULT_TOKENS,
                contender,
                DEFAULT_SECONDS if seconds is None else seconds,
                png=png,
                as_json=as_json,
            )
        else:
            bench_generate(
                model_or_demo(model),
                {"weights": formats, "linears": linears},
                prompt_tokens or DEFAULT_PROMPT,
                new_tokens or DEFAULT_NEW,
                deterministic=bool(deterministic),
                as_json=as_json,
                debug=debug,
            )


def refuse(options: Mapping[str, object], place: str) -> None:
    """A usage error where an option is given that has no meaning here, and where it has one."""
    for name, value in options.items():
        if value is not None:
            raise typer.TyperException(f"{name} goes with '{place}'.")


def bench_cuda(options: Mapping[str, Any], *, as_json: bool) -> None:
    """Measure layers on a GPU; options that are None have the defaults of `GpuOptions`."""
    from mixtura.bench.gpu.command import GpuOptions, bench_gpu

    given = {name: value for name, value in options.items() if value is not None}
    status = bench_gpu(GpuOptions(**given, as_json=as_json))
    if status:
        raise typer.Exit(status)


def on_path(path: str | None) -> AbstractContextManager[None]:
    """Run what is measured on that instruction set; on the best one without a name.

    Raises:
        InputError: there are no C++ kernels. ConfigError: the processor does not run them.
    """
    from mixtura.errors import InputError
    from mixtura.kernels.cpu.extension import forced_path, missing

    if path is None:
        return nullcontext()
    reason = missing()
    if reason is not None:
        raise InputError(f"path ({path}) must be one of the C++ kernels'; got none: {reason}.")
    return forced_path(path)


def bench_experts(
    shapes: list[str],
    weights: str,
    tokens: str,
    contenders: list[str] | None,
    seconds: float,
    *,
    png: Path | None,
    as_json: bool,
) -> None:
    """Measure cases one after the other; what is measured is shown, however it ends."""
    from mixtura.bench.cases import find_cases
    from mixtura.bench.chart import check_writable, require_matplotlib
    from mixtura.bench.choices import DEFAULT, find_contenders
    from mixtura.bench.experts import run_cases
    from mixtura.bench.machine import probe_machine
    from mixtura.bench.report import case_line, machine_summary

    cases = find_cases(shapes, weights, tokens)
    running = find_contenders(contenders or list(DEFAULT))
    if png is not None:
        require_matplotlib()
        check_writable(png)
    machine = probe_machine(tuple(dict.fromkeys(case.arithmetic for case in cases)))
    console = make_console(as_json)
    console.print(machine_summary(machine))
    results: list[CaseResult] = []
    try:
        for result in run_cases(cases, running, machine, seconds=seconds):
            results.append(result)
            if as_json:
                typer.echo("\n".join(result.lines()))
            print(f"{len(results)}/{len(cases)}  {case_line(result)}", file=sys.stderr)
    finally:
        show_results(results, console, png)
    if not all(result.is_correct for result in results):
        raise typer.Exit(1)


def show_results(results: list[CaseResult], console: Console, png: Path | None) -> None:
    """The table and, where it was asked for, the picture of what there is."""
    from mixtura.bench.chart import save_chart
    from mixtura.bench.report import refusal_notes, results_table

    if not results:
        return
    console.print(results_table(results))
    console.print(refusal_notes(results), markup=False)
    if png is not None:
        save_chart(results, png)


def bench_generate(
    model: str,
    formats: dict[str, str | None],
    num_prompt_tokens: int,
    num_new_tokens: int,
    *,
    deterministic: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Load a model, time it, and say where the time goes; or what determinism costs."""
    with quiet(debug):
        import mixtura
        from mixtura.bench.determinism import measure_slowdown
        from mixtura.bench.generation import measure_generation
        from mixtura.bench.machine import probe_machine
        from mixtura.bench.report import generation_summary, machine_summary, parts_table
        from mixtura.hf.generate import prepare_experts
        from mixtura.quant.formats import WeightFormat

        asked = {name: WeightFormat.parse(text).value for name, text in formats.items() if text}
        arguments: dict[str, Any] = dict(asked)
        loaded = mixtura.from_pretrained(model, **arguments)
        names = {
            "model": model,
            "weights": asked.get("weights"),
            "linears": asked.get("linears"),
            "kernels": prepare_experts(loaded),
        }
    console = make_console(as_json)
    machine = probe_machine(())  # of the limits, the bandwidth alone
    console.print(machine_summary(machine))
    if deterministic:
        with quiet(debug):
            slowdown = measure_slowdown(
                loaded, model, num_prompt_tokens=num_prompt_tokens, num_new_tokens=num_new_tokens
            )
        if as_json:
            typer.echo(slowdown.to_json(machine))
        console.print(slowdown.summary())
        raise typer.Exit(bool(slowdown.wrong_layers))
    with quiet(debug):
        result = measure_generation(
            loaded, names, num_prompt_tokens=num_prompt_tokens, num_new_tokens=num_new_tokens
        )
    if as_json:
        typer.echo(result.to_json(machine))
    console.print(generation_summary(result))
    console.print(parts_table(result))
    if not result.timed.is_valid:
        raise typer.Exit(1)


def make_console(as_json: bool) -> Console:
    """Tables go where JSON does not, at full width where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    return console if console.is_terminal else Console(stderr=as_json, highlight=False, width=WIDTH)
