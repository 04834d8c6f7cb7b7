"""`PackedExperts`: experts whose weights a kernel may keep in a layout of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import ExpertsConfig, WeightOn
from mixtura.errors import GradientUnsupported, InputError
from mixtura.experts.storage import Storage, read_weights, tensor_of
from mixtura.kernels import ExpertsKernel, KernelDecision, select_kernel
from mixtura.types import DENSE, ExpertBatch, ExpertsProblem, ExpertWeights, RoutingObserver

_PACKING = threading.RLock()
"""Held while weights change form, so that threads that share experts pack them once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """How experts are to be run.

    Attributes:
        kernel: insist on this kernel.
        strict: an error where the preferred one cannot run.
        deterministic: only kernels whose rows do not depend on the batch.
        weight_on: where the routing weight applies.
    """

    kernel: str | None = None
    strict: bool = False
    deterministic: bool = False
    weight_on: WeightOn = WeightOn.OUTPUT


Fingerprint = tuple[tuple[int, int, int], ...]
"""(identity, address, version) of every stored tensor."""


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """A kernel's packed weights, remembered between calls.

    Attributes:
        kernel, packed: the kernel, and what it holds.
        is_only_copy: the storage they were packed from has been freed.
        fingerprint: of the stored tensors once they were packed (and freed).
        spare_rows: rows by role that were stored but are no experts.
    """

    kernel: ExpertsKernel
    packed: Any
    is_only_copy: bool
    fingerprint: Fingerprint
    spare_rows: Mapping[str, Tensor]


@dataclass(slots=True)
class PackedState:
    """What is remembered between calls: kernels by problem, and the weights one of them holds."""

    decisions: dict[ExpertsProblem, KernelDecision] = field(default_factory=dict)
    held: HeldWeights | None = None


class PackedExperts(nn.Module):
    """Parameters, and a kernel's packed form of them; one of the two is always whole.

    When the experts first run, the kernel packs them; if its layout is its own, the dense storage
    is freed. It comes back by itself for `state_dict`, `load_state_dict`, `to`, copies and pickles,
    and for a call that needs gradients; after which the weights are packed again. Parameters that
    have a gradient are not freed. `adopt` must have been called before anything else.
    """

    experts_config: ExpertsConfig
    options: ExpertsOptions
    storage: Storage
    given: ExpertWeights | None
    state: PackedState
    observers: tuple[RoutingObserver, ...]

    def adopt(
        self,
        config: ExpertsConfig,
        options: ExpertsOptions,
        storage: Storage,
        given: ExpertWeights | None = None,
    ) -> None:
        """Set what the parameters mean; `given` are immutable weights in their stead."""
        self.experts_config = config
        self.options = options
        self.storage = storage
        self.given = given
        self.state = PackedState()
        self.observers = ()

    @property
    def expert_weights(self) -> ExpertWeights:
        """The weights as kernels see them, unpacked where the kernel holds the only copy."""
        held = self.state.held
        if held is not None and held.is_only_copy:
            return held.kernel.unpack(held.packed, self.experts_config)
        if self.given is not None:
            return self.given
        return read_weights(self, self.experts_config, self.storage)

    def problem(self, activation_dtype: torch.dtype, *, needs_grad: bool) -> ExpertsProblem:
        """What a kernel would be asked to run now."""
        if self.given is not None:
            first, scheme = self.given.gate_up_proj.values, self.given.scheme
        else:
            first, scheme = self.storage["gate_up_proj"].read(self), DENSE
        return ExpertsProblem(
            experts=self.experts_config,
            scheme=scheme,
            weight_dtype=first.dtype,
            activation_dtype=activation_dtype,
            device=first.device.type,
            weight_on=self.options.weight_on,
            needs_grad=needs_grad,
            is_deterministic=self.options.deterministic,
        )

    def decide(self, problem: ExpertsProblem) -> KernelDecision:
        """The kernel for a problem, chosen once and remembered.

        Raises:
            NoKernelFits: none can run it.
            GradientUnsupported: gradients of quantized weights.
        """
        decision = self.state.decisions.get(problem)
        if decision is None:
            if problem.needs_grad and problem.scheme != DENSE:
                raise GradientUnsupported(
                    f"the experts' weights ({problem.scheme}) must be dense to have gradients; got "
                    f"quantized ones. Use torch.no_grad(), or load the model dense."
                )
            decision = select_kernel(
                problem, kernel=self.options.kernel, strict=self.options.strict
            )
            self.state.decisions[problem] = decision
        return decision

    def run_batch(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        """Run the experts on the rows of `batch`; see `ExpertsKernel.run`.

        Raises:
            InputError: the rows have another width, device or number than the experts or the ids
                or, with dense weights, another dtype.
            GradientUnsupported: gradients are needed of quantized weights.
        """
        rows = batch.hidden_states
        needs_grad = torch.is_grad_enabled() and (
            rows.requires_grad
            or batch.topk_weights.requires_grad
            or any(tensor.requires_grad for tensor in self._sources())
        )
        problem = self.problem(rows.dtype, needs_grad=needs_grad)
        self._check(batch, problem)
        kernel = self.decide(problem).kernel
        packed = self.pack(kernel)
        return kernel.run(packed, batch, weight_on=self.options.weight_on, reduce=reduce)

    def _check(self, batch: ExpertBatch, problem: ExpertsProblem) -> None:
        rows, width = batch.hidden_states, self.experts_config.hidden_size
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InputError(
                f"hidden_states ({tuple(rows.shape)}) must be (rows, {width}); got another shape. "
                f"Flatten the batch and check the width."
            )
        shapes = tuple(batch.local_ids.shape), tuple(batch.topk_weights.shape)
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[0][0] != rows.shape[0]:
            raise InputError(
                f"local_ids and topk_weights ({shapes[0]}, {shapes[1]}) must both be (rows, "
                f"top_k); got {rows.shape[0]} rows. Give every row its ids and weights."
            )
        dtype = problem.weight_dtype if problem.scheme == DENSE else None
        check_rows(rows, problem.device, dtype)

    def pack(self, kernel: ExpertsKernel) -> Any:
        """The weights as `kernel` wants them: remembered, or packed now."""
        held = self.state.held
        if torch.compiler.is_compiling():
            if held is not None and held.is_only_copy and held.kernel is kernel:
                return held.packed
            return kernel.pack(self.expert_weights)
        if held is not None and self._is_current(held, kernel):
            return held.packed
        with _PACKING:
            held = self.state.held
            if held is not None and self._is_current(held, kernel):
                return held.packed  # another thread was first
            return self._pack_now(kernel)

    def _pack_now(self, kernel: ExpertsKernel) -> Any:
        self.materialize()
        is_recorded = self._is_recorded()
        # Parameters must not become tensors of inference mode.
        with torch.inference_mode(False), torch.set_grad_enabled(is_recorded):
            packed = kernel.pack(self.expert_weights)
            # What autograd records belongs to one call; so does what a parametrization computes.
            if not is_recorded and self._is_kept():
                frees = not kernel.shares_memory and self._can_be_freed()
                spare_rows = self._free() if frees else {}
                self.state.held = HeldWeights(
                    kernel, packed, frees, self._fingerprint(), spare_rows
                )
        return packed

    def _is_recorded(self) -> bool:
        """Whether autograd records what is made of the stored tensors."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._sources())

    def _is_kept(self) -> bool:
        """Whether the stored tensors are there from call to call."""
        return self.given is not None or all(
            isinstance(tensor, nn.Parameter) for tensor in self._sources()
        )

    def _can_be_freed(self) -> bool:
        """Whether nobody else needs the stored tensors, as an optimizer does that has gradients."""
        if self.given is not None:
            return not any(tensor.requires_grad for tensor in self._sources())
        return all(tensor.grad is None for tensor in self._sources())

    def _sources(self) -> tuple[Tensor, ...]:
        """The stored tensors: parameters, or the weights given in their stead."""
        if self.given is not None:
            return self.given.tensors()
        return tuple(stored.read(self) for stored in self.storage.values())

    def _fingerprint(self) -> Fingerprint:
        if self.given is not None:
            return ()  # immutable
        return tuple((id(t), t.data_ptr(), _version(t)) for t in self._sources())

    def _is_current(self, held: HeldWeights, kernel: ExpertsKernel) -> bool:
        return (
            held.kernel is kernel
            and held.fingerprint == self._fingerprint()
            and not self._is_recorded()
        )

    def _free(self) -> dict[str, Tensor]:
        """Drop the stored tensors' memory; return the rows that are no experts."""
        if self.given is not None:
            # One element stands for a whole tensor: shapes, dtypes and device stay known.
            self.given = self.given.mapped(lambda t: t.new_empty(()).expand(t.shape))
            return {}
        spare_rows = {}
        for role, stored in self.storage.items():
            tensor = stored.read(self)
            spare = stored.spare_rows(tensor.data)
            if spare is not None:
                spare_rows[role] = spare.clone()
            tensor.data = tensor.data.new_empty(0)
        return spare_rows

    def materialize(self) -> None:
        """Bring the stored weights back from a kernel's layout, if that holds the only copy.

        Raises:
            InputError: a freed parameter was changed in place, so that the change is lost.
        """
        if self.state.held is None:
            return
        with _PACKING, torch.inference_mode(False), torch.no_grad():
            held = self.state.held
            if held is not None and held.is_only_copy:
                self._restore(held)
            self.state.held = None

    def _restore(self, held: HeldWeights) -> None:
        weights = held.kernel.unpack(held.packed, self.experts_config)
        if self.given is not None:
            self.given = weights
            return
        freed = dict(zip(self.storage, held.fingerprint, strict=True))
        for role, stored in self.storage.items():
            tensor = stored.read(self)
            if id(tensor) != freed[role][0] or tensor.numel():
                continue  # replaced since
            if _version(tensor) != freed[role][2]:
                raise InputError(
                    f"{stored.path} ({tuple(tensor.shape)}) must not be changed in place while the "
                    f"kernel {held.kernel.name} holds the weights; got a change that went nowhere. "
                    f"Call materialize() before changing weights."
                )
            value = tensor_of(weights, role)
            tensor.data = stored.restored(value, held.spare_rows.get(role))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        self.materialize()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.given is not None:
            # Packed values and their scales move, and are never converted.
            device = fn(torch.empty(0, device=self.given.device)).device
            self.given = self.given.mapped(lambda t: t.to(device))
        self.state = PackedState()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.materialize()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.materialize()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: the parameters, not what a kernel made of them."""
        self.materialize()
        return {**self.__dict__, "state": PackedState()}


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one of inference mode, which cannot say."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def check_rows(rows: Tensor, device_type: str, dtype: torch.dtype | None) -> None:
    """Raise `InputError` unless rows are where the weights are and, given a dtype, of that dtype.

    Autocast lets any dtype pass.
    """
    if rows.device.type != device_type:
        raise InputError(
            f"hidden_states ({rows.device}) must be on the device of the weights; got "
            f"{device_type} there. Move one of them."
        )
    if dtype is None or rows.dtype == dtype:
        return
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return
    raise InputError(
        f"hidden_states ({rows.dtype}) must have the dtype of the weights; got {dtype} there. "
        f"Convert the model or the input."
    )
