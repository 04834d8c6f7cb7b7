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

import torch
from torch import Tensor

from mixtura.config import GateUp
from mixtura.kernels.triton.align import order_slots
from mixtura.kernels.triton.candidates import Case, LayerShape
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.experts import Call
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.table import DIRECT_TILE, Blocks, Product
from mixtura.kernels.triton.trials import Failed, Timed, Trial, told
from mixtura.quant.matrix import dense
from mixtura.types import ExpertOrder, ExpertWeights

TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of a value, and of the mean size of all: two units in the last place, as sums are added up in
another order before they are rounded."""

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

Clock = Callable[[Sequence[Sequence[Launch]], bool], list[float]]
"""Contenders' launches, and whether it is the last look -> seconds of one launch each."""


class CaptureFailed(Exception):
    """A CUDA graph could not be made; torch's generator and memory may be left half in it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch of its own ids. `order` is None where slots are not sorted."""

    call: Call
    order: ExpertOrder | None


@dataclass(frozen=True, slots=True)
class Batches:
    """What a case is measured on at one number of rows.

    Attributes:
        hidden: (N, I) input of the down projection.
        out: what launches write. truth: the same as the table's blocks write it, first turn.
    """

    case: Case
    turns: tuple[Turn, ...]
    hidden: Tensor
    out: Tensor
    truth: Tensor

    def launches(self, blocks: Blocks | None) -> list[Launch]:
        """One a turn; None: with the table's blocks."""
        return [launch_of(self.case, turn, self.hidden, self.out, blocks) for turn in self.turns]


def launch_of(case: Case, turn: Turn, hidden: Tensor, out: Tensor, blocks: Blocks | None) -> Launch:
    """The launch of a case's product alone."""
    tuned = {} if blocks is None else {case.key: blocks}
    call = replace(turn.call, tuned=tuned)
    is_first = case.product is Product.GATE_UP
    if turn.order is None:
        return call.direct_gate_up(out) if is_first else call.direct_down(hidden, out)
    assert turn.order.tiling.rows == case.tile_rows, (turn.order.tiling, case)
    return call.gate_up(turn.order, out) if is_first else call.down(turn.order, hidden, out)


class Measuring:
    """Measures on a device, as `tune.Measure` has it; keeps the last case's tensors."""

    def __init__(self, device: str, clock: Clock | None = None) -> None:
        self._device = torch.device(device)
        self._clock = clock or graph_clock
        self._case: Case | None = None
        self._batches: list[Batches] = []
        self._shape: LayerShape | None = None
        self._weights: list[ExpertWeights] = []

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
            batches.out.fill_(torch.nan)
            launches[0].run()
            num_wrong = count_wrong(batches.out, batches.truth)
            if num_wrong:
                return Failed(f"gives {num_wrong} wrong values of {batches.out.numel()}")
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


def count_wrong(found: Tensor, truth: Tensor) -> int:
    """Values (rows, columns) that are not the truth's; NaN must be where it is there."""
    pairs = list(
        zip(torch.split(found, COMPARED_ROWS), torch.split(truth, COMPARED_ROWS), strict=True)
    )
    squares = [torch.nan_to_num(part.float()).square().mean() for _, part in pairs]
    size = torch.stack(squares).max().sqrt()
    tolerance = TOLERANCE[truth.dtype]
    num_wrong = torch.zeros((), dtype=torch.int64, device=truth.device)
    for part, true in pairs:
        error = (part.float() - true.float()).abs()
        is_right = (error <= tolerance * (true.float().abs() + size)) | (
            part.isnan() & true.isnan()
        )
        num_wrong += (~is_right).sum()
    return int(num_wrong)


def make_weights(shape: LayerShape, device: torch.device) -> list[ExpertWeights]:
    """Random experts; several sets of them where one would stay in the L2 cache."""
    config, dtype = shape.config, shape.dtype
    inner = config.hidden_size * config.intermediate_size * config.num_experts
    wanted = ceil(ROTATED * l2_bytes(device) / (inner * dtype.itemsize))
    return [_experts(shape, device) for _ in range(max(1, min(wanted, MAX_WEIGHTS)))]


def _experts(shape: LayerShape, device: torch.device) -> ExpertWeights:
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


def make_batches(case: Case, num_rows: int, weights: Sequence[ExpertWeights]) -> Batches:
    """Random rows, their choices of experts, and what the table's blocks make of the first."""
    config, device = case.shape.config, weights[0].device
    num_slots = num_rows * case.shape.top_k

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=case.shape.dtype, device=device)

    rows = empty(num_rows, config.hidden_size).normal_()
    hidden = empty(num_slots, config.intermediate_size).normal_()
    is_direct = case.tile_rows == DIRECT_TILE
    out = empty(num_rows if is_direct else num_slots, config.hidden_size)
    if case.product is Product.GATE_UP:
        out = torch.empty_like(hidden)
    turns = tuple(
        _turn(case, rows, weights[number % len(weights)])
        for number in range(num_turns(case, num_rows, len(weights), device))
    )
    out.fill_(torch.nan)
    launch_of(case, turns[0], hidden, out, None).run()
    assert not bool(out.isnan().all()), "nothing was written"
    return Batches(case, turns, hidden, out, out.clone())


def num_turns(case: Case, num_rows: int, num_weights: int, device: torch.device) -> int:
    """Launches that read a few L2 caches of weights together."""
    shape = case.shape
    config = shape.config
    num_experts = min(num_rows * shape.top_k, config.num_experts)
    read = num_experts * config.hidden_size * config.intermediate_size * shape.dtype.itemsize
    wanted = ceil(ROTATED * l2_bytes(device) / read)
    return max(MIN_TURNS, num_weights, min(wanted, MAX_TURNS))


def _turn(case: Case, rows: Tensor, weights: ExpertWeights) -> Turn:
    shape = case.shape
    num_rows, num_experts = rows.shape[0], shape.config.num_experts
    scores = torch.rand(num_rows, num_experts, device=rows.device)
    ids = scores.topk(shape.top_k).indices.to(torch.int32)
    topk_weights = torch.rand(num_rows, shape.top_k, device=rows.device).softmax(1)
    call = Call(weights, rows, ids, topk_weights, weighs_input=False, device=device_of(rows.device))
    tiling = shape.tiling(num_rows)
    return Turn(call, None if tiling is None else order_slots(ids, num_experts, tiling))


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
