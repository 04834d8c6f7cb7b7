"""Measure a model directory on the demo corpus's held-out files, beside gzip and xz.

    python examples/eval_demo.py                 # the packaged model
    python examples/eval_demo.py --model DIR --limit 10 --json

Bits per byte are counted over non-overlapping windows, each starting with the end-of-text token;
gzip and xz take the same bytes as one stream. Every expert should get at least 0.1/E of the slots
of its layer.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import demo_corpus
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura
from mixtura.bench.perplexity import evaluate, expert_shares

PACKAGED = Path(mixtura.__file__).with_name("demo")
LEAST_SHARE = 0.1
"""Every expert's least part of its layer's slots, as a multiple of 1/E."""


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one model directory; shares are multiples of 1/E, one per MoE layer."""

    model: str
    num_files: int
    num_bytes: int
    num_tokens: int
    bits_per_byte: float
    perplexity: float
    compressors: dict[str, float]
    least_expert_shares: list[float]
    largest_expert_shares: list[float]
    seconds: float

    @property
    def verdicts(self) -> dict[str, bool]:
        return {
            "beats gzip -9": self.bits_per_byte < self.compressors["gzip -9"],
            "beats xz -9": self.bits_per_byte < self.compressors["xz -9"],
            f"every expert >= {LEAST_SHARE}/E": min(self.least_expert_shares) >= LEAST_SHARE,
        }


def measure(
    directory: Path, *, limit: int | None, window: int, experts: str, lora: Path | None = None
) -> Report:
    """Load a model in fp32 and measure it on the first `limit` held-out files, or on all.

    With `lora`, that adapter of PEFT is beside its weights, and mixtura runs the experts.
    """
    files = demo_corpus.load().held_out[:limit]
    texts = [file.text for file in files]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation=experts
    )
    if lora is not None:
        mixtura.load_adapter(mixtura.convert(model), lora)
    began = time.perf_counter()
    result = evaluate(model, tokenizer, texts, window)
    relative = expert_shares(model, tokenizer, texts, window) * model.config.num_experts
    return Report(
        model=str(directory),
        num_files=len(files),
        num_bytes=result.num_bytes,
        num_tokens=result.num_tokens,
        bits_per_byte=result.bits_per_byte,
        perplexity=result.perplexity,
        compressors=demo_corpus.compressed_bits_per_byte(files),
        least_expert_shares=relative.amin(dim=1).tolist(),
        largest_expert_shares=relative.amax(dim=1).tolist(),
        seconds=time.perf_counter() - began,
    )


def show(report: Report) -> None:
    """Print a report as two tables."""
    console = Console()
    console.print(f"{report.num_files} held-out files, {report.num_bytes} bytes")
    bits = Table("", "bits/byte")
    for name, value in (("model", report.bits_per_byte), *report.compressors.items()):
        bits.add_row(name, f"{value:.3f}")
    shares = Table("layer", "least share x E", "largest share x E")
    pairs = zip(report.least_expert_shares, report.largest_expert_shares, strict=True)
    for layer, (least, largest) in enumerate(pairs):
        shares.add_row(str(layer), f"{least:.2f}", f"{largest:.2f}")
    console.print(bits, shares)
    for claim, holds in report.verdicts.items():
        console.print(f"{'yes' if holds else 'NO '}  {claim}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=PACKAGED, help="a model directory")
    parser.add_argument("--limit", type=int, help="only the first files")
    parser.add_argument("--window", type=int, default=1024, help="tokens of one window")
    parser.add_argument("--experts", default="mixtura", help="Transformers' experts_implementation")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="with this adapter of PEFT")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice otherwise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = measure(
        arguments.model,
        limit=arguments.limit,
        window=arguments.window,
        experts=arguments.experts,
        lora=arguments.lora,
    )
    if arguments.json:
        print(json.dumps({**asdict(report), "verdicts": report.verdicts}))
    else:
        show(report)


if __name__ == "__main__":
    main()
