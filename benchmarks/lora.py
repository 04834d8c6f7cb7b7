"""What LoRA adapters cost a layer of OLMoE's shape on the CPU, and what rebuilding weights costs.

python benchmarks/lora.py --tokens 1,8,64,512 --weights bf16,int4-g32,int8-channel

`none`, `one` and `two` are the same packed experts, whose rows ask for no adapter, all for one, or
for two in turn. `rebuild` is what PEFT's target_parameters do: W + B A of every expert, anew in
each forward, for dense weights alone. Results are checked against fp32 experts with the adapter in
them first. Prints a line of JSON for each case, and a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixtura.bench.cases import Case, find_shape
from mixtura.bench.contenders import rotate
from mixtura.bench.experts import NUM_BATCHES, tolerance
from mixtura.bench.measure import Timing, interleave, relative_error
from mixtura.bench.weights import LayerWeights, num_weight_sets, random_batches
from mixtura.config import ExpertsConfig
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels.reference.activation import activate
from mixtura.lora import LoraWeights, LowRank
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch

Call = Callable[[int], Tensor]

ADAPTERS: dict[str, tuple[int, ...]] = {"none": (-1,), "one": (0,), "two": (0, 1)}
"""Contenders by name, and the adapters that their rows ask for in turn."""


def draw_adapter(config: ExpertsConfig, rank: int, seed: int) -> LoraWeights:
    """A tenth of the weights' size, in bf16; gate and up share A, as trained on one map."""
    generator = torch.Generator().manual_seed(seed)
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def normal(*shape: int, size: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * size**-0.5).bfloat16()

    def part(a: Tensor, num_out: int) -> LowRank:
        return LowRank(a, 0.1 * normal(count, num_out, rank, size=rank))

    a = normal(count, rank, hidden, size=hidden)
    down = part(normal(count, rank, inner, size=inner), hidden)
    return LoraWeights(part(a, inner), part(a, inner), down)


def asking(batch: ExpertBatch, numbers: tuple[int, ...]) -> ExpertBatch:
    """Rows that ask for these adapters in turn; -1 alone is as without adapters."""
    if numbers == (-1,):
        return batch
    count = len(batch.hidden_states)
    ids = torch.tensor(numbers, dtype=torch.int32).repeat(count)[:count]
    return replace(batch, adapter_ids=ids)


def true_output(source: LayerWeights, adapters: list[LoraWeights], batch: ExpertBatch) -> Tensor:
    """Experts in fp32, each row by those with its adapter in them. -> (M,H)."""
    rows = batch.hidden_states.float()
    out = torch.zeros_like(rows)
    ids = batch.adapter_ids
    asked = torch.full((len(rows),), -1) if ids is None else ids
    inner = source.shape.experts.intermediate_size
    for expert in range(source.shape.experts.num_experts):
        for number in asked.unique().tolist():
            is_here = (batch.local_ids == expert) & (asked == number).unsqueeze(1)
            tokens, slots = is_here.nonzero(as_tuple=True)
            if not tokens.numel():
                continue
            first = source.true_weight("gate_up_proj", 0, expert)
            second = source.true_weight("down_proj", 0, expert)
            if number >= 0:
                delta = {
                    name: part.b[expert].float() @ part.a[expert].float()
                    for name, part in adapters[number].parts().items()
                }
                first[:inner] += delta["gate"]
                first[inner:] += delta["up"]
                second += delta["down"]
            gate, up = (rows[tokens] @ first.T).chunk(2, 1)
            hidden = activate(gate, up, source.shape.experts.activation)
            weights = batch.topk_weights[tokens, slots, None]
            out.index_add_(0, tokens, hidden @ second.T * weights)
    return out


def rebuilt(experts: RoutedExperts, adapter: LoraWeights) -> Callable[[ExpertBatch], Tensor]:
    """Experts that are made anew of W and the adapter in every call."""
    base = experts.expert_weights
    assert adapter.gate is not None and adapter.up is not None and adapter.down is not None
    a, down = adapter.gate.a, adapter.down
    b = torch.cat([adapter.gate.b, adapter.up.b], 1)

    def run(batch: ExpertBatch) -> Tensor:
        weights = replace(
            base,
            gate_up_proj=dense(torch.baddbmm(base.gate_up_proj.values, b, a)),
            down_proj=dense(torch.baddbmm(base.down_proj.values, down.b, down.a)),
        )
        kernel = ExpertsOptions(kernel="torch")
        return RoutedExperts(weights.config, weights=weights, options=kernel)(batch)

    return run


def bind(
    case: Case, source: LayerWeights, adapters: list[LoraWeights]
) -> tuple[dict[str, Call], dict[str, Call]]:
    """What is timed by name: with layers to rotate through; and what rebuilds."""
    batches = random_batches(case, NUM_BATCHES, seed=1)
    layers = []
    for number in range(num_weight_sets(case, case.expert_bytes)):
        weights = source.stacks(number)
        layers.append(RoutedExperts(case.shape.experts, weights=weights))
        layers[-1].set_lora(adapters)
        layers[-1](batches[0])
    calls = {
        name: rotate(layers, [asking(batch, numbers) for batch in batches])
        for name, numbers in ADAPTERS.items()
    }
    if case.weights.scheme.is_quantized:
        return calls, {}
    plain = RoutedExperts(case.shape.experts, weights=source.stacks(0))
    one = [asking(batch, (0,)) for batch in batches]
    bare = [replace(batch, adapter_ids=None) for batch in one]
    return calls, {"rebuild": rotate([rebuilt(plain, adapters[0])], bare)}


def check(case: Case, source: LayerWeights, adapters: list[LoraWeights], calls: dict[str, Call]):
    """Raise where a contender's first result is not the merged experts'. -> errors by name."""
    batch = random_batches(case, 1, seed=1)[0]
    truths = {
        name: true_output(source, adapters, asking(batch, numbers))
        for name, numbers in ADAPTERS.items()
    }
    truths["rebuild"] = truths["one"]
    errors = {name: relative_error(call(0), truths[name]) for name, call in calls.items()}
    wrong = {name: error for name, error in errors.items() if error > tolerance(case)}
    if wrong:
        raise SystemExit(f"{case}: {wrong} must be at most {tolerance(case)}")
    return errors


def measure(case: Case, source: LayerWeights, adapters: list[LoraWeights], seconds: float):
    """Check, then time in turns -> the timings by name, and the errors."""
    calls, rebuilding = bind(case, source, adapters)
    errors = check(case, source, adapters, calls | rebuilding)
    timings = interleave(calls, seconds=seconds)
    if rebuilding:
        timings |= interleave(rebuilding, seconds=seconds)
    return timings, errors


def line(case: Case, rank: int, timings: dict[str, Timing], errors: dict[str, float]) -> str:
    """A case as JSON."""
    base = timings["none"].median
    found = {
        "shape": case.shape.name,
        "weights": case.weights.value,
        "num_tokens": case.num_tokens,
        "rank": rank,
        "num_threads": torch.get_num_threads(),
        "contenders": {
            name: {
                "ms": timing.median * 1e3,
                "ms_min": timing.minimum * 1e3,
                "ms_max": timing.maximum * 1e3,
                "repetitions": timing.repetitions,
                "disturbed": timing.disturbed,
                "to_none": timing.median / base,
                "relative_error": errors[name],
            }
            for name, timing in timings.items()
        },
    }
    return json.dumps(found)


def cells(timings: dict[str, Timing]) -> list[str]:
    """Medians, each with its ratio to that without adapters."""
    base = timings["none"].median
    found = {name: f"{t.median * 1e3:.3g} ({t.median / base:.2f})" for name, t in timings.items()}
    return [found.get(name, "") for name in (*ADAPTERS, "rebuild")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="olmoe")
    parser.add_argument("--tokens", default="1,8,64,512", help="numbers of tokens")
    parser.add_argument("--weights", default="bf16,int4-g32,int8-channel", help="weight formats")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case")
    arguments = parser.parse_args()
    shape = find_shape(arguments.shape)
    adapters = [draw_adapter(shape.experts, arguments.rank, seed) for seed in (1, 2)]
    table = Table(title="Experts of one layer: median ms (to none)")
    for head in ("weights", "T", *ADAPTERS, "rebuild"):
        table.add_column(head, justify="right")
    with torch.no_grad():
        for name in arguments.weights.split(","):
            weights = WeightFormat(name)
            source = LayerWeights(shape, weights)
            for count in map(int, arguments.tokens.split(",")):
                case = Case(shape=shape, num_tokens=count, weights=weights)
                timings, errors = measure(case, source, adapters, arguments.seconds)
                print(line(case, arguments.rank, timings, errors), flush=True)
                table.add_row(name, str(count), *cells(timings))
    Console().print(table)


if __name__ == "__main__":
    main()
