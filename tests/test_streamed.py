"""Models whose weights are in memory a layer at a time say what they say when all of it is."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXCEPTIONS, LOADED_AS, all_families, tiny_model
from packed_files import write_packed
from test_packed_load import CONFIGS, dense, expected_logits, is_linear
from tolerances import relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import mixtura
from mixtura.errors import CheckpointError, UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.in_step import THREAD_NAME, run_in_step
from mixtura.hf.load import load_stock
from mixtura.hf.streamed import StreamedModel, stream_checkpoint

__all__ = ["dense"]  # a fixture

OFTEN = {"deepseek_v3", "gemma4", "glm_moe_dsa", "gpt_oss", "llama4", "longcat_flash", "qwen3_next"}
"""Families of unlike kinds: values that go past layers, caches of other layers, odd storage."""

FAMILIES = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in sorted(all_families().keys() - EXCEPTIONS.keys() - LOADED_AS.keys())
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_a_layer_at_a_time(family: str, tmp_path: Path) -> None:
    case = tiny_model(family)
    case.model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)  # JetMoE's attention
        streamed = stream_checkpoint(tmp_path)
        # Not `case.model`: a ZAYA that is saved and loaded computes something else.
        expected_model = mixtura.convert(load_stock(tmp_path), kernel="torch")
    calls = [lambda: case.output(streamed.model)] * 2
    first, second = streamed.run(calls)
    with torch.no_grad():
        expected = case.output(expected_model)
    assert relative_error(first, expected) <= 1e-5
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------ a tiny model


def num_elements(model: nn.Module) -> int:
    """What parameters have in memory, and at least 1 for every kernel that keeps weights."""
    held = [m for m in model.modules() if isinstance(m, PackedExperts) and m.state.held is not None]
    return len(held) + sum(p.untyped_storage().nbytes() // p.itemsize for p in model.parameters())


def caller(streamed: StreamedModel, ids: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        found: Tensor = streamed.model(input_ids=ids, use_cache=False).logits
        return found

    return call


def test_a_weight_is_read_once_and_let_go_of(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = stream_checkpoint(dense)
    model: Any = streamed.model
    assert num_elements(model) == len(list(model.parameters()))
    done: list[tuple[str, int]] = []
    ids = [torch.randint(0, 128, (1, count)) for count in (9, 9, 4)]
    found = streamed.run(
        [caller(streamed, part) for part in ids],
        lambda path: done.append((path, num_elements(model))),
    )
    layers = [f"model.layers.{layer}" for layer in range(len(model.model.layers))]
    assert [path for path, _ in done] == ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    assert {count for _, count in done} == {len(list(model.parameters()))}
    stock = mixtura.convert(load_stock(dense), kernel="torch")
    for part, logits in zip(ids, found, strict=True):
        with torch.no_grad():
            assert torch.equal(logits, stock(input_ids=part).logits)
    assert all("forward" not in module.__dict__ for module in model.model.layers)


def test_a_quantized_checkpoint_runs_as_what_it_stands_for(dense: Path, tmp_path: Path) -> None:
    means = write_packed(dense, tmp_path / "packed", "ct_nvfp4", is_linear)
    streamed = stream_checkpoint(tmp_path / "packed")
    ids = torch.arange(1, 9).unsqueeze(0)
    (found,) = streamed.run([caller(streamed, ids)])
    assert relative_error(found, expected_logits(dense, means)) <= 1e-5


def test_a_tied_head(tmp_path: Path) -> None:
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=32,
        shared_expert_intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    stock: Any = AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    streamed = stream_checkpoint(tmp_path)
    ids = torch.arange(1, 9).unsqueeze(0)
    (found,) = streamed.run([caller(streamed, ids)])
    with torch.no_grad():
        assert relative_error(found, stock(input_ids=ids).logits) <= 1e-5


def test_a_weight_that_is_used_elsewhere_is_told(dense: Path) -> None:
    streamed = stream_checkpoint(dense)
    model: Any = streamed.model

    def call() -> Tensor:
        hidden: Tensor = model.model.embed_tokens.weight[torch.arange(4)].unsqueeze(0)
        found: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
        return found

    with pytest.raises(UnsupportedModel, match=r"model.layers.0 of \w+ must return numbers"):
        streamed.run([call])


def test_a_file_that_goes_while_it_is_read_is_told(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["mixtral"]).save_pretrained(tmp_path)
    streamed = stream_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight .* must be in the file"):
        streamed.run([caller(streamed, torch.arange(4).unsqueeze(0))])


# ------------------------------------------------------------------------------------ calls in step


class Noted(nn.Module):
    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self.name, self.order = name, order

    def forward(self, value: int) -> int:
        self.order.append(f"{self.name}{value}")
        return value + 10


def test_all_calls_go_through_a_module_before_one_goes_on() -> None:
    order: list[str] = []
    first, second = Noted("a", order), Noted("b", order)

    @contextmanager
    def around(path: str) -> Iterator[None]:
        order.append(f"<{path}")
        yield
        order.append(f"{path}>")

    def call(value: int) -> int:
        inner = first(first(value))
        order.append(f"between {value}")
        return int(second(inner))

    calls = [lambda: call(1), lambda: call(2)]
    found = run_in_step(calls, {"a": first, "b": second}, around)
    assert found == [31, 32]
    assert order == [
        *("<a", "a1", "a2", "a>", "<a", "a11", "between 1", "a12", "between 2", "a>"),
        *("<b", "b21", "b22", "b>"),
    ]


@pytest.mark.parametrize("where", ["module", "call"])
def test_an_error_ends_every_call(where: str) -> None:
    module = Noted("a", [])

    @contextmanager
    def around(path: str) -> Iterator[None]:
        yield

    def call(value: int) -> int:
        if where == "call" and value == 2:
            raise KeyError("broken")
        return int(module({} if where == "module" and value == 2 else value))

    calls = [lambda value=value: call(value) for value in (1, 2, 3)]  # type: ignore[misc]
    with pytest.raises(TypeError if where == "module" else KeyError):
        run_in_step(calls, {"a": module}, around)
    assert "forward" not in module.__dict__
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(5)
            assert not thread.is_alive()
