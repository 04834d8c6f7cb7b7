"""`trace_text`: a text goes through a model, and its routers' choices are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.config import require_positive
from mixtura.errors import InputError
from mixtura.hf.capture import capture_routing
from mixtura.observe import RoutingTrace

WINDOW = 1024
"""Tokens that go through the model at once: enough context for routing to settle, little memory."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text as tokens.

    Attributes:
        ids: the tokens.
        pieces: each token's part of the text, together all of it; empty where the tokenizer does
            not say.
        num_left_out: tokens of the text beyond those that were asked for.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    num_left_out: int


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None
) -> EncodedText:
    """Split a text into tokens, special ones in front included, and keep the first `max_tokens`.

    Raises:
        InputError: the text is empty.
    """
    if max_tokens is not None:
        require_positive("max_tokens", max_tokens)
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    if not text or not ids:
        raise InputError("the text must have a token; got an empty one. Give some text.")
    pieces = _pieces(text, encoded["offset_mapping"]) if tokenizer.is_fast else ()
    kept = len(ids) if max_tokens is None else min(max_tokens, len(ids))
    return EncodedText(tuple(ids[:kept]), pieces[:kept], len(ids) - kept)


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Each token's part of the text; what no token claims goes to the next one that claims some.

    Several tokens may share one character: the first of them gets it, the others nothing.
    """
    pieces, start = [], 0
    for _, stop in offsets:
        stop = max(start, stop)
        pieces.append(text[start:stop])
        start = stop
    if pieces:
        pieces[-1] += text[start:]
    return tuple(pieces)


def trace_text(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    window: int = WINDOW,
    on_tokens: Callable[[int], None] | None = None,
) -> RoutingTrace:
    """Run tokens through a converted model and return what its routers chose.

    Args:
        model: from `mixtura.from_pretrained` or `mixtura.convert`.
        token_ids: any number; they go through in windows that do not see each other.
        window: tokens of a window at most; the model's own limit holds too.
        on_tokens: called with the number of tokens of each window that is done.

    Raises:
        InputError: there is no token, or one that the model does not know.
        UnsupportedModel: the model has no MoE layer of ours.
    """
    require_positive("window", window)
    ids = torch.tensor(token_ids, dtype=torch.long)
    _check(model, ids)
    # The base model has no head, whose logits would be the largest tensor of all.
    base: Any = model.base_model
    with torch.inference_mode(), capture_routing(model) as capture:
        for part in torch.split(ids, window_size(model, window)):
            base(input_ids=part.unsqueeze(0).to(model.device), use_cache=False)
            if on_tokens is not None:
                on_tokens(part.numel())
    return capture.trace()


def _check(model: PreTrainedModel, ids: Tensor) -> None:
    if not ids.numel():
        raise InputError("token_ids must hold a token; got none. Give some text.")
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise InputError(
            f"token ids must be in [0, {rows}), the rows of the model's embedding; got "
            f"{int(ids.min())} to {int(ids.max())}. Use the model's own tokenizer."
        )


def window_size(model: PreTrainedModel, window: int = WINDOW) -> int:
    """Tokens of a window: `window`, or fewer where the model's configuration says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(window, limit) if isinstance(limit, int) and limit > 0 else window
