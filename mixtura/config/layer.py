"""Shared experts, runner, gate, and the layer they make up."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixtura.config.choice import Choice, require_positive
from mixtura.config.experts import Activation, ActivationDtype, ExpertsConfig
from mixtura.config.routing import NoComputeKind, RoutingConfig
from mixtura.errors import ConfigError


class SharedExpertsOrder(Choice):
    """When the shared experts run; each row runs exactly once whichever it is.

    NONE: there are none. EXTERNAL: the caller gets their output apart and adds it. NO_OVERLAP:
        before the routed experts. SUMMED: each of the ranks that hold the same tokens runs a part
        of them, which is summed over the ranks with the routed experts' results.
    MK_INTERNAL_OVERLAPPED: between dispatch and combine of a dispatcher that waits on other ranks.
    MULTI_STREAM_OVERLAPPED: on an auxiliary stream beside gate, router and experts. FUSED: as
        extra slots of the routed experts.
    """

    NONE = "none"
    EXTERNAL = "external"
    NO_OVERLAP = "no_overlap"
    SUMMED = "summed"
    MK_INTERNAL_OVERLAPPED = "mk_internal_overlapped"
    MULTI_STREAM_OVERLAPPED = "multi_stream_overlapped"
    FUSED = "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpertsConfig:
    """Experts that every token visits, as one MLP of width `intermediate_size`.

    Attributes:
        has_sigmoid_gate: the output is multiplied by `sigmoid(x @ gate.T)` (Qwen2-MoE).
        is_external: hand the output back apart from the routed one.
        uses_stream: run on an auxiliary CUDA stream while there are at most `stream_max_tokens`
            tokens and autograd does not record.
    """

    intermediate_size: int
    activation: Activation = field(default_factory=Activation)
    is_gated: bool = True
    has_bias: bool = False
    has_sigmoid_gate: bool = False
    is_external: bool = False
    uses_stream: bool = True
    stream_max_tokens: int = 256

    def __post_init__(self) -> None:
        require_positive("shared intermediate_size", self.intermediate_size)
        require_positive("stream_max_tokens", self.stream_max_tokens, minimum=0)
        if not self.is_gated and self.activation.has_gated_terms:
            raise ConfigError(
                "activation.up_offset and up_softcap must go with gated shared experts; got "
                "ungated ones. Drop them."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """When things run.

    Attributes:
        max_rows_per_pass: so many tokens go through the layer at a time; None: all at once.
        overlap_min_tokens: from so many tokens on every rank on, a batch goes through the layer in
            two, one's exchange between ranks beside the other's experts. None: never.
    """

    max_rows_per_pass: int | None = None
    overlap_min_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows_per_pass is not None:
            require_positive("max_rows_per_pass", self.max_rows_per_pass)
        if self.overlap_min_tokens is not None:
            require_positive("overlap_min_tokens", self.overlap_min_tokens, minimum=2)


class GatePrecision(Choice):
    """`fp32`: gate product, scores and weights in fp32. `native`: the arithmetic of the model's
    family."""

    FP32 = "fp32"
    NATIVE = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """One MoE layer.

    Attributes:
        hidden_size: H of the layer's input and output; the experts' own width differs with latent
            experts.
        has_gate_bias: the gate is a linear map with bias.
        has_latent: a projection into and out of the experts' width goes around the routed experts.
        deterministic: bitwise the same row whatever else is in the batch, with any number of
            threads and ranks.
        debug: check logits and ids on every call.
        activation_dtype: the arithmetic with quantized experts; None leaves it to the kernel.
    """

    hidden_size: int
    routing: RoutingConfig
    experts: ExpertsConfig
    shared: SharedExpertsConfig | None = None
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    gate: GatePrecision = GatePrecision.FP32
    has_gate_bias: bool = False
    has_latent: bool = False
    deterministic: bool = False
    debug: bool = False
    activation_dtype: ActivationDtype | None = None

    @property
    def adds_shared_to_rows(self) -> bool:
        """Whether nothing is done to the routed experts' sum before the shared ones are added."""
        is_added = self.shared is not None and not self.shared.is_external
        return is_added and not self.has_latent and self.routing.output_scale == 1.0

    def __post_init__(self) -> None:
        require_positive("hidden_size", self.hidden_size)
        expected = self.routing.num_experts + self.routing.num_fused_shared_experts
        if self.experts.num_experts != expected:
            raise ConfigError(
                f"experts.num_experts ({self.experts.num_experts}) must equal routing.num_experts "
                f"plus the fused shared experts; got {expected}. Make them agree."
            )
        if not self.has_latent and self.experts.hidden_size != self.hidden_size:
            raise ConfigError(
                f"experts.hidden_size ({self.experts.hidden_size}) must equal hidden_size; got "
                f"{self.hidden_size}. Set has_latent, or make them agree."
            )
        if self.routing.num_fused_shared_experts and self.shared is not None:
            raise ConfigError(
                "shared must be None where shared experts are fused into the routed ones; got "
                "both. Drop one."
            )
        if self.deterministic and self.routing.simulation is not None:
            kind = self.routing.simulation.kind.value
            raise ConfigError(
                f"simulation ({kind}) must be None with deterministic=True, as it chooses by a "
                f"row's place in the batch. Drop one."
            )
        if self.has_latent and self.routing.no_compute is not None:
            width = self.experts.hidden_size
            if self.routing.no_compute.kind is NoComputeKind.CONSTANT and width != self.hidden_size:
                raise ConfigError(
                    "constant experts must not stand behind a latent projection. Use identity or "
                    "zero."
                )
