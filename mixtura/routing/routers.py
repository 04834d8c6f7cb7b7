"""Routers: router logits -> `Routing`.

Each is a configuration of the pipeline or a small step beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mixtura.config import (
    NoComputeKind,
    RoutingConfig,
    ScoreFunction,
    SelectionBias,
    Simulation,
)
from mixtura.errors import ConfigError, InputError
from mixtura.kernels.cpu.routing import CpuRouting
from mixtura.kernels.registry import gpu_routing
from mixtura.routing import pipeline
from mixtura.routing.custom import CustomRouting, find_custom, without_choice
from mixtura.types import Bypass, Routing, TokenInputs

if TYPE_CHECKING:
    from mixtura.kernels.triton.routing import TritonRouting

GPU_DEVICES = ("cuda",)
"""Types of device that a router's kernel in Triton is asked for on."""


@dataclass(frozen=True, slots=True)
class RouterTensors:
    """What a router has learned or been given, apart from the gate.

    Attributes:
        selection_bias: (num_choices,).
        per_expert_scale: (num_experts,).
        hash_table: (vocabulary, K) ids.
        constants: (num_constant_experts, H).
        replayed_ids: (R, K) ids that the simulator plays back.
    """

    selection_bias: Tensor | None = None
    per_expert_scale: Tensor | None = None
    hash_table: Tensor | None = None
    constants: Tensor | None = None
    replayed_ids: Tensor | None = None

    def check(self, config: RoutingConfig) -> None:
        """Raise `ConfigError` where a tensor is missing, not asked for, or of the wrong length."""
        kind = config.no_compute.kind if config.no_compute else None
        constants = config.no_compute.count if config.no_compute else 0
        replays = config.simulation is not None and config.simulation.kind is Simulation.REPLAY
        has_bias = config.selection_bias is not SelectionBias.NONE
        rules: list[tuple[str, bool, tuple[int | str, ...]]] = [
            ("selection_bias", has_bias, (config.num_choices,)),
            ("per_expert_scale", config.per_expert_scale, (config.num_experts,)),
            ("hash_table", config.hash_routing, ("vocabulary", config.top_k)),
            ("constants", kind is NoComputeKind.CONSTANT, (constants, "hidden_size")),
            ("replayed_ids", replays, ("rows", config.top_k)),
        ]
        for name, is_needed, shape in rules:
            tensor: Tensor | None = getattr(self, name)
            if is_needed != (tensor is not None):
                rule = "be given where" if is_needed else "be None unless"
                raise ConfigError(
                    f"{name} must {rule} the routing configuration asks for it; got "
                    f"{'none' if tensor is None else tuple(tensor.shape)}. Make the two agree."
                )
            if tensor is not None and not _has_shape(tensor, shape):
                wanted = ", ".join(str(size) for size in shape)
                raise ConfigError(
                    f"{name} must have the shape ({wanted}) and some rows; got "
                    f"{tuple(tensor.shape)}. Give one value per expert (or slot)."
                )
        for name in ("hash_table", "replayed_ids"):
            ids: Tensor | None = getattr(self, name)
            if ids is not None and ids.numel() and ids.device.type != "meta":
                lowest, highest = int(ids.min()), int(ids.max())
                if lowest < 0 or highest >= config.num_choices:
                    raise ConfigError(
                        f"{name} must hold ids in [0, {config.num_choices}); got {lowest} to "
                        f"{highest}. Correct the table."
                    )


def _has_shape(tensor: Tensor, shape: tuple[int | str, ...]) -> bool:
    """Whether sizes agree; a named size is any but 0."""
    return tensor.ndim == len(shape) and all(
        got == want or (isinstance(want, str) and got > 0)
        for got, want in zip(tensor.shape, shape, strict=True)
    )


def _check_on_cpu(name: str, ids: Tensor, limit: int) -> None:
    """As `_check_range`, on a CPU; other devices are not waited for."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(name, ids, limit)


def _check_range(name: str, ids: Tensor, limit: int) -> None:
    """Raise `InputError` where an id is outside [0, limit)."""
    if ids.numel() == 0:
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= limit:
        raise InputError(
            f"{name} must be in [0, {limit}); got {lowest} to {highest}. Correct the ids."
        )


class Router:
    """Chooses experts for tokens. Stateless: what it has learned comes in as `RouterTensors`.

    `route` is `finish(select(...))`: `select` names the experts that the model was trained with,
    the ones an observer may see; `finish` turns experts without arithmetic into -1 and a bypass.

    Args:
        config: the rule.
        tensors: used when a call brings none.
    """

    is_parametric: ClassVar[bool] = True
    """The pipeline does all; kernels that compute it may stand in."""

    def __init__(self, config: RoutingConfig, tensors: RouterTensors | None = None) -> None:
        self.config = config
        self.tensors = tensors if tensors is not None else RouterTensors()
        self.kernel = CpuRouting.for_rule(config) if self.is_parametric else None

    def route(
        self,
        router_logits: Tensor,
        input_ids: Tensor | None = None,
        *,
        tokens: TokenInputs | None = None,
    ) -> Routing:
        """Route tokens by their logits.

        Args:
            router_logits: (T, num_logits), any float dtype.
            input_ids: (T,) token ids, for hash routing; short for `tokens=TokenInputs(input_ids)`.
            tokens: everything else that tokens bring along.

        Returns:
            `Routing` with fp32 weights and int32 ids.

        Raises:
            InputError: the logits have another width; token ids or replayed ids are missing,
                misshapen or (seen on a CPU only) out of range.
        """
        if router_logits.ndim != 2 or router_logits.shape[1] != self.config.num_logits:
            raise InputError(
                f"router_logits must be (tokens, {self.config.num_logits}); got the shape "
                f"{tuple(router_logits.shape)}. Check the gate against the routing configuration."
            )
        tokens = tokens if tokens is not None else TokenInputs(input_ids=input_ids)
        tokens.check(router_logits.shape[0])
        weights, ids, routing = self.choose(router_logits.float(), tokens, self.tensors)
        return routing or self.finish(weights, ids, tokens, self.tensors)

    def choose(
        self, logits: Tensor, tokens: TokenInputs, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Weights and ids of `select`, and what `finish` makes of them where a kernel does both.

        The ids are then int32.
        """
        is_covered = self.is_parametric and logits.device.type in GPU_DEVICES
        kernel: TritonRouting | None = gpu_routing(self.config) if is_covered else None
        bias, scale = tensors.selection_bias, tensors.per_expert_scale
        if kernel is None or not kernel.takes_logits(logits, bias, scale):
            return *self.select(logits, tokens, tensors), None
        given, mask = self.given_ids(tokens, tensors), tokens.padding_mask
        return kernel.route(logits, bias, scale, given, mask, tensors.constants)

    def select(
        self, logits: Tensor, tokens: TokenInputs, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor]:
        """Weights (T,K) and ids (T,K) int64 in [0, num_choices), shared slots at E .. E+S-1."""
        given = self.given_ids(tokens, tensors)
        bias, scale = tensors.selection_bias, tensors.per_expert_scale
        if self.kernel is not None and self.kernel.takes_logits(logits, bias, scale):
            return self.kernel.route(logits, bias, scale, given)
        return self.select_by_steps(logits, given, tensors)

    def select_by_steps(
        self, logits: Tensor, given: Tensor | None, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor]:
        """`select` in torch: on any device, in any float dtype, with gradients."""
        choices = pipeline.transform_logits(logits, self.config)
        ids = given
        if ids is None:
            ids = pipeline.choose(choices, self.config, tensors.selection_bias)
        weights = pipeline.weigh(choices, ids, self.config)
        if tensors.per_expert_scale is not None:
            weights = weights * tensors.per_expert_scale.float()[ids]
        # A NaN logit makes all weights of its token NaN: it cannot hide in an unchosen expert.
        return weights.masked_fill(logits.isnan().any(-1, keepdim=True), float("nan")), ids

    def given_ids(self, tokens: TokenInputs, tensors: RouterTensors) -> Tensor | None:
        """Ids (T,K) int64 that replace the choice, or None."""
        return None if tokens.replayed_ids is None else self.replay(tokens.replayed_ids)

    def replay(self, replayed_ids: Tensor) -> Tensor:
        """Ids (T,K) int64 that a token brought along, checked."""
        if replayed_ids.shape[1:] != (self.config.top_k,):
            raise InputError(
                f"replayed_ids must be (tokens, {self.config.top_k}); got the shape "
                f"{tuple(replayed_ids.shape)}. Record them with this routing configuration."
            )
        _check_on_cpu("replayed_ids", replayed_ids, self.config.num_choices)
        return replayed_ids.long()

    def check_tokens(self, tokens: TokenInputs, tensors: RouterTensors) -> None:
        """Raise `InputError` where ids that tokens bring along would index beyond a table.

        Waits for the device, and so is for debugging; on a CPU the same is checked on every call.
        """
        if tokens.replayed_ids is not None:
            _check_range("replayed_ids", tokens.replayed_ids, self.config.num_choices)
        if tokens.input_ids is not None and tensors.hash_table is not None:
            _check_range("input_ids", tokens.input_ids, tensors.hash_table.shape[0])

    def finish(
        self, weights: Tensor, ids: Tensor, tokens: TokenInputs, tensors: RouterTensors
    ) -> Routing:
        """Turn slots of no-compute experts and of padding tokens into -1, and say what they add."""
        bypass = None
        ids = ids.to(torch.int32)
        if tokens.padding_mask is not None:
            is_padding = ~tokens.padding_mask.bool().unsqueeze(1)
            ids, weights = ids.masked_fill(is_padding, -1), weights.masked_fill(is_padding, 0.0)
        if self.config.no_compute is not None:
            needs_none = ids >= self.config.num_experts
            kept = weights.masked_fill(~needs_none, 0.0)
            bypass = _bypass(self.config, kept, ids, tensors)
            ids, weights = ids.masked_fill(needs_none, -1), weights.masked_fill(needs_none, 0.0)
        return Routing(ids, weights.float(), bypass)


def _bypass(config: RoutingConfig, weights: Tensor, ids: Tensor, tensors: RouterTensors) -> Bypass:
    assert config.no_compute is not None
    match config.no_compute.kind:
        case NoComputeKind.ZERO:
            # Zero times its weight: nothing, or NaN where the token's weights are.
            return Bypass(identity_weight=weights.sum(-1) * 0.0)
        case NoComputeKind.IDENTITY:
            return Bypass(identity_weight=weights.sum(-1))
        case NoComputeKind.CONSTANT:
            rows = (ids.long() - config.num_experts).clamp(min=0)
            return Bypass(constant_ids=rows, constant_weights=weights, constants=tensors.constants)


class FusedTopKRouter(Router):
    """Scores and top-k, without bias or groups."""


class FusedTopKBiasRouter(Router):
    """A learned bias takes part in the choice and not in the weights."""


class GroupedTopKRouter(Router):
    """Only the experts of the best groups can be chosen (DeepSeek-V2, V3)."""


class ZeroExpertRouter(Router):
    """Some choices need no arithmetic (LongCat-Flash); they become -1 and a bypass."""


class HashRouter(Router):
    """Ids come from a table indexed by token id (DeepSeek-V4's first layers)."""

    def given_ids(self, tokens: TokenInputs, tensors: RouterTensors) -> Tensor | None:
        if tokens.replayed_ids is not None:
            return self.replay(tokens.replayed_ids)
        if tokens.input_ids is None:
            raise InputError(
                "input_ids (None) must be given to a hash router; got no token ids. Pass input_ids."
            )
        assert tensors.hash_table is not None
        _check_on_cpu("input_ids", tokens.input_ids, tensors.hash_table.shape[0])
        return tensors.hash_table[tokens.input_ids].long()


class CustomRoutingRouter(Router):
    """A function of the caller's chooses and weighs; the configured scale applies to it."""

    is_parametric: ClassVar[bool] = False

    def __init__(
        self, config: RoutingConfig, custom: CustomRouting, tensors: RouterTensors | None = None
    ) -> None:
        if replace(config, score=ScoreFunction.SOFTMAX) != without_choice(config):
            raise ConfigError(
                "a custom routing function must come without scores, bias, groups, "
                "renormalization or fused shared experts in RoutingConfig; got some. Do these in "
                "the function."
            )
        super().__init__(config, tensors)
        self.custom = custom

    def select(
        self, logits: Tensor, tokens: TokenInputs, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor]:
        _refuse_replay(tokens, "a custom routing function")
        weights, ids = self.custom(logits, self.config.top_k)
        shape = (logits.shape[0], self.config.top_k)
        if weights.shape != shape or ids.shape != shape:
            raise InputError(
                f"the custom routing function must return weights and ids of shape {shape}; got "
                f"{tuple(weights.shape)} and {tuple(ids.shape)}. Correct the function."
            )
        return pipeline.scale_weights(weights.float(), self.config), ids.long()


class FusedSharedExpertsRouter(Router):
    """Appends the shared experts to every token as slots E .. E+S-1."""

    def select_by_steps(
        self, logits: Tensor, given: Tensor | None, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        weights, ids = super().select_by_steps(logits[:, : config.num_choices], given, tensors)
        count = config.num_fused_shared_experts
        if config.fused_shared_gate:
            shared = logits[:, config.num_choices :].sigmoid()
        else:
            shared = logits.new_ones(logits.shape[0], count)
        # A scale on the layer's output must leave the shared experts at weight 1.
        shared = shared / config.output_scale
        slots = torch.arange(
            config.num_experts, config.num_experts + count, device=ids.device
        ).expand(ids.shape[0], -1)
        return torch.cat([weights, shared], 1), torch.cat([ids, slots], 1)


class RoutingSimulatorRouter(Router):
    """Draws distinct ids from a distribution, or plays captured ones back; each weight is 1/K.

    Ids are the top K of `log p(expert) + Gumbel noise`, that is K draws without replacement.
    """

    is_parametric: ClassVar[bool] = False

    def select(
        self, logits: Tensor, tokens: TokenInputs, tensors: RouterTensors
    ) -> tuple[Tensor, Tensor]:
        _refuse_replay(tokens, "a simulation")
        config = self.config
        num_tokens = logits.shape[0]
        if tensors.replayed_ids is not None:
            rows = torch.arange(num_tokens, device=logits.device) % tensors.replayed_ids.shape[0]
            ids = tensors.replayed_ids[rows].long()
        else:
            ids = self._draw(num_tokens, logits.device)
        return logits.new_full((num_tokens, config.top_k), 1.0 / config.top_k), ids

    def _draw(self, num_tokens: int, device: torch.device) -> Tensor:
        config, simulation = self.config, self.config.simulation
        assert simulation is not None
        generator = torch.Generator(device).manual_seed(simulation.seed)
        uniform = torch.rand(num_tokens, config.num_choices, generator=generator, device=device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        expert = torch.arange(config.num_choices, device=device, dtype=torch.float32)
        match simulation.kind:
            case Simulation.NORMAL:
                spread = max(config.num_choices / 6, 1e-6)
                log_p = -0.5 * ((expert - (config.num_choices - 1) / 2) / spread) ** 2
            case Simulation.ZIPF:
                log_p = -simulation.exponent * torch.log1p(expert)
            case Simulation.HOT_EXPERT:
                log_p = torch.where(expert == 0, 1e9, 0.0)
            case _:
                log_p = torch.zeros_like(expert)
        return pipeline.top_k_ids(gumbel + log_p, config.top_k)


def _refuse_replay(tokens: TokenInputs, what: str) -> None:
    """Raise `InputError` where ids were brought to a router that cannot weigh them."""
    if tokens.replayed_ids is not None:
        raise InputError(
            f"replayed_ids must be None for {what}, which chooses by itself; got "
            f"{tuple(tokens.replayed_ids.shape)}. Drop one."
        )


def create_router(
    config: RoutingConfig,
    *,
    selection_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
    constants: Tensor | None = None,
    replayed_ids: Tensor | None = None,
    custom: CustomRouting | str | None = None,
) -> Router:
    """Build the router that a configuration asks for, with what it has learned.

    Args:
        config: the rule.
        selection_bias: (num_choices,), where the rule has a bias.
        per_expert_scale: (num_experts,), where the rule scales by expert.
        hash_table: (vocabulary, K) expert ids, for hash routing.
        constants: (count, H), for constant experts.
        replayed_ids: (R, K) ids, for the simulator's replay; token t gets row t mod R.
        custom: `custom(router_logits, top_k) -> (topk_weights, topk_ids)`, or a plug-in's name.

    Raises:
        ConfigError: a tensor is missing, not asked for or misshapen, or the router cannot honour a
            part of the configuration.

    Example:
        >>> import torch
        >>> router = create_router(RoutingConfig(num_experts=4, top_k=2))
        >>> router.route(torch.tensor([[0.0, 3.0, 1.0, 3.0]])).topk_ids.tolist()
        [[1, 3]]
    """
    tensors = RouterTensors(selection_bias, per_expert_scale, hash_table, constants, replayed_ids)
    tensors.check(config)
    return router_for(config, tensors, custom)


def router_for(
    config: RoutingConfig,
    tensors: RouterTensors | None = None,
    custom: CustomRouting | str | None = None,
) -> Router:
    """The router of a configuration, its tensors unchecked (a layer passes its own with a call)."""
    if config.simulation is not None:
        if custom is not None or config.num_fused_shared_experts:
            raise ConfigError(
                "a simulation must not be combined with a custom function or fused shared experts; "
                "got both. Drop one."
            )
        return RoutingSimulatorRouter(config, tensors)
    if custom is not None:
        return CustomRoutingRouter(config, find_custom(custom), tensors)
    if config.num_fused_shared_experts:
        if config.hash_routing:
            raise ConfigError(
                "hash routing must not be combined with fused shared experts; got both. Run the "
                "shared experts apart."
            )
        return FusedSharedExpertsRouter(config, tensors)
    if config.hash_routing:
        return HashRouter(config, tensors)
    if config.no_compute is not None:
        return ZeroExpertRouter(config, tensors)
    if config.groups is not None:
        return GroupedTopKRouter(config, tensors)
    if config.selection_bias is not SelectionBias.NONE:
        return FusedTopKBiasRouter(config, tensors)
    return FusedTopKRouter(config, tensors)
