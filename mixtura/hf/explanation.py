"""What `explain` finds, as plain data: layers, groups of layers that are alike, the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mixtura.kernels import Rejection

LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A module path's first part that is a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsExplanation:
    """The experts of one layer, and what runs them.

    Attributes:
        num_experts: E. num_no_compute: choices without arithmetic beside them.
        top_k: K, or None where only the family's own router knows it.
        hidden_size: H. intermediate_size: I of one expert. shared_size: I of the shared experts.
        activation: what an expert computes between its projections.
        layout: how gate and up are stored.
        dtype: of the weights when they run, or their format where one was asked for.
        stored_dtype: in the files, where these are here.
        routing: the rule in words.
        is_router_ours: whether mixtura routes, or the family's own router.
        kernel: what runs the experts. rejections: the other kernels, each with its reason.
        kernel_path: how that kernel runs them on this machine, where it has a choice.
        is_fallback: a kernel that is preferred on this device cannot run them.
        asked: what the files ask activations to be rounded to, in words, whatever the kernel does.
        rounds_as_asked: whether they run so, with the scales in the files or found as they mean it.
        num_bytes: of the experts' weights.
        bytes_per_token: weights that a token reads at most: K experts and, where the whole block is
            ours, gate and shared experts; None where K is not known.
    """

    num_experts: int
    num_no_compute: int
    top_k: int | None
    hidden_size: int
    intermediate_size: int
    shared_size: int | None
    activation: str
    layout: str
    dtype: str
    stored_dtype: str | None
    routing: str
    is_router_ours: bool
    kernel: str
    kernel_path: str | None
    rejections: tuple[Rejection, ...]
    is_fallback: bool
    asked: str | None
    rounds_as_asked: bool
    num_bytes: int
    bytes_per_token: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExplanation:
    """One MoE layer of a model.

    Attributes:
        name: the module's path.
        kind: "block" (gate, router, experts and shared experts are ours), "experts" (only the
            experts are), or "none".
        reason: why it is not ours, or not wholly.
        experts: what runs; None where the layer is not ours.
    """

    name: str
    kind: str
    reason: str | None
    experts: ExpertsExplanation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """MoE layers that are alike but for their place.

    Attributes:
        names: their module paths.
        label: what they are called together: "layers 3-60".
        layer: what holds for each of them.
    """

    names: tuple[str, ...]
    label: str
    layer: LayerExplanation


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelExplanation:
    """What would run where.

    Attributes:
        model_type, architecture: the family, and the class that is built.
        device: where it would run. dtype: of the weights, unless a layer says otherwise.
        gate: the arithmetic of the routers that are ours.
        layers: the MoE layers, in order.
        dense: label of the layers beside them that have no experts, or None.
        num_bytes: of all weights.
        bytes_per_token: weights that a token reads at most; the input embedding, of which it reads
            a row, is left out. None where a layer's is not known.
        num_stored: tensors in the files that were compared; 0 where there are no files.
        unused: tensors of the files that the model has no place for.
        checkpoint: what the format of a quantized checkpoint is called; None where it is dense.
        num_packed_linears: linear layers beside the experts that stay packed.
    """

    model_type: str
    architecture: str
    device: str
    dtype: str
    gate: str
    layers: tuple[LayerExplanation, ...]
    dense: str | None
    num_bytes: int
    bytes_per_token: int | None
    num_stored: int
    unused: tuple[str, ...]
    checkpoint: str | None = None
    num_packed_linears: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' weights."""
        return sum(layer.experts.num_bytes for layer in self.layers if layer.experts is not None)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers, those that are alike together."""
        alike: dict[LayerExplanation, list[str]] = {}
        for layer in self.layers:
            pattern = LAYER_NUMBER.sub("*", layer.name, count=1)
            alike.setdefault(replace(layer, name=pattern), []).append(layer.name)
        has_one_pattern = len({layer.name for layer in alike}) == 1
        return tuple(
            LayerGroup(
                names=tuple(names),
                label=_label(names, None if has_one_pattern else layer.name),
                layer=replace(layer, name=names[0]),
            )
            for layer, names in alike.items()
        )


def _label(names: list[str], pattern: str | None) -> str:
    """What layers are called together; their path too, where there is more than one kind."""
    found = [LAYER_NUMBER.search(name) for name in names]
    numbers = {int(match.group()) for match in found if match is not None}
    if not numbers:
        return names[0]
    label = numbered(numbers)
    return label if pattern is None else f"{label} ({pattern})"


def numbered(numbers: set[int]) -> str:
    """Layers by their numbers, consecutive ones as a range.

    Example:
        >>> numbered({0, 3, 4, 5, 9})
        'layers 0, 3-5, 9'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    found = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer {found}" if len(numbers) == 1 else f"layers {found}"
