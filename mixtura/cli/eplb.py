"""`mixtura eplb simulate`: what balancing experts over ranks would bring, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli.balance import layers_with_tokens
from mixtura.cli.explain import size
from mixtura.cli.inspect import MAX_TOKENS, check_target, read_text, run, table_console
from mixtura.cli.loading import LoadOptions, load, quiet
from mixtura.cli.options import Debug, Device, Model, model_or_demo

if TYPE_CHECKING:
    from torch import Tensor

    from mixtura.eplb.simulation import Recommendation, Replay, Simulation
    from mixtura.observe import RoutingTrace

TOKENS_PER_STEP, INTERVAL = 64, 16
NUM_EXPERTS, NUM_LAYERS, TOP_K, NUM_STEPS = 64, 4, 4, 128
"""Of synthetic routing."""
EXPERT_MIB = 42.0
"""An expert of DeepSeek-V3 in 8 bits: 3 matrices of 7168 x 2048."""
STEP_MS, BANDWIDTH = 20.0, 40.0
LEAST, MOST = 1e-3, 1e6
"""Of MiB, ms and GB/s."""
COLUMNS = ("balance", "least", "ms a step", "saved", "plans", "slots moved", "bytes moved")
NARROW, LEFT_OUT = 78, ("least", "ms a step", "plans")
"""Terminals with fewer columns do without these figures."""


class Subject(StrEnum):
    """What is asked about balancing."""

    SIMULATE = "simulate"


class Synthetic(StrEnum):
    """The synthetic traces, as `mixtura.eplb.traces` has them."""

    BALANCED = "balanced"
    ONE_HOT_EXPERT = "one_hot_expert"
    HOT_RANK = "hot_rank"
    BURSTS = "bursts"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True)
class Source:
    """Routing to replay: its name, each layer's choices (N, K), and E."""

    name: str
    choices: tuple[Tensor, ...]
    num_experts: int


def eplb(
    subject: Annotated[Subject, typer.Argument(help="What is asked.")],
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Routing that 'mixtura inspect --trace' has kept. Default: a model reads a text."
        ),
    ] = None,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes on which the ranks lie.")] = 1,
    redundant: Annotated[
        int, typer.Option(min=0, help="Slots of a layer beyond one for each expert.")
    ] = 0,
    groups: Annotated[
        int, typer.Option(min=1, help="Expert groups, which hierarchical plans keep on a node.")
    ] = 1,
    synthetic: Annotated[
        Synthetic | None,
        typer.Option(
            help="Made-up routing in place of a trace: balanced, one_hot_expert, hot_rank, bursts "
            "or drift.",
            metavar="KIND",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"--synthetic: steps. Default: {NUM_STEPS}.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help=f"--synthetic: layers. Default: {NUM_LAYERS}.")
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(min=1, help=f"--synthetic: experts of a layer. Default: {NUM_EXPERTS}."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help=f"--synthetic: experts of a token. Default: {TOP_K}.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="--synthetic: of the random numbers. Default: 0.")
    ] = None,
    model: Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="File for the model to read; - reads standard input. Default: the source of "
            "mixtura's layer.",
            metavar="FILE",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = MAX_TOKENS,
    device: Device = None,
    tokens_per_step: Annotated[
        int, typer.Option(min=1, help="Tokens of all ranks in one step.")
    ] = TOKENS_PER_STEP,
    interval: Annotated[int, typer.Option(min=1, help="Steps between plans.")] = INTERVAL,
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy, or quota; repeatable. Default: all.")
    ] = None,
    min_gain: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="The part of the time that a plan, and balancing, must save."
        ),
    ] = 0.02,
    max_moved: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="The part of a layer's slots that local_search may change."
        ),
    ] = 0.15,
    expert_mib: Annotated[
        float | None,
        typer.Option(
            min=LEAST,
            max=MOST,
            help="MiB of one expert of a layer. Default: the model's; without one, "
            f"{EXPERT_MIB:g} (DeepSeek-V3 in 8 bits).",
        ),
    ] = None,
    step_ms: Annotated[
        float,
        typer.Option(
            min=LEAST,
            max=MOST,
            help="Milliseconds of the experts of all layers in a step with even ranks.",
        ),
    ] = STEP_MS,
    bandwidth: Annotated[
        float,
        typer.Option(
            min=LEAST,
            max=MOST,
            help="GB/s at which the ranks together receive moved experts.",
        ),
    ] = BANDWIDTH,
    png: Annotated[Path | None, typer.Option(help="Draw balancedness over the steps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    debug: Debug = False,
) -> None:
    """Replay routing through the policies that balance experts over ranks.

    Says for each how even ranks would have been, what it would have moved, and how long steps
    would have taken; and whether to enable any, or none.
    """
    made_up = {
        "--steps": steps, "--layers": layers, "--experts": experts, "--top-k": top_k,
        "--seed": seed,
    }  # fmt: skip
    check_choice(trace, synthetic, text, made_up)
    check_target(png)
    with quiet(debug):
        from mixtura.config import EplbConfig
        from mixtura.eplb.chart import require_matplotlib, save_chart
        from mixtura.eplb.simulation import (
            EVERY_POLICY,
            SimulationConfig,
            StepCosts,
            loads_of_choices,
            recommend,
            simulate,
        )
        from mixtura.eplb.traces import TraceSizes, synthetic_choices

        if png is not None:
            require_matplotlib()
    config = SimulationConfig(
        num_ranks=ep,
        num_nodes=nodes,
        num_redundant=redundant,
        num_expert_groups=groups,
        policies=tuple(policy or EVERY_POLICY),
        costs=StepCosts(step_ms / 1e3, int((expert_mib or EXPERT_MIB) * 2**20), bandwidth * 1e9),
        eplb=EplbConfig(interval=interval, min_gain=min_gain, max_moved_fraction=max_moved),
    )
    if synthetic is not None:
        sizes = TraceSizes(
            num_steps=NUM_STEPS if steps is None else steps,
            num_layers=NUM_LAYERS if layers is None else layers,
            tokens_per_step=tokens_per_step,
            num_experts=NUM_EXPERTS if experts is None else experts,
            top_k=TOP_K if top_k is None else top_k,
            num_ranks=ep,
        )
        choices = synthetic_choices(synthetic.value, sizes, seed=seed or 0)
        source = Source(f"synthetic {synthetic.value}", choices, sizes.num_experts)
    elif trace is not None:
        source = kept(trace)
    else:
        options = LoadOptions(model=model, device=device, debug=debug)
        source = captured(options, text, max_tokens)
    if expert_mib is None and (model is not None or (trace is None and synthetic is None)):
        costs = replace(config.costs, bytes_per_slot=expert_bytes(model, debug=debug))
        config = replace(config, costs=costs)
    loads = loads_of_choices(source.choices, source.num_experts, tokens_per_step)
    found = simulate(loads, config)
    advice = recommend(found, min_gain)
    if as_json:
        typer.echo(json.dumps(as_data(source.name, found, advice), indent=2))
    else:
        print_simulation(source.name, found, advice, tokens_per_step)
    if png is not None:
        save_chart(found, png, title=source.name)
        if not as_json:
            print(f"picture  {png}")


def check_choice(
    trace: Path | None, synthetic: Synthetic | None, text: str | None, made_up: dict[str, Any]
) -> None:
    """Raise a usage error where options contradict each other."""
    if trace is not None and synthetic is not None:
        raise typer.TyperException("TRACE and --synthetic exclude each other. Give one.")
    if text is not None and (trace is not None or synthetic is not None):
        raise typer.TyperException("--text goes without TRACE and --synthetic. Drop one.")
    for name, value in made_up.items():
        if value is not None and synthetic is None:
            raise typer.TyperException(f"{name} goes with --synthetic. Give both.")


def expert_bytes(model: str | None, *, debug: bool) -> int:
    """Bytes of an expert of the largest layer, from a model's configuration."""
    with quiet(debug):
        from mixtura.hf.explain import explain

        found = explain(model_or_demo(model))
    each = [layer.experts for layer in found.layers if layer.experts is not None]
    return max(experts.num_bytes // experts.num_experts for experts in each)


def kept(path: Path) -> Source:
    """The routing of a file."""
    from mixtura.observe import RoutingTrace

    return as_source(path.name, RoutingTrace.load(path))


def captured(options: LoadOptions, text: str | None, max_tokens: int) -> Source:
    """The routing of a model that reads a text."""
    source, name = read_text(text)
    with quiet(options.debug):
        from mixtura.hf.trace import encode_text
    model, tokenizer = load(options)
    with quiet(options.debug):
        encoded = encode_text(tokenizer, source, max_tokens=max_tokens)
        found = run(model, encoded)
    shown = options.model if options.model is not None else "the model in the box"
    return as_source(f"{shown} on {name}", found)


def as_source(name: str, trace: RoutingTrace) -> Source:
    """A trace's layers that saw tokens.

    Raises:
        InputError: none did, or they differ in their number of experts.
    """
    layers = tuple(layers_with_tokens(name, trace).values())
    return Source(name, tuple(layer.topk_ids for layer in layers), layers[0].num_experts)


def as_data(name: str, found: Simulation, advice: Recommendation) -> dict[str, Any]:
    """The simulation as JSON has it: seconds and bytes, a number for each step."""
    config = found.config
    return {
        "routing": name,
        "num_ranks": config.num_ranks,
        "num_nodes": config.num_nodes,
        "num_redundant": config.num_redundant,
        "num_steps": found.num_steps,
        "num_layers": found.num_layers,
        "num_experts": found.num_experts,
        "interval": config.eplb.interval,
        "even_seconds": config.costs.even_seconds,
        "bytes_per_slot": config.costs.bytes_per_slot,
        "bytes_per_second": config.costs.bytes_per_second,
        "redundant_bytes": found.redundant_bytes,
        "redundant_bytes_of_a_rank": found.redundant_bytes_of_a_rank,
        "replays": [
            {
                "policy": replay.policy,
                "saving": found.saving(replay),
                "num_plans": replay.num_plans,
                "num_carried_out": replay.num_carried_out,
                "balancedness": replay.balancedness.tolist(),
                "seconds": replay.seconds.tolist(),
                "moved_slots": replay.moved_slots.tolist(),
                "moved_bytes": replay.moved_bytes.tolist(),
            }
            for replay in (found.off, *found.replays)
        ],
        "refusals": dict(found.refusals),
        "recommendation": {"policy": advice.policy, "text": advice.text},
    }


def print_simulation(
    name: str, found: Simulation, advice: Recommendation, tokens_per_step: int
) -> None:
    """Print what was simulated, the table of policies, and the recommendation."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = table_console()
    config, costs = found.config, found.config.costs
    on_nodes = f" on {config.num_nodes} nodes" if config.num_nodes > 1 else ""
    console.print(
        f"[bold]{escape(name)}[/bold]: {found.num_steps} steps of {tokens_per_step:,} tokens, "
        f"{found.num_layers} layers of {found.num_experts} experts, {config.num_ranks} ranks"
        f"{on_nodes}"
    )
    console.print(
        f"assumed: {costs.even_seconds * 1e3:g} ms a step with even ranks, "
        f"{size(costs.bytes_per_slot)} an expert, {costs.bytes_per_second / 1e9:g} GB/s; a plan "
        f"every {config.eplb.interval} steps",
        style="dim",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("policy", no_wrap=True)
    shown = [name for name in COLUMNS if console.width >= NARROW or name not in LEFT_OUT]
    for column in shown:
        table.add_column(column, justify="right")
    for replay in (found.off, *found.replays):
        cells = row(found, replay)
        name = "no balancing" if replay is found.off else replay.policy
        table.add_row(name, *(cells[column] for column in shown))
    console.print(table)
    for policy, reason in found.refusals.items():
        console.print(f"{escape(policy)} cannot plan for this: {escape(reason)}")
    if config.num_redundant:
        console.print(
            f"memory of {config.num_redundant} redundant slots a layer: "
            f"{size(found.redundant_bytes_of_a_rank)} more on a rank, "
            f"{size(found.redundant_bytes)} in all"
        )
    console.print(f"[bold]{escape(advice.text)}[/bold]")


def row(found: Simulation, replay: Replay) -> dict[str, str]:
    """One policy's figures, by column."""
    plans = f"{replay.num_carried_out} of {replay.num_plans}" if replay.num_plans else "none"
    figures = (
        f"{replay.balancedness.mean():.3f}",
        f"{replay.balancedness.min():.3f}",
        f"{replay.seconds.mean() * 1e3:.2f}",
        "" if replay is found.off else f"{found.saving(replay):.1%}",
        plans,
        f"{replay.moved_slots.sum():,}",
        size(int(replay.moved_bytes.sum())),
    )
    return dict(zip(COLUMNS, figures, strict=True))
