"""Where the time of a model goes: exclusive seconds of its parts, by hooks on its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from time import perf_counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixtura.experts import PackedExperts
from mixtura.hf import moe_layers


class Part(Enum):
    """A part of a model, in the order in which tables show them."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    ROUTER = "router"
    NORMS = "norms"
    HEAD = "head"
    SHARED = "shared experts and dense layers"
    MOE = "MoE blocks around their experts"
    REST = "Python and the rest"


ROUTER_NAMES = ("gate", "router")
"""What routers are called, by the last part of their path."""


class PartClock:
    """Adds up the time of each part; a part's time is without that of the parts inside it.

    Parts are found by module: what runs outside any, in the decoder layers and in the loop that
    makes tokens, is `Part.REST`. The hooks themselves cost a few microseconds a module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = _find_parts(model)
        self.seconds = dict.fromkeys(Part, 0.0)
        self._open = [Part.REST]
        self._since = perf_counter()

    def restart(self) -> None:
        """Forget what was added up."""
        self.seconds = dict.fromkeys(Part, 0.0)
        self._since = perf_counter()

    def stop(self) -> dict[Part, float]:
        """Seconds by part since the last start; they add up to all of the time."""
        self._note()
        return dict(self.seconds)

    def _note(self) -> None:
        now = perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the model's modules during the block."""
        handles = []
        for module, part in self.parts.items():

            def enter(*_: Any, part: Part = part) -> None:
                self._note()
                self._open.append(part)

            def leave(*_: Any) -> None:
                self._note()
                self._open.pop()

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._open = [Part.REST]


def _find_parts(model: PreTrainedModel) -> dict[nn.Module, Part]:
    """The modules to watch; those inside a watched one count apart where they are a part."""
    blocks = {layer.name for layer in moe_layers(model)}
    head = model.get_output_embeddings()
    found: dict[nn.Module, Part] = {}
    for name, module in model.named_modules():
        part = Part.HEAD if module is head else _part_of(name, module, blocks)
        if part is not None:
            found[module] = part
    return found


def _part_of(name: str, module: nn.Module, blocks: set[str]) -> Part | None:
    kind, (parent, _, last) = type(module).__name__, name.rpartition(".")
    if isinstance(module, PackedExperts) or kind.endswith("Experts"):
        return Part.EXPERTS
    if "Norm" in kind:
        return Part.NORMS
    if kind.endswith(("Attention", "DeltaNet", "Mixer")):
        return Part.ATTENTION
    if (parent in blocks and last in ROUTER_NAMES) or kind.endswith("Router"):
        return Part.ROUTER
    if name in blocks:
        return Part.MOE
    return Part.SHARED if kind.endswith("MLP") else None
