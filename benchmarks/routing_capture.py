"""What does recording every choice of a model cost while it decodes?

Blocks of steps of one token with and without `mixtura.capture_routing` take turns; the fraction is
the ratio of the two medians, less 1. Time is that of the processor, on one thread, so that other
work on the machine counts little. Models: the one in the box, and one layer of OLMoE-1B-7B's sizes
(H 2048, E 64, K 8, I 1024). A line of JSON for each.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import OlmoeConfig, OlmoeForCausalLM

import mixtura
from mixtura.hf.cache import growing_cache
from mixtura.hf.generate import prepare_experts

DEMO = Path(mixtura.__file__).parent / "demo"
PROMPT = 32
STEPS = 32
"""Tokens of a block, all with or all without the recording."""


def one_olmoe_layer() -> Any:
    """A random model of one layer; its vocabulary is small, so that the layer is what runs."""
    config = OlmoeConfig(num_hidden_layers=1, vocab_size=512, num_experts=64, dtype=torch.bfloat16)
    torch.manual_seed(0)
    return mixtura.convert(OlmoeForCausalLM(config).to(torch.bfloat16).eval())


def seconds_of_steps(model: Any, is_recorded: bool) -> list[float]:
    """Seconds of each step of a block behind a new prompt."""
    prompt = torch.randint(3, 200, (1, PROMPT))
    cache = growing_cache(model)
    with mixtura.capture_routing(model) if is_recorded else nullcontext():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        found = []
        for _ in range(STEPS):
            start = time.process_time()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(time.process_time() - start)
    return found


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Blocks of each kind.")] = 30,
) -> None:
    torch.set_num_threads(1)
    models = {
        "the model in the box": mixtura.from_pretrained(DEMO),
        "one layer of OLMoE-1B-7B": one_olmoe_layer(),
    }
    for name, model in models.items():
        prepare_experts(model)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with torch.inference_mode():
            seconds_of_steps(model, True)
            for number in range(2 * rounds):
                is_recorded = (number + number // 2) % 2 == 1  # no kind is always the second
                seconds[is_recorded] += seconds_of_steps(model, is_recorded)
        plain, recorded = (statistics.median(seconds[key]) for key in (False, True))
        line = {
            "model": name,
            "plain_us": round(plain * 1e6, 1),
            "recorded_us": round(recorded * 1e6, 1),
            "fraction": round(recorded / plain - 1, 4),
            "rounds": rounds,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
