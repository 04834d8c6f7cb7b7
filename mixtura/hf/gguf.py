"""A GGUF file as a Transformers checkpoint: its configuration, its tensors, its tokenizer.

model = read_gguf("model-Q4_K_M.gguf")
model.config                                     # of Transformers
model.dense["model.layers.3.mlp.experts.*.gate_proj.weight"].stored
                                                 # ("blk.3.ffn_gate_exps.weight",)
model.matrix("blk.3.ffn_gate_exps.weight")       # (E, N, K), packed as the file has it
for name, tensor in model.weights(): ...         # the whole checkpoint, dense
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.gguf_config import config_arguments
from mixtura.hf.gguf_tensors import DenseTensor, dense_tensors, layer_rules
from mixtura.quant.codecs.contract import Decoded, Header, MatrixFormat
from mixtura.quant.codecs.gguf import DENSE_TYPES, Gguf, is_weight_type, read_weight
from mixtura.quant.gguf_file import GgufFile, GgufTensor, open_gguf
from mixtura.quant.matrix import dequantize

_STORED_AS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model in GGUF files.

    Attributes:
        file: the open files. config: the Transformers configuration.
        dense: the tensors of a Transformers checkpoint by name, in the order of the layers, with
            `*` for the number of an expert.
    """

    file: GgufFile
    config: Any
    dense: Mapping[str, DenseTensor]

    def matrix(self, stored: str, expert: int | None = None) -> Decoded:
        """A stored matrix (N, K) or stack (E, N, K), packed as it is in the file.

        Args:
            stored: its name. expert: the one matrix of a stack to read; None for all.

        Raises:
            CheckpointError: it is broken.
            KeyError: there is no such tensor.
        """
        parts = self._parts(stored)
        if expert is not None:
            blocks = parts.pop("blocks")[expert]
            scales = {name: part[expert : expert + 1] for name, part in parts.items()}
            parts = {"blocks": blocks, **scales}
        return self.format_of(stored)[0].read(stored, parts)

    def format_of(self, stored: str) -> tuple[MatrixFormat, tuple[str, ...]]:
        """How a stored matrix lies in the file, and its parts."""
        headers = {name: Header.of(part) for name, part in self._parts(stored).items()}
        format = Gguf(self.file.tensors[stored].type).format_of(stored, headers)
        assert format is not None
        return format, tuple(headers)

    def _parts(self, stored: str) -> dict[str, Tensor]:
        parts = {"blocks": self.file.tensors[stored].blocks}
        for part in ("scale", "input_scale"):
            companion = self.file.tensors.get(f"{stored.removesuffix('.weight')}.{part}")
            if companion is not None:
                parts[part] = read_weight(companion.type, companion.blocks)
        return parts

    def values(self, stored: str) -> Tensor:
        """A stored tensor of any number of dims as plain numbers, fp32 where it is packed.

        Raises:
            CheckpointError: it is broken.
            KeyError: there is no such tensor.
        """
        tensor = self.file.tensors[stored]
        if f"{stored.removesuffix('.weight')}.scale" in self.file.tensors:
            return dequantize(self.matrix(stored).matrix)
        try:
            return read_weight(tensor.type, tensor.blocks)
        except CheckpointError as error:
            raise CheckpointError(f"{stored}: {error}") from None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint by its name, dequantized, one stored tensor at a time.

        Raises:
            CheckpointError: one is broken.
        """
        for dense in self.dense.values():
            made = dense.make([self.values(name) for name in dense.stored])
            if dense.is_stack:
                for number, expert in enumerate(made):
                    yield dense.expert(number), expert
            else:
                yield dense.name, made

    def headers(self) -> dict[str, TensorHeader]:
        """What `weights` will give, without reading any of it."""
        found: dict[str, TensorHeader] = {}
        for dense in self.dense.values():
            made = dense.make([_empty(self.file.tensors[name]) for name in dense.stored])
            dtype, shape = _STORED_AS[made.dtype], tuple(made.shape)
            if dense.is_stack:
                header = TensorHeader(dtype, shape[1:])
                found |= dict.fromkeys(map(dense.expert, range(shape[0])), header)
            else:
                found[dense.name] = TensorHeader(dtype, shape)
        return found


def read_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file of an MoE model, or the first file of a split one; no weight is read.

    Raises:
        CheckpointError: the file is broken, or does not hold what its architecture has.
        UnsupportedModel: the architecture is not known, or the model has no experts.
    """
    file = open_gguf(path)
    arguments = config_arguments(file)
    try:
        config = AutoConfig.for_model(**arguments)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the keys of {path} must describe a {arguments['model_type']} model; got: "
            f"{' '.join(str(error).split())}. Fetch the file again."
        ) from None
    rules = layer_rules(file.metadata["general.architecture"], config)
    dense = dense_tensors(file.tensors, rules, arguments["num_hidden_layers"])
    for tensor in dense:
        for name in tensor.stored:
            if not is_weight_type(file.tensors[name].type):
                raise CheckpointError(
                    f"{name} ({file.tensors[name].type.name}) must be of a type of weights; got "
                    f"whole numbers. Use another file."
                )
    return GgufModel(file, config, {tensor.name: tensor for tensor in dense})


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, as Transformers makes it of the file's keys.

    Raises:
        CheckpointError: the file is broken, or has no tokenizer that Transformers knows.
    """
    path = Path(path)
    open_gguf(path)
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"the tokenizer in {path} must be readable; got {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Pass the tokenizer of the original model."
        ) from error
    return tokenizer


def _empty(tensor: GgufTensor) -> Tensor:
    """A tensor of the shape and dtype that a stored one is read with, without memory."""
    return torch.empty(
        tensor.shape, dtype=DENSE_TYPES.get(tensor.type, torch.float32), device="meta"
    )
