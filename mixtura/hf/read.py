"""Reads a family's modules into our configuration: flags say the layout, probes say the arithmetic.

Activations are recognised by what they compute on a grid of numbers, not by their names, so that a
family whose arithmetic is not ours is found out instead of being run wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import (
    Activation,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    PostNorm,
    SharedExpertsConfig,
)
from mixtura.errors import UnsupportedModel
from mixtura.experts import StoredTensor, default_storage
from mixtura.kernels.reference.activation import activate
from mixtura.kernels.reference.norm import post_norm

PROBE = torch.tensor(
    [-3e3, -8, -3, -1.6, -1, -0.5, -0.1, 0, 0.3, 0.5, 1, 1.5, 2, 3, 7.5, 11, 20, 3e3],
    dtype=torch.float32,
    device="cpu",
)
"""Gate and up values: fine near zero where functions differ, wide enough for every limit."""

LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")
SOFTCAP_NAMES = ("mlp_gate_softcap", "mlp_up_softcap")
QUICK_GELU_ALPHA = 1.702


def read_activation(module: nn.Module, *, is_gated: bool, layout: GateUp) -> Activation:
    """The activation that an experts or MLP module computes.

    Raises:
        UnsupportedModel: it is none that our kernels compute.
    """
    computed = _probe_gated(module, layout) if is_gated else _probe_ungated(module)
    gate, up = _grid()
    for candidate in _candidates(module, is_gated=is_gated):
        expected = activate(gate, up if is_gated else None, candidate)
        if torch.allclose(computed, expected, rtol=1e-5, atol=1e-6):
            return candidate
    raise UnsupportedModel(
        f"the activation of {type(module).__name__} must be one that mixtura computes; got "
        f"another. Keep this model's own experts (experts_implementation='eager')."
    )


def _grid() -> tuple[Tensor, Tensor]:
    return PROBE.repeat_interleave(len(PROBE)), PROBE.repeat(len(PROBE))


def _act_fn(module: nn.Module) -> Callable[[Tensor], Tensor]:
    for name in ("act_fn", "activation_fn", "activation"):
        function: Any = getattr(module, name, None)
        if callable(function):
            return function  # type: ignore[no-any-return]
    raise UnsupportedModel(
        f"{type(module).__name__} must have an activation function (act_fn, activation_fn or "
        f"activation); got none. Keep this model's own experts."
    )


@torch.no_grad()
def _probe_gated(module: nn.Module, layout: GateUp) -> Tensor:
    gate, up = _grid()
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        return _act_fn(module)(gate) * up
    if layout is GateUp.INTERLEAVED:
        return apply_gate(torch.stack([gate, up], -1).flatten().unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
    return apply_gate(torch.cat([gate, up]).unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]


@torch.no_grad()
def _probe_ungated(module: nn.Module) -> Tensor:
    return _act_fn(module)(_grid()[0])


def _numbers(owner: Any, names: tuple[str, ...]) -> list[float]:
    found = [getattr(owner, name, None) for name in names]
    numbers = [float(x) for x in found if isinstance(x, (int, float)) and not isinstance(x, bool)]
    return [x for x in dict.fromkeys(numbers) if 0 < x < float("inf")]


def _candidates(module: nn.Module, *, is_gated: bool) -> Iterator[Activation]:
    """Activations that the module's own constants allow, the plain ones first."""
    config = getattr(module, "config", None)
    limits: list[float | None] = [None, *_numbers(module, LIMIT_NAMES)]
    alphas = list(dict.fromkeys([1.0, QUICK_GELU_ALPHA, *_numbers(module, ALPHA_NAMES)]))
    caps: list[float | None] = [None, *_numbers(config, SOFTCAP_NAMES)]
    offsets = (0.0, 1.0) if is_gated else (0.0,)
    up_caps = caps if is_gated else [None]
    for limit, offset, cap, up_cap in product(limits, offsets, caps, up_caps):
        for limit_on in LimitOn if limit is not None else (LimitOn.GATE,):
            for alpha in alphas:
                yield Activation(
                    alpha=alpha,
                    limit=limit,
                    limit_on=limit_on,
                    up_offset=offset,
                    gate_softcap=cap,
                    up_softcap=up_cap,
                )
            if cap is None:
                for function in ActivationFunction:
                    if function is not ActivationFunction.SILU:
                        yield Activation(
                            function=function,
                            limit=limit,
                            limit_on=limit_on,
                            up_offset=offset,
                            up_softcap=up_cap,
                        )


def read_experts(module: nn.Module) -> tuple[ExpertsConfig, dict[str, StoredTensor]]:
    """Configuration and storage of an experts module that follows Transformers' conventions.

    Raises:
        UnsupportedModel: its activation or norm is none that our kernels compute.
    """
    flags: Any = module
    is_gated = bool(getattr(flags, "has_gate", True))
    is_transposed = bool(getattr(flags, "is_transposed", False))
    concatenated = bool(getattr(flags, "is_concatenated", True))
    gate_up = (
        GateUp.UNGATED if not is_gated else (GateUp.STACKED if concatenated else GateUp.INTERLEAVED)
    )
    down: Tensor = flags.down_proj
    count, *sizes = down.shape
    intermediate, hidden = sizes if is_transposed else sizes[::-1]
    norm = (
        read_post_norm(flags.post_expert_norm)
        if getattr(flags, "has_post_expert_norm", False)
        else None
    )
    config = ExpertsConfig(
        num_experts=count,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=read_activation(module, is_gated=is_gated, layout=gate_up),
        gate_up=gate_up,
        is_transposed=is_transposed,
        has_bias=bool(getattr(flags, "has_bias", False)),
        post_norm=norm[0] if norm else None,
        post_norm_epsilon=norm[1] if norm else 1e-6,
    )
    storage = default_storage(config)
    first = storage["gate_up_proj"]
    if first.read(module).shape[0] != count:  # LongCat: rows for zero experts behind the real ones
        storage["gate_up_proj"] = StoredTensor(
            first.path, is_transposed=first.is_transposed, num_rows=count
        )
    return config, storage


def read_post_norm(norm: nn.Module) -> tuple[PostNorm, float]:
    """Which norm a module is, by what a fresh one of its class computes, and its epsilon."""
    anything: Any = norm
    epsilon = float(getattr(anything, "eps", getattr(anything, "variance_epsilon", 1e-6)))
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        rows, weight = torch.randn(3, 8, generator=generator), torch.rand(8, generator=generator)
        fresh: Any = type(norm)(8, eps=epsilon).float()
        fresh.weight.copy_(weight)
        computed = fresh(rows)
    for kind in PostNorm:
        if torch.allclose(computed, post_norm(rows, weight, kind, epsilon), rtol=1e-5, atol=1e-6):
            return kind, epsilon
    raise UnsupportedModel(
        f"the norm {type(norm).__name__} after each expert must be one that mixtura computes; got "
        f"another. Keep this model's own experts."
    )


def read_shared_experts(mlp: nn.Module, *, has_sigmoid_gate: bool) -> SharedExpertsConfig:
    """Configuration of a shared MLP with `gate_proj`, `up_proj` and `down_proj`."""
    parts: Any = mlp
    limit = _numbers(mlp, LIMIT_NAMES)
    activation = read_activation(mlp, is_gated=True, layout=GateUp.STACKED)
    if limit:
        # A dense MLP has no `_apply_gate` to probe; its limit clamps as Step-3's: checked below.
        activation = Activation(
            function=activation.function, limit=limit[0], limit_on=LimitOn.ACTIVATED
        )
    config = SharedExpertsConfig(
        intermediate_size=parts.up_proj.weight.shape[0],
        activation=activation,
        has_bias=parts.up_proj.bias is not None,
        has_sigmoid_gate=has_sigmoid_gate,
    )
    _check_mlp(mlp, activation)
    return config


class _Fixed(nn.Module):
    """Stands in for a linear layer and returns the same value whatever it is given."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


@torch.no_grad()
def _check_mlp(mlp: nn.Module, activation: Activation) -> None:
    """Run the MLP's own forward on a grid of gate and up values, and compare."""
    gate, up = _grid()
    stand_in = {"gate_proj": _Fixed(gate), "up_proj": _Fixed(up), "down_proj": _Fixed(None)}
    kept = {name: mlp._modules[name] for name in stand_in}
    try:
        mlp._modules.update(stand_in)
        computed = type(mlp).forward(mlp, gate)
    finally:
        mlp._modules.update(kept)
    if not torch.allclose(computed, activate(gate, up, activation), rtol=1e-5, atol=1e-6):
        raise UnsupportedModel(
            f"the shared experts {type(mlp).__name__} must compute down(f(gate(x)) * up(x)); got "
            f"something else. Keep this model's own block."
        )
