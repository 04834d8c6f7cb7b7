"""The experts benchmark: one case, all contenders, beside the truth and the machine's limits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.cases import Case, WeightSet, num_weight_sets, random_batches, random_weights
from mixtura.bench.contenders import Contender, RunBatch
from mixtura.bench.machine import Machine, dtype_name, read_bandwidth
from mixtura.bench.measure import Timing, interleave, relative_error
from mixtura.config import ExpertsConfig
from mixtura.experts import RoutedExperts
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.quant.scheme import QuantizedMatrix
from mixtura.types import ExpertBatch

NUM_BATCHES = 16
"""Routings that take turns, so that no call visits the experts of the call before it."""

TOLERANCE = {
    torch.float64: 1e-5,  # the truth is fp32
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""Largest relative error of a correct result; three times what a correct kernel shows, or more."""

PROBE_SECONDS = 0.3
"""Bandwidth drifts on a shared machine, so it is probed before and after every case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contender on one case.

    Attributes:
        limit_seconds: what the measured limits allow: the longer of reading the weights that are
            touched and of the products at the peak rate.
        limited_by: "memory" or "compute", whichever of the two is longer.
        bandwidth: bytes per second, probed beside this case.
        bytes_touched: of weights, the mean over the routings.
        timing, relative_error: None where the contender was not run; `refusal` says why.
    """

    shape: str
    num_tokens: int
    dtype: str
    contender: str
    is_ours: bool
    bytes_touched: int
    flops: int
    bandwidth: float
    limit_seconds: float
    limited_by: str
    timing: Timing | None = None
    relative_error: float | None = None
    is_correct: bool | None = None
    refusal: str | None = None

    @property
    def fraction_of_limit(self) -> float | None:
        """1.0 is the limit itself."""
        return None if self.timing is None else self.limit_seconds / self.timing.median

    def to_json(self) -> str:
        """One line; the keys are those that `docs/benchmarks/cpu.md` lists."""
        record: dict[str, Any] = {"record": "experts", **dataclasses.asdict(self)}
        timing = record.pop("timing") or dict.fromkeys(f.name for f in dataclasses.fields(Timing))
        for name in ("median", "minimum", "maximum"):
            record[f"{name}_seconds"] = timing[name]
        for name in ("repetitions", "disturbed"):
            record[name] = timing[name]
        return json.dumps({**record, "fraction_of_limit": self.fraction_of_limit})


def machine_json(machine: Machine) -> str:
    """The machine's line, the first of a file of results."""
    return json.dumps({"record": "machine", **dataclasses.asdict(machine)})


def run_case(
    case: Case, contenders: Sequence[Contender], machine: Machine, *, seconds: float
) -> list[Result]:
    """Check every contender against the truth, then time them in turns.

    A contender with a wrong result is timed all the same, and shown as wrong.

    Args:
        case: what to run.
        contenders: who runs it; those that refuse appear in the results with their reason.
        machine: whose peak the limit is taken from.
        seconds: for the timing of all contenders together.
    """
    config = case.shape.experts
    refusals = {c.name: c.refusal(case) for c in contenders}
    running = [c for c in contenders if refusals[c.name] is None]
    batches = random_batches(case, NUM_BATCHES, seed=1)
    sets = [random_weights(config, case.dtype, seed) for seed in range(num_weight_sets(case))]
    with torch.no_grad():
        calls = {c.name: _rotate(c, config, sets, batches) for c in running}
        truth = true_output(config, sets[0], batches[0])
        errors = {name: relative_error(call(0), truth) for name, call in calls.items()}
        before = read_bandwidth(PROBE_SECONDS)
        timings = interleave(calls, seconds=seconds) if calls else {}
        bandwidth = max(before, read_bandwidth(PROBE_SECONDS))
    touched = sum(case.bytes_touched(batch) for batch in batches) // len(batches)
    reading = touched / bandwidth
    multiplying = case.flops / machine.peak_flops[dtype_name(case.dtype)]
    return [
        Result(
            shape=case.shape.name,
            num_tokens=case.num_tokens,
            dtype=dtype_name(case.dtype),
            contender=c.name,
            is_ours=c.is_ours,
            bytes_touched=touched,
            flops=case.flops,
            bandwidth=bandwidth,
            limit_seconds=max(reading, multiplying),
            limited_by="memory" if reading >= multiplying else "compute",
            timing=timings.get(c.name),
            relative_error=errors.get(c.name),
            is_correct=errors[c.name] <= TOLERANCE[case.dtype] if c.name in errors else None,
            refusal=refusals[c.name],
        )
        for c in contenders
    ]


def _rotate(
    contender: Contender,
    config: ExpertsConfig,
    sets: Sequence[WeightSet],
    batches: Sequence[ExpertBatch],
) -> Callable[[int], Tensor]:
    """Call `number` runs another layer and another routing than the call before it."""
    layers: list[RunBatch] = [contender.bind(config, weights) for weights in sets]
    prepared = [contender.prepare(batch) for batch in batches]

    def call(number: int) -> Tensor:
        return layers[number % len(layers)](prepared[number % len(prepared)])

    return call


def true_output(config: ExpertsConfig, weights: WeightSet, batch: ExpertBatch) -> Tensor:
    """The layer in fp32 whatever the dtype, expert by expert. -> (M,H) fp32."""
    experts = RoutedExperts(config, device="meta")
    for name, tensor in weights.items():
        setattr(experts, name, torch.nn.Parameter(tensor))
    stacks = experts.expert_weights

    def project(stack: QuantizedMatrix, bias: Tensor | None, expert: int, x: Tensor) -> Tensor:
        y = x @ stack.values[expert].float().T
        return y if bias is None else y + bias[expert].float()

    rows = batch.hidden_states.float()
    out = torch.zeros_like(rows)
    for expert in range(config.num_experts):
        tokens, slots = (batch.local_ids == expert).nonzero(as_tuple=True)
        if tokens.numel() == 0:
            continue
        x = rows[tokens]
        first = project(stacks.gate_up_proj, stacks.gate_up_bias, expert, x)
        gate, up = split_gate_up(first, config.gate_up)
        if stacks.up_proj is not None:
            up = project(stacks.up_proj, None, expert, x)
        hidden = activate(gate, up, config.activation)
        y = project(stacks.down_proj, stacks.down_bias, expert, hidden)
        out.index_add_(0, tokens, y * batch.topk_weights[tokens, slots, None].float())
    return out
