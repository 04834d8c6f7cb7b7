"""`decode`: the weight that the stored parts of one matrix stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.contract import Codec, Header
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.matrix import dequantize

_MODULE = "projection"
"""What the matrix's module is called while it is read, as its parts come without one."""


def decode(
    quantization_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Decode one projection of a quantized checkpoint.

    Args:
        quantization_config: what `codec_for` takes.
        tensors: everything that is stored of the projection, by what follows the module's name
            (and dot) in the file: `qweight`, `scales`, `weight_packed`. Where that is the same
            for every format, by the name of the part: `blocks` of a GGUF tensor.
        shape: (N, K) or (E, N, K); needed where the file does not tell, as for bitsandbytes
            without a `quant_state`, and compared with the file where it does.

    Returns:
        float32 (N, K), one row an output feature; (E, N, K) of files that hold all experts in one.

    Raises:
        CheckpointError: the configuration is none that is read, a tensor is missing, superfluous or
            of a wrong shape or dtype, or its contents are impossible. The message names it.

    >>> config = {"quant_method": "awq", "bits": 4, "group_size": 2, "zero_point": False}
    >>> tensors = {"qweight": torch.tensor([[0x76543210]] * 2, dtype=torch.int32)}
    >>> tensors["scales"] = torch.full((1, 8), 0.5, dtype=torch.float16)
    >>> decode(config, tensors)[:, 0].tolist()
    [-4.0, -2.0, -3.5, -1.5, -3.0, -1.0, -2.5, -0.5]
    """
    codec = codec_for(quantization_config)
    matrix, parts = parts_of(codec, tensors)
    if shape is not None:
        shape = tuple(shape)
    headers = {part: Header.of(value) for part, value in parts.items()}
    format = codec.format_of(matrix, headers)
    if format is not None:
        return dequantize(format.read(matrix, parts, shape).matrix)
    found_shape = tuple(parts["weight"].shape)
    if shape is not None and found_shape != shape:
        raise CheckpointError(
            f"weight ({found_shape}) must have the shape {shape}; got {found_shape}. Fetch "
            f"config.json and the weights again, both of one model."
        )
    return parts["weight"].to(torch.float32)


def parts_of(codec: Codec, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The dense name and the parts of one matrix, from tensors named as for `decode`.

    Raises:
        CheckpointError: a tensor is no part, or one of another matrix, or there is none.
    """
    parts: dict[str, Tensor] = {}
    names: set[str] = set()
    for tensor, value in tensors.items():
        found = codec.split(f"{_MODULE}.{tensor}")
        if found is None and tensor in codec.suffixes.values():
            found = f"{_MODULE}.weight", tensor
        if found is None or found[1] in parts or names - {found[0]}:
            raise CheckpointError(
                f"tensor ({tensor}) must be one part of one matrix stored as {codec.name}; got "
                f"{', '.join(tensors)}. Pass the parts of one matrix alone, by their own names."
            )
        names.add(found[0])
        parts[found[1]] = value
    if not parts:
        raise CheckpointError(
            f"tensors (none) must be the parts of one matrix stored as {codec.name}; got none. "
            f"Pass what the file holds of one module."
        )
    return names.pop(), parts
