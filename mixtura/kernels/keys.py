"""Objects that graphs of torch.compile name by key."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mixtura.errors import InputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Keys(Generic[T]):
    """Keys are tensors, so that layers which are alike share one compiled graph.

    Args:
        what: what the objects are called in errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = count(1)
        self._objects: WeakValueDictionary[int, T] = WeakValueDictionary()

    def new(self) -> Tensor:
        """A key that names nothing yet: (1,) int64."""
        return torch.tensor([next(self._next)], device="cpu")

    def name(self, key: Tensor, found: T) -> None:
        """Let a key name an object, as long as that lives."""
        self._objects[int(key)] = found

    def find(self, key: Tensor) -> T:
        """The object.

        Raises:
            InputError: it has been freed.
        """
        found = self._objects.get(int(key))
        if found is None:
            raise InputError(
                f"{self._what} ({int(key)}) must be alive while a compiled graph runs; got none. "
                f"Keep the model, or compile again."
            )
        return found


def constant_in_graphs(function: F) -> F:
    """Let a graph take what a function returns as a constant.

    What `torch.compiler.assume_constant_result` does, which imports the compiler for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
