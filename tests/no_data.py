"""Tensors without data, which stand for a GPU's where there is none.

A layer that runs on them never waits for the device: to read a value, or to ask for as many as
there are of something, is an error there, and what is copied to or from the host is noted. Their
device is `meta`, for which our code has no branch of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixtura.parallel import LoneTransport, Pending
from mixtura.parallel.transport import Ready


class Recorded(TorchDispatchMode):
    """Operators in their order, and those among them that take something from or to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.crossings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.crossings.append(str(func))
        return out


class FromLists(TorchFunctionMode):
    """Notes tensors that are made of lists, which no operator shows."""

    def __init__(self, record: Recorded) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor):
            self.record.crossings.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[Recorded]:
    """A context in which operators are noted."""
    with torch.no_grad(), Recorded() as record, FromLists(record):
        yield record


def without_data(value: Any) -> Any:
    """A tensor, or a frozen noun of tensors, without its data."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
    tensors = {name: part for name, part in fields.items() if isinstance(part, Tensor)}
    return replace(value, **{name: without_data(part) for name, part in tensors.items()})


class EchoTransport(LoneTransport):
    """One of two ranks, the other of which has nothing to add; only sums may be asked for."""

    size = 2

    def __init__(self) -> None:
        self.calls = 0

    def all_reduce(self, rows: Tensor) -> Pending[Tensor]:
        self.calls += 1
        return Ready(rows)

    def all_gather(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        raise AssertionError("rows must not be gathered")
