"""Checks that several families make of settings, headers, contents and matrices.

Each one raises an error of the house form that begins with the part or setting it is about; who
knows the name of the matrix puts it in front (`MatrixFormat.read`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.codecs.contract import Header
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code, QuantScheme

T = TypeVar("T")

SCALE_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What scales are stored in where no family says otherwise."""

DENSE_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_WHOLE_AXIS = -1
_FLOAT8_SPECIALS = {Code.E4M3: (0x7F, 0x7F), Code.E5M2: (0x7C, 0x7C)}
"""Code -> (mask, pattern) of the codes that stand for no number."""


def read_setting(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of some settings, by alias, that is there and not null; else None."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def read_choice(
    config: Mapping[str, Any], *keys: str, choices: tuple[T, ...], default: T | None = None
) -> T:
    """A setting that must be one of a few values; words are compared in lower case.

    Raises:
        CheckpointError: it is another one, or missing and without a default.
    """
    value = read_setting(config, *keys)
    if value is None and default is not None:
        return default
    wanted = value.lower() if isinstance(value, str) else value
    for choice in choices:
        if wanted == choice and type(wanted) is type(choice):
            return choice
    raise CheckpointError(
        f"{keys[0]} ({value!r}) must be one of {', '.join(map(str, choices))}; got "
        f"{'none' if value is None else repr(value)}. Use a checkpoint of a kind that is read."
    )


def read_group_size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Columns that share a scale: a positive integer, or None for the whole row, stored as -1.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    size = read_setting(config, *keys)
    if type(size) is not int or (size < 1 and size != _WHOLE_AXIS):
        raise CheckpointError(
            f"{keys[0]} ({size!r}) must be a positive integer, or -1 for whole rows; got {size!r}. "
            f"Fetch the configuration again."
        )
    return None if size == _WHOLE_AXIS else size


def matches_fragment(fragments: Iterable[str], name: str) -> bool:
    """Whether a module's name contains one of the fragments, compared by whole components.

    >>> matches_fragment(["gate"], "layers.0.mlp.gate"), matches_fragment(["gate"], "mlp.gate_proj")
    (True, False)
    """
    return any(f".{fragment.strip('.')}." in f".{name}." for fragment in fragments)


def module_of(name: str) -> str:
    """The name of the module that a dense name's matrix belongs to."""
    return name.removesuffix(".weight")


def is_dense(headers: Mapping[str, Header]) -> bool:
    """Whether the parts are those of an unquantized matrix."""
    return headers.keys() == {"weight"} and headers["weight"].dtype in DENSE_FLOATS


def header_of(headers: Mapping[str, Header], part: str, num_dims: int) -> Header:
    """The header of a part that a shape is read from.

    Raises:
        CheckpointError: it is missing, or has another number of dimensions.
    """
    header = headers.get(part)
    if header is None or len(header.shape) != num_dims:
        got = "none" if header is None else f"shape {header.shape}"
        raise CheckpointError(
            f"{part} ({got}) must be a tensor of {num_dims} dimensions; got {got}. "
            f"Fetch the weights again."
        )
    return header


def check_finite(part: str, tensor: Tensor) -> None:
    """Refuse NaN and infinities, float8 dtypes included."""
    is_finite = torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())
    if not is_finite.all():
        index = tuple((~is_finite).nonzero()[0].tolist())
        raise CheckpointError(
            f"{part} (at {index}) must be finite; got {tensor[index].item()}. Fetch the weights "
            f"again, or quantize the model again."
        )


def check_positive(part: str, tensor: Tensor) -> None:
    """Refuse a scale of a whole matrix that is not finite and above zero."""
    check_finite(part, tensor)
    if not (tensor > 0).all():
        raise CheckpointError(
            f"{part} ({tensor.min().item()}) must be above 0; got {tensor.min().item()}. Fetch the "
            f"weights again, or quantize the model again."
        )


def check_numbers(part: str, codes: Tensor, code: Code) -> None:
    """Refuse 8-bit float codes, one a byte, that stand for NaN or infinity."""
    mask, pattern = _FLOAT8_SPECIALS.get(code, (0, 1))
    is_special = (codes & mask) == pattern
    if is_special.any():
        index = tuple(is_special.nonzero()[0].tolist())
        raise CheckpointError(
            f"{part} (at {index}) must be a number; got code {codes[index].item():#04x} of "
            f"{code.value}. Fetch the weights again, or quantize the model again."
        )


def check_encodable(matrix: QuantizedMatrix, scheme: QuantScheme, family: str) -> None:
    """Refuse to write a matrix that is a stack, or whose scheme is not the format's.

    Raises:
        ConfigError: as above. Group shapes are compared as sizes: a whole row is a group too.
    """
    sizes = {
        found: dataclasses.replace(found, group_shape=found.group_size(matrix.shape))
        for found in (matrix.scheme, scheme)
    }
    if matrix.is_stack or sizes[matrix.scheme] != sizes[scheme]:
        raise ConfigError(
            f"matrix (shape {matrix.shape}, {matrix.scheme}) must be (N, K) of scheme '{scheme}' "
            f"to be written as {family}; got another. Quantize it with that scheme."
        )
