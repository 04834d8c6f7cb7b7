"""A cache of keys and values that grows in place.

Transformers' `DynamicCache` copies every layer's keys and values for every new token. Here they are
the beginning of a larger buffer, and a token is written behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Tokens that a buffer has room for, at least, beyond those that it is made for; and a quarter."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, views of buffers with room behind them."""

    keys: Any
    values: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, D) keys and values. -> all of them, (B, heads, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
            return torch.cat([held, new], dim=-2)
        length = held.shape[-2] if held.numel() else 0
        needed = length + new.shape[-2]
        room = self._rooms.get(name)
        # What is held may have been reordered, cropped or repeated since: then it lies elsewhere.
        if (
            room is None
            or needed > room.shape[-2]
            or held.data_ptr() != room.data_ptr()
            or held.stride() != room.stride()
            or held.shape[:2] != room.shape[:2]
            or room.is_inference() != torch.is_inference_mode_enabled()
        ):
            room = new.new_empty((*new.shape[:-2], needed + max(ROOM, needed // 4), new.shape[-1]))
            if length:
                room[..., :length, :] = held
            self._rooms[name] = room
        room[..., length:needed, :] = new
        return room[..., :needed, :]


def growing_cache(model: PreTrainedModel) -> DynamicCache | None:
    """A cache for `model.generate(past_key_values=...)`; None where the model has its own kind.

    Layers of attention to the whole past grow in place; others are Transformers' own.
    """
    if not model._supports_default_dynamic_cache() or model.config.is_encoder_decoder:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers:
        return None
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
