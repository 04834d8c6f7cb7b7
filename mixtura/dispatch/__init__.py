"""Dispatch and combine: which rank runs a token's experts; `LocalDispatcher` is without ranks."""

from mixtura.dispatch.contract import Dispatched, Dispatcher, Pending, Ready
from mixtura.dispatch.local import LocalDispatcher

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher", "Pending", "Ready"]
