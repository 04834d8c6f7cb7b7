"""The experts function that Transformers calls: `experts_implementation="mixtura"`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixtura.config import ExpertsConfig
from mixtura.dispatch import Dispatcher, LocalDispatcher
from mixtura.eplb.state import EplbLayerState, check_choice
from mixtura.errors import InputError, UnsupportedModel
from mixtura.experts import ExpertsOptions, PackedExperts, StoredTensor
from mixtura.experts.storage import Storage, read_weights
from mixtura.hf.adopt import adopt_class, offloads
from mixtura.hf.read import read_experts
from mixtura.kernels import KernelDecision, select_kernel
from mixtura.layer import check_ids
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import shard_weights
from mixtura.plugin import NAME
from mixtura.types import ExpertBatch, ExpertOrder, ExpertsProblem, ExpertWeights, TokenInputs


class AdoptedExperts(PackedExperts):
    """What experts of Transformers models have in common once they are ours.

    Attributes:
        spread: the ranks that share the experts; None where this one has them all.
    """

    spread: Spread | None = None

    def _is_kept(self) -> bool:
        return not offloads(self) and super()._is_kept()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_dense("be written to a state_dict")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_dense("be loaded from a state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def _check_dense(self, rule: str) -> None:
        if self.given is not None:
            raise InputError(
                f"the experts of {type(self).__name__} ({self.given.scheme}) must be dense to "
                f"{rule}, and all of them; got quantized ones, or a rank's. Keep the checkpoint "
                f"they came from, or load it without weights= and parallel=."
            )


class FamilyExperts(AdoptedExperts):
    """A family's experts module, adopted; its forward stays the family's, and comes back to us.

    Attributes:
        dispatcher: where tokens meet their experts.
        eplb: which replicas are taken, and what is counted; None is no balancing.
    """

    config: Any
    dispatcher: Dispatcher = LocalDispatcher()
    eplb: EplbLayerState | None = None

    def adopt(self, *args: Any, **kwargs: Any) -> None:
        super().adopt(*args, **kwargs)
        if self.given is not None:
            self._watch_calls()

    def _free(self) -> dict[str, Tensor]:
        self._watch_calls()
        return super()._free()

    def _watch_calls(self) -> None:
        if _restore_for_others not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_restore_for_others)

    def run_spread(self, spread: Spread, batch: ExpertBatch) -> Tensor:
        """Rows with logical ids -> (T,H), wherever their experts are."""
        rows, dispatcher = batch.hidden_states, self.dispatcher
        dispatcher.check_capture(rows.device)
        num_rows = None
        if dispatcher.needs_counts:
            num_rows = spread.ranks.clock.current(rows.shape[0]).num_tokens
        physical_ids = (self.eplb or spread).to_physical(batch.local_ids)
        arrived = dispatcher.dispatch(
            rows, physical_ids, batch.topk_weights, num_rows, batch.adapter_ids
        ).wait()
        out = self.run_batch(arrived.batch, reduce=not dispatcher.wants_terms)
        return dispatcher.combine(out, arrived.handle).wait().tensor

    def set_layer_state(self, state: EplbLayerState | None) -> None:
        """As of `FusedMoE`."""
        if state is not None:
            check_choice(state, self.dispatcher.name, self.dispatcher.needs_same_replicas)
        self.eplb = state

    @property
    def is_in_use(self) -> bool:
        """Whether Transformers sends this module's calls to us now."""
        return bool(self.config._experts_implementation == NAME)


def _restore_for_others(module: nn.Module, args: Any) -> None:
    """Bring the parameters back before an implementation runs that was set after ours."""
    if isinstance(module, FamilyExperts) and not module.is_in_use:
        module._check_dense("run in another experts implementation")
        module.materialize()


class BlockExperts(AdoptedExperts):
    """The experts of a block of ours, which calls them as the family's block would.

    So hooks on the module, and modules put around it, see every call.
    """

    def forward(
        self,
        hidden_states: Tensor,
        local_ids: Tensor,
        topk_weights: Tensor,
        *,
        order: ExpertOrder | None = None,
        adapter_ids: Tensor | None = None,
        reduce: bool = True,
    ) -> Tensor:
        """(M,H), (M,K) with -1 for no expert, (M,K) -> (M,H), or the terms (M,K,H)."""
        with read_once(self):
            batch = ExpertBatch(
                hidden_states, local_ids, topk_weights, order, adapter_ids=adapter_ids
            )
            return self.run_batch(batch, reduce=reduce)


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """An experts module that has been read and found to be one that we can run.

    Attributes:
        module: still as it was. config, storage: what it computes, and from what.
        options: how it is to be run.
        given: immutable weights instead of those in the storage, which go when they are adopted.
        row_dtype: see `PackedExperts`.
        spread: the ranks that share the experts; `config` and `given` are this rank's then.
        dispatcher: of experts whose block stays the family's own.
    """

    module: nn.Module
    config: ExpertsConfig
    storage: Storage
    options: ExpertsOptions
    given: ExpertWeights | None = None
    row_dtype: torch.dtype | None = None
    spread: Spread | None = None
    dispatcher: Dispatcher | None = None

    def with_given(self, given: ExpertWeights, row_dtype: torch.dtype) -> ExpertsPlan:
        """The same experts with immutable weights for rows of a dtype."""
        return replace(self, config=given.config, given=given, row_dtype=row_dtype)

    def sharded(self, spread: Spread) -> ExpertsPlan:
        """This rank's part of experts that it has all of."""
        if isinstance(self.module, PackedExperts) and self.module.has_lora:
            raise InputError(
                f"experts with LoRA adapters ({len(self.module.lora)}) must not be spread over "
                f"ranks; got adapters of all experts. Spread the model, then load them."
            )
        weights = self.weights()
        spread = spread.to(weights.device)
        given = shard_weights(weights.mapped(Tensor.detach), spread)
        row_dtype = self.row_dtype or weights.gate_up_proj.dtype
        return replace(self.with_given(given, row_dtype), spread=spread)

    def weights(self) -> ExpertWeights:
        """The weights: those given, or what the module stores."""
        return self.given or read_weights(self.module, self.config, self.storage)

    def problem(self, device: str | None = None) -> ExpertsProblem:
        """What a kernel would be asked to run, on the weights' device unless another is given."""
        weights = self.weights()
        return ExpertsProblem(
            experts=self.config,
            schemes=weights.schemes,
            row_dtype=self.row_dtype or weights.gate_up_proj.dtype,
            device=device or weights.device.type,
            weight_on=self.options.weight_on,
            is_deterministic=self.options.deterministic,
            activation_dtype=self.options.activation_dtype,
            roundings=weights.roundings(self.options.activation_dtype),
            activations=weights.activations,
            has_unlike_gate_up=weights.has_unlike_gate_up,
            has_lora=isinstance(self.module, PackedExperts) and self.module.has_lora,
        )

    def decide(self, device: str | None = None) -> KernelDecision:
        """The kernel for that problem.

        Raises:
            NoKernelFits: no kernel, or not the one asked for, can run the experts.
        """
        return select_kernel(
            self.problem(device), kernel=self.options.kernel, strict=self.options.strict
        )

    def adopt(self, ours: type[PackedExperts]) -> None:
        """Make the module one of ours. It cannot fail; observers stay."""
        module: Any = self.module
        is_ours = isinstance(module, PackedExperts)
        observers, sources = (module.observers, module.sources) if is_ours else ((), ())
        if self.given is not None:
            for stored in self.storage.values():
                owner, _, leaf = stored.path.rpartition(".")
                delattr(module.get_submodule(owner), leaf)
        adopt_class(module, ours)
        storage = self.storage if self.given is None else {}
        module.adopt(self.config, self.options, storage, self.given)
        module.row_dtype = self.row_dtype
        module.observers, module.sources = observers, sources
        module.spread = self.spread
        if self.dispatcher is not None:
            module.dispatcher = self.dispatcher


ReadExperts = Callable[[nn.Module], tuple[ExpertsConfig, dict[str, StoredTensor]]]


def plan_experts(
    module: nn.Module, options: ExpertsOptions, read: ReadExperts = read_experts
) -> ExpertsPlan:
    """Read an experts module that has Transformers' experts interface; it is left as it is.

    Args:
        read: what the module computes, and from which tensors.

    Raises:
        UnsupportedModel: it computes something that our kernels do not.
    """
    given = row_dtype = None
    if isinstance(module, PackedExperts):
        module.materialize()
        given, row_dtype = module.given, module.row_dtype
    if given is not None:
        spread = module.spread if isinstance(module, AdoptedExperts) else None
        return ExpertsPlan(module, given.config, {}, options, given, row_dtype, spread)
    config, storage = read(module)
    check_in_memory(module, [stored.path for stored in storage.values()])
    return ExpertsPlan(module, config, storage, options, row_dtype=row_dtype)


def check_in_memory(called: nn.Module, paths: list[str]) -> None:
    """Refuse weights of modules that are not called, and so stay where Accelerate put them.

    Raises:
        UnsupportedModel: a weight, by its path from the module that is called, is offloaded.
    """
    for path in paths:
        owner, _, _ = path.rpartition(".")
        if owner and offloads(called.get_submodule(owner)):
            raise UnsupportedModel(
                f"{path} of {type(called).__name__} must be in memory; got a module whose weights "
                f"are offloaded. Load the model without offload."
            )


_ADOPTING = threading.RLock()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _adopt_once(module: nn.Module) -> None:
    if isinstance(module, PackedExperts) and "observers" in module.__dict__:
        return  # `observers` is what `PackedExperts.adopt` sets last
    with _ADOPTING:  # two first calls must not adopt the module twice
        if not isinstance(module, PackedExperts):
            plan_experts(module, ExpertsOptions()).adopt(FamilyExperts)


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Run a family's experts with our kernels; registered in Transformers under `NAME`.

    Args:
        module: the family's experts module; adopted at its first call.
        hidden_states: (T,H).
        top_k_index: (T,K) integer ids; with expert parallelism, the number of local experts and
            above mean "not here".
        top_k_weights: (T,K).

    Returns:
        (T,H) in the dtype of `hidden_states`.

    Raises:
        UnsupportedModel: the experts compute something that our kernels do not.
        InputError: an id is out of range, or the hidden states do not fit the experts.
    """
    if kwargs:
        raise InputError(
            f"the experts function 'mixtura' must be called without {', '.join(sorted(kwargs))}; "
            f"got them. Use another ep_implementation."
        )
    _adopt_once(module)
    assert isinstance(module, PackedExperts)
    spread = module.spread if isinstance(module, AdoptedExperts) else None
    num_experts = module.experts_config.num_experts
    if spread is not None:
        num_experts = spread.placement.num_experts
    ids = top_k_index.to(torch.int32)
    if getattr(module, "_is_expert_parallel", False):
        ids = torch.where(ids >= num_experts, -1, ids)
    elif module.options.debug or (ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_ids(ids, num_experts)
    for observer in module.observers:
        observer(ids, top_k_weights)
    adapter_ids = _asked_adapters(module, hidden_states.shape[0])
    batch = ExpertBatch(hidden_states, ids, top_k_weights, adapter_ids=adapter_ids)
    with read_once(module):
        if spread is not None:
            assert isinstance(module, FamilyExperts), "experts over ranks run after convert"
            return module.run_spread(spread, batch)
        return module.run_batch(batch)


def _asked_adapters(module: PackedExperts, num_tokens: int) -> Tensor | None:
    """(T,) the adapters of the tokens, where the module's sources bring some along.

    Raises:
        InputError: they bring what only a router could use, and the family's own has chosen.
    """
    tokens = TokenInputs()
    for source in module.sources:
        tokens = source(tokens, num_tokens)
    if tokens.replayed_ids is not None:
        raise InputError(
            f"replayed_ids {tuple(tokens.replayed_ids.shape)} must be for a layer whose router is "
            f"ours; got the experts {type(module).__name__}, for which the family's own has "
            f"chosen. Convert the model, or replay none."
        )
    tokens.check(num_tokens)
    return tokens.adapter_ids


def read_once(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which a parametrized weight (LoRA) is computed once and read often."""
    if torch.compiler.is_compiling() or not parametrize.is_parametrized(module):
        return nullcontext()
    return parametrize.cached()
