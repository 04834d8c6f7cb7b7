"""`packed_config`: quantized checkpoints through Transformers' own `from_pretrained`, kept packed.

Transformers picks a quantizer by the configuration's `quant_method`, and its own make experts
dense. `packed_config` gives a configuration that names ours. Its quantizer takes what stays packed
out of the model before Transformers loads the rest, and puts it in after (`PackedLoad`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.errors import CheckpointError, InputError
from mixtura.hf.convert import convert
from mixtura.hf.fill import Filler
from mixtura.hf.gguf_checkpoint import is_gguf
from mixtura.hf.load import configured_dtype, find_packed, warn_of
from mixtura.hf.load_checks import check_arguments
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.stored import SafetensorsCheckpoint, quantization_config

METHOD = "mixtura-packed"
"""What the quantizer is called in Transformers."""

LEFT_OUT = "mixtura.left_out"
"""What Transformers is told that tensors are called which it is not to load."""


def packed_config(model: str | Path, **arguments: Any) -> Any:
    """The configuration with which Transformers' `from_pretrained` keeps a checkpoint packed.

        AutoModelForCausalLM.from_pretrained(model, config=mixtura.packed_config(model))

    The model is the one that `mixtura.from_pretrained(model)` gives, converted.

    Args:
        model: a directory of safetensors files with a quantization configuration, or a hub id.
        arguments: where it is found (`revision`, `token`, `cache_dir`, ...).

    Raises:
        InputError: it is not quantized, or a GGUF file.
        CheckpointError: files are missing or broken, or of a format that is not read.
    """
    found = None if is_gguf(model) else find_packed(model, **arguments)
    if found is None:
        raise InputError(
            f"the model ({model}) must be quantized, in safetensors files, to be kept packed by "
            f"Transformers' from_pretrained; got another. Use mixtura.from_pretrained."
        )
    config: Any = found[0]
    config.quantization_config = {"quant_method": METHOD}
    config.dtype = configured_dtype(config) or torch.bfloat16
    return config


@register_quantization_config(METHOD)
@dataclass
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Names the quantizer; what the files are they say themselves."""

    quant_method: str = METHOD


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Transformers' end of a `PackedLoad` that its user has started."""

    is_trainable = False
    load: PackedLoad

    def is_serializable(self) -> bool:
        """Whether the model could be saved with this quantizer; it does not keep it."""
        return False

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments({"device_map": device_map})
        directory = Path((checkpoint_files or [""])[0]).parent
        settings = quantization_config(directory)
        if settings is None or not checkpoint_files:
            raise CheckpointError(
                f"the files ({directory}) must be quantized to be kept packed; got others. Make "
                f"the configuration with packed_config of the same model."
            )
        with _plainly():
            checkpoint = SafetensorsCheckpoint(directory, settings)
            self.load = PackedLoad(model, checkpoint, packs_linears=device_map is None)
            warn_of(self.load.ledger)
            self.load.begin(model, checkpoint_files)
        anything: Any = model
        anything._keys_to_ignore_on_load_unexpected.add(f"^{re.escape(LEFT_OUT)}$")
        late = {name for name in self.load.state_dict() if name in checkpoint.packed}
        for target, merged in self.load.stored.sources.items():
            if any(name in late for names in merged.values() for name in names):
                anything._keys_to_ignore_on_load_missing.add(f"^{re.escape(target)}$")

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Before all others: what Transformers is not to load."""
        checkpoint, own = self.load.checkpoint, self.load.state_dict()
        left_out = {
            stored
            for stored, tensor in checkpoint.tensors.items()
            if tensor.part is not None or not any(name in own for name in tensor.names)
        }
        return [_LeaveOut(left_out), *weight_conversions]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Add what Transformers has not loaded, take over the MoE layers, and leave no trace."""
        self.remove_quantization_config(model)
        packed = self.load.checkpoint.packed
        late = {name: value for name, value in self.load.state_dict().items() if name in packed}
        if late:
            Filler(model, model.dtype).fill(late)
            model.tie_weights()
        self.load.finish(model)
        convert(model)


class _LeaveOut(WeightRenaming):  # type: ignore[misc]
    """Gives tensors a name that no model has, so that they are not even read."""

    __slots__ = ("names",)

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(f"^{re.escape(LEFT_OUT)}$", LEFT_OUT)
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name, or the one of what is left out."""
        return (LEFT_OUT if source_key in self.names else source_key), None


@contextmanager
def _plainly() -> Iterator[None]:
    """Undo what Transformers sets while it builds a model: the meta device and its dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
