"""Fills parts of a model that is there already, with Transformers' own renamings and merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from mixtura.errors import CheckpointError
from mixtura.hf.stored import LazyTensor


class _OneByOne(HfQuantizer):  # type: ignore[misc]
    """Quantizes nothing; with a quantizer Transformers reads one conversion's tensors at a time."""

    is_trainable = False

    def __init__(self) -> None:
        super().__init__(None, pre_quantized=False)

    def is_serializable(self) -> bool:
        return False


class Filler:
    """Fills a model's parameters from tensors of a checkpoint.

    Args:
        model: whose parameters have the right shapes. dtype: of the model.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._loading = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),
            hf_quantizer=_OneByOne(),
        )

    def fill(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Set the parameters that tensors, by the names of the checkpoint, become.

        Raises:
            CheckpointError: tensors cannot be merged.
        """
        with _without_bars():
            found, _ = convert_and_load_state_dict_in_model(
                self._model, dict(tensors), self._loading
            )
        for name, error in found.conversion_errors.items():
            raise CheckpointError(
                f"{name} must be made of its tensors; got {str(error).strip().splitlines()[0]}. "
                f"Free some memory, or fetch the weights again."
            )


@contextmanager
def _without_bars() -> Iterator[None]:
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
