"""bitsandbytes: 4-bit codebooks in blocks over the flattened weight, and int8 by row.

4 bits, `i` the position in the weight as one row, the even one in the high nibble:

    W[i] = quant_map[code[i]] * absmax[i // block_size]
    absmax[b] = nested_quant_map[absmax_code[b]] * nested_absmax[b // 256] + nested_offset

the second line where `absmax` is quantized in turn. The shape is in no header: it comes from the
JSON of `quant_state`, or from who reads. Blocks cross rows where K is not divisible by
`block_size`; groups are then as long as the greatest common divisor of both, and scales repeat.

8 bits: `W[n, k] = weight[n, k] * SCB[n] / 127`.

Source: bitsandbytes 0.50, `functional.py` (`QuantState`, `dequantize_4bit`,
`int8_vectorwise_dequant`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import (
    check_encodable,
    check_finite,
    header_of,
    is_dense,
    matches_fragment,
    module_of,
    read_choice,
    read_setting,
)
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.module_names import is_stack_of_experts
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_BITS = 4
_BLOCK_SIZES = (64, 32, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes offers, its default first."""
_NESTED_BLOCK_SIZE = 256
_TYPES = ("nf4", "fp4")
_STATES = tuple(f"quant_state.bitsandbytes__{type}" for type in _TYPES)
_CODEBOOK_PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "nested_offset",
    *_STATES,
)
"""What lies beside 4-bit codes; without `.weight` in front where they are a stack of experts."""
_MAX_STATE_BYTES = 4096
"""A dozen short settings take a few hundred bytes."""
_INT8_MAX = 127
_INT8_ACTIVATIONS = ActivationScheme(
    Code.INT, 8, ActivationGroup.TOKEN, extra=ActivationExtra.OUTLIERS
)
_INT8_SCHEME = QuantScheme(Code.INT, 8, (1, None), torch.float32, ZeroPoint.MID)
_SIGN_BIT = 0x80
_ROW_MAJOR = 0


class QuantState(NamedTuple):
    """What a `quant_state` says.

    Attributes:
        shape: of the weight. block_size: weights that share an absmax.
        nested_offset: added to a quantized absmax; None where absmax is not quantized.
    """

    shape: tuple[int, ...]
    block_size: int
    nested_offset: float | None


def _parse_state(part: str, blob: Tensor) -> QuantState:
    try:
        state = json.loads(bytes(blob.flatten().tolist()))
        shape, offset = state["shape"], state.get("nested_offset")
        is_number = offset is None or type(offset) in (int, float)
        is_sound = (
            all(type(size) is int and size > 0 for size in shape)
            and state["quant_type"] == part.rpartition("__")[2]
            and state["blocksize"] in _BLOCK_SIZES
            and state.get("nested_blocksize", _NESTED_BLOCK_SIZE) == _NESTED_BLOCK_SIZE
            and is_number
            and math.isfinite(offset or 0)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(
            f"{part} ({blob.numel()} bytes) must be JSON with a shape (N, K) or (E, N, K), its own "
            f"quant_type, a blocksize out of {sorted(_BLOCK_SIZES)}, a nested_blocksize of "
            f"{_NESTED_BLOCK_SIZE} and a finite nested_offset; got another. Fetch the weights "
            f"again."
        )
    return QuantState(tuple(shape), state["blocksize"], None if offset is None else float(offset))


@dataclass(frozen=True)
class Codebook4Format(MatrixFormat):
    """How one matrix lies in a 4-bit file.

    Attributes:
        block_size: weights that share an absmax, as the headers tell.
        is_nested: whether absmax is quantized.
        state: the part that holds the state, and its length; None without one. Then the offset of
            a nested absmax is a part of its own.
    """

    block_size: int
    is_nested: bool
    state: tuple[str, int] | None
    activations: ActivationScheme | None = None

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        if shape is None:
            raise CheckpointError(
                "shape (none) must be known, as the codes are one flat row; got no quant_state and "
                "none from the model's configuration. Pass shape=(N, K)."
            )
        if math.prod(shape) % 2:
            raise CheckpointError(
                f"weight ({shape}) must have an even number of elements; got {math.prod(shape)}. "
                f"Leave the matrix unquantized."
            )
        return shape

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        num_blocks = -(-math.prod(shape) // self.block_size)
        absmax_dtype = torch.uint8 if self.is_nested else torch.float32
        parts = {
            "weight": Part((torch.uint8,), (math.prod(shape) // 2, 1)),
            "absmax": Part((absmax_dtype,), (num_blocks,)),
            "quant_map": Part((torch.float32,), (2**_BITS,)),
        }
        if self.is_nested:
            num_nested = -(-num_blocks // _NESTED_BLOCK_SIZE)
            parts["nested_absmax"] = Part((torch.float32,), (num_nested,))
            parts["nested_quant_map"] = Part((torch.float32,), (256,))
        if self.state is not None:
            parts[self.state[0]] = Part((torch.uint8,), (self.state[1],))
        elif self.is_nested:
            parts["nested_offset"] = Part((torch.float32,), (), other_shapes=((1,),))
        return parts

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        state = self._read_state(tensors)
        return None if state is None else state.shape

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        state = self._read_state(tensors)
        num_blocks = len(tensors["absmax"])
        if state is not None:
            self._check_state(state, shape, num_blocks)
        check_finite("quant_map", tensors["quant_map"])
        absmax = self._absmax(tensors, state)
        check_finite("absmax", absmax)

        codebook = tuple(tensors["quant_map"].tolist())
        group_size = math.gcd(shape[-1], self.block_size)
        num_groups = math.prod(shape) // group_size
        scales = absmax.repeat_interleave(self.block_size // group_size)[:num_groups]
        pairs = tensors["weight"]
        codes = torch.cat((pairs >> _BITS, pairs & (2**_BITS - 1)), dim=1).view(shape)
        matrix = QuantizedMatrix(
            self._scheme(shape, codebook),
            shape,
            pack_codes(codes, _BITS),
            scales.view(*shape[:-1], -1),
        )
        parts = ("nested_absmax", "nested_quant_map", "nested_offset", *_STATES)
        kept = {part: tensors[part] for part in parts if part in tensors}
        if self.is_nested:
            kept["absmax"] = tensors["absmax"]
        return Decoded(matrix, kept=kept)

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix, codebook = decoded.matrix, decoded.matrix.scheme.codebook
        if codebook is None or matrix.scheme != self._scheme(matrix.shape, codebook):
            raise ConfigError(
                f"matrix (shape {matrix.shape}, {matrix.scheme}) must have 4-bit codes of a "
                f"codebook in blocks of {self.block_size} to be written as bitsandbytes; got "
                f"another. Quantize it with that scheme."
            )
        assert matrix.scales is not None
        codes = unpack_codes(matrix.values, matrix.shape[-1], _BITS).reshape(-1, 2)
        every = self.block_size // math.gcd(matrix.shape[-1], self.block_size)
        parts = {
            "weight": (codes[:, :1] << _BITS) | codes[:, 1:],
            "absmax": matrix.scales.flatten()[::every].contiguous(),
            "quant_map": torch.tensor(codebook, dtype=torch.float32, device=matrix.device),
            **decoded.kept,
        }
        missing = self.parts(matrix.shape).keys() - parts.keys()
        if missing:
            raise ConfigError(
                f"kept ({', '.join(decoded.kept) or 'nothing'}) must hold {', '.join(missing)} to "
                f"write quantized absmax or a quant_state; got none. Encode what decode returned."
            )
        return parts

    def _scheme(self, shape: tuple[int, ...], codebook: tuple[float, ...]) -> QuantScheme:
        group = (1, math.gcd(shape[-1], self.block_size))
        return QuantScheme(Code.CODEBOOK, _BITS, group, torch.float32, codebook=codebook)

    def _read_state(self, tensors: Mapping[str, Tensor]) -> QuantState | None:
        return None if self.state is None else _parse_state(self.state[0], tensors[self.state[0]])

    def _check_state(self, state: QuantState, shape: tuple[int, ...], num_blocks: int) -> None:
        is_nested = state.nested_offset is not None
        stated_blocks = -(-math.prod(shape) // state.block_size)
        if state.shape != shape or stated_blocks != num_blocks or is_nested != self.is_nested:
            raise CheckpointError(
                f"quant_state ({state}) must describe its tensors; got shape {shape}, {num_blocks} "
                f"blocks, {'' if self.is_nested else 'no '}quantized absmax. Fetch config.json and "
                f"the weights again, both of one model."
            )

    def _absmax(self, tensors: Mapping[str, Tensor], state: QuantState | None) -> Tensor:
        absmax = tensors["absmax"]
        if not self.is_nested:
            return absmax
        nested = tensors["nested_absmax"].repeat_interleave(_NESTED_BLOCK_SIZE)[: len(absmax)]
        if state is not None:
            offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
        else:
            offset = tensors["nested_offset"]
        return tensors["nested_quant_map"][absmax.long()] * nested + offset


@dataclass(frozen=True)
class Int8Format(MatrixFormat):
    """How one matrix lies in an 8-bit file."""

    activations: ActivationScheme | None = _INT8_ACTIVATIONS

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        return header_of(headers, "weight", 2).shape

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {
            "weight": Part((torch.int8,), shape),
            "SCB": Part((torch.float32,), shape[:1]),
            "weight_format": Part((torch.uint8,), (), is_optional=True),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        check_finite("SCB", tensors["SCB"])
        layout = tensors.get("weight_format")
        if layout is not None and layout.item() != _ROW_MAJOR:
            raise CheckpointError(
                f"weight_format ({layout.item()}) must be {_ROW_MAJOR}, row by row; got the tiles "
                f"of a GPU. Save the model again with a current bitsandbytes."
            )
        matrix = QuantizedMatrix(
            _INT8_SCHEME,
            shape,
            tensors["weight"].contiguous().view(torch.uint8) ^ _SIGN_BIT,
            (tensors["SCB"] / _INT8_MAX).unsqueeze(1),
        )
        # The scales, once divided, do not give their origin back bit for bit.
        kept = {part: tensors[part] for part in ("SCB", "weight_format") if part in tensors}
        return Decoded(matrix, kept=kept)

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix = decoded.matrix
        check_encodable(matrix, _INT8_SCHEME, "bitsandbytes int8")
        assert matrix.scales is not None
        return {
            "weight": (matrix.values ^ _SIGN_BIT).view(torch.int8),
            "SCB": matrix.scales.squeeze(1) * _INT8_MAX,
            **decoded.kept,
        }


@dataclass(frozen=True)
class BitsAndBytes(Codec):
    """bitsandbytes, configured.

    Attributes:
        unquantized: fragments of the names of modules that are left as they are.
    """

    name: ClassVar[str] = "bitsandbytes"
    methods: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".SCB": "SCB",
        ".weight_format": "weight_format",
    } | {f"{prefix}.{part}": part for prefix in (".weight", "") for part in _CODEBOOK_PARTS}

    unquantized: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read_choice(config, "bnb_4bit_quant_type", choices=_TYPES, default=_TYPES[0])
        skipped = read_setting(config, "llm_int8_skip_modules") or ()
        return cls(tuple(map(str, skipped)))

    def split(self, tensor: str) -> tuple[str, str] | None:
        """As for any family; a stack of experts has no `.weight` in its name, nor its parts."""
        if is_stack_of_experts(tensor):
            return tensor, "weight"
        found = super().split(tensor)
        if found is None or found[1] not in _CODEBOOK_PARTS:
            return found
        stack = tensor.removesuffix(f".{found[1]}")
        return (stack, found[1]) if is_stack_of_experts(stack) else found

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        if is_dense(headers):
            return None
        return Int8Format() if "SCB" in headers else _codebook_format(name, headers)

    def expects(self, name: str) -> bool:
        return not matches_fragment(self.unquantized, module_of(name))


def _codebook_format(name: str, headers: Mapping[str, Header]) -> Codebook4Format:
    try:
        num_codes = 2 * header_of(headers, "weight", 2).shape[0]
        num_blocks = header_of(headers, "absmax", 1).shape[0]
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    sizes = [size for size in _BLOCK_SIZES if -(-num_codes // size) == num_blocks]
    states = [state for state in _STATES if state in headers]
    if not sizes or len(states) > 1:
        raise CheckpointError(
            f"absmax of {name} ({num_blocks} blocks of {num_codes} weights) must go with a block "
            f"size out of {sorted(_BLOCK_SIZES)} and at most one quant_state; got none, or two "
            f"states. Fetch the weights again."
        )
    if states and math.prod(headers[states[0]].shape) > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"{states[0]} of {name} ({headers[states[0]].shape}) must have at most "
            f"{_MAX_STATE_BYTES} bytes; got more. Fetch the weights again."
        )
    state = (states[0], math.prod(headers[states[0]].shape)) if states else None
    return Codebook4Format(sizes[0], "nested_absmax" in headers, state)
