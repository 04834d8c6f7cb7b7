"""Expert kernels and their choice."""

from mixtura.kernels.contract import ExpertsKernel
from mixtura.kernels.registry import (
    KernelDecision,
    Rejection,
    get_kernel,
    kernel_names,
    register_kernel,
    select_kernel,
    unregister_kernel,
)

__all__ = [
    "ExpertsKernel",
    "KernelDecision",
    "Rejection",
    "get_kernel",
    "kernel_names",
    "register_kernel",
    "select_kernel",
    "unregister_kernel",
]
