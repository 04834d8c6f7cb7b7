"""The model in the box with its experts in each weight format: size, speed, bits per byte.

    python examples/demo_formats.py                          # a Markdown table
    python examples/demo_formats.py --limit 10 int4 mxfp4    # ten held-out files, two formats

Bits per byte are those of `eval_demo.py`; tokens per second the best of five greedy runs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import demo_corpus
import torch
from eval_demo import PACKAGED
from transformers import AutoTokenizer

import mixtura
from mixtura.bench.perplexity import evaluate
from mixtura.experts import PackedExperts

FORMATS = ("bf16", "int8-channel", "int8", "int4-g32", "int4", "mxfp4", "nvfp4", "fp8")
PROMPT = "def read_json(path):"
NEW_TOKENS = 96
RUNS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One format: bytes of all experts as stored, decoded tokens per second, bits per byte."""

    weights: str
    num_bytes: int
    tokens_per_second: float
    bits_per_byte: float

    def __str__(self) -> str:
        return (
            f"| {self.weights} | {self.num_bytes / 2**20:.1f} | {self.tokens_per_second:.0f} | "
            f"{self.bits_per_byte:.4f} |"
        )


@torch.no_grad()
def measure(weights: str, texts: list[str]) -> Row:
    """Load the packaged model with its experts in a format, and measure it."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    model = mixtura.from_pretrained(PACKAGED, weights=weights)
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    num_bytes = sum(module.expert_weights.num_bytes for module in experts)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    rates = []
    for _ in range(RUNS):
        start = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        rates.append(NEW_TOKENS / (time.perf_counter() - start))
    bits = evaluate(model, tokenizer, texts).bits_per_byte
    return Row(weights, num_bytes, max(rates), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", default=FORMATS, help="weight formats")
    parser.add_argument("--limit", type=int, help="only the first held-out files")
    arguments = parser.parse_args()
    texts = [file.text for file in demo_corpus.load().held_out[: arguments.limit]]
    print("| weights | experts, MiB | tokens/s | bits per byte |\n|---|---|---|---|")
    for weights in arguments.formats:
        print(measure(weights, texts), flush=True)


if __name__ == "__main__":
    main()
