"""A checkpoint's headers against the model that its configuration describes; no weight is read."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import TensorHeader, checkpoint_files, read_headers
from mixtura.hf.exclusions import exclusion_rule

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored dtypes that a weight can be loaded from, as safetensors spells them."""


WRITTEN_APART: dict[str, dict[str, tuple[str, ...]]] = {
    "Llama4TextExperts": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
}
"""Experts that Transformers knows as stacks (E, in, out) alone, by class, and the linear layers
that quantizers take each stack apart into and write: `experts.0.gate_proj.weight_packed`."""

EACH = "*"
"""Stands for the number of an expert in the patterns of Transformers' conversions."""


def local_directory(model: str | Path) -> Path | None:
    """Where a model's files are, a directory or one of the hub's cache; None without all of them.

    Raises:
        CheckpointError: in a directory some files are missing.
    """
    directory = Path(model)
    is_cached = not directory.is_dir()
    if is_cached:
        try:
            config = try_to_load_from_cache(str(model), "config.json")
        except HFValidationError:
            return None  # a path, where nothing is
        if not isinstance(config, str):
            return None
        directory = Path(config).parent
    present = {file.name for file in directory.glob("*.safetensors")}
    if not present or (is_cached and not _is_complete(directory, present)):
        return None
    return directory


def local_headers(model: str | Path) -> dict[str, TensorHeader]:
    """The headers of a model's files, in its directory or the hub's cache; none without files.

    Raises:
        CheckpointError: in a directory some files are missing, or one is broken.
    """
    directory = local_directory(model)
    return {} if directory is None else read_headers(checkpoint_files(directory))


def _is_complete(directory: Path, present: set[str]) -> bool:
    """Whether an interrupted download has brought all files of the index."""
    try:
        return all(file.name in present for file in checkpoint_files(directory))
    except CheckpointError:
        return False


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What the headers of a checkpoint say of a model.

    Attributes:
        dtypes: the stored dtype of every tensor of the model that is filled, by its name there.
        unused: tensors of the checkpoint that the model has no place for.
        excluded: those that it needs none for, each with the rule that says so.
        sources: the stored tensors that each of the model's is made of: a list for each pattern of
            the conversion that merges them, or the one that it is, under None.
    """

    dtypes: Mapping[str, torch.dtype]
    unused: tuple[str, ...]
    sources: Mapping[str, Mapping[str | None, list[str]]] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


def stored_dtype(headers: Mapping[str, TensorHeader]) -> torch.dtype | None:
    """The dtype that Transformers loads with where the configuration has none: the first one."""
    found = (DTYPES.get(headers[name].dtype) for name in headers)
    return next((dtype for dtype in found if dtype is not None), None)


def match_headers(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> StoredModel:
    """Follow every stored tensor to its place in the model, as loading would, and compare.

    Args:
        model: built on the meta device.
        headers: of all files of the checkpoint.

    Raises:
        CheckpointError: a tensor has another shape than the configuration gives, or a dtype that
            is no plain number, or is missing or there twice; or experts are not numbered 0, 1, ...
    """
    places = Places(model)
    state = places.state
    dtypes: dict[str, torch.dtype] = {}
    merged: dict[str, dict[str | None, list[str]]] = {}
    found: dict[str, Mapping[str | None, list[str]]] = {}
    unused: list[str] = []
    excluded: dict[str, str] = {}
    for name in sorted(headers, key=dot_natural_key):
        target, pattern = places.find(name)
        if target not in state:
            rule = exclusion_rule(name, model)
            if rule is None:
                unused.append(name)
            else:
                excluded[name] = rule
        elif pattern is not None:
            merged.setdefault(target, {}).setdefault(pattern, []).append(name)
        else:
            _check_stack(name, headers[name], target, places)
            _check_shape(name, headers[name].shape, target, state[target])
            _check_first(name, target, found)
            dtypes[target] = _dtype_of(headers, [name], state[target])
            found[target] = {None: [name]}
    for target, sources in merged.items():
        names = [name for group in sources.values() for name in group]
        _check_numbers(target, sources)
        for filled, shape in places.merge(target, sources, headers):
            if filled in state:
                _check_first(names[0], filled, found)
                _check_count(target, sources, shape, state[filled])
                _check_shape(_some(names), shape, filled, state[filled])
                dtypes[filled] = _dtype_of(headers, names, state[filled])
                found[filled] = dict(sources)
    _check_missing(model, state.keys() - dtypes.keys(), dtypes.keys())
    return StoredModel(dtypes, tuple(unused), found, excluded)


class Places:
    """Where a checkpoint's tensors go in a model: Transformers' renamings and merges for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self.model = model
        self.state: dict[str, Tensor] = model.state_dict()
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_parts = _converters_of_parts(model)
        self.converters += of_parts.values()
        self.stacks = tuple(f".{stack}" for stack in of_parts)
        self.converter_of = {p: c for c in self.converters for p in c.source_patterns}

    def find(self, name: str) -> tuple[str, str | None]:
        """The model's tensor that a stored one goes into, and the merge that takes it there."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(
            name, self.renamings, self.converters, prefix, self.state
        )
        if target not in self.state and name in self.state:
            target, pattern = rename_source_key(name, [], [], prefix, self.state)
        return target, pattern

    def merge(
        self, target: str, sources: Mapping[Any, list[str]], headers: Mapping[str, TensorHeader]
    ) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Name and shape of what stored tensors become together."""
        for names in sources.values():
            _check_alike(names, headers, target)
        # A gate and its up: their sum would fit whatever the sizes.
        firsts = [names[0] for pattern, names in sources.items() if EACH in pattern]
        if firsts:
            _check_alike(firsts, headers, target)
        empty = {
            name: torch.empty(headers[name].shape, device="meta")
            for names in sources.values()
            for name in names
        }
        for name, tensor in self.convert(target, sources, empty).items():
            yield name, tuple(tensor.shape)

    def convert(
        self, target: str, sources: Mapping[Any, list[str]], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the conversion that a target's sources go through makes of them, by name.

        Raises:
            CheckpointError: they do not fit together.
        """
        converter: Any = copy.deepcopy(self.converter_of[next(iter(sources))])
        for pattern, names in sources.items():
            converter.collected_tensors[pattern] = [tensors[name] for name in names]
        try:
            made = converter.convert(target, model=self.model, config=self.model.config)
        except Exception as error:  # whatever a family's operation stumbles over
            names = [name for group in sources.values() for name in group]
            patterns = self.converter_of[next(iter(sources))].source_patterns
            lacking = [pattern for pattern in patterns if pattern not in sources]
            got = f"no {lacking[0]}" if lacking else f"{type(error).__name__}: {_line(error)}"
            raise CheckpointError(
                f"{_some(names)} must fit together as {target}; got {got}. Fetch config.json and "
                f"the weights again, both of one model."
            ) from None
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def _converters_of_parts(model: PreTrainedModel) -> dict[str, WeightConverter]:
    """By the end of a stack's name, its merge of experts that are written one by one."""
    found: dict[str, WeightConverter] = {}
    for name, module in model.named_modules():
        for stack, parts in WRITTEN_APART.get(type(module).__name__, {}).items():
            owner = ".".join(name.split(".")[-2:])  # as "feed_forward.experts", of any layer
            steps = [MergeModulelist(0), *([Concatenate(1)] if len(parts) > 1 else [])]
            found[f"{owner}.{stack}"] = WeightConverter(
                [f"{owner}.{EACH}.{part}.weight" for part in parts],
                f"{owner}.{stack}",
                [*steps, Transpose(1, 2)],
            )
    return found


def _check_alike(names: list[str], headers: Mapping[str, TensorHeader], target: str) -> None:
    """Raise `CheckpointError` naming the tensor whose shape is not that of its siblings."""
    shapes = Counter(headers[name].shape for name in names)
    usual = shapes.most_common(1)[0][0]
    odd = next((name for name in names if headers[name].shape != usual), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd} ({headers[odd].shape}) must have the shape of the others that make up "
            f"{target}; got {usual} there. Fetch the weights again."
        )


def expert_number(name: str) -> int | None:
    """The expert whose tensor it is, by the number behind "experts"; None where there is none."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if "expert" in part), len(parts))
    return next((int(part) for part in reversed(parts[first:]) if part.isdecimal()), None)


def _check_numbers(target: str, sources: Mapping[Any, list[str]]) -> None:
    """Raise `CheckpointError` naming the first of numbered tensors that is missing or there twice.

    Experts are merged in the order of their numbers, so a gap would move those that follow.
    """
    numbered = {p: [expert_number(n) for n in names] for p, names in sources.items() if EACH in p}
    if any(None in found for found in numbered.values()):
        return  # stacks
    for pattern, found in numbered.items():
        twice = next((n for n, number in enumerate(found) if number in found[:n]), None)
        if twice is not None:
            first = sources[pattern][found.index(found[twice])]
            raise CheckpointError(
                f"{first} must be the only tensor of its kind in {target}; got "
                f"{sources[pattern][twice]} too. Fetch the weights again."
            )
        wanted = max(len(other) for other in numbered.values())
        missing = next((n for n in range(wanted) if n not in found), None)
        if missing is None:
            continue
        like = sources[pattern][-1].split(".")
        place = max(index for index, part in enumerate(like) if part.isdecimal())
        name = ".".join([*like[:place], str(missing), *like[place + 1 :]])
        last = max(sources.values(), key=len)[-1]
        raise CheckpointError(
            f"{name} must be there beside {last}, as {target} is made of {wanted} of each kind; "
            f"got none. Fetch config.json and the weights again, both of one model."
        )


def _check_count(
    target: str, sources: Mapping[Any, list[str]], shape: tuple[int, ...], needed: Tensor
) -> None:
    """Raise `CheckpointError` where experts' tensors are fewer or more than config.json gives."""
    names = max(sources.values(), key=len)
    is_list = EACH in next(iter(sources)) and len(shape) == 3 and shape[0] == len(names)
    if is_list and shape[1:] == tuple(needed.shape[1:]) and shape[0] != needed.shape[0]:
        last = names[min(needed.shape[0], len(names) - 1)]
        raise CheckpointError(
            f"{last} must be of one of the {needed.shape[0]} experts that config.json gives, all "
            f"of them there; got {len(names)} for {target}. Fetch config.json and the weights "
            f"again, both of one model."
        )


def _check_first(name: str, target: str, found: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a tensor of the model has been filled before."""
    if target in found:
        first = next(iter(found[target].values()))[0]
        raise CheckpointError(
            f"{name} must be the only tensor that fills {target}; got {first} too. Fetch the "
            f"weights again."
        )


def _check_stack(name: str, header: TensorHeader, target: str, places: Places) -> None:
    """Raise `CheckpointError` for a quantized stack whose matrices are transposed."""
    if header.dtype not in DTYPES and target.endswith(places.stacks):
        raise CheckpointError(
            f"{name} ({header.dtype}) must be written expert by expert to stay packed, as "
            f"compressed-tensors files have it; got a stack of transposed matrices. Use a "
            f"checkpoint with tensors such as experts.0.down_proj.weight, or the original weights."
        )


def _check_shape(name: str, shape: tuple[int, ...], target: str, needed: Tensor) -> None:
    if shape != tuple(needed.shape):
        place = "" if name == target else f", for {target}"
        raise CheckpointError(
            f"{name} ({shape}) must have the shape that config.json gives; got "
            f"{tuple(needed.shape)} from it{place}. Fetch config.json and the weights again, both "
            f"of one model."
        )


def _dtype_of(headers: Mapping[str, TensorHeader], names: list[str], needed: Tensor) -> torch.dtype:
    """The widest stored dtype of tensors that become one."""
    if not needed.is_floating_point():
        return needed.dtype
    for name in names:
        if headers[name].dtype not in DTYPES:
            raise CheckpointError(
                f"{name} ({headers[name].dtype}) must be stored in one of {', '.join(DTYPES)}; got "
                f"a packed or 8-bit dtype, and no quantization_config in config.json that says "
                f"what it means. Fetch config.json again."
            )
    return max((DTYPES[headers[name].dtype] for name in names), key=lambda dtype: dtype.itemsize)


def _check_missing(model: PreTrainedModel, missing: Iterable[str], filled: Iterable[str]) -> None:
    """Raise `CheckpointError` for a tensor of the model that the checkpoint does not fill."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    filled = set(filled)
    shared = {name for pair in tied.items() if filled.intersection(pair) for name in pair}
    ignored = model._keys_to_ignore_on_load_missing or ()
    lacking = sorted(n for n in missing if n not in shared and not _matches(n, ignored))
    if lacking:
        raise CheckpointError(
            f"the checkpoint must hold every tensor that config.json gives; got none for "
            f"{_some(lacking)}. Fetch config.json and the weights again, both of one model."
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
