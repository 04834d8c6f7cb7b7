"""Second moments of what experts and linear layers are multiplied with, on a calibration text.

The dense model runs a layer at a time (`streamed.py`), so it need not fit in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.errors import UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf.load import load_tokenizer
from mixtura.hf.streamed import StreamedModel, stream_checkpoint
from mixtura.hf.trace import encode_text, window_size
from mixtura.kernels.torch.experts import run_experts
from mixtura.quant.matrix import QuantizedMatrix, dequantize

MAX_TOKENS = 65_536
"""Tokens of a calibration text that are run; the rest is left out."""

STARVED = 32
"""Tokens below which an expert counts as starved: a mean of squares is then off by a quarter."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text to calibrate with.

    Attributes:
        text: as it is in its file.
    """

    text: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ExpertMoments:
    """What the experts of one layer have seen.

    Attributes:
        num_tokens: (E,) of each expert.
        gate_up: (E, H) sums of squares of the inputs. down: (E, I) of what down_proj is applied to.
    """

    num_tokens: Tensor
    gate_up: Tensor
    down: Tensor

    def starved(self) -> tuple[int, ...]:
        """Experts with fewer than `STARVED` tokens."""
        return tuple((self.num_tokens < STARVED).nonzero().flatten().tolist())


@dataclass(frozen=True, slots=True)
class Moments:
    """What a calibration text has shown: by path, of experts modules and linear layers (K,)."""

    experts: Mapping[str, ExpertMoments]
    linears: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write them to a safetensors file, which appears whole."""
        tensors = {f"linear:{name}": value for name, value in self.linears.items()}
        for name, found in self.experts.items():
            for field in ExpertMoments.__dataclass_fields__:
                tensors[f"{field}:{name}"] = getattr(found, field)
        unfinished = path.with_name(f"{path.name}.part")
        save_file(tensors, unfinished)
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read what `save` has written."""
        fields: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(path).items():
            field, _, name = key.partition(":")
            fields.setdefault(field, {})[name] = value
        linears = fields.pop("linear", {})
        paths = fields.get("num_tokens", {})
        experts = {
            name: ExpertMoments(**{field: found[name] for field, found in fields.items()})
            for name in paths
        }
        return cls(experts, linears)


def find_moments(
    directory: Path,
    calibration: Calibration,
    linears: list[str],
    on_module: Callable[[str], object] = lambda path: None,
) -> Moments:
    """Run a calibration text through a dense checkpoint.

    Args:
        directory: of the checkpoint, with its tokenizer.
        calibration: the text.
        linears: paths of linear layers to look at besides.
        on_module: told the path of each module that the whole text has gone through.

    Raises:
        InputError: the text is empty.
        CheckpointError: the tokenizer or the weights are broken.
        UnsupportedModel: the model has no experts that are called as modules, or does not run a
            layer at a time.
    """
    encoded = encode_text(load_tokenizer(directory), calibration.text, max_tokens=MAX_TOKENS)
    streamed = stream_checkpoint(directory)
    return collect_moments(streamed, torch.tensor(encoded.ids), linears, on_module)


def collect_moments(
    streamed: StreamedModel,
    ids: Tensor,
    linears: list[str],
    on_module: Callable[[str], object] = lambda path: None,
) -> Moments:
    """Second moments in a model.

    Args:
        streamed: the model. ids: (T,) tokens. linears, on_module: see `find_moments`.

    Raises:
        UnsupportedModel: see `find_moments`.
    """
    model = streamed.model
    watched: dict[str, _WatchedExperts] = {}
    inputs: dict[str, _WatchedLinear] = {}
    base: Any = model.base_model
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, PackedExperts):
                watched[name] = _WatchedExperts(module)
                hook = module.register_forward_pre_hook(watched[name], with_kwargs=True)
                hooks.callback(hook.remove)
            elif name in linears:
                inputs[name] = _WatchedLinear()
                hooks.callback(module.register_forward_pre_hook(inputs[name]).remove)
        windows = torch.split(ids, window_size(model))
        streamed.run([partial(_run_window, base, part) for part in windows], on_module)
    if not any(found.num_tokens.any() for found in watched.values()):
        raise UnsupportedModel(
            f"the experts of {type(model).__name__} must be modules that are called to be "
            f"calibrated; got none. Leave --calibration out."
        )
    experts = {name: found.moments() for name, found in watched.items()}
    means = {name: found.total / max(found.num_rows, 1) for name, found in inputs.items()}
    return Moments(experts, means)


def _run_window(base: Any, ids: Tensor) -> None:
    base(input_ids=ids.unsqueeze(0), use_cache=False)


class _WatchedLinear:
    """Sums the squares of a linear layer's inputs."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.num_rows = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        self.total = self.total + rows.float().square().sum(0).cpu()
        self.num_rows += len(rows)


class _WatchedExperts:
    """Sums the squares of the inputs of an experts module's projections, by expert."""

    def __init__(self, module: PackedExperts) -> None:
        config = module.experts_config
        count = config.num_experts
        self.num_tokens = torch.zeros(count, dtype=torch.int64)
        self.gate_up = torch.zeros(count, config.hidden_size)
        self.down = torch.zeros(count, config.intermediate_size)

    def __call__(self, module: PackedExperts, args: tuple[Any, ...], kwargs: Any) -> None:
        hidden_states, ids = [*args, *kwargs.values()][:2]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = ids.reshape(len(rows), -1)
        weights = module.expert_weights
        count = weights.config.num_experts
        flat = ids.flatten().long()
        flat = torch.where((flat < 0) | (flat >= count), count, flat)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=count + 1)[:count].cpu()
        kept = order[: int(counts.sum())]

        def linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
            is_down = weight is weights.down_proj
            sums = self.down if is_down else self.gate_up
            if weight is not weights.up_proj:
                _add_squares(sums, x, counts)
            if is_down:
                return x.new_zeros(len(x), weight.shape[1])
            return _by_expert(x, weight, bias, counts)

        def per_row(values: Tensor) -> Tensor:
            return values.repeat_interleave(counts.to(values.device))

        run_experts(weights, rows[kept // ids.shape[1]], linear, per_row)
        self.num_tokens += counts

    def moments(self) -> ExpertMoments:
        """What has been summed up."""
        return ExpertMoments(self.num_tokens, self.gate_up, self.down)


def _add_squares(sums: Tensor, rows: Tensor, counts: Tensor) -> None:
    for expert, part in enumerate(torch.split(rows, counts.tolist())):
        if len(part):
            sums[expert] += part.float().square().sum(0).cpu()


def _by_expert(
    rows: Tensor, weight: QuantizedMatrix, bias: Tensor | None, counts: Tensor
) -> Tensor:
    parts = [
        F.linear(
            part,
            dequantize(weight.expert(expert), part.dtype),
            None if bias is None else bias[expert].to(part.dtype),
        )
        for expert, part in enumerate(torch.split(rows, counts.tolist()))
        if len(part)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, weight.shape[1])
