"""What `deterministic=True` costs one MoE layer on this machine; prints JSON lines.

    python benchmarks/determinism.py [--dtype bf16] [--threads 2] [--shape olmoe]

One layer without and one with it, of the same random weights, take turns; rows of the second are
first checked to have the same bits alone and in the batch. A ratio is of the median times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import torch

from mixtura.config import ExpertsConfig, MoEConfig, RoutingConfig, SharedExpertsConfig
from mixtura.layer import FusedMoE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 4, 64, 512)
CHECKED = 16
"""Rows that are also run alone."""

SECONDS = 4.0
"""Of turns for a number of tokens; there are at least three."""

# hidden size, experts, experts of a token, width of one, width of the shared one
SHAPES = {
    "olmoe": (2048, 64, 8, 1024, None),
    "qwen2-moe": (2048, 60, 4, 1408, 5632),
}


def layer_config(shape: str) -> MoEConfig:
    hidden, num_experts, top_k, width, shared = SHAPES[shape]
    return MoEConfig(
        hidden_size=hidden,
        routing=RoutingConfig(num_experts=num_experts, top_k=top_k),
        experts=ExpertsConfig(num_experts=num_experts, hidden_size=hidden, intermediate_size=width),
        shared=None
        if shared is None
        else SharedExpertsConfig(intermediate_size=shared, has_sigmoid_gate=True),
    )


def seconds_of(layer: FusedMoE, rows: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(rows)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(shape: str, dtype: str) -> None:
    config = layer_config(shape)
    plain = FusedMoE(config, dtype=DTYPES[dtype])
    for parameter in plain.parameters():
        parameter.normal_(std=0.02)
    strict = FusedMoE(dataclasses.replace(config, deterministic=True), dtype=DTYPES[dtype])
    strict.load_state_dict(plain.state_dict())
    for num_tokens in TOKENS:
        rows = torch.randn(num_tokens, config.hidden_size).to(DTYPES[dtype])
        whole = strict(rows)
        alone = [strict(rows[t : t + 1])[0] for t in range(min(num_tokens, CHECKED))]
        if not torch.equal(torch.stack(alone), whole[:CHECKED]):
            raise SystemExit(f"{shape} {dtype} {num_tokens}: a row depends on its batch")
        found: list[tuple[float, float]] = []
        start = time.perf_counter()
        seconds_of(plain, rows)
        while len(found) < 3 or time.perf_counter() - start < SECONDS:
            found.append((seconds_of(plain, rows), seconds_of(strict, rows)))
        without, with_it = (statistics.median(times) for times in zip(*found, strict=True))
        record = {
            "shape": shape,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "tokens": num_tokens,
            "turns": len(found),
            "seconds": without,
            "deterministic_seconds": with_it,
            "ratio": with_it / without,
        }
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for shape in options.shape or SHAPES:
        for dtype in options.dtype or ("bf16", "fp32"):
            measure(shape, dtype)


if __name__ == "__main__":
    main()
