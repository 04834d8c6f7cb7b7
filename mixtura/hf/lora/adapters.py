"""LoRA adapters on a model: load, choose, unload; the model's weights stay as they are."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mixtura.errors import InputError, UnsupportedModel
from mixtura.hf.balance import current_spread
from mixtura.hf.lora.modules import (
    Installed,
    check_copy,
    experts_device,
    experts_modules,
    install,
    layer_of,
    layers,
    linear_module,
    linear_tables,
    new_selection,
)
from mixtura.hf.lora.places import AdapterPlaces
from mixtura.hf.lora.read import Adapter, read_adapter
from mixtura.hf.lora.selection import ADAPTERS, NONE, Chosen, Names, Selection, find_selection
from mixtura.hf.parallel import base_of, find_ranks, transport_of
from mixtura.lora import LoraWeights
from mixtura.parallel import agree
from mixtura.parallel.shard import shard_lora

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What adapters may be called."""


def load_adapter(model: PreTrainedModel, path: str | Path, name: str | None = None) -> str:
    """Load a LoRA adapter of PEFT beside a model's weights, which are neither merged nor rebuilt.

    The first one that is loaded is chosen for all rows; of others, `select_adapters` says whose
    rows they are for. An error leaves the model as it was. Where ranks share the experts, each of
    them must load the same adapters in the same order.

    Args:
        model: converted; of any dtype and in any weight format.
        path: a directory with adapter_config.json and adapter_model.safetensors.
        name: what to call it; the directory's name unless given.

    Returns:
        The name.

    Raises:
        CheckpointError: a file is missing or broken, asks for what is not done here, or is of
            another model; a tensor without a place is named.
        InputError: the name is taken, or has odd characters.
        UnsupportedModel: the model has no experts of ours, or the adapter is of a part that is not.
        NoKernelFits: no kernel adds adapters to the experts, or not the one insisted on.
    """
    directory = Path(path).expanduser()
    found = find_selection(model)
    selection = new_selection(model) if found is None else found
    called = _free_name(directory.resolve().name if name is None else name, selection, directory)
    number = len(selection.names)
    before = Installed(
        {path: one.lora for path, one in experts_modules(model).items()}, linear_tables(model)
    )
    if not before.experts:
        raise UnsupportedModel(
            f"the model ({type(model).__name__}) must have experts that are ours to load an "
            f"adapter; got none. Convert it first, with mixtura.convert."
        )

    def add() -> tuple[Mapping[str, Any], None]:
        adapter = read_adapter(directory, AdapterPlaces(model))
        install(model, _with(model, before, adapter, number), selection)
        _choose_kernels(model)
        return {f"adapter {number}": called, f"tensors of {called}": _digest(adapter)}, None

    try:
        agree(transport_of(find_ranks(model)), add)
    except BaseException:
        install(model, before, selection)
        raise
    if found is None:
        _watch(model, selection)
        selection.choose(number)
    selection.names = (*selection.names, called)
    _forget_graphs()
    return called


def unload_adapter(model: PreTrainedModel, name: str) -> None:
    """Take an adapter off a model; without the last one, the model is bitwise as before the first.

    The numbers of adapters that were loaded after it fall by one. Rows that had it have none.

    Raises:
        InputError: none of that name is loaded.
    """
    selection = _selection_of(model)
    number = selection.number_of(name)
    told = Installed(
        {
            path: (*one.lora[:number], *one.lora[number + 1 :])
            for path, one in experts_modules(model).items()
        },
        {
            path: {n - (n > number): factors for n, factors in table.items() if n != number}
            for path, table in linear_tables(model).items()
        },
    )
    install(model, told, selection)
    before, selection.names = selection.names, tuple(n for n in selection.names if n != name)
    selection.choose(_renumbered(selection.chosen, before, selection.names))
    if not selection.names:
        _forget(model)
    _forget_graphs()


def adapter_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The adapters that are loaded, in the order of their numbers: 0, 1, ..."""
    selection = find_selection(model)
    return () if selection is None else selection.names


def select_adapters(model: PreTrainedModel, names: Names) -> Restoring:
    """Choose whose rows have which adapter, in the forwards to come.

    Args:
        model: with adapters.
        names: one name for all rows, None for no adapter; or a name or None for each sequence of
            the batch, where beams and returned sequences count; or an integer tensor with a number
            for each token, (T,) or (sequences, T), as `adapter_names` counts them, -1 for none.

    Returns:
        A context: leaving it restores what was chosen before, by name: none where that has been
        unloaded. It need not be entered.

    Raises:
        InputError: no such adapter is loaded.
    """
    selection = _selection_of(model)
    before = selection.chosen
    selection.choose(selection.read(names))
    return Restoring(selection, before, selection.names)


@dataclass(frozen=True, slots=True)
class Restoring:
    """What `select_adapters` returns."""

    selection: Selection
    before: Chosen
    names: tuple[str, ...]
    """That the numbers in `before` are of."""

    def __enter__(self) -> None:
        """What was chosen is chosen already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        now = self.selection.names
        self.selection.choose(_renumbered(self.before, self.names, now))


def _free_name(name: str, selection: Selection, directory: Path) -> str:
    if NAME.fullmatch(name) is None:
        raise InputError(
            f"an adapter's name ({name!r}) must be letters, digits, '.', '_' and '-', 128 at most, "
            f"a letter or digit first; got another one for {directory}. Give a name."
        )
    if name in selection.names:
        raise InputError(
            f"an adapter's name ({name!r}) must be free; got one that is loaded. Unload that, or "
            f"give another name."
        )
    return name


def _with(model: PreTrainedModel, before: Installed, adapter: Adapter, number: int) -> Installed:
    """What modules are told once an adapter has joined those before it.

    Raises:
        UnsupportedModel: the adapter is of a module that is not ours, or cannot be added to.
    """
    for path, name in adapter.names.items():
        if path not in before.experts:
            raise UnsupportedModel(
                f"{name} must be of experts that are ours; got {path}, which are not. See "
                f"'mixtura explain' for the reason."
            )
    for path, copy in adapter.copies.items():
        check_copy(model.get_submodule(path), path, copy)
    experts = {}
    for path, adapters in before.experts.items():
        padded = (*adapters, *[None] * (number - len(adapters)))
        whole = adapter.experts.get(path)
        experts[path] = (*padded, None if whole is None else _local(model, path, whole))
    linears = {path: dict(table) for path, table in before.linears.items()}
    paths = {id(module): path for path, module in model.named_modules()}
    for path, factors in adapter.linears.items():
        owner = paths[id(linear_module(model, path, factors.name))]
        linears.setdefault(owner, {})[number] = (factors.a, factors.b)
    return Installed(experts, linears)


def _local(model: PreTrainedModel, path: str, whole: LoraWeights) -> LoraWeights:
    """This rank's part of an adapter where the experts are, in 16 bits for a model in 16 bits."""
    spread = current_spread(model, layer_of(model, path))
    mine = whole if spread is None else shard_lora(whole, spread)
    dtype = model.dtype if model.dtype.itemsize == 2 else torch.float32
    device = experts_device(experts_modules(model)[path])
    return mine.mapped(lambda factor: factor.to(device, dtype))


def _choose_kernels(model: PreTrainedModel) -> None:
    """Choose the experts' kernels anew, so that one that cannot add adapters is told of now."""
    for module in experts_modules(model).values():
        module.decide(module.problem(module.row_dtype or model.dtype, needs_grad=False))


def _digest(adapter: Adapter) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path, weights in sorted(adapter.experts.items()):
        for name, tensor in weights.tensors().items():
            digest.update(f"{path}.{name}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    for path, factors in sorted(adapter.linears.items()):
        digest.update(path.encode())
        digest.update(factors.a.numpy().tobytes())
        digest.update(factors.b.numpy().tobytes())
    return digest.hexdigest()


def _watch(model: PreTrainedModel, selection: Selection) -> None:
    """Let every forward of the model tell its batch, and the model know its adapters."""
    base: Any = base_of(model, layers(model))
    handle = base.register_forward_pre_hook(selection.begin, with_kwargs=True)
    setattr(base, ADAPTERS, (selection, handle))


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        found: tuple[Selection, RemovableHandle] | None = getattr(module, ADAPTERS, None)
        if found is not None:
            found[1].remove()
            delattr(module, ADAPTERS)


def _forget_graphs() -> None:
    """Let what was compiled be compiled anew: graphs do not look for hooks that were not there."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _selection_of(model: PreTrainedModel) -> Selection:
    selection = find_selection(model)
    if selection is None:
        raise InputError(
            f"the model ({type(model).__name__}) must have an adapter loaded; got none. Load one "
            f"with load_adapter."
        )
    return selection


def _renumbered(chosen: Chosen, before: tuple[str, ...], now: tuple[str, ...]) -> Chosen:
    """What was chosen, by the numbers that the adapters have now; none where one is gone."""
    numbers = [now.index(name) if name in now else NONE for name in before]
    numbers.append(NONE)  # where -1 finds it
    if isinstance(chosen, int):
        return numbers[chosen]
    if isinstance(chosen, tuple):
        return tuple(numbers[one] for one in chosen)
    return torch.tensor(numbers, dtype=torch.int32, device=chosen.device)[chosen.long()]
