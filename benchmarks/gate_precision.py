"""On what share of tokens do the fp32 gate and a family's own bf16 gate choose different experts?

Both see the same bf16 hidden states: those of a model on a text, layer by layer, and random ones
with a random gate of a large model's size. Prints a line per case.
"""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import mixtura
from mixtura.config import GatePrecision, Renormalize, RoutingConfig
from mixtura.hf.gate import FamilyGate
from mixtura.routing import RouterTensors, router_for
from mixtura.routing.gate import GatePlan
from mixtura.types import TokenInputs

DEMO = Path(mixtura.__file__).parent / "demo"


def differing(plan: GatePlan, hidden: Tensor, weight: Tensor, tensors: RouterTensors) -> Tensor:
    """(T,) bool: the two precisions choose different sets of experts."""
    chosen = []
    for precision in GatePrecision:
        choice = replace(plan, precision=precision).choose(
            hidden, weight, None, tensors, TokenInputs()
        )
        chosen.append(choice.ids.sort(-1).values)
    return (chosen[0] != chosen[1]).any(-1)


def on_model(directory: Path, num_tokens: int) -> tuple[int, int]:
    """(choices that differ, choices) over the layers of a model on a Python source file."""
    model = mixtura.from_pretrained(directory, dtype=torch.bfloat16)
    text = inspect.getsource(inspect)
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    counts = [0, 0]

    def count(gate: FamilyGate, args: tuple[Tensor, ...], kwargs: object) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        found = differing(gate.gate_plan, hidden, gate.weight, gate.router_tensors())
        counts[0] += int(found.sum())
        counts[1] += found.numel()

    for module in model.modules():
        if isinstance(module, FamilyGate):
            module.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        for window in ids[:, :num_tokens].split(1024, dim=1):
            model(window)
    return counts[0], counts[1]


def on_random(num_tokens: int) -> tuple[int, int]:
    """The same for N(0,1) hidden states and a gate of Qwen3-30B-A3B's size: E 128, K 8, H 2048."""
    torch.manual_seed(0)
    config = RoutingConfig(num_experts=128, top_k=8, renormalize=Renormalize.SUM)
    hidden = torch.randn(num_tokens, 2048).bfloat16()
    weight = (torch.randn(128, 2048) * 2048**-0.5).bfloat16()
    found = differing(GatePlan(router_for(config)), hidden, weight, RouterTensors())
    return int(found.sum()), found.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO, help="a model directory")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per case")
    arguments = parser.parse_args()
    cases = {
        f"{arguments.model.name} on inspect.py": on_model(arguments.model, arguments.tokens),
        "random, E=128 K=8 H=2048": on_random(arguments.tokens),
    }
    for name, (differ, total) in cases.items():
        print(
            json.dumps({"case": name, "differ": differ, "choices": total, "share": differ / total})
        )


if __name__ == "__main__":
    main()
