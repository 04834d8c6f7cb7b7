"""Which dispatcher runs, decided from sizes when the layer is built."""

from __future__ import annotations

from dataclasses import dataclass

from mixtura.config import DispatcherName, MoEConfig, ParallelConfig, TokensHeld
from mixtura.dispatch.all_gather import AllGatherDispatcher
from mixtura.dispatch.all_reduce import AllReduceDispatcher
from mixtura.dispatch.all_to_all import AllToAllDispatcher
from mixtura.dispatch.contract import Dispatcher
from mixtura.dispatch.deep_ep import DeepEpDispatcher, deep_ep_cannot
from mixtura.dispatch.local import LocalDispatcher
from mixtura.dispatch.shared_batch import SharedBatchDispatcher
from mixtura.errors import ConfigError
from mixtura.parallel.ranks import Spread
from mixtura.parallel.transport import TorchTransport


@dataclass(frozen=True, slots=True)
class DispatcherChoice:
    """A dispatcher by name, and why it and not another; None is no dispatching at all."""

    name: DispatcherName | None
    reason: str


def expected_ranks(num_experts: int, top_k: int, ep_size: int) -> float:
    """Ranks with an expert of a token, on average over even, independent choices.

    `d = R (1 - C(E - E/R, K) / C(E, K))`, with the product of the quotient taken term by term.

    >>> round(expected_ranks(256, 8, 8), 2)
    5.29
    """
    away = num_experts - num_experts / ep_size
    none = 1.0
    for slot in range(top_k):
        none *= max(away - slot, 0.0) / (num_experts - slot)
    return ep_size * (1.0 - none)


def choose_dispatcher(config: ParallelConfig, *, num_experts: int, top_k: int) -> DispatcherChoice:
    """Decide how rows meet their experts. Pure.

    With tokens that all ranks share nothing has to be sent before the experts run. Else rows are
    gathered where nearly every rank needs nearly every row, as two collectives of known sizes then
    cost less than three with an exchange of counts before them.
    """
    if config.num_ranks == 1:
        return DispatcherChoice(None, "there is one rank")
    if config.dispatcher is not None:
        return DispatcherChoice(config.dispatcher, "it was asked for")
    if config.tokens is TokensHeld.SHARED:
        return DispatcherChoice(DispatcherName.ALL_REDUCE, "all ranks hold the same tokens")
    others = config.ep_size - 1
    needed = expected_ranks(num_experts, top_k, config.ep_size) * others / config.ep_size
    found = f"a row is needed on {needed:.1f} of the {others} other ranks"
    if needed >= GATHER_FROM * others:
        return DispatcherChoice(DispatcherName.ALL_GATHER, found)
    return DispatcherChoice(DispatcherName.ALL_TO_ALL, found)


GATHER_FROM = 0.9
"""Part of the other ranks that need a row, from which on all of them get it."""


def dispatcher_for(config: MoEConfig, spread: Spread | None) -> Dispatcher:
    """The dispatcher of a layer.

    Raises:
        ConfigError: one was asked for that cannot serve it.
    """
    if spread is None:
        return LocalDispatcher()
    return create_dispatcher(spread, config.routing.top_k, deterministic=config.deterministic)


def create_dispatcher(spread: Spread, top_k: int, *, deterministic: bool = False) -> Dispatcher:
    """The dispatcher of experts over ranks, of which every token visits so many."""
    parallel, transport, slots = spread.ranks.config, spread.ranks.transport, spread.slots
    choice = choose_dispatcher(parallel, num_experts=spread.placement.num_experts, top_k=top_k)
    if choice.name is None:
        return LocalDispatcher()
    if choice.name is DispatcherName.ALL_REDUCE:
        return AllReduceDispatcher(transport, slots, wants_terms=deterministic)
    inner: Dispatcher
    if choice.name is DispatcherName.DEEP_EP:
        reason = deep_ep_cannot(spread, deterministic=deterministic)
        if reason is not None:
            raise ConfigError(
                f"dispatcher (deep_ep) must be able to serve the layer; got: {reason}. Use "
                f"all_to_all."
            )
        assert isinstance(transport, TorchTransport)
        inner = DeepEpDispatcher(transport, spread.placement.topology.num_physical_experts)
    elif choice.name is DispatcherName.ALL_GATHER:
        inner = AllGatherDispatcher(transport, slots, wire=parallel.wire, wants_terms=deterministic)
    else:
        inner = AllToAllDispatcher(
            transport,
            slots,
            tp_size=parallel.tp_size,
            wire=parallel.wire,
            wants_terms=deterministic,
        )
    is_shared = parallel.tokens is TokensHeld.SHARED
    return SharedBatchDispatcher(transport, inner) if is_shared else inner
