"""Experts: the routed ones with their kernel, and the shared ones with their order."""

from mixtura.experts.packed import ExpertsOptions, PackedExperts, check_rows
from mixtura.experts.routed import RoutedExperts
from mixtura.experts.row_activation import RowActivation
from mixtura.experts.row_linear import RowLinear
from mixtura.experts.shared import SharedExperts, SharedTask, shared_experts_order
from mixtura.experts.storage import StoredTensor, default_storage

__all__ = [
    "ExpertsOptions",
    "PackedExperts",
    "RoutedExperts",
    "RowActivation",
    "RowLinear",
    "SharedExperts",
    "SharedTask",
    "StoredTensor",
    "check_rows",
    "default_storage",
    "shared_experts_order",
]
