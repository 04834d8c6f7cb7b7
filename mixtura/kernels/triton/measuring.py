"""Measures blocks on a GPU: results first, then launches in CUDA graphs, contenders in turns.

A graph holds several launches, each with other ids, and other weights where a layer's are few, so
that what is read is in memory and not in the L2 cache, as when a model runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from mixtura.config import GateUp
from mixtura.kernels.triton.align import order_slots
from mixtura.kernels.triton.call import Call
from mixtura.kernels.triton.candidates import Case, LayerShape
from mixtura.kernels.triton.dense import DenseCall
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.packed import measured
from mixtura.kernels.triton.packed.call import PackedCall
from mixtura.kernels.triton.packed.experts import PackedWeights
from mixtura.kernels.triton.packed.made_up import random_experts
from mixtura.kernels.triton.packed.rounding import Rows
from mixtura.kernels.triton.table import DIRECT_TILE, Blocks, Product
from mixtura.kernels.triton.trials import Failed, Timed, Trial, told
from mixtura.quant.matrix import dense
from mixtura.types import ExpertOrder, ExpertWeights

TOLERANCE = {
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
    torch.float32: 2**-9,
    torch.float8_e4m3fn: 2**-2,
    torch.int8: 2**-4,
}
"""Of a value, and of the mean size of all, by what is written: two units in the last place, as sums
are added up in another order before they are rounded. Numbers of fp32 are sums of products that
need not be exact; the largest code of int8 is some four times the mean size."""

COMPARED_ROWS = 4096
"""Rows of results that are compared at a time, in fp32."""

ROTATED = 4
"""L2 caches that a graph's launches read in all, at least."""

MIN_TURNS, MAX_TURNS = 4, 32
"""Launches in a graph."""

MAX_WEIGHTS = 8
"""Sets of a layer's weights, at most."""

ROUNDS = 10
"""Replays of every contender between two waits for the GPU."""

WARM_ROUNDS = 3
"""Replays that do not count: clocks rise."""

MAX_ROUNDS = 200
SWEEP_SECONDS, FINAL_SECONDS = 0.2, 1.0
"""For both contenders together, beside the first rounds."""

Experts = ExpertWeights | PackedWeights

Clock = Callable[[Sequence[Sequence[Launch]], bool], list[float]]
"""Contenders' launches, and whether it is the last look -> seconds of one launch each."""


class CaptureFailed(Exception):
    """A CUDA graph could not be made; torch's generator and memory may be left half in it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch of its own ids.

    Attributes:
        order: None where slots are not sorted.
        read: what the product multiplies.
    """

    call: Call
    order: ExpertOrder | None
    read: Tensor | Rows


@dataclass(frozen=True, slots=True)
class Batches:
    """What a case is measured on at one number of rows.

    Attributes:
        out: what launches write. truth: the same as the table's blocks write it, first turn.
    """

    case: Case
    turns: tuple[Turn, ...]
    out: Tensor | Rows
    truth: Tensor

    def launches(self, blocks: Blocks | None) -> list[Launch]:
        """One a turn; None: with the table's blocks."""
        return [launch_of(self.case, turn, self.out, blocks) for turn in self.turns]

    def count_wrong(self) -> int:
        """Values of the first turn that are not the truth's."""
        dtype = self.out.data.dtype
        return count_wrong(values(self.out), self.truth, TOLERANCE[dtype])


def launch_of(case: Case, turn: Turn, out: Tensor | Rows, blocks: Blocks | None) -> Launch:
    """The launch of a case's product alone."""
    tuned = {} if blocks is None else {case.key: blocks}
    call, order = replace(turn.call, tuned=tuned), turn.order
    assert order is None or order.tiling.rows == case.tile_rows, (order, case)
    is_first = case.product is Product.GATE_UP
    if isinstance(call, PackedCall):
        assert isinstance(turn.read, Rows) and isinstance(out, Rows)
        return measured.launch_of(call, case.product, order, turn.read, out)
    assert isinstance(call, DenseCall) and isinstance(turn.read, Tensor) and isinstance(out, Tensor)
    if order is None:
        return call.direct_gate_up(out) if is_first else call.direct_down(turn.read, out)
    return call.gate_up(order, out) if is_first else call.down(order, turn.read, out)


def values(out: Tensor | Rows) -> Tensor:
    """What has been written, as numbers."""
    return measured.values(out) if isinstance(out, Rows) else out


def forget_(out: Tensor | Rows) -> None:
    """Put NaN where something is to be written."""
    if isinstance(out, Rows):
        measured.forget_(out)
    else:
        out.fill_(torch.nan)


class Measuring:
    """Measures on a device, as `tune.Measure` has it; keeps the last case's tensors."""

    def __init__(self, device: str, clock: Clock | None = None) -> None:
        self._device = torch.device(device)
        self._clock = clock or graph_clock
        self._case: Case | None = None
        self._batches: list[Batches] = []
        self._shape: LayerShape | None = None
        self._weights: list[Experts] = []

    def __call__(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        """Compare and time; whatever goes wrong is an answer."""
        if case != self._case:
            try:
                self._prepare(case)
            except Exception as error:
                self._case, self._batches = None, []
                reason = f"the table's blocks cannot be measured: {told(error)}"
                return Failed(reason, ends_case=True, has_broken_device=self._is_broken())
        try:
            return self._measure(blocks, is_final)
        except Exception as error:
            is_broken = isinstance(error, CaptureFailed) or self._is_broken()
            return Failed(told(error), has_broken_device=is_broken)

    def _measure(self, blocks: Blocks, is_final: bool) -> Trial:
        shipped, tried = [], []
        for batches in self._batches:
            launches = batches.launches(blocks)
            forget_(batches.out)
            launches[0].run()
            num_wrong = batches.count_wrong()
            if num_wrong:
                return Failed(f"gives {num_wrong} wrong values of {batches.truth.numel()}")
            old, new = self._clock([batches.launches(None), launches], is_final)
            shipped.append(old)
            tried.append(new)
        return Timed(tuple(shipped), tuple(tried))

    def _prepare(self, case: Case) -> None:
        self._case, self._batches = None, []
        if case.shape != self._shape:
            self._weights.clear()
            self._weights = make_weights(case.shape, self._device)
            self._shape = case.shape
        self._batches = [make_batches(case, rows, self._weights) for rows in case.rows]
        self._case = case

    def _is_broken(self) -> bool:
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except Exception:
            return True
        return False


def cuda_measuring() -> Measuring:
    """Measures on the current GPU."""
    return Measuring("cuda")


def count_wrong(found: Tensor, truth: Tensor, tolerance: float) -> int:
    """Values (rows, columns) that are not the truth's; NaN must be where it is there."""
    pairs = list(
        zip(torch.split(found, COMPARED_ROWS), torch.split(truth, COMPARED_ROWS), strict=True)
    )
    squares = [torch.nan_to_num(part.float()).square().mean() for _, part in pairs]
    size = torch.stack(squares).max().sqrt()
    num_wrong = torch.zeros((), dtype=torch.int64, device=truth.device)
    for part, true in pairs:
        error = (part.float() - true.float()).abs()
        is_right = (error <= tolerance * (true.float().abs() + size)) | (
            part.isnan() & true.isnan()
        )
        num_wrong += (~is_right).sum()
    return int(num_wrong)


def make_weights(shape: LayerShape, device: torch.device) -> list[Experts]:
    """Random experts; several sets of them where one would stay in the L2 cache."""
    config = shape.config
    size = config.hidden_size * config.intermediate_size * config.num_experts
    wanted = ceil(ROTATED * l2_bytes(device) / (size * shape.weight_bits / 8))
    return [_experts(shape, device) for _ in range(max(1, min(wanted, MAX_WEIGHTS)))]


def _experts(shape: LayerShape, device: torch.device) -> Experts:
    if shape.quantization is None:
        return _dense_experts(shape, device)
    return random_experts(shape.config, shape.quantization, shape.dtype, device)


def _dense_experts(shape: LayerShape, device: torch.device) -> ExpertWeights:
    config, dtype = shape.config, shape.dtype
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def stack(rows: int, columns: int) -> Tensor:
        size = (columns, rows) if config.is_transposed else (rows, columns)
        weight = torch.empty((count, *size), dtype=dtype, device=device)
        weight.normal_(std=columns**-0.5)
        return weight.transpose(1, 2) if config.is_transposed else weight

    def vector(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    return ExpertWeights(
        config,
        gate_up_proj=dense(stack(config.up_size, hidden)),
        down_proj=dense(stack(hidden, inner)),
        up_proj=dense(stack(inner, hidden)) if config.gate_up is GateUp.SEPARATE else None,
        gate_up_bias=vector(count, config.up_size) if config.has_bias else None,
        down_bias=vector(count, hidden) if config.has_bias else None,
        post_norm=vector(hidden) if config.post_norm is not None else None,
    )


def make_batches(case: Case, num_rows: int, weights: Sequence[Experts]) -> Batches:
    """Random rows, their choices of experts, and what the table's blocks make of the first."""
    config, device = case.shape.config, weights[0].device
    num_slots = num_rows * case.shape.top_k

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=case.shape.dtype, device=device)

    rows = empty(num_rows, config.hidden_size).normal_()
    hidden = empty(num_slots, config.intermediate_size).normal_()
    turns = tuple(
        _turn(case, rows, hidden, weights[number % len(weights)])
        for number in range(num_turns(case, num_rows, len(weights), device))
    )
    out: Tensor | Rows
    if isinstance(turns[0].call, PackedCall):
        out = measured.written_by(turns[0].call, case.product)
    elif case.product is Product.GATE_UP:
        out = torch.empty_like(hidden)
    else:
        is_direct = case.tile_rows == DIRECT_TILE
        out = empty(num_rows if is_direct else num_slots, config.hidden_size)
    forget_(out)
    launch_of(case, turns[0], out, None).run()
    truth = values(out).clone()
    assert not bool(truth.isnan().all()), "nothing was written"
    return Batches(case, turns, out, truth)


def num_turns(case: Case, num_rows: int, num_weights: int, device: torch.device) -> int:
    """Launches that read a few L2 caches of weights together."""
    shape = case.shape
    config = shape.config
    num_experts = min(num_rows * shape.top_k, config.num_experts)
    size = num_experts * config.hidden_size * config.intermediate_size
    wanted = ceil(ROTATED * l2_bytes(device) / (size * shape.weight_bits / 8))
    return max(MIN_TURNS, num_weights, min(wanted, MAX_TURNS))


def _turn(case: Case, rows: Tensor, hidden: Tensor, weights: Experts) -> Turn:
    shape = case.shape
    num_rows, num_experts = rows.shape[0], shape.config.num_experts
    scores = torch.rand(num_rows, num_experts, device=rows.device)
    ids = scores.topk(shape.top_k).indices.to(torch.int32)
    topk_weights = torch.rand(num_rows, shape.top_k, device=rows.device).softmax(1)
    tiling = shape.tiling(num_rows)
    order = None if tiling is None else order_slots(ids, num_experts, tiling)
    inputs = (weights, rows, ids, topk_weights)
    options: dict[str, Any] = {"weighs_input": False, "device": device_of(rows.device)}
    if isinstance(weights, PackedWeights):
        packed = PackedCall(*inputs, **options)
        return Turn(packed, order, measured.read_by(packed, case.product))
    return Turn(DenseCall(*inputs, **options), order, hidden)


def l2_bytes(device: torch.device) -> int:
    """The L2 cache; 0 where there is none to avoid."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def graph_clock(contenders: Sequence[Sequence[Launch]], is_final: bool) -> list[float]:
    """Replay a CUDA graph of every contender's launches in turns; medians in seconds."""
    for launches in contenders:
        launches[0].run()  # compiles and loads, which a capture cannot
    torch.cuda.synchronize()
    graphs = [_captured(launches) for launches in contenders]
    samples: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + (FINAL_SECONDS if is_final else SWEEP_SECONDS)
    num_rounds = 0
    while num_rounds < MAX_ROUNDS and (num_rounds == 0 or time.perf_counter() < end):
        for number, elapsed in _replayed(graphs):
            samples[number].append(elapsed)
        num_rounds += ROUNDS
    num_warm = WARM_ROUNDS
    return [
        statistics.median(times[num_warm:]) / len(launches)
        for times, launches in zip(samples, contenders, strict=True)
    ]


def _captured(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for launch in launches:
                launch.run()
    except Exception as error:
        raise CaptureFailed(told(error)) from error
    return graph


def _replayed(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[tuple[int, float]]:
    """(contender, seconds of its graph) of ROUNDS rounds; who comes first changes."""
    events = []
    numbers = list(range(len(graphs)))
    for _ in range(ROUNDS):
        numbers = numbers[1:] + numbers[:1]
        for number in numbers:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graphs[number].replay()
            stop.record()
            events.append((number, start, stop))
    torch.cuda.synchronize()
    return [(number, start.elapsed_time(stop) / 1e3) for number, start, stop in events]
