"""A model whose weights are in memory only while they are used: a layer at a time.

Transformers makes the model without its parameters. Calls then run in step, and where they come to
a decoder layer, an embedding, a norm or the head, its tensors are read, go through Transformers'
own conversions, and are let go of when the last call has gone through. In memory are one layer,
what the largest of its conversions takes besides (for an experts projection about twice that), and
of each call what goes from layer to layer: hidden states, masks, positions. There is no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.errors import UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf.adopt import get_attribute
from mixtura.hf.checkpoint import TensorHeader, checkpoint_files
from mixtura.hf.convert import convert
from mixtura.hf.fill import Filler
from mixtura.hf.headers import match_headers, stored_dtype
from mixtura.hf.in_step import run_in_step
from mixtura.hf.load import (
    check_moe,
    configured_dtype,
    empty_model,
    find_packed,
    load_config,
)
from mixtura.hf.stored import LazyTensor
from mixtura.hf.tensor_io import TensorReader

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where weights come from.

    Attributes:
        headers: of all tensors, by the names of a dense checkpoint.
        read: gives one of them, dense. release: gives back pages that have been read.
    """

    headers: Mapping[str, TensorHeader]
    read: Callable[[str], Tensor]
    release: Callable[[], object] = lambda: None

    def lazily(self, names: Sequence[str]) -> dict[str, LazyTensor]:
        """Tensors that are read when Transformers' loader comes to them."""
        return {name: LazyTensor(self.read, name, self.headers[name]) for name in names}


class StreamedModel:
    """A converted model that runs without ever being in memory as a whole.

    Args:
        empty: the model on the meta device, as its configuration builds it.
        weights: of the checkpoint.
        dtype: of the model.

    Attributes:
        model: the model. Its parameters are NaN, of one element, unless a call is in their module.

    Raises:
        CheckpointError: the weights are not those of the model.
    """

    def __init__(self, empty: PreTrainedModel, weights: WeightSource, dtype: torch.dtype) -> None:
        self._weights = weights
        stored = match_headers(empty, weights.headers)
        self._sources = {
            target: [name for names in merged.values() for name in names]
            for target, merged in stored.sources.items()
        }
        self._tied: dict[str, str] = dict(getattr(empty, "all_tied_weights_keys", {}))
        self._modules = _streamed_modules(empty)
        parameters = dict(empty.named_parameters(remove_duplicate=False))
        self._targets = {
            path: [name for name in parameters if name.startswith(f"{path}.")]
            for path in self._modules
        }
        self.model = empty_model(empty.config, dtype)
        self._filler = Filler(self.model, dtype)
        streamed = {name for names in self._targets.values() for name in names}
        self._load(sorted(self._sources.keys() - streamed))
        _fill_buffers(self.model)
        for name in streamed:
            self._set(name, _stand_in(get_attribute(self.model, name)))
        convert(self.model.eval(), kernel="torch")

    def _load(self, targets: Sequence[str]) -> None:
        """Let Transformers fill tensors of the model."""
        names = dict.fromkeys(name for target in targets for name in self._sources.get(target, ()))
        self._filler.fill(self._weights.lazily(list(names)))
        self._weights.release()

    def run(
        self,
        calls: Sequence[Callable[[], Result]],
        on_module: Callable[[str], object] = lambda path: None,
    ) -> list[Result]:
        """Run calls of the model in inference mode, all of them through one layer after the other.

        Args:
            calls: functions that call `model`, or its base.
            on_module: told the path of each module that all calls have gone through.

        Returns:
            What they return.

        Raises:
            UnsupportedModel: a module returns NaN, as where the model uses a weight without calling
                the module that it is in.
        """

        @contextmanager
        def around(path: str) -> Iterator[None]:
            with self._filled(path):
                yield
            on_module(path)

        modules = {path: self.model.get_submodule(path) for path in self._modules}
        with ExitStack() as hooks:
            for path, module in modules.items():
                hook = module.register_forward_hook(partial(self._check_numbers, path))
                hooks.callback(hook.remove)
            return run_in_step(calls, modules, around)

    def _check_numbers(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and bool(first.isnan().any()):
            raise UnsupportedModel(
                f"{path} of {type(self.model).__name__} must return numbers; got NaN, of damaged "
                f"weights, or as the model uses a weight without calling its module. Check the "
                f"weights, or leave out --calibration and --eval."
            )

    @contextmanager
    def _filled(self, path: str) -> Iterator[None]:
        """While it lasts, the weights of a module are there."""
        targets = self._targets[path]
        partners = {name: self._partner(name) for name in targets if name not in self._sources}
        filled = [*targets, *partners.values()]
        before = {name: get_attribute(self.model, name) for name in filled}
        try:
            self._load(filled)
            for name, partner in partners.items():
                self._set(name, get_attribute(self.model, partner))
            yield
        finally:
            for module in self.model.get_submodule(path).modules():
                if isinstance(module, PackedExperts):
                    module.materialize()  # forget what a kernel keeps of them
            for name, parameter in before.items():
                self._set(name, parameter)

    def _partner(self, name: str) -> str:
        """The tensor that is stored and tied to one that is not."""
        pairs = [*self._tied.items(), *((b, a) for a, b in self._tied.items())]
        return next(other for one, other in pairs if one == name and other in self._sources)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = parameter


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and dtype whose memory is one element, NaN.

    Not one on the meta device: models ask weights where they are, and move their inputs there.
    """
    value = torch.nan if parameter.is_floating_point() else 0
    element = torch.full((), value, dtype=parameter.dtype)
    return nn.Parameter(element.expand(parameter.shape), requires_grad=False)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute what is in no file, such as rotary tables; parameters are left as they are."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


def stream_checkpoint(directory: Path) -> StreamedModel:
    """The model of a checkpoint, dense or quantized; what is quantized runs as what it stands for.

    Args:
        directory: of safetensors files.

    Raises:
        CheckpointError: files are missing or broken, or not those of the model.
        UnsupportedModel: there is no MoE layer.
    """
    found = find_packed(directory)
    if found is None:
        config = load_config(directory)
        reader = TensorReader(checkpoint_files(directory))
        weights = WeightSource(reader.headers, reader.read)
    else:
        config, stored = found
        weights = WeightSource(stored.headers, stored.tensor, stored.mapped.release)
    dtype = configured_dtype(config) or stored_dtype(weights.headers) or torch.bfloat16
    return StreamedModel(check_moe(config), weights, dtype)


def _streamed_modules(model: nn.Module) -> list[str]:
    """Modules whose weights come and go: those in numbered lists, and single ones beside them."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        is_single = next(module.children(), None) is None
        if (is_single or isinstance(parent, nn.ModuleList)) and any(
            True for _ in module.parameters()
        ):
            found.append(name)
    return found
