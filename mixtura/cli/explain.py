"""`mixtura explain`: which kernel runs each MoE layer, and why, before a weight is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli.doctor import memory_sizes
from mixtura.cli.loading import DtypeName, quiet
from mixtura.cli.options import Debug, Deterministic, Kernel, Model, Weights, model_or_demo
from mixtura.cli.ranks import (
    CutRanks,
    DispatcherOption,
    ExpertRanks,
    PlacementOption,
    RankOptions,
)
from mixtura.config import PlacementStrategy

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.hf.explain_ranks import RanksExplanation
    from mixtura.hf.explanation import ExpertsExplanation, LayerGroup, ModelExplanation

NAME_WIDTH = 11
KINDS = {
    "block": "MoE block, all of it ours",
    "experts": "experts ours, router and the rest the family's own",
    "none": "stays with Transformers",
}


def explain(
    model: Model = None,
    device: Annotated[
        str | None,
        typer.Option(help="As if it ran there: cpu, cuda. Default: a GPU if there is one."),
    ] = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the weights; auto is the checkpoint's.")
    ] = DtypeName.AUTO,
    weights: Weights = None,
    kernel: Kernel = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail where a layer or kernel is not the preferred one."),
    ] = False,
    deterministic: Deterministic = False,
    ep: ExpertRanks = None,
    tp: CutRanks = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="With --ep: machines that the ranks are on.")
    ] = 1,
    dispatcher: DispatcherOption = None,
    placement: PlacementOption = PlacementStrategy.LINEAR,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    debug: Debug = False,
) -> None:
    """Say which kernel runs each MoE layer, and why.

    Reads config.json and, where they are here, the headers of the files; downloads no weights. With
    --ep: how rows would meet their experts, what each rank would hold, and whether ranks would pay.
    """
    name = model_or_demo(model)
    spread = RankOptions(ep=ep, tp=tp, dispatcher=dispatcher, placement=placement).config()
    with quiet(debug):
        import torch

        from mixtura.hf import explain as core
        from mixtura.hf.explain_ranks import explain_ranks
        from mixtura.parallel.ranks import check_deterministic_ranks

        if deterministic and spread is not None:
            check_deterministic_ranks(spread)

        found = core.explain(
            name,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=None if dtype is DtypeName.AUTO else getattr(torch, dtype.for_torch),
            weights=weights,
            kernel=kernel,
            strict=strict,
            deterministic=deterministic,
        )
        ranks = None if spread is None else explain_ranks(found, spread, num_nodes=nodes)
    memory = memory_of(found.device)
    tuned = tuned_of(found)
    if as_json:
        data = as_data(name, found, memory)
        data["tuned"] = tuned
        if ranks is not None:
            data["ranks"] = {**asdict(ranks), **advice_of(ranks, memory[0])}
        typer.echo(json.dumps(data, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    print_model(console, name if model is not None else "the model in the box", found, memory)
    if tuned is not None:
        _print_rows(console, {"tuned": tuned})
    for group in found.groups:
        print_group(console, group)
    if ranks is not None:
        print_ranks(console, ranks, memory[0])


def memory_of(device: str) -> tuple[int | None, int | None]:
    """Total and free bytes of the device's memory; None where it is not here."""
    import torch

    if torch.device(device).type == "cpu":
        return memory_sizes()
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return None, None


def tuned_of(found: ModelExplanation) -> str | None:
    """The tuned blocks for the model's experts in words; None where no kernel would use them."""
    import torch

    from mixtura.kernels.triton import TritonKernel
    from mixtura.kernels.triton.device import device_of
    from mixtura.kernels.triton.tuned import DTYPES, read_tuned, tuned_path
    from mixtura.quant.formats import WeightFormat

    parts = [layer.experts for layer in found.layers if layer.experts is not None]
    sizes = {
        (
            *(part.num_experts, part.hidden_size, part.intermediate_size, part.layout),
            part.dtype in (*DTYPES, WeightFormat.BF16.value, WeightFormat.FP16.value),
        )
        for part in parts
        if part.kernel == TritonKernel.name
    }
    if not sizes or not torch.cuda.is_available():
        return None
    device = device_of(torch.device(found.device))
    file = read_tuned(tuned_path(device), device)
    num_entries = sum(
        (
            *(key.num_experts, key.hidden_size, key.intermediate_size, key.gate_up.value),
            key.packing is None,
        )
        in sizes
        for key in file.entries
    )
    return f"{num_entries} entries for these experts; {file}"


def as_data(
    name: str, found: ModelExplanation, memory: tuple[int | None, int | None]
) -> dict[str, Any]:
    """The explanation as JSON has it: numbers are bytes, layers are ungrouped."""
    return {
        "model": name,
        **asdict(found),
        "expert_bytes": found.expert_bytes,
        "memory": {"total": memory[0], "free": memory[1]},
        "groups": [{"label": group.label, "names": group.names} for group in found.groups],
    }


def print_model(
    console: Console, name: str, found: ModelExplanation, memory: tuple[int | None, int | None]
) -> None:
    """What holds for the whole model."""
    from rich.markup import escape

    console.print(f"[bold]{escape(name)}[/bold]")
    files = (
        f"{found.num_stored:,} tensors in the files agree with config.json"
        if found.num_stored
        else "config.json alone; no weights here"
    )
    has_our_router = any(layer.kind == "block" for layer in found.layers)
    gate = f", router in {found.gate}" if has_our_router else ""
    rows = {
        "family": f"{found.model_type} ({found.architecture})",
        "read": files,
        "runs in": f"{found.dtype} on {found.device}{gate}",
        "weights": f"{size(found.num_bytes)}, of these {size(found.expert_bytes)} experts",
        "memory": _fits(found.num_bytes, *memory),
    }
    if found.bytes_per_token is not None:
        part = found.bytes_per_token / max(found.num_bytes, 1)
        rows["per token"] = f"{size(found.bytes_per_token)} of weights at most ({part:.1%})"
    if found.checkpoint is not None:
        rows["stored as"] = f"{found.checkpoint}; {found.num_packed_linears} linear layers packed"
    if found.unused:
        rows["unused"] = f"{len(found.unused):,} tensors in the files, first {found.unused[0]}"
    if found.dense is not None:
        rows["beside"] = f"{found.dense}: no experts"
    _print_rows(console, rows)


def _fits(needed: int, total: int | None, free: int | None) -> str:
    """Whether so many bytes of weights have room in the device's memory."""
    if total is None:
        return "unknown: the device is not here"
    free = free if free is not None else total
    if needed <= free:
        verdict = "the weights fit"
    elif needed <= total:
        verdict = "the weights fit once other programs make room"
    else:
        verdict = "the weights do not fit"
    return f"{size(total)}, {size(free)} free: {verdict}"


def print_group(console: Console, group: LayerGroup) -> None:
    """What holds for layers that are alike."""
    from rich.markup import escape

    layer = group.layer
    console.print(f"\n[bold]{escape(group.label)}[/bold]: {KINDS[layer.kind]}")
    rows = {}
    if layer.reason is not None and layer.kind == "none":
        rows["reason"] = layer.reason
    if layer.experts is not None:
        rows |= _experts_rows(layer.experts, len(group.names))
    _print_rows(console, rows)
    if layer.experts is not None:
        for rejection in layer.experts.rejections:
            console.print(f"  {'':<{NAME_WIDTH}}not {rejection.kernel}: {escape(rejection.reason)}")


def advice_of(ranks: RanksExplanation, capacity: int | None) -> dict[str, Any]:
    """The prediction's conclusions, where there is one."""
    found = ranks.prediction
    if found is None:
        return {}
    return {
        "alone_rate": found.alone_rate,
        "ranks_rate": found.ranks_rate,
        "advice": found.advice(capacity),
    }


def print_ranks(console: Console, ranks: RanksExplanation, capacity: int | None) -> None:
    """What the model would be over ranks; `capacity` are the bytes of one memory."""
    where = "one machine" if ranks.num_nodes == 1 else f"{ranks.num_nodes} machines"
    console.print(f"\n[bold]{ranks.num_ranks} ranks[/bold] on {where}")
    rows = {}
    for number, (choice, count) in enumerate(ranks.choices):
        name = "nothing is sent" if choice.name is None else choice.name.value
        layers = "" if len(ranks.choices) == 1 else f" ({count} layers)"
        label = "rows meet" if number == 0 else " " * number
        rows[label] = f"{name}: {choice.reason}{layers}"
    sizes = ", ".join(
        f"rank {rank}: {size(num_bytes)}" for rank, num_bytes in enumerate(ranks.expert_bytes)
    )
    least, most = min(ranks.expert_bytes), max(ranks.expert_bytes)
    if least == most:
        sizes = f"{size(most)} on every rank"
    rows["experts"] = f"{sizes}; and {size(ranks.beside_bytes)} of other weights on each"
    found = ranks.prediction
    if found is None:
        rows["predicted"] = "nothing: how many experts a token visits is not known"
    else:
        rows["predicted"] = (
            f"{found.ranks_rate:.3g} tokens/s, in one process {found.alone_rate:.3g}: "
            f"{found.advice(capacity)}"
        )
        machine = ranks.machine
        memory = "a machine's ranks share a memory" if machine.shares_memory else "each its own"
        rows["with"] = (
            f"{machine.bandwidth / 1e9:,.0f} GB/s from memory ({memory}), "
            f"{machine.latency * 1e6:.0f} µs an exchange, {machine.link / 1e9:.0f} GB/s between "
            f"ranks; one token, even loads, nothing overlapped"
        )
    _print_rows(console, rows)


def _experts_rows(experts: ExpertsExplanation, num_layers: int) -> dict[str, str]:
    whose = "" if experts.is_router_ours else " (the family's own router)"
    no_compute = f" + {experts.num_no_compute} no-compute" if experts.num_no_compute else ""
    shared = f", shared {experts.shared_size}" if experts.shared_size is not None else ""
    stored = ""
    if experts.stored_dtype is not None and experts.stored_dtype != experts.dtype:
        stored = f", stored in {experts.stored_dtype}"
    each = f" a layer, {size(experts.num_bytes * num_layers)} in all" if num_layers > 1 else ""
    rows = {
        "routing": experts.routing + whose,
        "experts": (
            f"{experts.num_experts}{no_compute}, each {experts.hidden_size} -> "
            f"{experts.intermediate_size} -> {experts.hidden_size}{shared}"
        ),
        "computes": f"{experts.activation}; gate and up {experts.layout}",
        "weights": f"{experts.dtype}{stored}, {size(experts.num_bytes)}{each}",
    }
    if experts.bytes_per_token is not None:
        parts = ["experts"]
        if experts.is_router_ours:
            parts += ["gate"] if experts.shared_size is None else ["gate", "shared experts"]
        layer = " a layer" if num_layers > 1 else ""
        rows["per token"] = f"{size(experts.bytes_per_token)}{layer} at most: {', '.join(parts)}"
    fallback = ", a fallback" if experts.is_fallback else ""
    path = f": {experts.kernel_path}" if experts.kernel_path is not None else ""
    if experts.asked is not None:
        how = "so" if experts.rounds_as_asked else "as the kernel says"
        rows["asks for"] = f"{experts.asked} activations; they run {how}"
    rows["kernel"] = f"{experts.kernel}{path}{fallback}"
    return rows


def _print_rows(console: Console, rows: dict[str, str]) -> None:
    from rich.markup import escape

    for name, value in rows.items():
        console.print(f"  [dim]{name:<{NAME_WIDTH}}[/dim]{escape(value)}")


def size(num_bytes: int) -> str:
    """Bytes in the unit that leaves a number below 1000, with three digits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
