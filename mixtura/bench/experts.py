"""The experts benchmark: one case, all contenders, beside the truth and the machine's limits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.contenders import Contender, Layer, RunBatch, refusals, rotate
from mixtura.bench.machine import Arithmetic, Machine, read_bandwidth
from mixtura.bench.measure import interleave, relative_error
from mixtura.bench.results import CaseResult, ContenderResult, Floor
from mixtura.bench.weights import LayerWeights, num_weight_sets, random_batches
from mixtura.kernels.cpu.extension import extension, missing
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.types import ExpertBatch

NUM_BATCHES = 17
"""Routings that take turns, so that no call visits the experts of the call before it; a prime
number, so that every layer meets every routing."""

DENSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
INT8_TOLERANCE = 5e-2
"""Largest relative error (Frobenius) of a correct result, against fp32 with dequantized weights:
above what a correct kernel shows, 3.5e-2 with int8 activations scaled by token."""

PROBE_SECONDS = 0.3
"""Bandwidth drifts on a shared machine, so it is probed just before and just after every case."""


def run_cases(
    cases: Sequence[Case], contenders: Sequence[Contender], machine: Machine, *, seconds: float
) -> Iterator[CaseResult]:
    """Run cases in order, one at a time in memory; see `run_case`.

    Raises:
        InputError: the weights of a case do not fit in memory; told before the first case runs.
    """
    for case in cases:
        refusals(case, contenders)
    source: LayerWeights | None = None
    for case in cases:
        if source is None or (source.shape, source.format) != (case.shape, case.weights):
            source = None  # its drawn expert makes room
            source = LayerWeights(case.shape, case.weights)
        yield run_case(case, contenders, machine, seconds=seconds, source=source)
        gc.collect()


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    machine: Machine,
    *,
    seconds: float,
    source: LayerWeights | None = None,
) -> CaseResult:
    """Check every contender against the truth, then time them in turns.

    A contender with a wrong result is timed all the same, and shown as wrong.

    Args:
        case: what to run.
        contenders: who runs it; those that refuse appear in the results with their reason.
        machine: whose peak the floor is taken from.
        seconds: for the timing of all contenders together.
        source: the experts, if they are made already.

    Raises:
        InputError: the weights do not fit in memory.
    """
    refused = refusals(case, contenders)
    running = [c for c in contenders if c.name not in refused]
    source = source or LayerWeights(case.shape, case.weights)
    batches = random_batches(case, NUM_BATCHES, seed=1)
    calls = _bind(case, running, source, batches)
    truth = true_output(source, batches[0])
    errors = {name: relative_error(call(0), truth) for name, call in calls.items()}
    slow = num_slow_calls()
    before = read_bandwidth(PROBE_SECONDS)
    timings = interleave(calls, seconds=seconds) if calls else {}
    after = read_bandwidth(PROBE_SECONDS)
    floor = Floor(
        weight_bytes=sum(case.bytes_touched(batch) for batch in batches) // len(batches),
        flops=case.flops,
        bandwidth_before=before,
        bandwidth_after=after,
        peak=machine.peak[case.arithmetic.value],
    )
    return CaseResult(
        case=case,
        slow_calls=num_slow_calls() - slow,
        machine=machine,
        floor=floor,
        contenders=tuple(
            ContenderResult(
                name=c.name,
                kernel=c.name if c.name in refused else c.kernel(case),
                weights=c.weights(case),
                is_ours=c.is_ours,
                timing=timings.get(c.name),
                relative_error=errors.get(c.name),
                is_correct=errors[c.name] <= tolerance(case) if c.name in errors else None,
                refusal=refused.get(c.name),
            )
            for c in contenders
        ),
    )


def num_slow_calls() -> int:
    """Calls of the C++ kernels so far that got fewer threads than they asked for."""
    return int(extension().num_short_teams()) if missing() is None else 0


def tolerance(case: Case) -> float:
    """The largest relative error of a correct result."""
    return INT8_TOLERANCE if case.arithmetic is Arithmetic.INT8 else DENSE_TOLERANCE[case.dtype]


def _bind(
    case: Case,
    contenders: Sequence[Contender],
    source: LayerWeights,
    batches: Sequence[ExpertBatch],
) -> dict[str, Callable[[int], Tensor]]:
    """Functions by contender, each with as many layers as its own weights need to come from memory.

    Every layer has run once: packing and compiling are not timed.
    """
    layers: dict[str, list[RunBatch]] = {c.name: [] for c in contenders}
    num_layers = {c.name: num_weight_sets(case, c.expert_bytes(case)) for c in contenders}
    for number in range(max(num_layers.values(), default=0)):
        layer = Layer(case, source, number)
        for contender in contenders:
            if number < num_layers[contender.name]:
                layers[contender.name].append(contender.bind(layer))
    calls = {
        c.name: rotate(layers[c.name], [c.prepare(case, batch) for batch in batches])
        for c in contenders
    }
    for name, call in calls.items():
        for number in range(num_layers[name]):
            call(number)
    return calls


@torch.no_grad()
def true_output(
    source: LayerWeights,
    batch: ExpertBatch,
    layer: int = 0,
    round_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """The layer in fp32 on the weights that the format stands for, by expert. -> (M,H) fp32.

    `round_rows` is what becomes of rows before each product, fp32 to fp32.
    """
    config = source.shape.experts

    def project(role: str, bias_role: str, expert: int, x: Tensor) -> Tensor:
        y = x @ source.true_weight(role, layer, expert).T
        bias = source.true_bias(bias_role, layer, expert)
        return y if bias is None else y + bias

    rows = round_rows(batch.hidden_states.float())
    out = torch.zeros_like(rows)
    for expert in range(config.num_experts):
        tokens, slots = (batch.local_ids == expert).nonzero(as_tuple=True)
        if tokens.numel() == 0:
            continue
        x = rows[tokens]
        gate, up = split_gate_up(project("gate_up_proj", "gate_up_bias", expert, x), config.gate_up)
        if "up_proj" in source.shape.matrices:
            up = project("up_proj", "", expert, x)
        hidden = round_rows(activate(gate, up, config.activation))
        y = project("down_proj", "down_bias", expert, hidden)
        out.index_add_(0, tokens, y * batch.topk_weights[tokens, slots, None].float())
    return out
