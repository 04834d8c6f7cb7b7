"""The whole of a run, for the command line and for `benchmarks/gpu.py`: no package but torch."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtura.bench.cases import Case, find_cases
from mixtura.bench.chart import check_writable, draw_lines, require_matplotlib
from mixtura.bench.choices import default_on_gpu, find_contenders
from mixtura.bench.contenders import Contender
from mixtura.bench.gpu.arithmetic import (
    NAMES,
    activation_dtype_of,
    parse_activation_dtype,
    product_dtype,
)
from mixtura.bench.gpu.batches import Spread
from mixtura.bench.gpu.device import CudaDevice, Device
from mixtura.bench.gpu.journal import Journal
from mixtura.bench.gpu.layer_case import Bench, DeviceLost, run_case
from mixtura.bench.gpu.limits import find_peak, probe_bandwidth
from mixtura.bench.gpu.results import (
    Key,
    LayerResult,
    Place,
    find_commit,
    find_sources,
    find_tuned,
    find_versions,
)
from mixtura.bench.gpu.rotation import Measure, Mode
from mixtura.bench.gpu.table import case_line, chart_lines, notes, place_summary, results_table
from mixtura.config import ActivationDtype

DEFAULT_SHAPE = "qwen3-30b-a3b"
DEFAULT_WEIGHTS = "bf16"
DEFAULT_TOKENS = "1,8,16,32,64,128,256,512,2048,8192,16384"
DEFAULT_SECONDS = 4.0
"""For the timing of a case; with compiling and capturing a shape is meant to take under two
minutes."""

TITLE = "One layer in a CUDA graph: share of the floor"


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What is asked for.

    Attributes:
        weights: formats, with commas.
        activation_dtype: the arithmetic with quantized weights; None is what a format means.
        contenders: names; none are the default ones.
        seconds: for the timing of a case.
        minutes: after which no case is begun; None is no limit.
        out: the file of results, which a later run goes on with. png: the chart.
    """

    shapes: Sequence[str] = (DEFAULT_SHAPE,)
    weights: str = DEFAULT_WEIGHTS
    activation_dtype: str | None = None
    tokens: str = DEFAULT_TOKENS
    routing: str = Spread.UNIFORM.value
    contenders: Sequence[str] = ()
    seconds: float = DEFAULT_SECONDS
    minutes: float | None = None
    out: Path | None = None
    png: Path | None = None
    as_json: bool = False


def bench_gpu(options: GpuOptions, open_device: Callable[[], Device] = CudaDevice) -> int:
    """Measure, tell, and return the exit status: 1 where a result is wrong or the device is lost.

    Raises:
        InputError: there is no such device, or a file cannot be written.
        ConfigError: a name is unknown.
    """
    cases = find_cases(list(options.shapes), options.weights, options.tokens)
    spread = Spread.parse(options.routing)
    formats = list(dict.fromkeys(case.weights for case in cases))
    asked = parse_activation_dtype(options.activation_dtype, formats)
    named = find_contenders(list(options.contenders))
    device = open_device()
    cases = [on_device(case, device, asked) for case in cases]
    turns = [Turn(case, named or find_contenders(default_on_gpu(case))) for case in cases]
    if options.png is not None:
        require_matplotlib()
        check_writable(options.png)
    place = find_place(device)
    journal = Journal(options.out, place)
    dtypes = dict.fromkeys(product_dtype(case) for case in cases)
    bench = Bench(
        device=device,
        place=place,
        peak={dtype: find_peak(device, dtype) for dtype in dtypes},
        spread=spread,
        seconds=options.seconds,
    )
    _say(place_summary(place, probe_bandwidth(device), bench.peak))
    is_lost = False
    try:
        for number, results in enumerate(run_cases(turns, bench, journal, options), 1):
            if options.as_json:
                print(*(result.to_json() for result in results), sep="\n", flush=True)
            if results:
                _say(f"{number}/{len(cases)}  {case_line(results)}")
    except DeviceLost as lost:
        is_lost = True
        _say(f"the device was lost: {lost}. What is known is kept; run the command again to go on.")
    finally:
        found = asked_results(turns, spread, journal)
        show(found, options)
    is_wrong = any(result.is_correct is False for result in found)
    return 1 if is_lost or is_wrong else 0


@dataclass(frozen=True)
class Turn:
    """A case, and who runs it."""

    case: Case
    contenders: Sequence[Contender]


def on_device(case: Case, device: Device, asked: ActivationDtype | None) -> Case:
    """A case on a device, with the arithmetic that it has there."""
    arithmetic = activation_dtype_of(case.weights, asked, device.facts().capability)
    return dataclasses.replace(case, device=device.type, activation_dtype=arithmetic)


def find_place(device: Device) -> Place:
    """Where this run measures."""
    return Place(
        device=dataclasses.asdict(device.facts()),
        versions=find_versions(),
        sources=find_sources(),
        commit=find_commit(),
        tuned=find_tuned(device.type),
    )


def run_cases(
    turns: Sequence[Turn], bench: Bench, journal: Journal, options: GpuOptions
) -> Iterator[list[LayerResult]]:
    """Run what the journal lacks, case by case; yields the new results of each.

    No case is begun that would not end in time, judged by the longest one before it.

    Raises:
        DeviceLost: nothing runs on the device any more.
    """
    begun, longest = time.monotonic(), 0.0
    for number, turn in enumerate(turns):
        case = turn.case
        missing = [c for c in turn.contenders if not journal.has(keys_of(case, c, bench.spread))]
        start = time.monotonic()
        limit = None if options.minutes is None else begun + 60 * options.minutes
        if missing and limit is not None and start + longest > limit:
            _say(f"stopped by the time limit: {number} of {len(turns)} cases are done.")
            return
        results: list[LayerResult] = []
        try:
            results = run_case(case, missing, bench) if missing else []
        except DeviceLost as lost:
            results = lost.results
            raise
        finally:
            journal.add(results)
        longest = max(longest, time.monotonic() - start)
        yield results


def keys_of(case: Case, contender: Contender, spread: Spread) -> list[Key]:
    """What a contender's results on a case are known by."""
    operands = (case.weights.value, NAMES[product_dtype(case)])
    about = (case.shape.name, str(case.num_tokens), *operands, spread.value)
    return [(*about, contender.name, m.value, mode.value) for m in Measure for mode in Mode]


def asked_results(turns: Sequence[Turn], spread: Spread, journal: Journal) -> list[LayerResult]:
    """Those in the journal that this run asks for, in its order."""
    there = {result.key: result for result in journal.results}
    keys = [key for turn in turns for c in turn.contenders for key in keys_of(turn.case, c, spread)]
    return [there[key] for key in keys if key in there]


def show(results: Sequence[LayerResult], options: GpuOptions) -> None:
    """The table, what must be known about it and, where it was asked for, the chart."""
    if not results:
        return
    stream = sys.stderr if options.as_json else sys.stdout
    print(results_table(results), notes(results), sep="\n\n", file=stream)
    if options.png is not None:
        lines = chart_lines(results)
        if lines:
            draw_lines(lines, options.png, TITLE)
        else:
            _say("no chart: nothing ran in a graph and was right.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
