"""How evenly a text used the experts of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mixtura.errors import InputError
from mixtura.observe.trace import RoutingTrace

FIRST_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A module name's first part that is a number: the layer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUsage:
    """The slots that each choice of one layer received.

    Attributes:
        name: the layer's module name.
        counts: (E + Z,) slots by choice; experts without arithmetic stand at the end.
        num_experts: E. num_tokens: N. top_k: K.

    Raises:
        InputError: the counts do not sum to N * K.
    """

    name: str
    counts: tuple[int, ...]
    num_experts: int
    num_tokens: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= len(self.counts):
            raise InputError(
                f"num_experts ({self.num_experts}) must be in [1, {len(self.counts)}], the number "
                f"of counts. Correct it."
            )
        if min(self.counts) < 0 or sum(self.counts) != self.num_slots:
            raise InputError(
                f"the counts of {self.name} must sum to tokens * top_k = {self.num_tokens} * "
                f"{self.top_k}; got {sum(self.counts)}. Count them again."
            )

    @property
    def num_slots(self) -> int:
        """N * K."""
        return self.num_tokens * self.top_k

    @property
    def share(self) -> tuple[float, ...]:
        """Each choice's part of the layer's slots; 0 where there are none."""
        return tuple(count / max(self.num_slots, 1) for count in self.counts)

    @property
    def entropy_bits(self) -> float:
        """`-sum p log2 p` over all choices: log2(E + Z) where all are used alike."""
        return sum(-p * math.log2(p) for p in self.share if p > 0)

    @property
    def normalized_entropy(self) -> float:
        """The entropy as a part of the highest possible; 1 where there is one choice."""
        return self.entropy_bits / math.log2(len(self.counts)) if len(self.counts) > 1 else 1.0

    @property
    def mean_load(self) -> float:
        """Slots per expert that computes: what the colours of pictures are relative to."""
        return sum(self.counts[: self.num_experts]) / self.num_experts

    @property
    def relative_load(self) -> tuple[float, ...]:
        """Each choice's slots over `mean_load`; 0 where no expert that computes was used."""
        return tuple(count / self.mean_load if self.mean_load else 0.0 for count in self.counts)

    @property
    def max_over_mean(self) -> float:
        """The busiest computing expert's slots over the mean: 1 is balanced, E the worst."""
        return max(self.relative_load[: self.num_experts])

    @property
    def never_used(self) -> tuple[int, ...]:
        """Ids that no token chose, experts without arithmetic included."""
        return tuple(expert for expert, count in enumerate(self.counts) if count == 0)

    def top(self, number: int) -> tuple[int, ...]:
        """The most used ids, most used first; ties go to the lower id."""
        return tuple(sorted(range(len(self.counts)), key=lambda e: (-self.counts[e], e))[:number])


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """How a text used the experts of a model, layer by layer."""

    layers: tuple[LayerUsage, ...]

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> Self:
        """Count a trace."""
        return cls(
            tuple(
                LayerUsage(
                    name=name,
                    counts=tuple(layer.counts.tolist()),
                    num_experts=layer.num_experts,
                    num_tokens=layer.num_tokens,
                    top_k=layer.top_k,
                )
                for name, layer in trace.layers.items()
            )
        )

    @property
    def num_slots(self) -> int:
        """Slots of all layers."""
        return sum(layer.num_slots for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """The most experts that a layer has."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def num_no_compute(self) -> int:
        """The most choices without arithmetic that a layer has."""
        return max(len(layer.counts) - layer.num_experts for layer in self.layers)

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the layers, each different from the others."""
        return short_names([layer.name for layer in self.layers])


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Module names by their layer numbers, or, where these do not tell them apart, in short.

    Example:
        >>> short_names(["model.layers.3.mlp", "model.layers.4.mlp"])
        ('3', '4')
        >>> short_names(["model.layers.3.mlp", "model.mtp.0.mlp"])
        ('layers.3.mlp', 'mtp.0.mlp')
    """
    numbers = [FIRST_NUMBER.search(name) for name in names]
    if len({FIRST_NUMBER.sub("*", name, count=1) for name in names}) == 1:
        return tuple(m.group() if m else name for m, name in zip(numbers, names, strict=True))
    parts = [name.split(".") for name in names]
    shortest = min(len(part) for part in parts) - 1
    shared = 0
    while shared < shortest and len({part[shared] for part in parts}) == 1:
        shared += 1
    return tuple(".".join(part[shared:]) for part in parts)
