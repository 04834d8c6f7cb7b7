"""What a model would be over ranks: dispatcher, bytes of each rank, and whether it would pay."""

from __future__ import annotations

from dataclasses import dataclass

from mixtura.config import DispatcherName, ParallelConfig, PlacementStrategy
from mixtura.dispatch import DispatcherChoice, choose_dispatcher
from mixtura.errors import UnsupportedModel
from mixtura.hf.explanation import ModelExplanation
from mixtura.parallel import Placement, Topology
from mixtura.parallel.predict import MACHINES, LayerBytes, MachineSpeed, Prediction, predict

ROW_ITEMSIZE = 2
"""Bytes of an element of a row: bf16, as models run that are worth spreading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksExplanation:
    """A model over ranks.

    Attributes:
        num_ranks: in all. num_nodes: machines that they are on.
        choices: how rows meet their experts, each with the layers of which it holds.
        expert_bytes: by rank, of the routed experts. beside_bytes: of all else, on every rank.
        prediction: of a decode step; None where a layer's top-k or experts are not known.
        machine: what it takes for granted.
    """

    num_ranks: int
    num_nodes: int
    choices: tuple[tuple[DispatcherChoice, int], ...]
    expert_bytes: tuple[int, ...]
    beside_bytes: int
    prediction: Prediction | None
    machine: MachineSpeed


def explain_ranks(
    found: ModelExplanation, parallel: ParallelConfig, *, num_nodes: int = 1
) -> RanksExplanation:
    """Say what ranks would make of a model.

    Args:
        found: the model on one process. parallel: the ranks. num_nodes: machines that they are on.

    Raises:
        ConfigError: fewer experts than ranks, or fewer ranks than machines.
        UnsupportedModel: no layer's experts are ours.
    """
    experts = [layer.experts for layer in found.layers if layer.experts is not None]
    if not experts:
        raise UnsupportedModel(
            f"the model ({found.architecture}) must have experts that mixtura runs to spread them "
            f"over ranks; got none. Run it in one process."
        )
    choices: dict[DispatcherChoice, int] = {}
    by_rank = [0] * parallel.num_ranks
    layers = []
    for one in experts:
        topology = Topology.even(
            one.num_experts, parallel.ep_size, min(num_nodes, parallel.ep_size)
        )
        deal = (
            Placement.round_robin
            if parallel.placement is PlacementStrategy.ROUND_ROBIN
            else Placement.linear
        )
        slots = deal(one.num_experts, topology).topology.slots_per_rank
        for rank in range(parallel.num_ranks):
            part = one.num_bytes * slots[rank // parallel.tp_size] // one.num_experts
            by_rank[rank] += part // parallel.tp_size
        choice = choose_dispatcher(parallel, num_experts=one.num_experts, top_k=one.top_k or 1)
        choices[choice] = choices.get(choice, 0) + 1
        if one.top_k is not None:
            row_bytes = ROW_ITEMSIZE * one.hidden_size
            size = one.num_bytes / one.num_experts
            layers.append(LayerBytes(one.num_experts, one.top_k, size, row_bytes))
    beside = found.num_bytes - found.expert_bytes
    machine = MACHINES["cuda" if found.device.startswith("cuda") else "cpu"]
    name: DispatcherName | None = next(iter(choices)).name
    prediction = None
    if len(layers) == len(experts):
        prediction = predict(
            _read_beside(found, beside),
            layers,
            parallel,
            machine,
            dispatcher=name,
            num_nodes=num_nodes,
        )
    return RanksExplanation(
        num_ranks=parallel.num_ranks,
        num_nodes=num_nodes,
        choices=tuple(choices.items()),
        expert_bytes=tuple(by_rank),
        beside_bytes=beside,
        prediction=prediction,
        machine=machine,
    )


def _read_beside(found: ModelExplanation, beside: int) -> int:
    """What a token reads of the weights beside the experts: all but the input embedding."""
    if found.bytes_per_token is None:
        return beside
    chosen = 0
    for layer in found.layers:
        one = layer.experts
        if one is not None and one.top_k is not None:
            chosen += one.num_bytes * min(one.top_k, one.num_experts) // one.num_experts
    return found.bytes_per_token - chosen
