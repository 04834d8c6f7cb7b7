"""The model in the box over ranks, on prompts that use few of its experts: balanced and not.

    torchrun --nproc-per-node 4 benchmarks/expert_balance.py

Every rank holds the same batch. The first run has one slot for each expert, the second one slot
more on each rank and balancing. Their texts must be those of one process; what is printed is the
balancedness of the ranks (mean over max of their loads, of the layers' mean) with the placement in
force at the end, tokens per second, and what was moved.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import mixtura
from mixtura.cli.options import DEMO
from mixtura.config import EplbConfig, ParallelConfig
from mixtura.eplb import EplbLayerState, ExpertLoadLedger, balancedness
from mixtura.hf.balance import find_balancer, spread_of
from mixtura.hf.load import load_tokenizer
from mixtura.layer import FusedMoE
from mixtura.parallel import ModelPlacement

PROMPTS = ("0 1 2 3 4 5 6 7 8 9 10 11", "[0, 1, 1, 2, 3, 5, 8, 13, 21,", "1.0, 2.0, 3.0, 4.0, 5.0,")
"""Numbers alone, which a model of code sends to few experts."""


@dataclass(frozen=True, slots=True)
class Run:
    """One way of running: text, tokens per second, balancedness at the end, slots moved."""

    text: str
    tokens_per_second: float
    balancedness: float | None
    num_moved: int


def write(model: Any, prompts: tuple[str, ...], count: int) -> tuple[str, float]:
    """The continuations, and the tokens per second of all of them."""
    tokenizer = load_tokenizer(DEMO)
    found, start, tokens = [], time.perf_counter(), 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        tokens += count
        found.append(tokenizer.decode(out[0]))
    return "\n".join(found), tokens / (time.perf_counter() - start)


def layers_of(model: Any) -> dict[str, FusedMoE]:
    return {name: one for name, one in model.named_modules() if isinstance(one, FusedMoE)}


def measure(parallel: ParallelConfig, count: int, rounds: int) -> Run:
    model = mixtura.from_pretrained(DEMO, parallel=parallel)
    layers = layers_of(model)
    spreads = [spread_of(model, name) for name in layers]
    placement = ModelPlacement.stack([one.placement for one in spreads if one is not None])
    balancer = find_balancer(model)
    if balancer is None:  # loads are counted all the same
        ledger = ExpertLoadLedger(placement.num_layers, placement.num_experts)
        for number, layer in enumerate(layers.values()):
            layer.set_layer_state(EplbLayerState.of(ledger, number, placement.layer(number)))
    texts, rates = [], []
    for _ in range(rounds):
        text, rate = write(model, PROMPTS, count)
        texts.append(text)
        rates.append(rate)
    assert all(text == texts[0] for text in texts)
    if balancer is not None:
        balancer.ledger.reset()
        write(model, PROMPTS, count)  # no more than an interval, so that no plan resets the loads
    loads = (balancer.ledger if balancer else ledger).loads()
    now = balancer.placement if balancer else placement
    quota = balancer.quota if balancer else None
    found = float(balancedness(loads, now, quota).mean())
    moved = balancer.report().num_moved if balancer else 0
    rate = sorted(rates)[len(rates) // 2]
    return Run(texts[0], rate, found, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--rounds", type=int, default=6, help="how often all prompts are run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    alone, _ = write(mixtura.from_pretrained(DEMO), PROMPTS, arguments.tokens)
    ways = {
        "as loaded": ParallelConfig(ep_size=size),
        "balanced": ParallelConfig(
            ep_size=size,
            num_redundant_experts=size,
            eplb=EplbConfig(interval=256, max_moved_fraction=0.3),
        ),
    }
    if dist.get_rank() == 0:
        print("| run | balancedness | tokens/s | slots moved |\n|---|---|---|---|")
    for name, parallel in ways.items():
        found = measure(parallel, arguments.tokens, arguments.rounds)
        assert found.text == alone, "the text is another than one process writes"
        if dist.get_rank() == 0:
            rate = f"{found.tokens_per_second:.1f}"
            print(f"| {name} | {found.balancedness:.3f} | {rate} | {found.num_moved} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
