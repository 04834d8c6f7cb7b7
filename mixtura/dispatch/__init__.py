"""Dispatch and combine: which rank runs a token's experts; `LocalDispatcher` is without ranks."""

from mixtura.dispatch.all_gather import AllGatherDispatcher
from mixtura.dispatch.all_reduce import AllReduceDispatcher
from mixtura.dispatch.all_to_all import AllToAllDispatcher
from mixtura.dispatch.choice import (
    DispatcherChoice,
    choose_dispatcher,
    create_dispatcher,
    dispatcher_for,
    expected_ranks,
)
from mixtura.dispatch.contract import Dispatched, Dispatcher
from mixtura.dispatch.local import LocalDispatcher
from mixtura.dispatch.shared_batch import SharedBatchDispatcher

__all__ = [
    "AllGatherDispatcher",
    "AllReduceDispatcher",
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "DispatcherChoice",
    "LocalDispatcher",
    "SharedBatchDispatcher",
    "choose_dispatcher",
    "create_dispatcher",
    "dispatcher_for",
    "expected_ranks",
]
