"""The model in the box with its experts in each weight format: size, speed, bits per byte.

    python examples/demo_formats.py                           # a Markdown table, every format
    python examples/demo_formats.py int4 mxfp4                # two formats
    python examples/demo_formats.py --limit 10 --no-speed     # ten held-out files, no tokens/s

Bits per byte, which are those of `eval_demo.py`, stand in three columns: rounded to nearest while
the model loads; for formats with four bits also as `mixtura quantize --method search` writes them,
without and with `--calibration` on files that the model was trained on. Tokens per second are the
best of five greedy runs; other programs on the machine disturb them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import demo_corpus
import torch
from eval_demo import PACKAGED
from transformers import AutoTokenizer

import mixtura
from mixtura.bench.perplexity import evaluate
from mixtura.cli.loading import quiet
from mixtura.experts import PackedExperts
from mixtura.hf.activation_moments import Calibration
from mixtura.hf.quantize_checkpoint import Method, QuantizeOptions, quantize_checkpoint
from mixtura.quant.formats import WeightFormat

PROMPT = "def read_json(path):"
NEW_TOKENS = 96
RUNS = 5
SEARCHED_BITS = 4
"""Of a code: with more, a search gains next to nothing."""

CALIBRATION_STEP = 200
"""Every 200th training file is calibrated on: 23,000 tokens, a quarter of them for each expert."""


class Rounding(Enum):
    """How weights are rounded: a column of the table, by its heading."""

    NEAREST = "nearest"
    SEARCH = "search"
    CALIBRATED = "calibrated search"


@dataclass(frozen=True, slots=True)
class Row:
    """One format: bytes of all experts as stored, decoded tokens per second, bits per byte."""

    weights: WeightFormat
    num_bytes: int
    tokens_per_second: float | None
    bits_per_byte: dict[Rounding, float]

    def __str__(self) -> str:
        speed = "-" if self.tokens_per_second is None else f"{self.tokens_per_second:.0f}"
        bits = [
            f"{self.bits_per_byte[rounding]:.4f}" if rounding in self.bits_per_byte else "-"
            for rounding in Rounding
        ]
        return (
            f"| {' | '.join([self.weights.value, f'{self.num_bytes / 2**20:.1f}', speed, *bits])} |"
        )


HEADINGS = ("weights", "experts, MiB", "tokens/s", *(rounding.value for rounding in Rounding))


def load(weights: WeightFormat, rounding: Rounding, calibration: Calibration, scratch: Path) -> Any:
    """The packaged model with its experts in a format, through a directory where it needs one."""
    if rounding is Rounding.NEAREST:
        return mixtura.from_pretrained(PACKAGED, weights=weights.value)
    options = QuantizeOptions(
        format=weights,
        method=Method.SEARCH,
        calibration=calibration if rounding is Rounding.CALIBRATED else None,
    )
    quantize_checkpoint(PACKAGED, scratch / rounding.name, options)
    return mixtura.from_pretrained(scratch / rounding.name)


@torch.no_grad()
def decode_rate(model: Any, tokenizer: Any) -> float:
    """Tokens per second of the best of some greedy runs."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        seconds.append(time.perf_counter() - start)
    return NEW_TOKENS / min(seconds)


def measure(
    weights: WeightFormat, texts: list[str], calibration: Calibration, *, has_speed: bool
) -> Row:
    """One row, measured."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    model = load(weights, Rounding.NEAREST, calibration, Path())
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    num_bytes = sum(module.expert_weights.num_bytes for module in experts)
    rate = decode_rate(model, tokenizer) if has_speed else None
    bits = {Rounding.NEAREST: evaluate(model, tokenizer, texts).bits_per_byte}
    if weights.scheme.bits == SEARCHED_BITS:
        with tempfile.TemporaryDirectory() as scratch:
            for rounding in (Rounding.SEARCH, Rounding.CALIBRATED):
                model = load(weights, rounding, calibration, Path(scratch))
                bits[rounding] = evaluate(model, tokenizer, texts).bits_per_byte
    return Row(weights, num_bytes, rate, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "formats", nargs="*", type=WeightFormat.parse, default=list(WeightFormat), help="names"
    )
    parser.add_argument("--limit", type=int, help="only the first held-out files")
    parser.add_argument("--no-speed", action="store_true", help="leave tokens/s out")
    arguments = parser.parse_args()
    corpus = demo_corpus.load()
    texts = [file.text for file in corpus.held_out[: arguments.limit]]
    calibration = Calibration("\n".join(file.text for file in corpus.train[::CALIBRATION_STEP]))
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for weights in arguments.formats:
        with quiet():
            row = measure(weights, texts, calibration, has_speed=not arguments.no_speed)
        print(row, flush=True)


if __name__ == "__main__":
    main()
