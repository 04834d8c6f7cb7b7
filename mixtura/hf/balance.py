"""The load balancing of a model's experts: one balancer, which acts after every forward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixtura.config import EplbConfig
from mixtura.cuda import is_capturing
from mixtura.eplb import ExpertBalancer
from mixtura.errors import ConfigError
from mixtura.hf.experts import FamilyExperts
from mixtura.hf.parallel import BALANCER, base_of, find_ranks
from mixtura.layer import FusedMoE
from mixtura.parallel import ModelPlacement, Spread, TorchTransport, Transport, agree


def find_balancer(model: nn.Module) -> ExpertBalancer | None:
    """The balancer of a model, or None where its experts are not balanced."""
    for module in model.modules():
        found = getattr(module, BALANCER, None)
        if isinstance(found, ExpertBalancer):
            return found
    return None


def balance_experts(model: PreTrainedModel, paths: Iterable[str]) -> ExpertBalancer | None:
    """Balance the experts of a model where its ranks are to; the kernels pack them now.

    Args:
        model: converted, its experts spread over ranks.
        paths: its MoE layers.

    Returns:
        The balancer; None where the ranks do not balance.

    Raises:
        ConfigError: the layers have different experts, or a kernel cannot move them.
    """
    ranks = find_ranks(model)
    if ranks is None or ranks.config.eplb is None:
        return None
    config, transport = ranks.config.eplb, ranks.transport
    background = transport
    if isinstance(transport, TorchTransport):
        background = transport.another(config.stall_seconds)  # weights alone, with a limit
    paths = list(paths)
    return agree(transport, lambda: ({}, _start(model, paths, config, background)))


def _start(
    model: PreTrainedModel, paths: list[str], config: EplbConfig, background: Transport
) -> ExpertBalancer:
    old = find_balancer(model)
    layers = {path: spread for path in paths if (spread := spread_of(model, path)) is not None}
    sizes = {(one.placement.num_experts, one.placement.topology) for one in layers.values()}
    if len(sizes) > 1:
        raise ConfigError(
            f"the MoE layers must have as many experts on the same slots to be balanced together; "
            f"got {len(sizes)} ways, of {sorted(count for count, _ in sizes)} experts. Turn "
            f"balancing off."
        )
    modules: list[Any] = [model.get_submodule(path) for path in layers]
    first = next(iter(layers.values()))
    placement = ModelPlacement.stack([one.placement for one in layers.values()])
    if old is not None:
        old.close()
        placement = old.placement  # experts have moved since they were loaded
    balancer = ExpertBalancer(config, first.ranks, modules, placement, background)
    base: Any = base_of(model, paths)
    if old is None:
        base.register_forward_hook(_after_forward)
    setattr(base, BALANCER, balancer)
    return balancer


def spread_of(model: nn.Module, path: str) -> Spread | None:
    """How the experts of an MoE layer are spread."""
    module = model.get_submodule(path)
    if isinstance(module, FusedMoE):
        return module.plan.spread
    return module.spread if isinstance(module, FamilyExperts) else None


def current_spread(model: nn.Module, path: str) -> Spread | None:
    """As `spread_of`, with the experts where they are now: balancing has moved them since."""
    spread, balancer = spread_of(model, path), find_balancer(model)
    if spread is None or balancer is None:
        return spread
    index = [id(layer) for layer in balancer.layers].index(id(model.get_submodule(path)))
    return replace(spread, placement=balancer.placement.layer(index))


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    balancer: ExpertBalancer = getattr(module, BALANCER)
    # A graph's replays run no hooks: whoever replays it calls `step` after each.
    if not is_capturing(balancer.ledger.counts.device):
        balancer.step()
