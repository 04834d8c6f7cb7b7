"""A whole layer and the ranks' parts of it."""

from __future__ import annotations

from dataclasses import replace

from mixtura.config import DispatcherName, ParallelConfig, RunnerConfig, TokensHeld
from mixtura.layer import FusedMoE
from mixtura.parallel import ExpertParallel, Placement, Transport
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import shard_weights

WAYS = [
    (DispatcherName.ALL_REDUCE, TokensHeld.SHARED),
    (DispatcherName.ALL_GATHER, TokensHeld.SHARED),
    (DispatcherName.ALL_TO_ALL, TokensHeld.SHARED),
    (DispatcherName.ALL_GATHER, TokensHeld.OWN),
    (DispatcherName.ALL_TO_ALL, TokensHeld.OWN),
]
"""Every dispatcher with the tokens that it can have."""


def rank_layer(
    whole: FusedMoE,
    parallel: ParallelConfig,
    transport: Transport,
    *,
    runner: RunnerConfig | None = None,
    placement: Placement | None = None,
    kernel: str | None = "reference",
) -> FusedMoE:
    """This rank's part of a whole layer, with a runner of its own where one is given."""
    config = whole.moe_config
    if runner is not None:
        config = replace(config, runner=runner)
    least = config.runner.overlap_min_tokens
    ranks = ExpertParallel.over(parallel, transport, overlap_min_tokens=least)
    spread = Spread.of(config, ranks, placement)
    weights = shard_weights(whole.experts.expert_weights, spread)
    dtype = whole.gate.weight.dtype
    layer = FusedMoE(config, weights=weights, spread=spread, kernel=kernel, dtype=dtype)
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("experts.")}
    layer.load_state_dict(state)
    return layer
