"""Bits per byte against a plain loop, and expert shares against the routers' own outputs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import mixtura
from mixtura.bench import perplexity
from mixtura.bench.perplexity import evaluate, expert_shares
from mixtura.errors import InputError, UnsupportedModel

TEXTS = ["def f(x):\n    return x\n", "", "é = 'two bytes'\n" * 5, "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(mixtura.__file__).with_name("demo"))


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    return Qwen3MoeForCausalLM(config).eval()


def pieces_of(tokenizer: Any, window: int) -> list[list[int]]:
    found = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        found += [ids[first : first + window] for first in range(0, len(ids), window)]
    return found


@torch.no_grad()
def bits_by_loop(model: nn.Module, tokenizer: Any, window: int) -> float:
    bits = 0.0
    for piece in pieces_of(tokenizer, window):
        inputs = torch.tensor([[tokenizer.eos_token_id, *piece[:-1]]])
        log_p = model(input_ids=inputs).logits[0].double().log_softmax(dim=-1)
        bits -= sum(log_p[i, token].item() for i, token in enumerate(piece)) / math.log(2)
    return bits


@pytest.mark.parametrize("window", [1, 3, 1024])
@pytest.mark.parametrize("logits_per_batch", [1, 60_000, 2**25])
def test_bits_are_those_of_a_plain_loop(
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    logits_per_batch: int,
) -> None:
    monkeypatch.setattr(perplexity, "LOGITS_PER_BATCH", logits_per_batch)
    result = evaluate(model, tokenizer, TEXTS, window)
    assert result.bits == pytest.approx(bits_by_loop(model, tokenizer, window), rel=1e-5)
    assert result.num_tokens == sum(len(piece) for piece in pieces_of(tokenizer, window))
    assert result.num_windows == len(pieces_of(tokenizer, window))
    assert result.num_bytes == len("".join(TEXTS).encode())


def test_a_model_that_knows_nothing_needs_the_vocabulary_per_token(
    model: Any, tokenizer: Any
) -> None:
    ignorant = copy.deepcopy(model)
    nn.init.zeros_(ignorant.lm_head.weight)
    result = evaluate(ignorant, tokenizer, TEXTS)
    assert result.perplexity == pytest.approx(len(tokenizer))
    per_byte = result.num_tokens * math.log2(len(tokenizer)) / result.num_bytes
    assert result.bits_per_byte == pytest.approx(per_byte)


@pytest.mark.parametrize("window", [3, 1024])
def test_shares_are_those_of_the_routers(model: Any, tokenizer: Any, window: int) -> None:
    counts = torch.zeros(2, 6, dtype=torch.float64)

    def count(layer: int, chosen: torch.Tensor) -> None:
        counts[layer] += torch.bincount(chosen.reshape(-1), minlength=6)

    handles = [
        block.mlp.experts.register_forward_pre_hook(
            lambda module, inputs, layer=layer: count(layer, inputs[1])
        )
        for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for piece in pieces_of(tokenizer, window):
            model(input_ids=torch.tensor([[tokenizer.eos_token_id, *piece[:-1]]]))
    for handle in handles:
        handle.remove()
    expected = counts / counts.sum(dim=1, keepdim=True)
    torch.testing.assert_close(expert_shares(model, tokenizer, TEXTS, window), expected)


@pytest.mark.parametrize("function", [evaluate, expert_shares])
def test_refuses_what_it_cannot_measure(model: Any, tokenizer: Any, function: Any) -> None:
    with pytest.raises(InputError, match="must hold text"):
        function(model, tokenizer, ["", ""])
    with pytest.raises(InputError, match=r"window \(0\) must be at least 1"):
        function(model, tokenizer, TEXTS, 0)


def test_shares_need_router_logits(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model).forward
    monkeypatch.setattr(
        model, "forward", lambda output_router_logits=False, **inputs: forward(model, **inputs)
    )
    with pytest.raises(UnsupportedModel, match="must return router logits"):
        expert_shares(model, tokenizer, TEXTS)
