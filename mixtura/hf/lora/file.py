"""The tensors of a PEFT adapter: pairs of factors by the module that they were trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import PICKLES
from mixtura.hf.headers import DTYPES
from mixtura.hf.tensor_io import TensorReader

WEIGHTS = "adapter_model.safetensors"

NAME = re.compile(
    r"base_model\.model\.(?P<path>.+?)(?P<wrappers>(\.base_layer)*)\.lora_(?P<side>[AB])\.weight"
)
"""How PEFT calls a factor; each wrapper around a module adds `base_layer` to what is inside."""

COPY = re.compile(r"base_model\.model\.(?P<path>.+)\.base_layer\.weight")
"""How it calls a weight of the base model."""

WRAPPED = ".base_layer"


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Two tensors of a file that belong together, fp32.

    Attributes:
        path: of the module, in the model that was trained.
        depth: how many wrappers are around the one that they are of.
        a_name, b_name: of the tensors.
        a: (rank, in), or for E experts (E * rank, in). b: (out, rank), or (out, rank * E).
    """

    path: str
    depth: int
    a_name: str
    b_name: str
    a: Tensor
    b: Tensor

    def __str__(self) -> str:
        return f"{self.a_name} {tuple(self.a.shape)} and {self.b_name} {tuple(self.b.shape)}"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """The tensors of an adapter.

    Attributes:
        factors: in the order of their names; each is in one pair.
        copies: weights of the base model that PEFT has put in beside factors of the output head, by
            the path of the module that holds them there; the name, and the tensor.
    """

    factors: list[Factors]
    copies: dict[str, tuple[str, Tensor]]


def read_file(directory: Path) -> AdapterFile:
    """Read the tensors of an adapter.

    Raises:
        CheckpointError: the file is missing, broken, or a pickle; or a tensor, which is named, is
            no factor of a linear map, has none to go with it, or is no finite matrix.
    """
    reader = TensorReader([_weights_file(directory)])
    sides: dict[tuple[str, int], dict[str, str]] = {}
    copies: dict[str, tuple[str, Tensor]] = {}
    for name in sorted(reader.headers):
        found = NAME.fullmatch(name)
        copy = COPY.fullmatch(name)
        if copy is not None:
            copies[copy["path"]] = name, _read(reader, name)
            continue
        if found is None:
            raise CheckpointError(
                f"{name} must be a factor of a linear map, base_model.model. ... .lora_A.weight or "
                f"lora_B.weight; got another name. {_advice(name)}"
            )
        path = found["path"].replace(f"{WRAPPED}.", ".")
        pair = sides.setdefault((path, found["wrappers"].count(WRAPPED)), {})
        if found["side"] in pair:
            raise CheckpointError(
                f"{name} must be the only tensor of its kind; got {pair[found['side']]} too. Fetch "
                f"the adapter again."
            )
        pair[found["side"]] = name
    if not sides:
        raise CheckpointError(
            f"the adapter ({directory}) must hold factors of linear maps; got no tensor. Train it "
            f"with target_modules or target_parameters."
        )
    factors = [_pair(reader, path, depth, pair) for (path, depth), pair in sides.items()]
    return AdapterFile(factors, copies)


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS
    if file.is_file():
        return file
    pickles = [one.name for pattern in PICKLES for one in sorted(directory.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"an adapter must be in {WEIGHTS}; got {pickles[0]}, a pickle, which can run code when "
            f"it is read. Convert it where you trust it: load it with PEFT and save_pretrained."
        )
    raise CheckpointError(
        f"the adapter ({directory}) must hold {WEIGHTS}; got none. Give a directory that PEFT's "
        f"save_pretrained has written."
    )


def _advice(name: str) -> str:
    if "lora_embedding" in name:
        return "Train without the embeddings, or merge the adapter into the model with PEFT."
    return "Train a plain LoRA adapter, or fetch the adapter again."


def _pair(reader: TensorReader, path: str, depth: int, pair: dict[str, str]) -> Factors:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise CheckpointError(
                f"{pair[other]} must have its lora_{side} beside it; got none. Fetch the adapter "
                f"again."
            )
    return Factors(
        path, depth, pair["A"], pair["B"], _read(reader, pair["A"]), _read(reader, pair["B"])
    )


def _read(reader: TensorReader, name: str) -> Tensor:
    header = reader.headers[name]
    if header.dtype not in DTYPES or len(header.shape) != 2 or 0 in header.shape:
        raise CheckpointError(
            f"{name} ({header.dtype} {header.shape}) must be a matrix in one of "
            f"{', '.join(DTYPES)}; got another tensor. Fetch the adapter again."
        )
    tensor = reader.read(name).float()
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} {header.shape} must be finite; got NaN or infinity. Train the adapter again."
        )
    return tensor
