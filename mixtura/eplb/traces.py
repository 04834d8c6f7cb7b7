"""Synthetic routing with a name: what balancing must cope with, and what it cannot.

A token draws K different experts, one after the other, each with a probability proportional to its
weight among those that are left. A kind of trace is a rule for the weights w of a step, a layer and
an expert:

- `balanced`: `w = 1`.
- `one_hot_expert`: `w = 16` for one expert of each layer, drawn once; 1 for the others.
- `hot_rank`: `w = 3` for the experts that rank 0 holds at the start (`Placement.linear`), else 1.
- `bursts`: in the first 4 of every 16 steps, `w = 16` for one expert of each layer, drawn anew for
  each burst; else 1. A plan made of a burst comes when it is over.
- `drift`: `w = exp(z)`, where each z is a standard normal that wanders: `z[t] = 0.99 z[t - 1] +
  sqrt(1 - 0.99^2) e[t]`, so that popularity is log-normal at every step and another one after some
  hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.config.choice import Choice, require_positive
from mixtura.errors import ConfigError
from mixtura.parallel.topology import split_evenly

Floats = NDArray[np.float64]

HOT_EXPERT, HOT_RANK = 16.0, 3.0
"""Weights, where the others have 1."""
BURST_EVERY, BURST_STEPS = 16, 4
KEPT = 0.99
"""The part of a log weight that the next step keeps."""


class SyntheticTrace(Choice):
    """The kinds of synthetic routing."""

    BALANCED = "balanced"
    ONE_HOT_EXPERT = "one_hot_expert"
    HOT_RANK = "hot_rank"
    BURSTS = "bursts"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSizes:
    """How large a synthetic trace is.

    Attributes:
        num_steps, num_layers: steps, and MoE layers.
        tokens_per_step: tokens of all ranks in one step.
        num_experts: E. top_k: K.
        num_ranks: R, which says what rank 0 holds.

    Raises:
        ConfigError: a number is below 1, or top_k above num_experts.
    """

    num_steps: int
    num_layers: int
    tokens_per_step: int
    num_experts: int
    top_k: int
    num_ranks: int

    def __post_init__(self) -> None:
        for field in fields(self):
            require_positive(field.name, getattr(self, field.name))
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"top_k ({self.top_k}) must be at most num_experts; got {self.num_experts} "
                f"experts. Choose fewer for a token."
            )


def synthetic_choices(
    kind: SyntheticTrace | str, sizes: TraceSizes, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """The experts that each token of a synthetic trace visits.

    Returns:
        For each layer (num_steps * tokens_per_step, K) int32, in [0, E), no expert twice in a row;
        the same for the same arguments.

    Raises:
        ConfigError: there is no such kind.
    """
    random = np.random.default_rng(seed)
    weights = _WEIGHTS[SyntheticTrace.parse(kind)](sizes, random)  # (steps, layers, E)
    shape = (sizes.num_layers, sizes.tokens_per_step, sizes.num_experts)
    steps = []
    for log_weights in np.log(weights):
        # The K largest of log w + Gumbel noise are K draws without replacement.
        keys = log_weights[:, None, :] + random.gumbel(size=shape)
        chosen = np.argpartition(-keys, sizes.top_k - 1, axis=2)[..., : sizes.top_k]
        steps.append(torch.from_numpy(chosen.astype(np.int32)))
    return tuple(torch.cat(steps, dim=1))


def _even(sizes: TraceSizes) -> Floats:
    return np.ones((sizes.num_steps, sizes.num_layers, sizes.num_experts))


def _balanced(sizes: TraceSizes, random: np.random.Generator) -> Floats:
    return _even(sizes)


def _one_hot_expert(sizes: TraceSizes, random: np.random.Generator) -> Floats:
    weights = _even(sizes)
    hot = random.integers(sizes.num_experts, size=sizes.num_layers)
    weights[:, np.arange(sizes.num_layers), hot] = HOT_EXPERT
    return weights


def _hot_rank(sizes: TraceSizes, random: np.random.Generator) -> Floats:
    weights = _even(sizes)
    weights[..., : split_evenly(sizes.num_experts, sizes.num_ranks)[0]] = HOT_RANK
    return weights


def _bursts(sizes: TraceSizes, random: np.random.Generator) -> Floats:
    weights = _even(sizes)
    for start in range(0, sizes.num_steps, BURST_EVERY):
        hot = random.integers(sizes.num_experts, size=sizes.num_layers)
        weights[start : start + BURST_STEPS, np.arange(sizes.num_layers), hot] = HOT_EXPERT
    return weights


def _drift(sizes: TraceSizes, random: np.random.Generator) -> Floats:
    logs = random.standard_normal((sizes.num_steps, sizes.num_layers, sizes.num_experts))
    for step in range(1, sizes.num_steps):
        logs[step] = KEPT * logs[step - 1] + np.sqrt(1 - KEPT**2) * logs[step]
    weights: Floats = np.exp(logs)
    return weights


_WEIGHTS: dict[SyntheticTrace, Callable[[TraceSizes, np.random.Generator], Floats]] = {
    SyntheticTrace.BALANCED: _balanced,
    SyntheticTrace.ONE_HOT_EXPERT: _one_hot_expert,
    SyntheticTrace.HOT_RANK: _hot_rank,
    SyntheticTrace.BURSTS: _bursts,
    SyntheticTrace.DRIFT: _drift,
}
