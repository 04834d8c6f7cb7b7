"""How router logits become expert ids and weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mixtura.config.choice import Choice, require_finite, require_positive
from mixtura.errors import ConfigError, UnsupportedModel


class ScoreFunction(Choice):
    """How a router logit becomes a score."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"
    LOGIT = "logit"
    SPARSEMIXER = "sparsemixer"


class ScoreOrder(Choice):
    """Whether scores are taken over all experts before the choice, or over the chosen ones after
    it."""

    BEFORE_TOP_K = "before"
    AFTER_TOP_K = "after"


class SelectionBias(Choice):
    """What a learned bias is added to; it chooses experts and never weighs them."""

    NONE = "none"
    ON_SCORE = "score"
    ON_LOGIT = "logit"


class GroupScore(Choice):
    """How a group of experts is scored: its best expert, or the sum of its two best."""

    MAX = "max"
    TOP2_SUM = "top2_sum"


class DroppedGroup(Choice):
    """The selection score that the experts of a dropped group get."""

    NEGATIVE_INFINITY = "-inf"
    ZERO = "0"


class Renormalize(Choice):
    """How the chosen weights w are renormalized; s is their sum.

    NONE: w; SUM: w / (s + epsilon); CLAMPED_SUM: w / max(s, epsilon); P_NORM: w / ||w||_p.
    """

    NONE = "none"
    SUM = "sum"
    CLAMPED_SUM = "clamped_sum"
    P_NORM = "p_norm"


class ScaleOn(Choice):
    """Where the routed scaling factor is applied."""

    WEIGHTS = "weights"
    OUTPUT = "output"


class WeightOn(Choice):
    """Where the routing weight is applied: to an expert's output, or (Llama 4) to its input."""

    OUTPUT = "output"
    INPUT = "input"


class NoComputeKind(Choice):
    """An expert that needs no matrix product: it returns zero, its input, or a stored constant."""

    ZERO = "zero"
    IDENTITY = "identity"
    CONSTANT = "constant"


class Simulation(Choice):
    """Synthetic routing for measurements: what the simulator draws expert ids from."""

    UNIFORM = "uniform"
    NORMAL = "normal"
    ZIPF = "zipf"
    HOT_EXPERT = "hot_expert"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """Restricts the choice to the best `topk_groups` of `num_expert_groups` equal groups."""

    num_expert_groups: int
    topk_groups: int
    score: GroupScore = GroupScore.TOP2_SUM
    dropped: DroppedGroup = DroppedGroup.NEGATIVE_INFINITY

    def __post_init__(self) -> None:
        require_positive("num_expert_groups", self.num_expert_groups)
        require_positive("topk_groups", self.topk_groups)
        if self.topk_groups > self.num_expert_groups:
            raise ConfigError(
                f"topk_groups ({self.topk_groups}) must be at most num_expert_groups; got "
                f"{self.num_expert_groups}. Lower topk_groups."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoComputeExperts:
    """`count` experts without arithmetic; their ids follow the real ones: E .. E + count - 1."""

    kind: NoComputeKind
    count: int

    def __post_init__(self) -> None:
        require_positive("no_compute.count", self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Draws ids instead of choosing them; `seed` fixes the draw, `exponent` shapes ZIPF.

    A draw, and the first row of a replay, begin anew with every pass through the router: a layer
    that sends its tokens in chunks repeats them with every chunk.
    """

    kind: Simulation
    seed: int = 0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        require_finite("simulation.exponent", self.exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeGate:
    """The arithmetic a model family uses for its own gate, kept by `gate="native"`.

    Attributes:
        fp32_logits: the gate product is taken in fp32, whatever the model's dtype.
        fp32_scores: scores are computed in fp32 from the logits.
        fp32_weights: routing weights stay fp32; else they are rounded to the model's dtype.
    """

    fp32_logits: bool = False
    fp32_scores: bool = True
    fp32_weights: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How router logits become expert ids and weights.

    One pipeline covers the field: transform logits -> score -> add selection bias -> restrict to
    groups -> top-k -> weigh -> renormalize -> scale.

    Attributes:
        num_experts: E, the experts that compute.
        top_k: K, slots per token (before fused shared experts are appended).
        score, score_order: the function, over all experts before the choice or the chosen after it.
        selection_bias: what a learned bias is added to.
        groups: restrict the choice to the best groups.
        renormalize, epsilon, p_norm: what is done to the chosen weights.
        scale, scale_on: the routed scaling factor, on the weights or on the layer's routed output.
        weight_on: whether an expert's output or its input is weighed.
        logit_multiplier, logit_softcap: `cap * tanh(m * x / cap)` on the logits.
        jitter: half the relative window of the sparsemixer score.
        per_expert_scale: weights are multiplied by a learned factor of their expert.
        no_compute: experts behind the real ones that need no arithmetic.
        simulation: ids are drawn instead of chosen.
        native: a family's own arithmetic, where the gate is to keep it.
        num_fused_shared_experts: S shared experts appended to every token as slots E .. E+S-1, with
            weight 1 (divided by a scale on the output), or, with `fused_shared_gate`, with the
            sigmoid of S further logits.
        hash_routing: ids come from a table indexed by token id; the scores only weigh.

    Raises:
        ConfigError: a combination that no router honours.
    """

    num_experts: int
    top_k: int
    score: ScoreFunction = ScoreFunction.SOFTMAX
    score_order: ScoreOrder = ScoreOrder.BEFORE_TOP_K
    selection_bias: SelectionBias = SelectionBias.NONE
    groups: GroupLimit | None = None
    renormalize: Renormalize = Renormalize.NONE
    epsilon: float = 0.0
    p_norm: float = 2.0
    scale: float = 1.0
    scale_on: ScaleOn = ScaleOn.WEIGHTS
    weight_on: WeightOn = WeightOn.OUTPUT
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    jitter: float = 0.01
    per_expert_scale: bool = False
    hash_routing: bool = False
    no_compute: NoComputeExperts | None = None
    num_fused_shared_experts: int = 0
    fused_shared_gate: bool = False
    simulation: SimulationConfig | None = None
    native: NativeGate = field(default_factory=NativeGate)

    HF_RULES: ClassVar[dict[str, Callable[[Any, int], RoutingConfig]]] = {}
    HF_NOT_COVERED: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        require_positive("num_experts", self.num_experts)
        require_positive("top_k", self.top_k)
        require_positive("num_fused_shared_experts", self.num_fused_shared_experts, minimum=0)
        for name in ("epsilon", "p_norm", "scale", "logit_multiplier", "jitter"):
            require_finite(name, getattr(self, name))
        if self.top_k > self.num_choices:
            raise ConfigError(
                f"top_k ({self.top_k}) must be at most the number of experts; got "
                f"{self.num_choices} experts. Lower top_k."
            )
        if self.epsilon < 0:
            raise ConfigError(f"epsilon ({self.epsilon}) must be >= 0. Use 0 for none.")
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise ConfigError(
                f"logit_softcap ({self.logit_softcap}) must be > 0. Use None for no soft-cap."
            )
        self._check_groups()
        self._check_combinations()

    def _check_groups(self) -> None:
        if self.groups is None:
            return
        count = self.groups.num_expert_groups
        if self.num_choices % count:
            fits = [d for d in range(1, self.num_choices + 1) if self.num_choices % d == 0]
            raise ConfigError(
                f"num_experts ({self.num_choices}) must be divisible by num_expert_groups; got "
                f"{count}. Use one of {fits}."
            )
        size = self.num_choices // count
        if self.groups.score is GroupScore.TOP2_SUM and size < 2:
            raise ConfigError(
                f"num_expert_groups ({count}) must leave two experts to a group for the score "
                f"top2_sum; got {size}. Use GroupScore.MAX or fewer groups."
            )
        if self.top_k > size * self.groups.topk_groups:
            raise ConfigError(
                f"top_k ({self.top_k}) must be at most the experts of the kept groups; got "
                f"{self.groups.topk_groups} groups of {size}. Keep more groups."
            )

    def _check_combinations(self) -> None:
        after = self.score_order is ScoreOrder.AFTER_TOP_K
        clashes: list[tuple[bool, str, str]] = [
            (
                after and self.selection_bias is SelectionBias.ON_SCORE,
                "score_order 'after' with a selection bias on the score",
                "put the bias on the logit",
            ),
            (
                self.hash_routing
                and (self.groups is not None or self.selection_bias is not SelectionBias.NONE),
                "hash routing with groups or a selection bias",
                "drop them: the table alone chooses",
            ),
            (
                self.hash_routing and after and self.score is not ScoreFunction.SOFTMAX,
                "hash routing with scores after top-k",
                "score before",
            ),
            (
                self.score is ScoreFunction.SPARSEMIXER
                and (
                    self.top_k != 2
                    or after
                    or self.groups is not None
                    or self.hash_routing
                    or self.selection_bias is not SelectionBias.NONE
                ),
                "the sparsemixer score with top_k other than 2, groups, a bias, a hash table or "
                "'after'",
                "use another score",
            ),
            (
                self.no_compute is not None
                and self.scale != 1.0
                and self.scale_on is ScaleOn.OUTPUT,
                "no-compute experts with a scale on the output",
                "put the scale on the weights",
            ),
            (
                self.fused_shared_gate and self.num_fused_shared_experts == 0,
                "fused_shared_gate with no fused shared experts",
                "set num_fused_shared_experts",
            ),
            (
                self.num_fused_shared_experts > 0 and self.output_scale == 0.0,
                "fused shared experts with a scale of 0 on the output",
                "run the shared experts apart",
            ),
            (
                self.no_compute is not None and self.num_fused_shared_experts > 0,
                "no-compute experts with fused shared experts",
                "run the shared experts apart",
            ),
            (
                self.no_compute is not None and self.per_expert_scale,
                "no-compute experts with a scale per expert",
                "drop per_expert_scale",
            ),
            (
                self.weight_on is WeightOn.INPUT and self.no_compute is not None,
                "no-compute experts with the weight on the input",
                "weigh the output",
            ),
        ]
        for clash, what, mend in clashes:
            if clash:
                raise ConfigError(f"RoutingConfig must not combine {what}. To mend it, {mend}.")

    @property
    def num_choices(self) -> int:
        """What top-k chooses from: real experts and those without arithmetic."""
        return self.num_experts + (self.no_compute.count if self.no_compute else 0)

    @property
    def num_logits(self) -> int:
        """Columns of the router logits: the choices, and the gates of fused shared experts."""
        gated = self.num_fused_shared_experts if self.fused_shared_gate else 0
        return self.num_choices + gated

    @property
    def num_slots(self) -> int:
        """Columns of `Routing.topk_ids`: top_k and the fused shared experts."""
        return self.top_k + self.num_fused_shared_experts

    @property
    def output_scale(self) -> float:
        """The factor on the layer's routed output (1.0 where the weights carry the scale)."""
        return self.scale if self.scale_on is ScaleOn.OUTPUT else 1.0

    @classmethod
    def from_hf(cls, hf_config: Any, *, layer_index: int = 0) -> RoutingConfig:
        """Read a Transformers configuration's routing rule for one layer.

        Args:
            hf_config: a Transformers configuration object (or any object with the same attributes).
            layer_index: the decoder layer; some families route differently by layer.

        Raises:
            UnsupportedModel: the family's rule is not one that the pipeline covers.
        """
        # The table is filled by the module that holds the rules, which this one must not import.
        importlib.import_module("mixtura.routing.families")
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        model_type = str(getattr(text, "model_type", None))
        rule = cls.HF_RULES.get(model_type)
        if rule is None:
            reason = cls.HF_NOT_COVERED.get(model_type, f"none of the {len(cls.HF_RULES)} known")
            raise UnsupportedModel(
                f"model_type ({model_type!r}) must be a family with a known routing rule; got one "
                f"that is not: {reason}. Replace its experts only, or add a rule in "
                f"mixtura/routing/families.py."
            )
        return rule(text, layer_index)
