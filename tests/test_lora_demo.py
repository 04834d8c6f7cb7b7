"""The adapter in the examples: its size, its effect in bits per byte, its command, and PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mixtura
from mixtura.bench.perplexity import evaluate
from mixtura.cli import app

DEMO = Path(mixtura.__file__).with_name("demo")
ADAPTER = Path(__file__).parent.parent / "examples" / "lora_docs"
MAX_BYTES = 1_000_000
LEAST_GAIN = 0.05
"""Bits per byte."""
SAMPLE_BYTES = 1200


@pytest.fixture(scope="module")
def model() -> Any:
    return mixtura.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def kept_text() -> str:
    """The beginning of the first texts that were not trained on; `train_lora.py` keeps the same."""
    return "".join(topics[name] for name in sorted(topics)[::10])[:SAMPLE_BYTES]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) < MAX_BYTES
    assert {file.name for file in ADAPTER.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_it_predicts_texts_of_its_kind_better(model: Any, tokenizer: Any) -> None:
    alone = evaluate(model, tokenizer, [kept_text()]).bits_per_byte
    mixtura.load_adapter(model, ADAPTER)
    try:
        adapted = evaluate(model, tokenizer, [kept_text()]).bits_per_byte
    finally:
        mixtura.unload_adapter(model, "lora_docs")
    assert adapted < alone - LEAST_GAIN


def test_its_output_is_that_of_peft(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(kept_text()[:300], return_tensors="pt")["input_ids"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        stock = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        expected = PeftModel.from_pretrained(stock, ADAPTER).eval()(ids).logits
        mixtura.load_adapter(model, ADAPTER, "docs")
        found = model(ids).logits
    mixtura.unload_adapter(model, "docs")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_command_loads_it_and_says_so() -> None:
    arguments = ["generate", "Names are", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, [*arguments, "--lora", f"{ADAPTER}=docs"])
    assert result.exit_code == 0, result.output
    assert "adapter      docs, beside the weights" in result.stderr


def test_a_second_adapter_on_the_command_line_is_refused():
    result = CliRunner().invoke(app, ["generate", "a", "--lora", "one", "--lora", "two"])
    assert result.exit_code == 2
    assert "there must be one; got 2" in " ".join(result.output.replace("│", " ").split())
