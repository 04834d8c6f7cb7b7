"""`PackedExperts`: experts whose weights a kernel may keep in a layout of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import ActivationDtype, ExpertsConfig, WeightOn
from mixtura.cuda import cannot_capture, is_capturing, on_device
from mixtura.errors import ConfigError, GradientUnsupported, InputError
from mixtura.experts.lora import kept, moved
from mixtura.experts.storage import Storage, read_weights, tensor_of
from mixtura.kernels import ExpertsKernel, KernelDecision, select_kernel
from mixtura.kernels.keys import Keys
from mixtura.kernels.lora import check_adapter_ids
from mixtura.lora import Adapters, LoraWeights, adapter_tensors
from mixtura.quant.scheme import QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights, RoutingObserver, TokenSource

_PACKING = threading.RLock()
"""Held while weights change form, so that threads that share experts pack them once."""

_KEYS: Keys[PackedExperts] = Keys("the experts")
"""Experts that compiled graphs call by key; see `_call_experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """How experts are to be run.

    Attributes:
        kernel: insist on this kernel.
        strict: an error where the preferred one cannot run.
        deterministic: only kernels whose rows do not depend on the batch.
        weight_on: where the routing weight applies.
        activation_dtype: the arithmetic with quantized weights.
        debug: check ids on every call, on any device.
    """

    kernel: str | None = None
    strict: bool = False
    deterministic: bool = False
    weight_on: WeightOn = WeightOn.OUTPUT
    activation_dtype: ActivationDtype | None = None
    debug: bool = False


Fingerprint = tuple[tuple[int, int, int], ...]
"""(identity, address, version) of every stored tensor."""


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """A kernel's packed weights, remembered between calls.

    Attributes:
        kernel, packed: the kernel, and what it holds.
        is_only_copy: the storage they were packed from has been freed.
        fingerprint: of the stored tensors once they were packed (and freed).
        freed: the stored tensors by role, where they have been freed; a parametrization may have
            taken them elsewhere since.
        spare_rows: rows by role that were stored but are no experts.
    """

    kernel: ExpertsKernel
    packed: Any
    is_only_copy: bool
    fingerprint: Fingerprint
    freed: Mapping[str, Tensor]
    spare_rows: Mapping[str, Tensor]


@dataclass(slots=True)
class PackedState:
    """What is remembered between calls: kernels by problem, and the weights one of them holds.

    `choices` are the problems and kernels of calls by what can differ from call to call: a decode
    step asks in every layer, and making a problem and hashing it took as long as a small layer.
    """

    decisions: dict[ExpertsProblem, KernelDecision] = field(default_factory=dict)
    choices: dict[tuple[object, ...], tuple[ExpertsProblem, ExpertsKernel]] = field(
        default_factory=dict
    )
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
    key: Tensor
    observers: tuple[RoutingObserver, ...]
    sources: tuple[TokenSource, ...]
    row_dtype: torch.dtype | None = None
    lora: Adapters = ()
    """What adapters add, by number; see `set_lora`."""

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
        self._take_key()
        self.sources = ()
        self.observers = ()

    def _take_key(self) -> None:
        self.key = _KEYS.new()
        _KEYS.name(self.key, self)

    @property
    def expert_weights(self) -> ExpertWeights:
        """The weights as kernels see them, unpacked where the kernel holds the only copy."""
        held = self.state.held
        if held is not None and held.is_only_copy:
            return held.kernel.unpack(held.packed, self.experts_config)
        if self.given is not None:
            return self.given
        return read_weights(self, self.experts_config, self.storage)

    def set_lora(self, adapters: Sequence[LoraWeights | None]) -> None:
        """Let these adapters, and no others, add to rows that ask for them by number.

        Weights stay as they are, packed ones too; the kernel is chosen anew. Copies, pickles and
        moves to a device take adapters along; `state_dict` does not.

        Args:
            adapters: by number, each of these experts alone; None where one adds nothing to them.

        Raises:
            InputError: an adapter does not fit the experts, or is not finite.
        """
        first = self.given.gate_up_proj.values if self.given else self._stored()["gate_up_proj"]
        with _PACKING:
            self.lora = kept(adapters, self.experts_config, first.device)
            held = self.state.held
            if held is not None and held.kernel.has_lora:
                held = replace(held, packed=held.kernel.with_lora(held.packed, self.lora))
            self.state = PackedState(held=held)

    @property
    def has_lora(self) -> bool:
        """Whether an adapter adds something here."""
        return any(adapter is not None for adapter in self.lora)

    def problem(self, row_dtype: torch.dtype, *, needs_grad: bool) -> ExpertsProblem:
        """What a kernel would be asked to run now."""
        if self.given is not None:
            first, schemes = self.given.gate_up_proj.values, self.given.schemes
            roundings = self.given.roundings(self.options.activation_dtype)
            is_unlike = self.given.has_unlike_gate_up
        else:
            stored = self._stored()
            first = stored["gate_up_proj"]
            dtypes = (t.dtype for role, t in stored.items() if role.endswith("_proj"))
            schemes, roundings = tuple(map(QuantScheme.dense, dict.fromkeys(dtypes))), ()
            is_unlike = "up_proj" in stored and stored["up_proj"].dtype != first.dtype
        return ExpertsProblem(
            experts=self.experts_config,
            schemes=schemes,
            row_dtype=row_dtype,
            device=first.device.type,
            weight_on=self.options.weight_on,
            needs_grad=needs_grad,
            is_deterministic=self.options.deterministic,
            activation_dtype=self.options.activation_dtype,
            roundings=roundings,
            activations=None if self.given is None else self.given.activations,
            has_unlike_gate_up=is_unlike,
            has_lora=self.has_lora,
        )

    def decide(self, problem: ExpertsProblem) -> KernelDecision:
        """The kernel for a problem, chosen once and remembered.

        Raises:
            NoKernelFits: none can run it.
            GradientUnsupported: gradients of quantized weights.
        """
        decision = self.state.decisions.get(problem)
        if decision is None:
            if problem.needs_grad and not problem.is_dense:
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
            CaptureUnsupported: a CUDA graph is being captured that cannot hold the call.
        """
        rows = batch.hidden_states
        if "parametrizations" in self._modules:
            self.materialize()  # before anything is computed from freed parameters
        kernel = self._kernel_for(batch, self._needs_grad(rows, batch.topk_weights))
        self._check_capture(kernel, rows.device)
        if self._packs_outside(kernel):
            out: Tensor = torch.ops.mixtura.experts(
                rows, batch.local_ids, batch.topk_weights, batch.adapter_ids, self.key, reduce
            )
            return out
        packed = self.pack(kernel)
        with on_device(rows.device):
            return kernel.run(packed, batch, weight_on=self.options.weight_on, reduce=reduce)

    def _kernel_for(self, batch: ExpertBatch, needs_grad: bool) -> ExpertsKernel:
        """Check a batch; -> the kernel that runs it."""
        dtype = batch.hidden_states.dtype
        first = None if self.given is not None else self.storage["gate_up_proj"].read(self)
        stored = () if first is None else (first.dtype, first.device.type)
        key = (dtype, needs_grad, *stored)
        found = self.state.choices.get(key)
        if found is not None:
            self._check(batch, found[0])
            return found[1]
        problem = self.problem(dtype, needs_grad=needs_grad)
        self._check(batch, problem)
        kernel = self.decide(problem).kernel
        self.state.choices[key] = (problem, kernel)
        return kernel

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
        if batch.adapter_ids is not None:
            check_adapter_ids(batch.adapter_ids, rows, self.lora)
        has_one_dtype = problem.is_dense and self.row_dtype is None
        check_rows(rows, problem.device, problem.weight_dtype if has_one_dtype else None)

    def slots(self) -> dict[str, Tensor]:
        """The tensors in which the chosen kernel keeps the experts, (L, ...) each, to be moved.

        They are packed now if they are not; what is written to a row is what that expert is.

        Raises:
            ConfigError: the kernel's experts cannot be moved.
        """
        first = self.problem(self.row_dtype or torch.float32, needs_grad=False)
        dtype = self.row_dtype or (first.weight_dtype if first.is_dense else torch.bfloat16)
        kernel = self.decide(replace(first, row_dtype=dtype)).kernel
        found = kernel.slots(self.pack(kernel))
        if found is None:
            raise ConfigError(
                f"the kernel ({kernel.name}) must be able to move experts to balance their load; "
                f"got one that cannot. Choose another kernel, or turn balancing off."
            )
        return found

    def pack(self, kernel: ExpertsKernel) -> Any:
        """The weights as `kernel` wants them: remembered, or packed now."""
        held = self.state.held
        if torch.compiler.is_compiling():
            if held is not None and self._holds(kernel):
                return held.packed
            return self._packed_by(kernel)
        if held is not None and self._is_current(held, kernel):
            return held.packed
        with _PACKING:
            held = self.state.held
            if held is not None and self._is_current(held, kernel):
                return held.packed  # another thread was first
            return self._pack_now(kernel)

    def _needs_grad(self, *inputs: Tensor) -> bool:
        """Whether gradients are needed of the inputs or the weights."""
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*inputs, *self._sources())
        )

    def check_capture(self, rows: Tensor) -> None:
        """What `run_batch` would raise in a CUDA graph, before anything of a layer is launched."""
        if is_capturing(rows.device):
            problem = self.problem(rows.dtype, needs_grad=self._needs_grad(rows))
            self._check_capture(self.decide(problem).kernel, rows.device)

    def _check_capture(self, kernel: ExpertsKernel, device: torch.device) -> None:
        """Raise `CaptureUnsupported` in a CUDA graph that cannot hold a call of the kernel."""
        if not is_capturing(device):
            return
        if not kernel.is_capturable:
            raise cannot_capture(
                f"kernel ({kernel.name})", "one that reads ids there", "Choose another kernel"
            )
        held = self.state.held
        if not self._shares_memory(kernel) and (held is None or not self._is_current(held, kernel)):
            raise cannot_capture(
                f"kernel ({kernel.name})",
                "weights that it has not packed yet",
                "Run the layer once before the capture",
            )

    def _is_quantized(self) -> bool:
        return self.given is not None and any(s.is_quantized for s in self.given.schemes)

    def _shares_memory(self, kernel: ExpertsKernel) -> bool:
        return kernel.shares_memory(self._is_quantized())

    def _packs_outside(self, kernel: ExpertsKernel) -> bool:
        """Whether a graph is compiled that cannot hold the packing that a call begins with."""
        if not torch.compiler.is_compiling() or self._holds(kernel):
            return False
        return not kernel.packs_in_graphs(self._is_quantized())

    def _holds(self, kernel: ExpertsKernel) -> bool:
        """Whether the kernel has the weights, and nobody else."""
        held = self.state.held
        return held is not None and held.is_only_copy and held.kernel is kernel

    def _pack_now(self, kernel: ExpertsKernel) -> Any:
        self.materialize()
        is_recorded = self._is_recorded()
        # Parameters must not become tensors of inference mode.
        with torch.inference_mode(False), torch.set_grad_enabled(is_recorded):
            packed = self._packed_by(kernel)
            # What autograd records belongs to one call; so does what a parametrization computes.
            if not is_recorded and self._is_kept():
                frees = not self._shares_memory(kernel) and self._can_be_freed()
                freed = self._stored() if frees else {}
                spare_rows = self._free() if frees else {}
                self.state.held = HeldWeights(
                    kernel, packed, frees, self._fingerprint(), freed, spare_rows
                )
        return packed

    def _packed_by(self, kernel: ExpertsKernel) -> Any:
        packed = kernel.pack(self.expert_weights, self.options.activation_dtype)
        return kernel.with_lora(packed, self.lora) if self.lora and kernel.has_lora else packed

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
        return tuple(self._stored().values())

    def _stored(self) -> dict[str, Tensor]:
        """The stored tensors by role; empty where weights were given in their stead."""
        if self.given is not None:
            return {}
        return {role: stored.read(self) for role, stored in self.storage.items()}

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
        here = {id(parameter) for parameter in self.parameters()}
        for (role, tensor), (_, _, version) in zip(
            held.freed.items(), held.fingerprint, strict=True
        ):
            stored = self.storage[role]
            if id(tensor) not in here or tensor.numel():
                continue  # replaced since
            # A parametrization takes a parameter elsewhere, and sets it to itself there.
            if stored.holds(self, tensor) and _version(tensor) != version:
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
        if self.has_lora:
            first = next(iter(adapter_tensors(self.lora).values()))
            self.lora = moved(self.lora, fn(torch.empty(0, device=first.device)).device)
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_key()


@torch.library.custom_op("mixtura::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _call_experts(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
    key: Tensor,
    reduce: bool,
) -> Tensor:
    """A call in a compiled graph of experts whose kernel cannot pack there: as without a graph."""
    experts = _KEYS.find(key)
    batch = ExpertBatch(rows, local_ids, topk_weights, adapter_ids=adapter_ids)
    return experts.run_batch(batch, reduce=reduce)


@_call_experts.register_fake
def _(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
    key: Tensor,
    reduce: bool,
) -> Tensor:
    if reduce:
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    num_rows, top_k = local_ids.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty((num_rows, top_k, rows.shape[1]), dtype=dtype)


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
