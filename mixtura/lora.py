"""What LoRA adapters add to the experts of a layer: frozen nouns that pass between rooms.

L local experts, H hidden size, I intermediate size, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mixtura.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to one linear map of each expert: `y += B[e] @ (A[e] @ x)`.

    Attributes:
        a: (L, r, in). b: (L, out, r), with the adapter's scaling in it. An expert without a part in
            the adapter has zeros.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) != 3 or len(b) != 3 or (a[0], a[1]) != (b[0], b[2]) or a[1] < 1:
            raise ConfigError(
                f"the factors of an adapter must be A (experts, rank, in) and B (experts, out, "
                f"rank); got {a} and {b}. Correct the adapter."
            )

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[1]

    @property
    def num_experts(self) -> int:
        """L."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """What one LoRA adapter adds to the routed experts of one layer, or of one rank of it.

    Gate and up are those of an expert whatever holds them in the base weights: B of the gate is
    (L, I, r) where the base has them stacked, interleaved or apart. Where the adapter was trained
    on both as one map they share A: `gate.a is up.a`.

    Attributes:
        gate: None where the adapter has none, or the experts are ungated. up, down: or None.
    """

    gate: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None

    def parts(self) -> dict[str, LowRank]:
        """Those that it has, by name."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: part for name, part in found.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name, (L, ...) each; one that gate and up share is there once."""
        factors = {
            f"{name}.{factor}": tensor
            for name, part in self.parts().items()
            for factor, tensor in (("a", part.a), ("b", part.b))
        }
        shares = self.gate is not None and self.up is not None and self.gate.a is self.up.a
        return {name: t for name, t in factors.items() if not (shares and name == "up.a")}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LoraWeights:
        """The same adapter with every factor changed, one that is shared only once."""
        done: dict[int, Tensor] = {}

        def once(factor: Tensor) -> Tensor:
            if id(factor) not in done:
                done[id(factor)] = change(factor)
            return done[id(factor)]

        parts = {name: LowRank(once(part.a), once(part.b)) for name, part in self.parts().items()}
        return LoraWeights(**parts)


Adapters = tuple[LoraWeights | None, ...]
"""What adapters add to a layer, by their number; None: nothing."""


def adapter_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """The factors of all adapters by number and name, (L, ...) each."""
    return {
        f"lora.{number}.{name}": tensor
        for number, adapter in enumerate(adapters)
        if adapter is not None
        for name, tensor in adapter.tensors().items()
    }
