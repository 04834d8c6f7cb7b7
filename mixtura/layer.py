"""`FusedMoE`: one Mixture-of-Experts layer. Read `forward`, then `runner/schedule.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from mixtura.config import MoEConfig, SharedExpertsOrder, Simulation
from mixtura.cuda import cannot_capture, is_capturing
from mixtura.dispatch import Dispatcher, dispatcher_for
from mixtura.eplb.state import EplbLayerState, check_choice
from mixtura.errors import InputError
from mixtura.experts import (
    ExpertsOptions,
    PackedExperts,
    RoutedExperts,
    RowLinear,
    SharedExperts,
    SharedTask,
    check_rows,
)
from mixtura.parallel import Spread
from mixtura.routing import CustomRouting, Router, RouterTensors, router_for
from mixtura.routing.gate import Choice, Gate, GatePlan
from mixtura.runner import LayerOutput, MoERunner, create_runner
from mixtura.types import (
    ExpertBatch,
    ExpertWeights,
    Routing,
    RoutingObserver,
    StepContext,
    TokenInputs,
    TokenSource,
)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Everything of a layer that holds no parameters."""

    config: MoEConfig
    router: Router
    runner: MoERunner
    dispatcher: Dispatcher
    spread: Spread | None = None


class FusedMoE(nn.Module):
    """Gate, router, dispatch, routed experts, combine, shared experts: one answer everywhere.

    Args:
        config: what the layer is.
        weights: quantized weights of the experts; without them they are parameters.
        kernel: insist on an experts kernel by name.
        strict: an error where the device's preferred kernel cannot run.
        custom_routing: a function that chooses and weighs, or the name of a plug-in that is one,
            instead of the configured pipeline.
        spread: the ranks that share the experts, and which has which; `weights`, or the parameters,
            are this rank's. None: this rank has them all.
        device, dtype: of new, uninitialised parameters; the device of the tables of `spread` too.

    Example:
        >>> from mixtura import ExpertsConfig, MoEConfig, RoutingConfig
        >>> config = MoEConfig(
        ...     hidden_size=8,
        ...     routing=RoutingConfig(num_experts=4, top_k=2),
        ...     experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=16),
        ... )
        >>> layer = FusedMoE(config)
        >>> _ = [nn.init.normal_(p, std=0.1) for p in layer.parameters()]
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """

    eplb: EplbLayerState | None = None
    """Which replicas are taken, and what is counted; None is no balancing."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        weights: ExpertWeights | None = None,
        kernel: str | None = None,
        strict: bool = False,
        custom_routing: CustomRouting | str | None = None,
        spread: Spread | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spread is not None and device is not None:
            spread = spread.to(device)
        self.plan = LayerPlan(
            config,
            router_for(config.routing, custom=custom_routing),
            create_runner(config.runner),
            dispatcher_for(config, spread),
            spread,
        )
        self.observers: tuple[RoutingObserver, ...] = ()
        self.sources: tuple[TokenSource, ...] = ()
        self.gate = Gate(
            GatePlan(self.plan.router, config.gate, config.deterministic, config.debug),
            config.hidden_size,
            has_bias=config.has_gate_bias,
            device=device,
            dtype=dtype,
        )
        self.experts = RoutedExperts(
            config.experts if spread is None else spread.local_experts(config.experts),
            weights=weights,
            options=ExpertsOptions(
                kernel=kernel,
                strict=strict,
                deterministic=config.deterministic,
                weight_on=config.routing.weight_on,
                activation_dtype=config.activation_dtype,
                debug=config.debug,
            ),
            device=device,
            dtype=dtype,
        )
        linear_class = RowLinear if config.deterministic else nn.Linear
        if config.shared is not None:
            self.shared_experts = SharedExperts(
                config.shared,
                config.hidden_size,
                is_row_invariant=config.deterministic,
                device=device,
                dtype=dtype,
            )
            if config.shared.has_sigmoid_gate:
                self.shared_expert_gate = linear_class(
                    config.hidden_size, 1, bias=False, device=device, dtype=dtype
                )
        if config.has_latent:
            sizes = (config.hidden_size, config.experts.hidden_size)
            self.latent_in = linear_class(*sizes, bias=False, device=device, dtype=dtype)
            self.latent_out = linear_class(*sizes[::-1], bias=False, device=device, dtype=dtype)

    def forward(
        self, hidden_states: Tensor, tokens: TokenInputs | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Send tokens through the layer.

        Args:
            hidden_states: (..., H) in the layer's dtype; leading dimensions are tokens.
            tokens: what tokens bring along, one row per token.

        Returns:
            (..., H) like the input; with external shared experts, (shared, routed).

        Raises:
            InputError: wrong width, device or dtype; token inputs of another length; with `debug`,
                NaN, or ids out of range.
            CaptureUnsupported: a CUDA graph is being captured that cannot hold the layer.
        """
        check_rows(hidden_states, self.gate.weight.device.type, self._linear_dtype)
        output = self.run(hidden_states.reshape(-1, hidden_states.shape[-1]), tokens)
        routed = output.hidden_states.view(hidden_states.shape)
        if output.shared is None:
            return routed
        return output.shared.view(hidden_states.shape), routed

    def run(self, hidden_states: Tensor, tokens: TokenInputs | None = None) -> LayerOutput:
        """(T,H) -> `LayerOutput`; the runner drives the schedule over the parts below."""
        if hidden_states.shape[1] != self.moe_config.hidden_size:
            raise InputError(
                f"hidden_states ({tuple(hidden_states.shape)}) must have "
                f"{self.moe_config.hidden_size} columns; got {hidden_states.shape[1]}. Check the "
                f"model's hidden size."
            )
        num_tokens = hidden_states.shape[0]
        tokens = tokens if tokens is not None else TokenInputs()
        tokens = reduce(lambda found, source: source(found, num_tokens), self.sources, tokens)
        tokens.check(num_tokens)
        self.check_capture(hidden_states)
        return self.plan.runner.run(self, hidden_states, tokens)

    def route(self, hidden_states: Tensor, tokens: TokenInputs) -> Routing:
        """Choose experts: gate, router, observers. (T,H) -> `Routing`."""
        return self.finish_routing(self.gate(hidden_states, tokens), tokens, self.gate.tensors())

    def check_capture(self, hidden_states: Tensor) -> None:
        """Raise `CaptureUnsupported` in a CUDA graph that cannot hold the layer, before it begins.

        Observers look after themselves.
        """
        if not is_capturing(hidden_states.device):
            return
        self.dispatcher.check_capture(hidden_states.device)
        self.packed_experts.check_capture(hidden_states)
        if self.moe_config.debug:
            raise cannot_capture("debug (True)", "checks that read logits and ids", "Turn it off")
        simulation = self.moe_config.routing.simulation
        if simulation is not None and simulation.kind is not Simulation.REPLAY:
            raise cannot_capture(
                f"simulation ({simulation.kind.value})", "a generator seeded there", "Use replay"
            )

    def step(self, num_tokens: int) -> StepContext:
        """What every rank brings to the forward that is under way."""
        if self.plan.spread is None:
            return StepContext.alone(num_tokens, self.moe_config.runner.overlap_min_tokens)
        return self.plan.spread.ranks.clock.current(num_tokens)

    def place(self, topk_ids: Tensor) -> Tensor:
        """Logical ids (T,K) -> physical ids (T,K), -1 where there is no expert."""
        placer = self.eplb or self.plan.spread
        return topk_ids if placer is None else placer.to_physical(topk_ids)

    def set_layer_state(self, state: EplbLayerState | None) -> None:
        """Bind the layer's view of the model's load balancing; None unbinds it.

        Raises:
            ConfigError: ranks would choose replicas that the dispatcher cannot have.
        """
        if state is not None:
            check_choice(state, self.dispatcher.name, self.dispatcher.needs_same_replicas)
        self.eplb = state

    def slots(self) -> dict[str, Tensor]:
        """The tensors of this rank's experts, (L, ...) each, as the kernel keeps them.

        Raises:
            ConfigError: the kernel's experts cannot be moved.
        """
        return self.packed_experts.slots()

    @property
    def packed_experts(self) -> PackedExperts:
        """The module that holds the experts' weights."""
        return self.experts

    def finish_routing(
        self, choice: Choice, tokens: TokenInputs, tensors: RouterTensors
    ) -> Routing:
        """Show the choice to the observers, then turn no-compute experts into -1 and a bypass."""
        if self.moe_config.debug:
            rule = self.moe_config.routing
            check_ids(choice.ids, rule.num_choices + rule.num_fused_shared_experts)
        for observe in self.observers:
            observe(choice.ids, choice.weights)
        routing = choice.routing or self.plan.router.finish(
            choice.weights, choice.ids, tokens, tensors
        )
        return replace(routing, router_logits=choice.logits)

    def start_shared(self, hidden_states: Tensor, order: SharedExpertsOrder) -> SharedTask:
        """Start the shared experts on (T,H) rows."""
        gate = self.shared_expert_gate if self._has_shared_gate else None
        return self.shared_experts.start(hidden_states, gate, order, self.dispatcher.part)

    @property
    def sums_shared(self) -> bool:
        """Whether each rank runs a part of the shared experts."""
        is_possible = self.dispatcher.part is not None and self.moe_config.adds_shared_to_rows
        return is_possible and self.shared_module.can_be_cut

    @property
    def shared_module(self) -> SharedExperts:
        """The module that holds the shared experts, where there are any."""
        return self.shared_experts

    def enter_experts(self, hidden_states: Tensor) -> Tensor:
        """Into the experts' width: (T,H) -> (T, experts.hidden_size)."""
        if self.moe_config.has_latent:
            hidden_states = self.latent_in(hidden_states)
        return hidden_states

    def leave_experts(self, routed: Tensor) -> Tensor:
        """Back to the layer's width, scaled where the scale belongs to the output."""
        if self.moe_config.has_latent:
            routed = self.latent_out(routed)
        scale = self.moe_config.routing.output_scale
        return routed * scale if scale != 1.0 else routed

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        """Run this rank's experts on the rows of `batch`. -> (M,H), or the terms (M,K,H)."""
        return self.experts.run_batch(batch, reduce=reduce)

    @property
    def moe_config(self) -> MoEConfig:
        """What the layer is."""
        return self.plan.config

    @property
    def dispatcher(self) -> Dispatcher:
        """Where tokens meet their experts."""
        return self.plan.dispatcher

    @property
    def _linear_dtype(self) -> torch.dtype | None:
        """The dtype of the linear maps that rows meet before the experts; None without any."""
        if self.moe_config.has_latent:
            return self.latent_in.weight.dtype
        if self.moe_config.shared is not None:
            return self.shared_experts.up_proj.weight.dtype
        return None

    @property
    def _has_shared_gate(self) -> bool:
        return self.moe_config.shared is not None and self.moe_config.shared.has_sigmoid_gate


def check_ids(ids: Tensor, num_experts: int) -> None:
    """Raise `InputError` where an id is outside [-1, num_experts). Synchronises with the device.

    Raises:
        CaptureUnsupported: a CUDA graph is being captured.
    """
    if is_capturing(ids.device):
        raise cannot_capture("debug (True)", "a check of expert ids", "Turn it off")
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= num_experts):
        raise InputError(
            f"expert ids must be in [-1, {num_experts}); got {int(ids.min())} to {int(ids.max())}. "
            f"Check the router or the replayed ids."
        )


def is_moe_layer(module: nn.Module) -> bool:
    """Whether a module is one of our MoE layers or sets of routed experts."""
    return isinstance(module, (FusedMoE, PackedExperts))
