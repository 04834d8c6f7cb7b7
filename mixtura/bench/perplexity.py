"""How well a language model predicts texts, in bits per byte, and how evenly experts are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.errors import InputError, UnsupportedModel

LOGITS_PER_BATCH = 2**25
"""Windows run together as long as their logits stay below this count: 128 MiB in fp32."""
IGNORED = -100
"""Target of a padded position; `cross_entropy` leaves it out."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model needs to write texts down.

    Attributes:
        bits: the sum of -log2 p(token | tokens before it in its window), over every token.
        num_tokens: tokens scored. num_bytes: UTF-8 bytes of the texts. num_windows: windows run.
    """

    bits: float
    num_tokens: int
    num_bytes: int
    num_windows: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token: 2 ** (bits per token)."""
        return math.exp2(self.bits / self.num_tokens)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Windows of the same or a smaller length, padded on the right: (B, window) each."""

    input_ids: Tensor
    targets: Tensor


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise InputError(
            f"tokenizer.eos_token_id ({token}) must be a token id; got none. "
            f"Set tokenizer.eos_token to the token that ends a text."
        )
    return token


def _windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int
) -> Iterator[Tensor]:
    """Each text's tokens in consecutive pieces of `window`; the last piece of a text is shorter."""
    for text in texts:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for first in range(0, len(ids), window):
            yield torch.tensor(ids[first : first + window])


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int
) -> Iterator[_Batch]:
    """Windows as batches: the input is the end-of-text token, then all targets but the last."""
    if window < 1:
        raise InputError(f"window ({window}) must be at least 1; got less. Use 1024.")
    start = _end_of_text(tokenizer)
    vocab_size: int = model.config.get_text_config().vocab_size
    size = max(1, LOGITS_PER_BATCH // (window * vocab_size))
    pieces = sorted(_windows(tokenizer, texts, window), key=len, reverse=True)
    for first in range(0, len(pieces), size):
        group = pieces[first : first + size]
        targets = torch.full((len(group), len(group[0])), IGNORED)
        for row, piece in zip(targets, group, strict=True):
            row[: len(piece)] = piece
        inputs = torch.cat((torch.full((len(group), 1), start), targets[:, :-1]), dim=1)
        inputs = inputs.where(inputs != IGNORED, start)
        yield _Batch(inputs.to(model.device), targets.to(model.device))


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of -ln p over the targets that count; one window at a time in fp32."""
    return math.fsum(
        F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="sum").item()
        for row, target in zip(logits, targets, strict=True)
    )


Calls = Sequence[Callable[[], float]]


def _one_by_one(calls: Calls) -> list[float]:
    return [call() for call in calls]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int = 1024,
    run: Callable[[Calls], list[float]] = _one_by_one,
) -> Evaluation:
    """Score every token of every text once, in windows that do not overlap.

        for tokens in pieces of `window` of each text:
            bits += sum(-log2 p(tokens[i] | end_of_text, tokens[:i]))

    Memory is that of one batch of at most `LOGITS_PER_BATCH` logits, or of one window.

    Args:
        model: a causal language model in eval mode, on any device and in any dtype.
        tokenizer: its own, with an end-of-text token and without a token for unknown text.
        texts: at least one text that is not empty.
        window: tokens scored together, at most what the model was trained with.
        run: runs calls of the model, one for each batch, and returns what they return.

    Returns:
        The bits, and what they were counted over.

    Raises:
        InputError: no text, a window below 1, or no end-of-text token.
    """
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if num_bytes == 0:
        raise InputError("texts (0 bytes) must hold text; got none. Give a text that is not empty.")
    batches = list(_batches(model, tokenizer, texts, window))
    nats = math.fsum(run([partial(_batch_nats, model, batch) for batch in batches]))
    num_tokens = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    num_windows = sum(len(batch.targets) for batch in batches)
    return Evaluation(nats / math.log(2.0), num_tokens, num_bytes, num_windows)


def _batch_nats(model: PreTrainedModel, batch: _Batch) -> float:
    return _nats(model(input_ids=batch.input_ids, use_cache=False).logits, batch.targets)


def _add_slots(slots: list[Tensor], router_logits: Sequence[Tensor], batch: _Batch, k: int) -> None:
    counted = (batch.targets != IGNORED).reshape(-1).cpu()
    for layer, logits in enumerate(router_logits):
        flat = logits.float().cpu().reshape(-1, logits.shape[-1])[counted]
        chosen = flat.topk(k, dim=-1).indices.reshape(-1)
        if layer == len(slots):
            slots.append(torch.zeros(flat.shape[-1], dtype=torch.int64))
        slots[layer] += torch.bincount(chosen, minlength=flat.shape[-1])


@torch.no_grad()
def expert_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int = 1024,
) -> Tensor:
    """Each expert's part of the routed slots of its layer, over the tokens that `evaluate` runs.

    A token takes the `num_experts_per_tok` slots of its highest router logits; so this holds for
    routers without groups and without a selection bias. An even router gives every expert 1/E.

    Args:
        model: a model whose `output_router_logits=True` returns (tokens, E) logits per MoE layer.
        tokenizer, texts, window: as for `evaluate`.

    Returns:
        (layers, E) fp64 on the CPU; rows sum to 1.

    Raises:
        UnsupportedModel: the model returns no router logits.
    """
    config: Any = model.config.get_text_config()
    slots: list[Tensor] = []
    for batch in _batches(model, tokenizer, texts, window):
        output = model(input_ids=batch.input_ids, use_cache=False, output_router_logits=True)
        logits = getattr(output, "router_logits", None)
        if not logits:
            raise UnsupportedModel(
                f"the model ({type(model).__name__}) must return router logits; got none. "
                f"Use a family with output_router_logits."
            )
        _add_slots(slots, logits, batch, config.num_experts_per_tok)
    if not slots:
        raise InputError("texts (0 bytes) must hold text; got none. Give a text that is not empty.")
    counts = torch.stack(slots).double()
    return counts / counts.sum(dim=1, keepdim=True)
