"""The routed experts of one layer: sizes, activation, storage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mixtura.config.choice import MAX_ELEMENTS, Choice, require_finite, require_positive
from mixtura.errors import ConfigError


class ActivationFunction(Choice):
    """The scalar function of an expert; a gated expert multiplies it with the up half."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU_SQUARED = "relu2"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    IDENTITY = "identity"


class ActivationDtype(Choice):
    """The arithmetic of products with quantized weights: what the activations are rounded to.

    INT8 has a scale for each row, or for each of its groups of columns, or the checkpoint's. So has
    FP8, with e4m3 codes. BF16 is nearer to the truth and slower, and leaves a checkpoint's scales
    unused. A processor without products of bf16 takes fp32 in its place, and the torch kernel the
    dtype of the rows.
    """

    INT8 = "int8"
    FP8 = "fp8"
    BF16 = "bf16"


class LimitOn(Choice):
    """Which value the limit clamps: the gate before the function, or the function's result."""

    GATE = "gate"
    ACTIVATED = "activated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """`f(g) * (u + up_offset)` for gated experts, `f(g)` for ungated ones.

    f is `function`; for SILU it is `g * sigmoid(alpha * g)`. With `limit` c: u is clamped to [-c,
    c], and g (LimitOn.GATE) or f(g) (LimitOn.ACTIVATED) is clamped from above by c. With
    `gate_softcap` b: the linear factor of SILU becomes `b * tanh(g / b)`; with `up_softcap` b, u
    becomes `b * tanh(u / b)`. GPT-OSS: SILU, alpha 1.702, limit 7, up_offset 1.
    """

    function: ActivationFunction = ActivationFunction.SILU
    alpha: float = 1.0
    limit: float | None = None
    limit_on: LimitOn = LimitOn.GATE
    up_offset: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None

    def __post_init__(self) -> None:
        require_finite("alpha", self.alpha)
        require_finite("up_offset", self.up_offset)
        for name in ("limit", "gate_softcap", "up_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"{name} ({value!r}) must be a positive number. Use None for none."
                )
        if self.function is not ActivationFunction.SILU and (
            self.alpha != 1.0 or self.gate_softcap is not None
        ):
            raise ConfigError(
                "alpha and gate_softcap must go with the silu activation; got "
                f"{self.function.value}. Drop them."
            )

    @property
    def has_gated_terms(self) -> bool:
        """Whether a value is set that only a gated expert has a use for."""
        return self.up_offset != 0.0 or self.up_softcap is not None


SWIGLU_OAI = Activation(alpha=1.702, limit=7.0, up_offset=1.0)
"""The activation of GPT-OSS (source: its model card and reference code's constants)."""


class GateUp(Choice):
    """How the gate and up halves of an expert's first projection are stored.

    STACKED: rows gate 0..I-1, up 0..I-1 of one tensor; INTERLEAVED: rows gate 0, up 0, gate 1, ...;
    SEPARATE: two tensors; UNGATED: there is no gate, the tensor is the up projection.
    """

    STACKED = "stacked"
    INTERLEAVED = "interleaved"
    SEPARATE = "separate"
    UNGATED = "ungated"


class PostNorm(Choice):
    """A norm over each expert's output, before the routing weight.

    RMS: `x / rms(x) * w`; RMS_SCALE_FIRST: `y / rms(y)` with `y = x * (1 + w)` (Muse Spark).
    """

    RMS = "rms"
    RMS_SCALE_FIRST = "rms_scale_first"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The routed experts of one layer: sizes, activation, storage.

    Attributes:
        num_experts: E experts that compute.
        hidden_size: H, width of what an expert reads and writes.
        intermediate_size: I, width of one expert's hidden layer.
        is_transposed: parameters are stored (E, in, out), not (E, out, in).
        has_bias: both projections have a bias.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = field(default_factory=Activation)
    gate_up: GateUp = GateUp.STACKED
    is_transposed: bool = False
    has_bias: bool = False
    post_norm: PostNorm | None = None
    post_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require_positive("num_experts", self.num_experts)
        require_positive("hidden_size", self.hidden_size)
        require_positive("intermediate_size", self.intermediate_size)
        require_finite("post_norm_epsilon", self.post_norm_epsilon)
        if self.num_experts * self.hidden_size * self.up_size >= MAX_ELEMENTS:
            raise ConfigError(
                f"num_experts * hidden_size * intermediate_size ({self.num_experts} * "
                f"{self.hidden_size} * {self.intermediate_size}) must be below 2**62. Correct the "
                "sizes."
            )
        if self.gate_up is GateUp.UNGATED and self.activation.has_gated_terms:
            raise ConfigError(
                "activation.up_offset and up_softcap must go with gated experts; got ungated ones. "
                "Drop them."
            )

        if self.gate_up is GateUp.SEPARATE and self.has_bias:
            raise ConfigError(
                "has_bias must be False where gate and up are separate tensors; got True. Stack "
                "them."
            )

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate half beside the up half."""
        return self.gate_up is not GateUp.UNGATED

    @property
    def up_size(self) -> int:
        """Rows of the first projection's tensor: 2I where it holds gate and up, else I."""
        has_both = self.gate_up in (GateUp.STACKED, GateUp.INTERLEAVED)
        return self.intermediate_size * (2 if has_both else 1)
