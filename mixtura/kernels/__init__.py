"""Expert kernels and their choice."""

from mixtura.kernels.contract import ExpertsKernel, StoredWeightsKernel
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
    "StoredWeightsKernel",
    "get_kernel",
    "kernel_names",
    "register_kernel",
    "select_kernel",
    "unregister_kernel",
]
