"""Time one layer over ranks that are processes, and where the time goes.

python benchmarks/expert_parallel.py --shape olmoe --weights bf16,int4 --tokens 1,16,256

Every case is checked first against the layer on one process. Prints a line of JSON for each, and a
table. A forward's time is split in three: exchanges (waiting for the other ranks included), the
experts' kernel, and the layer's own: gate, router, and everything that dispatchers do around
exchanges. `floor` is the part of the kernel's time that the machine's limits, measured by all ranks
at once, account for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixtura.bench.cases import Case, find_cases
from mixtura.bench.experts import tolerance
from mixtura.bench.machine import peak_rate, read_bandwidth
from mixtura.bench.measure import relative_error
from mixtura.bench.weights import LayerWeights
from mixtura.config import (
    DispatcherName,
    MoEConfig,
    ParallelConfig,
    RoutingConfig,
    RunnerConfig,
    TokensHeld,
)
from mixtura.layer import FusedMoE
from mixtura.parallel import ExpertParallel, Pending, TorchTransport, Transport, join
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import shard_weights
from mixtura.types import ExpertBatch

WARM_UP = 3
LEAST, MOST = 5, 300
"""Forwards of a case."""

WAYS = (
    (DispatcherName.ALL_REDUCE, TokensHeld.SHARED),
    (DispatcherName.ALL_GATHER, TokensHeld.OWN),
    (DispatcherName.ALL_TO_ALL, TokensHeld.OWN),
)

OWN_SHARE_LIMIT = 0.05
"""Of the layer's time, at 256 tokens per rank."""


class Stopwatch:
    """Adds up the time spent in one kind of thing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, call: Callable[[], Any]) -> Any:
        """Call, and add the time it takes."""
        started = time.perf_counter()
        found = call()
        self.seconds += time.perf_counter() - started
        return found


@dataclasses.dataclass(frozen=True)
class Timed:
    """An exchange under way whose end is timed."""

    watch: Stopwatch
    pending: Pending[Any]

    def wait(self) -> Any:
        return self.watch.time(self.pending.wait)


class TimedTransport(Transport):
    """A transport whose starts and waits are timed."""

    def __init__(self, inner: Transport, watch: Stopwatch) -> None:
        self.inner = inner
        self.watch = watch
        self.rank, self.size, self.device = inner.rank, inner.size, inner.device

    def _timed(self, call: Callable[[], Pending[Any]]) -> Pending[Any]:
        return Timed(self.watch, self.watch.time(call))

    def all_reduce(self, *arguments: Any) -> Pending[Tensor]:
        return self._timed(lambda: self.inner.all_reduce(*arguments))

    def all_gather(self, *arguments: Any) -> Pending[Tensor]:
        return self._timed(lambda: self.inner.all_gather(*arguments))

    def reduce_scatter(self, *arguments: Any) -> Pending[Tensor]:
        return self._timed(lambda: self.inner.reduce_scatter(*arguments))

    def all_to_all(self, *arguments: Any) -> Pending[Tensor]:
        return self._timed(lambda: self.inner.all_to_all(*arguments))

    def swap(self, *arguments: Any) -> Pending[None]:
        return self._timed(lambda: self.inner.swap(*arguments))

    def close(self) -> None:
        self.inner.close()


class TimedLayer(FusedMoE):
    """A layer whose experts' kernel is timed; remembers what it ran last."""

    watch: Stopwatch
    last: list[ExpertBatch]

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        self.last.append(batch)
        out: Tensor = self.watch.time(
            lambda: super(TimedLayer, self).run_experts(batch, reduce=reduce)
        )
        return out


@dataclasses.dataclass
class Rank:
    """What a rank measures with.

    Attributes:
        bandwidth, peak: bytes and operations per second of this rank, while all measure.
    """

    transport: TorchTransport
    seconds: float
    bandwidth: float
    peak: float

    def together(self, value: Any) -> list[Any]:
        """Every rank's value."""
        return self.transport.exchange_values(value)


def layer_config(case: Case, is_overlapped: bool) -> MoEConfig:
    """The layer of a case; `is_overlapped`: in two batches, from two tokens on."""
    experts = case.shape.experts
    return MoEConfig(
        hidden_size=experts.hidden_size,
        routing=RoutingConfig(num_experts=experts.num_experts, top_k=case.shape.top_k),
        experts=experts,
        runner=RunnerConfig(overlap_min_tokens=2 if is_overlapped else None),
    )


def gate_weight(case: Case) -> Tensor:
    """(E,H), alike on all ranks."""
    experts = case.shape.experts
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(experts.num_experts, experts.hidden_size, generator=generator)
    return (weight * experts.hidden_size**-0.5).to(case.dtype)


def rows_of(case: Case, seed: int) -> Tensor:
    """(T,H) hidden states."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.num_tokens, case.shape.experts.hidden_size)
    return torch.randn(shape, generator=generator).to(case.dtype)


def measure_case(rank: Rank, case: Case, whole: FusedMoE) -> Iterator[dict[str, Any]]:
    """Every dispatcher, overlapped and not, on one case."""
    one_process = time_one_process(rank, case, whole)
    for dispatcher, held in WAYS:
        for is_overlapped in (False, True):
            if is_overlapped and case.num_tokens < 2:
                continue
            parallel = ParallelConfig(
                ep_size=rank.transport.size, tokens=held, dispatcher=dispatcher
            )
            found = measure_layer(rank, case, whole, parallel, is_overlapped)
            yield {
                "shape": case.shape.name,
                "weights": case.weights.value,
                "tokens_per_rank": case.num_tokens,
                "ranks": rank.transport.size,
                "dispatcher": dispatcher.value,
                "tokens": held.value,
                "overlapped": is_overlapped,
                "one_process_ms": 1e3 * one_process,
                **found,
            }


def time_one_process(rank: Rank, case: Case, whole: FusedMoE) -> float:
    """Median seconds of the whole layer on rank 0, with a thread for each rank, while others wait.

    It runs as many tokens as all ranks have together.
    """
    taken = []
    if rank.transport.rank == 0:
        rows = torch.cat([rows_of(case, seed) for seed in range(rank.transport.size)])
        torch.set_num_threads(rank.transport.size)
        for _ in range(WARM_UP):
            whole(rows)
        until = time.perf_counter() + rank.seconds
        while len(taken) < LEAST or (time.perf_counter() < until and len(taken) < MOST):
            started = time.perf_counter()
            whole(rows)
            taken.append(time.perf_counter() - started)
        torch.set_num_threads(1)
    found: float = rank.together(statistics.median(taken) if taken else None)[0]
    return found


def measure_layer(
    rank: Rank, case: Case, whole: FusedMoE, parallel: ParallelConfig, is_overlapped: bool
) -> dict[str, Any]:
    """Check, and time, this rank's part of a layer."""
    exchanges, kernel = Stopwatch(), Stopwatch()
    config = layer_config(case, is_overlapped)
    ranks = ExpertParallel.over(
        parallel,
        TimedTransport(rank.transport, exchanges),
        overlap_min_tokens=config.runner.overlap_min_tokens,
    )
    spread = Spread.of(config, ranks)
    weights = shard_weights(whole.experts.expert_weights, spread)
    layer = TimedLayer(config, weights=weights, spread=spread, dtype=case.dtype)
    layer.watch, layer.last = kernel, []
    layer.gate.weight.copy_(whole.gate.weight)
    own = rank.transport.rank if parallel.tokens is TokensHeld.OWN else 0
    rows = rows_of(case, own)

    def forward() -> tuple[Tensor, list[float]]:
        layer.last.clear()
        with ranks.clock.step(case.num_tokens):  # one for all layers of a model
            exchanges.seconds = kernel.seconds = 0.0
            started = time.perf_counter()
            out = layer(rows)
            total = time.perf_counter() - started
        assert isinstance(out, Tensor)
        return out, [total, exchanges.seconds, kernel.seconds]

    out, _ = forward()
    error = relative_error(out, whole(rows).float())
    started = time.perf_counter()
    for _ in range(WARM_UP):
        forward()
    each = (time.perf_counter() - started) / WARM_UP
    repetitions = rank.together(min(MOST, max(LEAST, int(rank.seconds / each))))[0]
    samples = [forward()[1] for _ in range(repetitions)]
    floor = floor_seconds(rank, case, layer.last)
    found = rank.together({"error": error, "samples": samples, "floor": floor})
    return summary(case, found)


def floor_seconds(rank: Rank, case: Case, batches: Sequence[ExpertBatch]) -> float:
    """The least time in which this rank's limits let its experts run."""
    seconds = 0.0
    for batch in batches:
        ids = batch.local_ids[batch.local_ids >= 0]
        read = len(ids.unique()) * case.shape.expert_bytes(case.weights.scheme)
        flops = 2 * case.shape.weights_per_expert * ids.numel()
        seconds += max(read / rank.bandwidth, flops / rank.peak)
    return seconds


def summary(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the forwards; of each forward, the mean over the ranks."""
    by_forward = torch.tensor([one["samples"] for one in found]).mean(0)  # (n,3)
    total, exchanges, kernel = by_forward.unbind(1)
    own = total - exchanges - kernel
    middle = {
        "total": total.median(),
        "exchanges": exchanges.median(),
        "kernel": kernel.median(),
        "own": own.median(),
    }
    error = max(one["error"] for one in found)
    floor = statistics.mean(one["floor"] for one in found)
    return {
        **{f"{name}_ms": 1e3 * float(value) for name, value in middle.items()},
        "own_share": float(middle["own"] / middle["total"]),
        "floor_share": float(floor / middle["kernel"]),
        "forwards": len(by_forward),
        "relative_error": error,
        "is_correct": error <= tolerance(case),
    }


def work(number: int, size: int, port: int, pipe: Connection, options: argparse.Namespace) -> None:
    """A rank: measure every case; rank 0 sends what was found."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    transport = join(store, number, size, timeout_seconds=1800.0)
    cases = find_cases([options.shape], options.weights, options.tokens)
    with torch.no_grad():
        for weights in dict.fromkeys(case.weights for case in cases):
            of_weights = [case for case in cases if case.weights is weights]
            source = LayerWeights(of_weights[0].shape, weights)
            whole = FusedMoE(
                layer_config(of_weights[0], False),
                weights=source.stacks(0),
                dtype=of_weights[0].dtype,
            )
            whole.gate.weight.copy_(gate_weight(of_weights[0]))
            for case in of_weights:
                transport.exchange((0,))  # so that all measure at once
                rank = Rank(
                    transport,
                    options.seconds,
                    bandwidth=read_bandwidth(options.seconds / 4),
                    peak=peak_rate(case.arithmetic, options.seconds / 4),
                )
                for line in measure_case(rank, case, whole):
                    if number == 0:
                        pipe.send(line)
    transport.close()
    pipe.close()


def lines_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start the ranks, and pass on what they find."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes = [
        context.Process(
            target=work, args=(rank, options.ranks, store.port, theirs, options), daemon=True
        )
        for rank in range(options.ranks)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        while True:
            yield ours.recv()
    except EOFError:
        pass
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"a rank ended with {process.exitcode}"


def table_of(lines: Sequence[dict[str, Any]]) -> Table:
    """What people read."""
    table = Table(title="One layer over ranks: median ms of a forward")
    heads = ("weights", "T a rank", "dispatcher", "overlap", "ms", "exchanges", "kernel", "own")
    for head in (*heads, "own %", "floor %", "one process", "error"):
        table.add_column(head, justify="right")
    for line in lines:
        times = [f"{line[f'{name}_ms']:.3f}" for name in ("total", "exchanges", "kernel", "own")]
        is_over = line["own_share"] > OWN_SHARE_LIMIT and line["tokens_per_rank"] >= 256
        table.add_row(
            line["weights"],
            str(line["tokens_per_rank"]),
            line["dispatcher"],
            "yes" if line["overlapped"] else "",
            *times,
            f"{100 * line['own_share']:.1f}{' !' if is_over else ''}",
            f"{100 * line['floor_share']:.0f}",
            f"{line['one_process_ms']:.3f}",
            f"{line['relative_error']:.1e}{'' if line['is_correct'] else ' WRONG'}",
        )
    return table


def main() -> None:
    """Measure, print a line of JSON for each case as it is done, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="olmoe", help="a layer shape of mixtura bench")
    parser.add_argument("--weights", default="bf16,int4", help="formats, with commas between")
    parser.add_argument("--tokens", default="1,16,256", help="tokens of each rank")
    parser.add_argument("--ranks", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    options = parser.parse_args()
    lines = []
    for line in lines_of(options):
        print(json.dumps(line), flush=True)
        lines.append(line)
    Console(width=140).print(table_of(lines))


if __name__ == "__main__":
    main()
