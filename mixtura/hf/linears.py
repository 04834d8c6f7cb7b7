"""`PackedLinear`: a linear layer beside the experts whose weight is stored in a format of its own.

At one token, attention projections and the output head are most of the bytes that are not experts.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import ActivationDtype
from mixtura.errors import GradientUnsupported, InputError, UnsupportedModel
from mixtura.hf.adopt import adopt_class, offloads
from mixtura.kernels.cpu.linear import CpuLinear, cannot_pack, pack_linear
from mixtura.kernels.cpu.panels import ROW_DTYPES
from mixtura.quant.activations import StaticInputs, activations_for, round_activations
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.scheme import QuantScheme

CPU = torch.device("cpu")
_PACKING = threading.Lock()
"""Held while a matrix is packed, so that threads that share a layer pack it once."""

PROJECTIONS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("kv_proj", "qkv_proj", "query_key_value", "Wqkv", "out_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_b_proj"),  # latent
        *("in_proj_qkv", "in_proj_qkvz", "in_proj_z"),  # linear attention
        *("v_proj_current", "v_proj_delayed"),  # ZAYA
    }
)
"""What Transformers calls the large projections of attention, by the last part of their path."""

ATTENTION = re.compile(r"^(?!.*(indexer|compressor)).*(attn|attention|mixer)")
"""The path before it: a router may have an `out_proj`, too; and what chooses keys stays exact."""


class PackedLinear(nn.Module):
    """A linear layer, adopted: its weight is an immutable `QuantizedMatrix` instead of a parameter.

    On a CPU the matrix is laid out for the C++ kernel at the first call, and that is the only copy;
    elsewhere it is made dense for every call. The bias stays a parameter. `weight` is the dense
    matrix, made when it is asked for. Rows are rounded first where a stored scale says so, or
    `activation_dtype`: with scales found from them then, for a row, or for its groups of 128
    columns beside a weight in blocks of 128x128. There are no gradients, neither of the weight nor
    through it, and no state_dict.
    """

    given: QuantizedMatrix | None
    packed: CpuLinear | None
    inputs: StaticInputs | None
    row_dtype: torch.dtype
    activation_dtype: ActivationDtype | None

    @property
    def matrix(self) -> QuantizedMatrix:
        """The weight (N, K) as it was given."""
        if self.packed is not None:
            return self.packed.unpacked()
        assert self.given is not None
        return self.given

    @property
    def device(self) -> torch.device:
        """Where the weight is; nothing is unpacked to say so."""
        return CPU if self.packed is not None else self.matrix.device

    def forward(self, rows: Tensor) -> Tensor:
        """(..., K) -> (..., N).

        Raises:
            GradientUnsupported: gradients are needed of the rows or the bias.
            InputError: the rows have another width or device than the weight.
        """
        layer: Any = self  # the family gave it the bias
        bias: Tensor | None = layer.bias
        if torch.is_grad_enabled() and (
            rows.requires_grad or (bias is not None and bias.requires_grad)
        ):
            raise GradientUnsupported(
                f"a linear layer's weight ({self.scheme}) must be a parameter to have "
                f"gradients; got a packed one. Use torch.no_grad(), or load the model without "
                f"linears=."
            )
        packed = self._packed()
        shape = self.matrix.shape if packed is None else packed.matrix.shape[1:]
        device = self.device
        if rows.shape[-1] != shape[1] or rows.device != device:
            raise InputError(
                f"rows ({tuple(rows.shape)} on {rows.device}) must be (..., {shape[1]}) on "
                f"{device}; got others. Check the width, and move the model or the input."
            )
        is_packed = packed is not None and rows.dtype in ROW_DTYPES
        rows = self._rounded(rows, is_packed)
        if packed is not None and is_packed:
            out = packed(rows)
        else:
            out = F.linear(rows, dequantize(self.matrix, rows.dtype))
        return out if bias is None else out + bias.to(out.dtype)

    def _rounded(self, rows: Tensor, is_packed: bool) -> Tensor:
        """Rows as they are multiplied.

        The C++ kernel rounds with stored scales, and to int8, by itself; it multiplies in bf16 what
        is rounded to e4m3 here.
        """
        asked, inputs = self.activation_dtype, self.inputs
        if inputs is not None and inputs.scheme.holds_with(asked):
            return rows if is_packed else round_activations(rows, inputs.scheme, inputs.scales)
        if asked is None or (is_packed and asked is not ActivationDtype.FP8):
            return rows
        found = activations_for(asked, None, [self.scheme])
        return rows if found is None else round_activations(rows, found)

    def _packed(self) -> CpuLinear | None:
        """The matrix in the C++ kernel's layout, packed at the first call; None where it cannot."""
        if self.packed is not None or self.given is None:
            return self.packed
        if self.given.device.type != "cpu" or cannot_pack(self.given.scheme) is not None:
            return None
        if torch.compiler.is_compiling():
            return None  # the first call is made outside of a graph
        with _PACKING:
            if self.given is not None:
                packed = pack_linear(
                    self.given, inputs=self.inputs, activation_dtype=self.activation_dtype
                )
                self.packed, self.given = packed, None
        return self.packed

    @property
    def scheme(self) -> QuantScheme:
        """How the weight is stored."""
        found = self.given if self.packed is None else self.packed.matrix
        assert found is not None
        return found.scheme

    @property
    def weight(self) -> Tensor:
        """The dense weight (N, K) in the model's dtype; a new tensor each time."""
        return dequantize(self.matrix, self.row_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Packed values and their scales move, and are never converted.
        probe = fn(torch.empty(0, device=self.matrix.device, dtype=self.row_dtype))
        self.row_dtype = probe.dtype
        matrix = self.matrix
        if matrix.device != probe.device:
            parts = {name: part.to(probe.device) for name, part in matrix.tensors.items()}
            self.given = QuantizedMatrix(matrix.scheme, matrix.shape, **parts)
            self.packed = None
            if self.inputs is not None:
                self.inputs = self.inputs.mapped(lambda scales: scales.to(probe.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: the matrix, not what a kernel made of it."""
        return {**self.__dict__, "given": self.matrix, "packed": None}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("be written to a state_dict")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("be loaded from a state_dict")

    def _refuse(self, rule: str) -> None:
        raise InputError(
            f"a linear layer's weight ({self.scheme}) must be a parameter to {rule}; got a "
            f"packed one. Keep the checkpoint it came from, or load it without linears=."
        )


def find_linears(model: PreTrainedModel, moe_layers: list[str]) -> dict[str, nn.Linear]:
    """Attention projections of the layers that go with the MoE layers, and the output head.

    Linear layers inside MoE layers, of dense MLPs and of vision or audio towers are left out.

    Args:
        model: may be on the meta device.
        moe_layers: paths of its MoE layers.

    Returns:
        Linear layers by path.

    Raises:
        UnsupportedModel: there is none.
    """
    stacks = tuple({_stack(name) for name in moe_layers})
    inside = tuple(f"{name}." for name in moe_layers)
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (
            module is head
            or (_is_projection(name) and name.startswith(stacks) and not name.startswith(inside))
        )
    }
    if not found:
        raise UnsupportedModel(
            f"the model ({type(model).__name__}) must have attention projections or an output head "
            f"that are plain linear layers; got none. Load it without linears=."
        )
    return found


def _is_projection(name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last in PROJECTIONS and ATTENTION.search(path) is not None


def _stack(name: str) -> str:
    """The list that a layer is in: "model.layers.3.mlp" -> "model.layers."."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return "".join(f"{part}." for part in parts[:first])


def adopt_linear(
    module: nn.Module,
    matrix: QuantizedMatrix,
    row_dtype: torch.dtype,
    inputs: StaticInputs | None = None,
) -> None:
    """Make a linear layer ours; its `weight` parameter goes, its bias, name and hooks stay.

    Args:
        module: an `nn.Linear`.
        matrix: the weight (N, K).
        row_dtype: the dtype of the model.
        inputs: what rows are rounded to, with a scale ().

    Raises:
        UnsupportedModel: its weights are offloaded.
    """
    if offloads(module):
        raise UnsupportedModel(
            f"a linear layer ({tuple(matrix.shape)}) must be in memory to be packed; got one whose "
            f"weights are offloaded. Load the model without offload, or without linears=."
        )
    ours: Any = module
    del ours.weight
    adopt_class(module, PackedLinear)
    ours.given = matrix
    ours.packed = None
    ours.inputs = inputs
    ours.row_dtype = row_dtype
    ours.activation_dtype = None


def set_activation_dtype(model: nn.Module, activation_dtype: ActivationDtype | None) -> None:
    """Choose the arithmetic of every packed linear layer; one that has been packed is again."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.activation_dtype is not activation_dtype:
            with _PACKING:
                module.given, module.packed = module.matrix, None
                module.activation_dtype = activation_dtype
