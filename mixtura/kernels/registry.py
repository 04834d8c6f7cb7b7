"""Which kernels exist, and which one runs a problem.

The decision, with every loser's reason, is a value. A plug-in that cannot be used, or whose answers
are errors, is a kernel that was not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixtura.config import RoutingConfig
from mixtura.entry_points import Group, PlugIns, one_line, wrong_offer
from mixtura.errors import ConfigError, NoKernelFits
from mixtura.kernels.contract import ExpertsKernel
from mixtura.kernels.keys import constant_in_graphs
from mixtura.kernels.triton.device import missing
from mixtura.types import ExpertsProblem

if TYPE_CHECKING:
    from mixtura.kernels.triton.routing import TritonRouting


def _reference() -> ExpertsKernel:
    from mixtura.kernels.reference import ReferenceKernel

    return ReferenceKernel()


def _torch() -> ExpertsKernel:
    from mixtura.kernels.torch import TorchKernel

    return TorchKernel()


def _cpu() -> ExpertsKernel:
    from mixtura.kernels.cpu import CpuKernel

    return CpuKernel()


def _triton() -> ExpertsKernel:
    from mixtura.kernels.triton import TritonKernel

    return TritonKernel()


def _grouped_mm() -> ExpertsKernel:
    from mixtura.kernels.grouped_mm import GroupedMmKernel

    return GroupedMmKernel()


def _deep_gemm() -> ExpertsKernel:
    from mixtura.kernels.deep_gemm import DeepGemmKernel

    return DeepGemmKernel()


def _flashinfer() -> ExpertsKernel:
    from mixtura.kernels.flashinfer import FlashInferKernel

    return FlashInferKernel()


_LOADERS: dict[str, Callable[[], ExpertsKernel]] = {
    "cpu": _cpu,
    "triton": _triton,
    "grouped_mm": _grouped_mm,
    "deep_gemm": _deep_gemm,
    "flashinfer": _flashinfer,
    "torch": _torch,
    "reference": _reference,
}
"""Kernels by name, imported when first asked for, in order of preference."""

_BUILT_IN = frozenset(_LOADERS)
"""Kernels of mixtura's own: what they raise is a fault of ours, and not caught."""

_LOADED: dict[str, ExpertsKernel] = {}
"""Kernels that have been asked for; one object each, as experts compare them by identity."""


_GPU_ROUTINGS: dict[RoutingConfig, TritonRouting | None] = {}
"""What `gpu_routing` has found."""


@constant_in_graphs
def gpu_routing(config: RoutingConfig) -> TritonRouting | None:
    """What routes by a rule on a GPU; None without Triton, and where it does not cover the rule."""
    if config not in _GPU_ROUTINGS:
        _GPU_ROUTINGS[config] = _load_gpu_routing(config)
    return _GPU_ROUTINGS[config]


def _load_gpu_routing(config: RoutingConfig) -> TritonRouting | None:
    if missing() is not None:
        return None
    from mixtura.kernels.triton.routing import TritonRouting

    return TritonRouting.for_rule(config)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A kernel that was not taken, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelDecision:
    """The kernel that runs a problem.

    Attributes:
        problem: what was asked.
        kernel: what runs it.
        rejections: every other kernel with its reason, in the order they were looked at.
        is_fallback: a kernel that is preferred on this device could not run it.
    """

    problem: ExpertsProblem
    kernel: ExpertsKernel
    rejections: tuple[Rejection, ...]
    is_fallback: bool


def _accept(name: str, offered: object) -> ExpertsKernel:
    """A kernel from what a package offers: a class, or one object."""
    kernel = offered() if isinstance(offered, type) else offered
    if not isinstance(kernel, ExpertsKernel):
        raise wrong_offer(name, "be an ExpertsKernel", repr(offered))
    if getattr(kernel, "name", None) != name:
        raise wrong_offer(name, f"have the name {name!r}", repr(getattr(kernel, "name", None)))
    return kernel


PLUG_INS: PlugIns[ExpertsKernel] = PlugIns(Group.KERNELS, _accept, lambda: _LOADERS)
"""Kernels of other packages."""


@constant_in_graphs
def _order() -> tuple[tuple[str, ...], tuple[Rejection, ...]]:
    """The kernels in order of preference, and the plug-ins that cannot be used."""
    plugged = PLUG_INS.usable()
    first = [name for name, kernel in plugged.items() if kernel.comes_first]
    behind = [name for name in plugged if name not in first]
    broken = [Rejection(p.name, p.problem) for p in PLUG_INS.reports() if p.problem is not None]
    return (*first, *_LOADERS, *behind), tuple(broken)


def kernel_names() -> tuple[str, ...]:
    """Names of all kernels that can be used, in order of preference."""
    return _order()[0]


def register_kernel(name: str, load: Callable[[], ExpertsKernel]) -> None:
    """Add a kernel in front of the others.

    Args:
        name: its name; must be new.
        load: returns the kernel; called once, when kernels are first compared.
    """
    if name in _LOADERS:
        raise ConfigError(
            f"kernel name ({name!r}) must be new; got one that exists. Choose another."
        )
    others = dict(_LOADERS)
    _LOADERS.clear()
    _LOADERS.update({name: load, **others})


def unregister_kernel(name: str) -> None:
    """Take a kernel out again; layers that hold it keep it."""
    _LOADERS.pop(name, None)
    _LOADED.pop(name, None)


def _load(name: str) -> ExpertsKernel:
    if name not in _LOADERS:
        return PLUG_INS.load(name)
    if name not in _LOADED:
        _LOADED[name] = _LOADERS[name]()
    return _LOADED[name]


def get_kernel(name: str) -> ExpertsKernel:
    """The kernel of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
        PlugInError: it is a plug-in that cannot be used.
    """
    if name not in _LOADERS and name not in PLUG_INS.names():
        raise ConfigError(
            f"kernel ({name!r}) must be one of {', '.join(kernel_names())}; got an unknown name. "
            f"Use one of these."
        )
    return _load(name)


def _why_not(
    name: str,
    candidate: ExpertsKernel,
    problem: ExpertsProblem,
    asked: str | None,
    taken: ExpertsKernel | None,
) -> tuple[str | None, bool]:
    """Why a kernel is not taken, or None, and whether it might have been unasked.

    What a plug-in raises is a reason.
    """
    try:
        is_automatic = candidate.is_automatic(problem.device)
        reason = candidate.unsupported(problem)
        if reason is None and asked not in (None, name):
            reason = f"kernel={asked!r} was asked for"
        if reason is None and asked is None and not is_automatic:
            reason = f"runs on {problem.device} only when asked for: kernel={name!r}"
        if reason is None and taken is not None:
            reason = f"{taken.name} is preferred"
        return candidate.cannot_load() if reason is None else reason, is_automatic
    except Exception as error:
        if name in _BUILT_IN:
            raise
        return f"raised {one_line(error)}", candidate.comes_first


def select_kernel(
    problem: ExpertsProblem, *, kernel: str | None = None, strict: bool = False
) -> KernelDecision:
    """Choose the first kernel, in order of preference, that can run the problem.

    Args:
        problem: what is to be run.
        kernel: insist on this one.
        strict: an error instead of a kernel that is not the preferred one, or that falls short of
            what the checkpoint means (`shortfall`).

    Raises:
        ConfigError: the name is unknown.
        PlugInError: it is that of a plug-in that cannot be used.
        NoKernelFits: none can run it, or not the one insisted on; the message gives every reason.
    """
    if kernel is not None:
        get_kernel(kernel)  # an unknown name is an error of its own
    taken: ExpertsKernel | None = None
    rejections: list[Rejection] = []
    is_fallback = False
    names, broken = _order()
    for name in names:
        candidate = _load(name)
        reason, is_automatic = _why_not(name, candidate, problem, kernel, taken)
        if reason is None:
            taken = candidate
        else:
            is_passed_over = taken is None and kernel is None and is_automatic
            is_fallback = is_fallback or is_passed_over
            rejections.append(Rejection(name, reason))
    rejections += broken
    shortfall = None if taken is None or not strict else taken.shortfall(problem)
    if taken is not None and shortfall is not None:
        rejections.append(Rejection(taken.name, shortfall))
    if taken is None or (strict and is_fallback) or shortfall is not None:
        lines = "".join(f"\n  {r.kernel}: {r.reason}" for r in rejections)
        asked = f"kernel ({kernel!r})" if kernel else "a kernel"
        remedy = "Change what the reasons name, or choose another kernel or drop strict."
        if shortfall is not None:
            remedy = "Ask for activation_dtype='bf16' to take rows as they come, or drop strict."
        kind = "the preferred kernel under strict=True" if taken is not None else asked
        raise NoKernelFits(
            f"{kind} must be able to run experts of {problem.weight_dtype} weights (scheme "
            f"{problem.scheme}) on {problem.device}; got:{lines}\n{remedy}"
        )
    return KernelDecision(problem, taken, tuple(rejections), is_fallback)
