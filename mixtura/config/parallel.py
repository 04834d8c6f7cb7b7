"""How a layer is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mixtura.config.choice import Choice, require_finite, require_positive
from mixtura.errors import ConfigError


class DispatcherName(Choice):
    """How rows meet their experts.

    ALL_REDUCE: every rank runs its experts on the tokens that all ranks hold, and the results are
    summed. ALL_GATHER: every rank gets every rank's rows, and results are reduced and scattered.
    ALL_TO_ALL: a row goes once to each rank that has experts of its. DEEP_EP: the same by the
    package of that name, on GPUs.
    """

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    DEEP_EP = "deep_ep"


class TokensHeld(Choice):
    """Which tokens a rank brings to the layer.

    SHARED: all ranks hold one batch, as attention is replicated. OWN: every rank has its own
    requests (data-parallel attention), or its own part of a sequence.
    """

    SHARED = "shared"
    OWN = "own"


class WireFormat(Choice):
    """What rows travel as: the model's dtype, or 8-bit codes with a scale for 128 columns."""

    MODEL = "model"
    INT8 = "int8"
    FP8 = "fp8"


class PlacementStrategy(Choice):
    """Which rank holds an expert: consecutive experts to a rank, or one after the other in turn."""

    LINEAR = "linear"
    ROUND_ROBIN = "round_robin"


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbConfig:
    """Expert load balancing.

    Attributes:
        policy: name of the policy that plans placements.
        interval: forwards between plans.
        min_gain: the relative gain of step time below which a plan is not carried out.
        max_moved_fraction: at most this part of a layer's slots changes with one plan.
        seconds_per_step: how long a forward may be held up by a migration.
        stall_seconds: a migration that makes no progress for so long is given up, and balancing
            with it.
    """

    policy: str = "local_search"
    interval: int = 512
    min_gain: float = 0.02
    max_moved_fraction: float = 0.15
    seconds_per_step: float = 0.005
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_positive("eplb.interval", self.interval)
        for name in ("min_gain", "max_moved_fraction", "seconds_per_step", "stall_seconds"):
            require_finite(f"eplb.{name}", getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"eplb.{name} ({getattr(self, name)}) must be >= 0. Correct it in the "
                    f"configuration."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the experts of a layer are spread over ranks.

    Attributes:
        ep_size: R, groups of ranks that hold different experts.
        tp_size: ranks among which every expert's intermediate size is cut.
        tokens: which tokens a rank brings.
        dispatcher: how rows meet their experts; None decides from sizes.
        wire: what rows travel as, with ALL_GATHER and ALL_TO_ALL.
        placement: which rank holds which expert at the start.
        num_redundant_experts: slots beyond one for each expert; they need `eplb`.
        eplb: balancing of the load; None is off.
    """

    ep_size: int = 1
    tp_size: int = 1
    tokens: TokensHeld = TokensHeld.SHARED
    dispatcher: DispatcherName | None = None
    wire: WireFormat = WireFormat.MODEL
    placement: PlacementStrategy = PlacementStrategy.LINEAR
    num_redundant_experts: int = 0
    eplb: EplbConfig | None = None

    def __post_init__(self) -> None:
        require_positive("ep_size", self.ep_size)
        require_positive("tp_size", self.tp_size)
        require_positive("num_redundant_experts", self.num_redundant_experts, minimum=0)
        if self.num_redundant_experts and self.eplb is None:
            raise ConfigError(
                f"num_redundant_experts ({self.num_redundant_experts}) must come with eplb, which "
                f"chooses what they hold; got none. Set eplb, or drop the redundant experts."
            )
        if self.dispatcher is DispatcherName.ALL_REDUCE and self.tokens is TokensHeld.OWN:
            raise ConfigError(
                "dispatcher (all_reduce) must have tokens that all ranks share; got tokens='own'. "
                "Use all_to_all or all_gather."
            )
        if self.dispatcher is DispatcherName.ALL_REDUCE and self.wire is not WireFormat.MODEL:
            raise ConfigError(
                f"wire ({self.wire.value}) must be 'model' with all_reduce, which sums results "
                f"and sends no rows. Use another dispatcher."
            )

    @property
    def num_ranks(self) -> int:
        """Ranks in all: ep_size x tp_size."""
        return self.ep_size * self.tp_size
