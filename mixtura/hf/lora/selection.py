"""Which adapter each token of a model's forward is to have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.errors import InputError
from mixtura.types import TokenInputs

ADAPTERS = "mixtura_adapters"
"""The attribute of a base model that holds the selection of its adapters."""

NONE = -1
"""The number of no adapter."""

Names = str | None | Sequence[str | None] | Tensor
"""One adapter for all rows, or None; one for every sequence of a batch; a number for every token.
"""

Chosen = int | tuple[int, ...] | Tensor
"""The same as numbers; a tensor is (T,) int32."""


@dataclass(eq=False)
class Selection:
    """What has been chosen, and the batch that a forward has brought.

    Attributes:
        device: where the tokens of the last forward were.
        is_row_invariant: whether a row may not depend on its batch.
        names: of the loaded adapters, in the order of their numbers.
        chosen: their numbers.
        batch: (sequences, tokens of each) of the forward under way, or of the last one; kept only
            where rows have adapters of their own.
        numbers: those of the rows then, as a tensor, made before a graph is captured.
    """

    device: torch.device
    is_row_invariant: bool = False
    names: tuple[str, ...] = ()
    chosen: Chosen = NONE
    batch: tuple[int, int] | None = None
    numbers: Tensor | None = None

    def choose(self, chosen: Chosen) -> None:
        """Let the forwards to come have these adapters."""
        self.chosen, self.batch, self.numbers = chosen, None, None
        if not isinstance(chosen, int):
            self.numbers = torch.as_tensor(chosen, dtype=torch.int32, device=self.device)

    def number_of(self, name: str | None) -> int:
        """The number of an adapter.

        Raises:
            InputError: none of that name is loaded.
        """
        if name is None:
            return NONE
        if name not in self.names:
            raise InputError(
                f"adapter ({name!r}) must be one that is loaded; got "
                f"{', '.join(self.names) or 'none'}. Load it with load_adapter."
            )
        return self.names.index(name)

    def read(self, names: Names) -> Chosen:
        """What was asked for, as numbers.

        Raises:
            InputError: a name is not loaded, or a tensor holds no numbers of adapters.
        """
        if names is None or isinstance(names, str):
            return self.number_of(names)
        if not isinstance(names, Tensor):
            if not isinstance(names, Sequence):
                raise InputError(
                    f"adapters ({names!r}) must be a name, None, a list of these, or a tensor of "
                    f"numbers; got {type(names).__name__}. Name what adapter_names gives."
                )
            return tuple(self.number_of(name) for name in names)
        if names.is_floating_point() or names.dtype is torch.bool or not names.numel():
            raise InputError(
                f"adapter numbers ({tuple(names.shape)} of {names.dtype}) must be whole ones, one "
                f"for each token; got others. Give an integer tensor."
            )
        least, most = (int(bound) for bound in names.aminmax())
        if least < NONE or most >= len(self.names):
            raise InputError(
                f"adapter numbers must be in [-1, {len(self.names)}), as adapters were loaded; got "
                f"{least} to {most}. Load the adapter, or give -1."
            )
        return names.flatten().to(torch.int32, copy=True)  # the caller may write to it

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch of a forward of the model, before its first layer.

        Raises:
            InputError: the adapters that were chosen are for a batch of another size.
        """
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            return
        if self.device != given.device:
            self.device = given.device
        if isinstance(self.chosen, int):
            return
        count, length = given.shape[:2]
        self.batch = (count, length)
        is_tensor = isinstance(self.chosen, Tensor)
        wanted = count * length if is_tensor else count
        if len(self.chosen) != wanted:
            raise InputError(
                f"a batch ({count} sequences of {length} tokens) must have an adapter chosen for "
                f"each {'token' if is_tensor else 'sequence'}; got {len(self.chosen)}. Choose "
                f"{wanted}, where beams and returned sequences count, or one for all."
            )

    def ids(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The adapters' numbers of rows, -1 for none. -> (rows,) int32.

        Args:
            shape: of the rows, (sequences, tokens) or (tokens of all sequences,).

        Raises:
            InputError: rows cannot be told apart: they are not the tokens of the batch.
        """
        num_rows = torch.Size(shape).numel()
        if isinstance(self.chosen, int):
            return torch.full((num_rows,), self.chosen, dtype=torch.int32, device=device)
        assert self.numbers is not None
        numbers = self.numbers.to(device)
        count, length = self.batch if self.batch is not None else (0, 0)
        if isinstance(self.chosen, Tensor):
            if num_rows == count * length:
                return numbers
        elif count and (num_rows == count * length or (len(shape) > 1 and shape[0] == count)):
            return numbers.repeat_interleave(num_rows // count)
        raise InputError(
            f"rows ({tuple(shape)}) must be the tokens of the batch, {count} sequences of {length} "
            f"here, to have adapters of their own; got others. Choose one adapter for all."
        )

    def source(self, tokens: TokenInputs, num_tokens: int) -> TokenInputs:
        """Bring the tokens' adapters along to a layer; see `TokenSource`.

        Where no token has one, nothing is brought along.
        """
        if isinstance(self.chosen, int) and self.chosen == NONE:
            return tokens
        return replace(tokens, adapter_ids=self.ids((num_tokens,), self.device))

    @contextmanager
    def without(self) -> Iterator[None]:
        """Let no row have an adapter meanwhile."""
        before = self.chosen
        self.choose(NONE)
        try:
            yield
        finally:
            self.choose(before)


def find_selection(model: nn.Module) -> Selection | None:
    """The selection of a model's adapters; None where none is loaded."""
    for module in model.modules():
        found = getattr(module, ADAPTERS, None)
        if found is not None:
            selection: Selection = found[0]
            return selection
    return None


def check_no_adapters(model: nn.Module) -> None:
    """Raise `InputError` where a model has adapters."""
    selection = find_selection(model)
    if selection is not None:
        raise InputError(
            f"a model must be converted before adapters are loaded; got "
            f"{', '.join(selection.names)}. Unload them first."
        )
