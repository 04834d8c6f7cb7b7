"""Some experts of a dense checkpoint: their bytes alone are read, and no stack of all is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixtura.experts import StoredTensor
from mixtura.hf.headers import EACH, Places, expert_number
from mixtura.hf.loader import quantize_named
from mixtura.hf.stored import StoredCheckpoint
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense


@dataclass(frozen=True, slots=True)
class LocalSource:
    """Where a rank's experts are read from.

    Attributes:
        checkpoint: the files. places: the conversions that take its tensors to the model's.
        sources: what each of the model's tensors is made of, as `match_headers` finds it.
    """

    checkpoint: StoredCheckpoint
    places: Places
    sources: Mapping[str, Mapping[str | None, list[str]]]

    def read(self, target: str, stored: StoredTensor, experts: Sequence[int]) -> Tensor:
        """Some experts of one of the model's tensors, as kernels see it; a copy.

        A tensor of each expert is read for these alone; of a stack, which is a view of a mapped
        file, their rows. Transformers' own conversion then makes of these what it would of all.

        Args:
            target: the tensor. stored: how the model stores it.
            experts: which, in the order wanted.

        Returns:
            (L, ...) in the dtype of the file.
        """
        merged = self.sources[target]
        if None in merged:
            whole = self.checkpoint.plain(merged[None][0])
            return _some(stored.logical(whole), experts)
        chosen: dict[str | None, list[str]] = {}
        tensors: dict[str, Tensor] = {}
        for pattern, names in merged.items():
            if pattern is not None and EACH in pattern and expert_number(names[0]) is not None:
                chosen[pattern] = [names[number] for number in experts]
                tensors |= {name: self.checkpoint.plain(name) for name in chosen[pattern]}
            else:
                assert stored.num_experts is None, f"{target} is flat, and made of stacks"
                chosen[pattern] = names
                tensors |= {name: _some(self.checkpoint.plain(name), experts) for name in names}
        made = self.places.convert(target, chosen, tensors)[target]
        count = None if stored.num_experts is None else len(experts)
        return replace(stored, num_experts=count).logical(made)


def _some(stack: Tensor, experts: Sequence[int]) -> Tensor:
    """(E, ...) -> (L, ...); of a mapped stack nothing else is touched."""
    return torch.stack([stack[number] for number in experts])


def in_format(name: str, stack: Tensor, format: WeightFormat | None) -> QuantizedMatrix:
    """A stack in a weight format, or as it is.

    Raises:
        InputError: it has an element that is not finite; the message has the name.
    """
    if format is None:
        return dense(stack)
    if format.scheme.is_quantized:
        return quantize_named(name, stack, format)
    return dense(stack.to(format.scheme.values_dtype))
