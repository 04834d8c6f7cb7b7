"""The part of `mixtura inspect` about ranks: the load of each, before and after balancing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixtura.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.eplb.metrics import Floats
    from mixtura.observe import ExpertUsage, LayerTrace, RoutingTrace

POLICY = "local_search"
"""What plans: it starts at the placement in force, and moves little."""


@dataclass(frozen=True, slots=True)
class RankBalance:
    """The loads of ranks under two placements.

    Attributes:
        labels: of the layers with tokens.
        num_slots: P of each layer.
        before, after: (layers, R) slots that each rank's experts got, with linear placement, and
            as planned from these loads; replicas share equally.
        moved: slots of each layer that the plan changes.
    """

    labels: tuple[str, ...]
    num_slots: int
    before: Floats
    after: Floats
    moved: tuple[int, ...]


def layers_with_tokens(name: str, trace: RoutingTrace) -> dict[str, LayerTrace]:
    """The layers of a trace that can be spread over ranks together.

    Raises:
        InputError: no layer saw a token, or they differ in their number of experts.
    """
    layers = {key: layer for key, layer in trace.layers.items() if layer.num_tokens}
    sizes = sorted({layer.num_experts for layer in layers.values()})
    if len(sizes) != 1:
        raise InputError(
            f"the routing of {name} must have layers of as many experts, with tokens; got "
            f"{sizes or 'no tokens'}. Record other layers."
        )
    return layers


def balance_ranks(
    name: str, trace: RoutingTrace, usage: ExpertUsage, num_ranks: int, num_redundant: int
) -> RankBalance:
    """Spread the experts of a trace over ranks, as at the start and as a plan has it.

    Raises:
        InputError: layers differ, or there are more ranks than slots.
    """
    import numpy as np

    from mixtura.eplb import moved_slots, rank_loads, rebalance

    layers = layers_with_tokens(name, trace)
    num_experts = next(iter(layers.values())).num_experts
    num_slots = num_experts + num_redundant
    if num_ranks > num_slots:
        raise InputError(
            f"--ep ({num_ranks}) must be at most the slots of a layer; got {num_experts} experts "
            f"and {num_redundant} redundant slots. Use fewer ranks or more slots."
        )
    loads = np.stack([layer.counts[:num_experts].numpy() for layer in layers.values()])
    old = rebalance(loads, num_physical_experts=num_slots, num_ranks=num_ranks, policy="static")
    new = rebalance(
        loads, num_physical_experts=num_slots, num_ranks=num_ranks, policy=POLICY, old=old
    )
    labels = dict(zip(trace.layers, usage.labels, strict=True))
    return RankBalance(
        labels=tuple(labels[key] for key in layers),
        num_slots=num_slots,
        before=rank_loads(loads, old),
        after=rank_loads(loads, new),
        moved=tuple(moved_slots(old, new).tolist()),
    )


def print_balance(console: Console, found: RankBalance) -> None:
    """Print how even ranks are in each layer, and what each rank has to do."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    num_ranks = found.before.shape[1]
    console.print(
        f"\n[bold]{num_ranks} ranks[/bold], {found.num_slots} slots a layer: linear placement, and "
        f"after {POLICY} on these loads"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer")
    for column in ("balance", "busiest rank", "after", "busiest rank", "slots moved"):
        table.add_column(column, justify="right")
    for index, label in enumerate(found.labels):
        before, after = found.before[index], found.after[index]
        table.add_row(
            escape(label),
            f"{evenness(before):.3f}",
            busiest(before),
            f"{evenness(after):.3f}",
            busiest(after),
            f"{found.moved[index]} of {found.num_slots}",
        )
    console.print(table)
    by_rank = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    by_rank.add_column("rank")
    for column in ("load, all layers", "of mean", "after", "of mean"):
        by_rank.add_column(column, justify="right")
    sums = found.before.sum(0), found.after.sum(0)
    for rank in range(num_ranks):
        cells = [(f"{of[rank]:,.0f}", f"{of[rank] / max(of.mean(), 1e-9):.2f}") for of in sums]
        by_rank.add_row(str(rank), *cells[0], *cells[1])
    console.print(by_rank)


def evenness(loads: Floats) -> float:
    """Mean over max of one layer's rank loads; 1 without load."""
    return float(loads.mean() / loads.max()) if loads.max() > 0 else 1.0


def busiest(loads: Floats) -> str:
    """The rank with most to do, and how much that is of the mean."""
    rank = int(loads.argmax())
    return f"{rank} ({loads[rank] / loads.mean():.2f}x)" if loads.max() > 0 else "none"
