"""Tuning of blocks: which are tried, which win, what is kept, and what a launch makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import random_weights
from gpu_device import DEVICE
from tuning_fakes import (
    CASE,
    GPU,
    QUANTIZATIONS,
    SHAPE,
    FakeMeasure,
    fragile,
    timed,
    unusable,
)

from mixtura.config import ExpertsConfig, GateUp, WeightOn
from mixtura.env import cache_directory
from mixtura.errors import InputError
from mixtura.kernels.triton import child, experts, measuring, tuned
from mixtura.kernels.triton.candidates import (
    MAX_CHANGES,
    Case,
    LayerShape,
    candidates,
    cases_of,
)
from mixtura.kernels.triton.child import ChildMeasuring
from mixtura.kernels.triton.device import HOPPER, Device, device_of
from mixtura.kernels.triton.journal import Journal, journal_path
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.measuring import TOLERANCE, Measuring, Turn, count_wrong, make_weights
from mixtura.kernels.triton.packed.experts import pack_experts, quantization_of
from mixtura.kernels.triton.packed.made_up import random_experts
from mixtura.kernels.triton.regimes import LARGE_TILING, SMALL_TILES
from mixtura.kernels.triton.table import (
    DIRECT_TILE,
    MIN_COLUMNS,
    MIN_DEPTH,
    Blocks,
    Key,
    Product,
    blocks_for,
    shared_bytes,
    shipped_blocks,
)
from mixtura.kernels.triton.trials import Failed, MeasuringLost, Timed, Trial
from mixtura.kernels.triton.tune import MARGIN, Outcome, Sweep, Verdict, updated, wins
from mixtura.kernels.triton.tuned import (
    TunedFile,
    TunedFileWarning,
    forget_tuned,
    kernels_digest,
    read_tuned,
    tuned_for,
    tuned_path,
    write_tuned,
)
from mixtura.quant.activations import StaticInputs
from mixtura.quant.quantize import quantize
from mixtura.types import ExpertBatch

TILES = (DIRECT_TILE, *SMALL_TILES, LARGE_TILING.rows)
KIB = 1024
DEVICES = {
    "turing-64": Device("T4", (7, 5), 40, 64 * KIB),
    "ada-99": Device("L40S", (8, 9), 142, 99 * KIB),
    "ampere-163": Device("A100", (8, 0), 108, 163 * KIB),
    "consumer-blackwell": Device("RTX 5090", (12, 0), 170, 99 * KIB),
    "hopper-64": Device("cut Hopper", (9, 0), 16, 64 * KIB),
    "hopper": HOPPER,
    "blackwell": Device("B200", (10, 0), 148, 227 * KIB),
    "other-maker": Device("MI300X", None, 304, 64 * KIB),
}
SHAPES = {
    "qwen3": LayerShape(
        ExpertsConfig(num_experts=128, hidden_size=2048, intermediate_size=768), torch.bfloat16, 8
    ),
    "gpt-oss": LayerShape(
        ExpertsConfig(
            num_experts=128,
            hidden_size=2880,
            intermediate_size=2880,
            gate_up=GateUp.INTERLEAVED,
            is_transposed=True,
        ),
        torch.bfloat16,
        4,
    ),
    "slim": LayerShape(
        ExpertsConfig(num_experts=512, hidden_size=2048, intermediate_size=192), torch.float16, 10
    ),
    "mixtral": LayerShape(
        ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=14336), torch.bfloat16, 2
    ),
}
QUANTIZED = {
    "int4": replace(SHAPES["qwen3"], quantization=QUANTIZATIONS["int4"]),
    "mxfp4": replace(SHAPES["gpt-oss"], quantization=QUANTIZATIONS["mxfp4"]),
    "fp8-block": replace(SHAPES["qwen3"], quantization=QUANTIZATIONS["fp8-block"]),
    "int8": replace(SHAPES["slim"], quantization=QUANTIZATIONS["int8"]),
}
DENSE_KEYS, PACKED_KEYS = (
    [shape.key(kind, tile) for shape, kind, tile in product(shapes.values(), Product, TILES)]
    for shapes in (SHAPES, QUANTIZED)
)
KEYS = DENSE_KEYS + PACKED_KEYS
MIN_PACKED = 99 * KIB
"""Shared memory of the GPUs since Ampere that have the least."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_tuned()
    yield
    forget_tuned()
    kernels_digest.cache_clear()


# -------------------------------------------------------------------------------------- the table


def keys_of(device: Device) -> list[Key]:
    """Those that must fit: tiles of quantized experts have a depth of their own, and need more."""
    return KEYS if device.shared_bytes >= MIN_PACKED else DENSE_KEYS


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_shipped_entry_fits_every_device(device: Device) -> None:
    for key in keys_of(device):
        blocks = blocks_for(key, device)
        assert shared_bytes(blocks, key, device) <= device.shared_bytes, (key, blocks)
        assert blocks.num_stages >= (2 if key.packing is None else 1)
        assert blocks.depth >= MIN_DEPTH
        assert blocks.columns >= (8 if key.tile_rows == DIRECT_TILE else MIN_COLUMNS)
        assert device.has_descriptors or not blocks.uses_descriptors


def test_tuned_blocks_come_before_the_table_and_are_made_to_fit() -> None:
    key = SHAPES["qwen3"].key(Product.DOWN, 128)
    small = Blocks(64, 64, 4, 2)
    assert blocks_for(key, HOPPER, small) == small
    assert blocks_for(key, HOPPER) == shipped_blocks(key, HOPPER) != small
    huge = Blocks(256, 128, 8, 4, uses_descriptors=True)
    found = blocks_for(key, DEVICES["turing-64"], huge)
    assert shared_bytes(found, key, DEVICES["turing-64"]) <= 64 * KIB and not found.uses_descriptors


# --------------------------------------------------------------------------------------- the file


def entry() -> dict[Key, Blocks]:
    return {CASE.key: Blocks(32, 32, 4, 3)}


def written(change: Callable[[dict[str, Any]], Any] = lambda data: None) -> Path:
    """The file of the test GPU, with a change to what it says."""
    path = tuned_path(GPU)
    write_tuned(path, GPU, entry())
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == tmp_path / "mixtura"
    assert tuned_path(GPU) == tmp_path / "mixtura" / "tuned" / "nvidia-test-gpu.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_directory() == Path.home() / ".cache" / "mixtura"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "mixtura"


def test_a_file_is_read_as_it_was_written() -> None:
    entries = {key: Blocks(64, 64, 4, 3, is_persistent=key.packing is None) for key in KEYS}
    write_tuned(tuned_path(GPU), GPU, entries)
    found = read_tuned(tuned_path(GPU), GPU)
    assert found.entries == entries and found.problem is None
    assert str(found) == f"{len(KEYS)} entries in {tuned_path(GPU)}"


def test_no_file_is_no_problem() -> None:
    assert not tuned_for(GPU)
    assert str(read_tuned(tuned_path(GPU), GPU)) == "none"


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda data: data.update(format="x"), "no file of the format mixtura.tuned"),
    "version": (lambda data: data.update(version=0), "is of version 0, and this mixtura reads"),
    "device": (
        lambda data: data["device"].update(name="NVIDIA Other", num_processors=1),
        "another GPU, NVIDIA Other",
    ),
    "limits": (lambda data: data["device"].update(shared_bytes=1), "with other limits"),
    "triton": (lambda data: data.update(triton="0.0"), "made with Triton 0.0, and"),
    "kernels": (lambda data: data.update(kernels="0"), "was measured with other kernels"),
    "no entries": (lambda data: data.pop("entries"), "is broken (KeyError"),
    "a list": (lambda data: data.update(device=[]), "is broken (TypeError"),
    "no power": (lambda data: data["entries"][0]["blocks"].update(columns=48), "48 is no power"),
    "stages": (lambda data: data["entries"][0]["blocks"].update(num_stages=99), "99 is no number"),
    "negative": (lambda data: data["entries"][0]["blocks"].update(depth=-64), "-64 is no number"),
    "text": (lambda data: data["entries"][0]["blocks"].update(num_warps="4"), "'4' is no number"),
    "flag": (lambda data: data["entries"][0]["blocks"].update(is_persistent=1), "is_persistent"),
    "no descriptors": (
        lambda data: data["entries"][0]["blocks"].update(uses_descriptors=0),
        "uses_descriptors",
    ),
    "zero": (lambda data: data["entries"][0]["blocks"].update(num_stages=0), "0 is no number"),
    "truth": (lambda data: data["entries"][0]["blocks"].update(num_warps=True), "True is no"),
    "shallow": (lambda data: data["entries"][0]["blocks"].update(depth=16), "16 is no number"),
    "thin": (lambda data: data["entries"][0]["blocks"].update(columns=8), "8 is no number"),
    "a fraction": (lambda data: data["entries"][0]["blocks"].update(columns=64.0), "64.0 is no"),
    "tile": (lambda data: data["entries"][0]["key"].update(tile_rows=True), "True is no number"),
    "field": (lambda data: data["entries"][0]["blocks"].update(extra=1), "is broken (TypeError"),
    "product": (lambda data: data["entries"][0]["key"].update(product="side"), "is broken"),
    "dtype": (lambda data: data["entries"][0]["key"].update(dtype="int4"), "is broken"),
}


@pytest.mark.parametrize("change, problem", BROKEN.values(), ids=BROKEN)
def test_a_file_that_does_not_hold_is_left_alone(
    change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    found = read_tuned(written(change), GPU)
    assert not found.entries
    assert found.problem is not None and problem in found.problem


BROKEN_PACKINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field": lambda data: data["entries"][0]["key"]["packing"].update(extra=1),
    "none": lambda data: data["entries"][0]["key"].pop("packing"),
    "no name": lambda data: data["entries"][0]["key"]["packing"].update(name=""),
    "depth": lambda data: data["entries"][0]["key"]["packing"].update(depth=100),
    "bits": lambda data: data["entries"][0]["key"]["packing"].update(bits=3),
    "bytes": lambda data: data["entries"][0]["key"]["packing"].update(operand_bytes=4),
    "words": lambda data: data["entries"][0]["key"]["packing"].update(scale_words=-1),
    "columns": lambda data: data["entries"][0]["key"]["packing"].update(columns=8),
    "thin": lambda data: data["entries"][0]["blocks"].update(columns=8),
    "descriptors": lambda data: data["entries"][0]["blocks"].update(uses_descriptors=True),
    "persistent": lambda data: data["entries"][0]["blocks"].update(is_persistent=True),
}


@pytest.mark.parametrize("change", BROKEN_PACKINGS.values(), ids=BROKEN_PACKINGS)
def test_an_entry_of_quantized_experts_is_checked(change: Callable[[dict[str, Any]], Any]) -> None:
    key = QUANTIZED["int4"].key(Product.DOWN, DIRECT_TILE)
    path = tuned_path(GPU)
    write_tuned(path, GPU, {key: Blocks(64, 128, 4, 3)})
    assert len(read_tuned(path, GPU).entries) == 1
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert "is broken (" in str(read_tuned(path, GPU).problem)


@pytest.mark.parametrize("tail_rows", ["x", -5, 8, 48, 128, 1000, True, False, None, 0.0, 16.0])
def test_tails_are_a_power_of_two_below_the_tile(tail_rows: Any) -> None:
    assert not tails_read(128, tail_rows).entries
    assert "is broken (ValueError: " in str(tails_read(128, tail_rows).problem)


@pytest.mark.parametrize(
    "tile_rows, good, bad", [(1, [0], 16), (16, [0], 16), (32, [0, 16], 32), (128, [0, 16, 64], 96)]
)
def test_tails_are_rows_of_their_tile(tile_rows: int, good: list[int], bad: int) -> None:
    for tail_rows in good:
        (blocks,) = tails_read(tile_rows, tail_rows).entries.values()
        assert blocks.tail_rows == tail_rows
    assert not tails_read(tile_rows, bad).entries


def tails_read(tile_rows: int, tail_rows: Any) -> TunedFile:
    """A file with an entry of these tails."""
    path, key = tuned_path(GPU), SHAPE.key(Product.GATE_UP, tile_rows)
    write_tuned(path, GPU, {key: Blocks(32, 32, 4, 3, tail_rows=tail_rows)})
    return read_tuned(path, GPU)


def test_unsorted_slots_may_have_few_columns() -> None:
    entries = {SHAPE.key(Product.DOWN, DIRECT_TILE): Blocks(8, 32, 1, 1)}
    write_tuned(tuned_path(GPU), GPU, entries)
    assert read_tuned(tuned_path(GPU), GPU).entries == entries


def test_other_kernels_are_told_once_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written()
    change_kernels(tmp_path, monkeypatch)
    with pytest.warns(TunedFileWarning, match="measured with other kernels") as caught:
        assert not tuned_for(GPU)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert "Run 'mixtura tune' again" in str(caught[0].message)
    assert not tuned_for(GPU)


def change_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kernel had been written differently."""
    for name in tuned.KERNELS:
        text = (tuned.KERNELS_DIRECTORY / name).read_text()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "# changed\n" * (name == tuned.KERNELS[-1]))
    monkeypatch.setattr(tuned, "KERNELS_DIRECTORY", tmp_path)
    kernels_digest.cache_clear()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"', "\xff\xfe", "[" * 100_000])
def test_a_file_of_anything_is_left_alone(text: str) -> None:
    path = tuned_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    assert not read_tuned(path, GPU).entries and read_tuned(path, GPU).problem is not None
    path.unlink()
    path.mkdir()
    assert "cannot be read" in str(read_tuned(path, GPU).problem)


def test_a_problem_is_told_once_and_with_its_file() -> None:
    path = written(lambda data: data.update(triton="0.0"))
    with pytest.warns(TunedFileWarning, match="Triton 0.0") as caught:
        assert not tuned_for(GPU)
    assert str(path) in str(caught[0].message)
    assert not tuned_for(GPU)  # where a warning is an error, it would be raised here


def test_a_warning_that_is_an_error_is_raised_once() -> None:
    written(lambda data: data.update(version=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TunedFileWarning):
            tuned_for(GPU)
        assert not tuned_for(GPU)


def test_a_file_is_read_once_in_a_process() -> None:
    path = written()
    assert tuned_for(GPU) == entry()
    path.unlink()
    assert tuned_for(GPU) == entry()
    forget_tuned()
    assert not tuned_for(GPU)


def test_a_file_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    path = written()

    def torn(data: Any, file: Any, **options: Any) -> None:
        file.write("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", torn)
    with pytest.raises(KeyboardInterrupt):
        write_tuned(path, GPU, {})
    assert read_tuned(path, GPU).entries == entry()
    assert list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------------------------- what is tried


def test_cases_are_the_products_by_tile_at_the_fewest_and_the_most_rows() -> None:
    found = cases_of([SHAPES["qwen3"]])
    assert [(case.product.value, case.tile_rows, case.rows) for case in found[::2]] == [
        ("gate_up", 1, (1, 8)),
        ("gate_up", 16, (16, 128)),
        ("gate_up", 32, (256,)),
        ("gate_up", 64, (512, 1024)),
        ("gate_up", 128, (2048, 8192)),
    ]
    assert [case.product for case in found] == list(Product) * 5


def test_every_number_of_rows_of_a_case_makes_its_tile() -> None:
    for shape in SHAPES.values():
        for case in cases_of([shape]):
            assert {shape.tile_rows(number) for number in case.rows} == {case.tile_rows}


def test_layers_that_are_alike_for_kernels_are_measured_once() -> None:
    biased = replace(SHAPE, config=replace(SHAPE.config, has_bias=True))
    wider = replace(SHAPE, config=replace(SHAPE.config, intermediate_size=64))
    assert cases_of([SHAPE, biased]) == cases_of([SHAPE])
    assert len(cases_of([SHAPE, wider])) == 2 * len(cases_of([SHAPE]))


def test_rows_can_be_asked_for() -> None:
    found = cases_of([SHAPES["qwen3"]], [64, 1, 100, 64])
    assert [(case.tile_rows, case.rows) for case in found[::2]] == [(1, (1,)), (16, (64, 100))]
    with pytest.raises(InputError, match=r"rows \(0\) must be from 1"):
        cases_of([SHAPE], [0])


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_candidates_fit_and_differ(device: Device) -> None:
    for key in keys_of(device):
        shipped, found = blocks_for(key, device), candidates(key, device)
        has_columns = key.packing is not None and key.packing.columns > 0
        least = 3 if has_columns else 5
        assert shipped not in found and len(set(found)) == len(found) >= least, key
        changes = [sum(a != b for a, b in zip(fields(one), fields(shipped), strict=True))
                   for one in found]  # fmt: skip
        assert changes == sorted(changes) and max(changes) <= MAX_CHANGES
        for blocks in found:
            assert shared_bytes(blocks, key, device) <= device.shared_bytes
            assert blocks_for(key, device, blocks) == blocks  # what is measured is what will run
            assert device.has_descriptors or not blocks.uses_descriptors


def fields(blocks: Blocks) -> tuple[Any, ...]:
    return (
        blocks.columns, blocks.depth, blocks.num_warps, blocks.num_stages,
        blocks.uses_descriptors, blocks.is_persistent,
        blocks.tail_rows,
    )  # fmt: skip


def test_candidates_keep_to_what_a_packing_gives() -> None:
    for key in PACKED_KEYS:
        packing = key.packing
        assert packing is not None
        for blocks in candidates(key, HOPPER):
            assert blocks.depth == packing.depth
            assert blocks.columns == (packing.columns or blocks.columns) >= MIN_COLUMNS
            assert not blocks.uses_descriptors and not blocks.is_persistent
    rounding = [key for key in PACKED_KEYS if key.packing and key.packing.columns]
    assert {key.product for key in rounding} == {Product.GATE_UP}


def test_schemes_that_differ_are_cases_of_their_own() -> None:
    shapes = [SHAPES["qwen3"], QUANTIZED["int4"], QUANTIZED["fp8-block"]]
    assert len(cases_of(shapes)) == 3 * len(cases_of(shapes[:1]))
    assert cases_of([*shapes, shapes[1]]) == cases_of(shapes)


def test_warp_groups_of_small_tiles_have_rows_of_weights() -> None:
    found = candidates(SHAPES["qwen3"].key(Product.DOWN, 16), HOPPER)
    assert {blocks.num_warps for blocks in found if blocks.columns == 64} == {4}
    assert {blocks.num_warps for blocks in found if blocks.columns == 128} == {4, 8}
    assert min(blocks.columns for blocks in found) == 64


# -------------------------------------------------------------------------------------- the sweep


def journal(is_fresh: bool = False) -> Journal:
    return Journal(journal_path(GPU), GPU, is_fresh=is_fresh)


def sweep(measure: Any, **options: Any) -> list[Outcome]:
    """The outcomes of one case on the test GPU."""
    given: dict[str, Any] = {
        "known": {},
        "is_over": lambda: False,
        "tell": lambda case, blocks, trial: None,
        **options,
    }
    book = given.pop("journal", None) or journal()
    cases = given.pop("cases", [CASE])
    try:
        return list(Sweep(device=GPU, measure=measure, journal=book, **given).run(cases))
    finally:
        book.close()


TRIED = candidates(CASE.key, GPU)
FAST, SECOND = TRIED[2], TRIED[5]


def by_blocks(answers: dict[Blocks, Trial]) -> Callable[[Blocks], Trial]:
    return lambda blocks: answers.get(blocks, timed(1.1))


def test_a_winner_that_wins_again_is_kept() -> None:
    measure = FakeMeasure(by_blocks({FAST: timed(0.8), SECOND: timed(0.9)}))
    (outcome,) = sweep(measure)
    assert (outcome.verdict, outcome.blocks) == (Verdict.KEPT, FAST)
    assert outcome.num_measured == outcome.num_candidates == len(TRIED)
    assert [one[1] for one in measure.asked if one[2]] == [FAST]
    assert updated({}, outcome) == {CASE.key: FAST}


def test_winning_needs_a_margin_and_no_loss_anywhere() -> None:
    assert wins(timed(1 - MARGIN)) and not wins(timed(1 - MARGIN + 0.001))
    assert wins(timed(0.8, 1.01)) and not wins(timed(0.5, 1.02))
    (outcome,) = sweep(FakeMeasure(by_blocks({FAST: timed(0.98), SECOND: timed(0.4, 1.2)})))
    assert outcome.verdict is Verdict.STAYS
    assert outcome.blocks == SECOND  # the best there was is shown
    assert updated({}, outcome) == {}


def test_a_winner_that_does_not_win_again_gives_way() -> None:
    first = by_blocks({FAST: timed(0.7), SECOND: timed(0.9)})
    measure = FakeMeasure(first, by_blocks({FAST: timed(0.99), SECOND: timed(0.92)}))
    (outcome,) = sweep(measure)
    assert (outcome.verdict, outcome.blocks) == (Verdict.KEPT, SECOND)
    assert outcome.timed == timed(0.92)
    (outcome,) = sweep(FakeMeasure(first, lambda blocks: timed(1.0)), journal=journal(True))
    assert outcome.verdict is Verdict.STAYS


def test_failures_are_passed_over_and_told() -> None:
    wrong, large = Failed("gives 3 wrong values of 64"), Failed("OutOfResources: shared memory")
    answers = {TRIED[0]: wrong, TRIED[1]: large, FAST: timed(0.5)}
    told: list[Trial] = []
    (outcome,) = sweep(
        FakeMeasure(by_blocks(answers)), tell=lambda case, blocks, trial: told.append(trial)
    )
    assert (outcome.verdict, outcome.blocks) == (Verdict.KEPT, FAST)
    assert outcome.failures == ((TRIED[0], wrong.reason), (TRIED[1], large.reason))
    assert told[:2] == [wrong, large] and len(told) == len(TRIED) + 1


def test_a_winner_that_fails_the_last_look_is_not_kept() -> None:
    measure = FakeMeasure(by_blocks({FAST: timed(0.5)}), lambda blocks: Failed("gone"))
    assert sweep(measure)[0].verdict is Verdict.STAYS


def test_a_case_ends_where_the_table_itself_cannot_run() -> None:
    measure = FakeMeasure(lambda blocks: Failed("out of memory", ends_case=True))
    other = replace(CASE, product=Product.GATE_UP)
    outcomes = sweep(measure, cases=[CASE, other])
    assert [outcome.verdict for outcome in outcomes] == [Verdict.FAILED] * 2
    assert outcomes[0].note == "out of memory" and len(measure.asked) == 2
    assert len(journal()) == 0  # there may be memory next time


def test_time_that_is_up_ends_the_sweep_and_keeps_what_won() -> None:
    measure = FakeMeasure(by_blocks({FAST: timed(0.8)}))
    num_allowed = 4
    options = {"is_over": lambda: len(measure.asked) >= num_allowed}
    other = replace(CASE, product=Product.GATE_UP)
    first, second = sweep(measure, cases=[CASE, other], **options)
    assert (first.verdict, first.blocks) == (Verdict.KEPT, FAST)  # the last look is taken
    assert first.num_measured == num_allowed < first.num_candidates
    assert (second.verdict, second.num_measured) == (Verdict.NOT_REACHED, 0)
    entries = {CASE.key: FAST, other.key: SECOND}
    assert updated(entries, second) == entries


def test_a_case_that_is_not_whole_takes_no_entry_away() -> None:
    measure = FakeMeasure(lambda blocks: timed(1.0))
    (outcome,) = sweep(measure, is_over=lambda: len(measure.asked) >= 2)
    assert (outcome.verdict, outcome.num_measured) == (Verdict.PARTLY, 2)
    assert updated(entry(), outcome) == entry()


def test_an_earlier_entry_is_tried_first_and_goes_when_it_does_not_win() -> None:
    known = {CASE.key: Blocks(16, 32, 8, 2)}
    measure = FakeMeasure(lambda blocks: timed(1.0))
    (outcome,) = sweep(measure, known=known)
    assert measure.asked[0][1] == known[CASE.key]
    assert outcome.verdict is Verdict.STAYS and updated(known, outcome) == {}


MORE_SLOTS = replace(CASE, shape=replace(SHAPE, top_k=4))
"""A case whose entry is CASE's, too."""
OTHER_ROWS = replace(CASE, rows=(8,))


def by_case(answers: dict[Case, dict[Blocks, Trial]]) -> Callable[..., Trial]:
    return lambda case, blocks, is_final: answers.get(case, {}).get(blocks, timed(1.1))


def entries_after(outcomes: list[Outcome], entries: dict[Key, Blocks]) -> dict[Key, Blocks]:
    for outcome in outcomes:
        entries = updated(entries, outcome)
    return entries


@pytest.mark.parametrize("other", [MORE_SLOTS, OTHER_ROWS])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_won_once_and_loses_nowhere_stays(other: Case, is_first: bool) -> None:
    answers: dict[Case, dict[Blocks, Trial]] = {CASE: {FAST: timed(0.8)}, other: {FAST: timed(1)}}
    cases = [CASE, other] if is_first else [other, CASE]
    found = sweep(by_case(answers), cases=cases)
    assert entries_after(found, {}) == {CASE.key: FAST}
    again = sweep(by_case(answers), cases=cases, known={CASE.key: FAST})
    assert entries_after(again, {CASE.key: FAST}) == {CASE.key: FAST}


@pytest.mark.parametrize("lost", [timed(1.0, 1.02), Failed("no")])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_loses_anywhere_is_not_kept(lost: Trial, is_first: bool) -> None:
    answers = {CASE: {FAST: timed(0.5), SECOND: timed(0.9)}, MORE_SLOTS: {FAST: lost}}
    cases = [CASE, MORE_SLOTS] if is_first else [MORE_SLOTS, CASE]
    assert entries_after(sweep(by_case(answers), cases=cases), {}) == {}
    answers[MORE_SLOTS][SECOND] = timed(1.0)
    found = sweep(by_case(answers), cases=cases, journal=journal(is_fresh=True))
    found += sweep(by_case(answers), cases=cases)  # the first case learns what lost in the second
    assert entries_after(found, {}) == {CASE.key: SECOND}


def test_what_loses_a_last_look_anywhere_is_not_kept() -> None:
    def measure(case: Case, blocks: Blocks, is_final: bool) -> Trial:
        return timed(1.2) if is_final and case == CASE else by_blocks({FAST: timed(0.8)})(blocks)

    assert entries_after(sweep(measure, cases=[CASE, MORE_SLOTS]), {}) == {}


def test_of_two_that_lose_nowhere_the_faster_on_the_whole_is_kept() -> None:
    answers: dict[Case, dict[Blocks, Trial]] = {
        CASE: {FAST: timed(0.9), SECOND: timed(0.8)},
        MORE_SLOTS: {FAST: timed(0.6), SECOND: timed(0.9)},
    }
    for cases in ([CASE, MORE_SLOTS], [MORE_SLOTS, CASE]):
        found = sweep(by_case(answers), cases=cases, journal=journal(is_fresh=True))
        assert entries_after(found, {}) == {CASE.key: FAST}


def test_a_lost_gpu_ends_the_sweep_and_keeps_what_was_found() -> None:
    other = replace(CASE, product=Product.GATE_UP)
    answers = FakeMeasure(by_blocks({FAST: timed(0.5)}))

    def measure(case: Case, blocks: Blocks, is_final: bool) -> Trial:
        if case.product is Product.GATE_UP:
            raise MeasuringLost("the GPU has fallen off the bus")
        return answers(case, blocks, is_final)

    found = sweep(measure, cases=[CASE, other, replace(other, rows=(4,))])
    verdicts = [outcome.verdict for outcome in found]
    assert verdicts == [Verdict.KEPT, Verdict.FAILED, Verdict.NOT_REACHED]
    assert found[2].note == "the GPU has fallen off the bus"


# ------------------------------------------------------------------------------------ the journal


def test_an_interrupted_sweep_goes_on_where_it_was() -> None:
    answers = by_blocks({FAST: timed(0.8), TRIED[0]: Failed("no")})
    measure = FakeMeasure(answers)

    def interrupted(case: Case, blocks: Blocks, is_final: bool) -> Trial:
        if len(measure.asked) == 4:
            raise KeyboardInterrupt
        return measure(case, blocks, is_final)

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted)
    rest = FakeMeasure(answers)
    (outcome,) = sweep(rest)
    assert [one[1] for one in rest.asked] == [*TRIED[4:], FAST]
    assert (outcome.verdict, outcome.blocks) == (Verdict.KEPT, FAST)
    assert outcome.failures == ((TRIED[0], "no"),)
    nothing = FakeMeasure(answers)
    assert sweep(nothing)[0].verdict is Verdict.KEPT and not nothing.asked
    anew = FakeMeasure(answers)
    sweep(anew, journal=journal(is_fresh=True))
    assert len(anew.asked) == len(TRIED) + 1


def test_times_survive_the_journal() -> None:
    book = journal()
    book.add(CASE, FAST, False, Timed((1.23456e-4, 2e-6), (1e-4, 3e-6)))
    book.close()
    assert journal().find(CASE, FAST, False) == Timed((1.23456e-4, 2e-6), (1e-4, 3e-6))
    assert journal().find(CASE, FAST, True) is None


@pytest.mark.parametrize("torn", ['{"what": {"dev', "[1]", "\xff", '{"what": 1, "failed": 1'])
def test_a_torn_line_is_measured_again(torn: str) -> None:
    book = journal()
    book.add(CASE, FAST, False, timed(0.8))
    book.close()
    path = journal_path(GPU)
    with path.open("ab") as file:
        file.write(torn.encode("latin-1"))
    book = journal()
    assert len(book) == 1
    book.add(CASE, SECOND, False, timed(0.9))
    book.close()
    assert len(journal()) == 2  # the next line did not stick to the torn one


@pytest.mark.parametrize("times", [[], [0.0, 1.0], [1.0], [float("nan"), 1.0], ["x", 1.0]])
def test_times_that_are_none_are_measured_again(times: list[Any]) -> None:
    book = journal()
    book.add(CASE, FAST, False, timed(0.8))
    book.close()
    path = journal_path(GPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), "tried_us": times}) + "\n")
    assert len(journal()) == 0


def test_another_gpu_triton_or_size_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    book = journal()
    book.add(CASE, FAST, False, timed(0.8))
    book.close()
    path = journal_path(GPU)
    assert Journal(path, replace(GPU, num_processors=1)).find(CASE, FAST, False) is None
    wider = replace(SHAPE, config=replace(SHAPE.config, hidden_size=512))
    for case in (replace(CASE, shape=wider), replace(CASE, rows=(4,))):
        assert journal().find(case, FAST, False) is None
    monkeypatch.setattr("mixtura.kernels.triton.journal.triton_version", lambda: "0.0")
    assert journal().find(CASE, FAST, False) is None


def test_other_kernels_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = journal()
    book.add(CASE, FAST, False, timed(0.8))
    book.close()
    assert journal().find(CASE, FAST, False) is not None
    change_kernels(tmp_path, monkeypatch)
    assert journal().find(CASE, FAST, False) is None


def test_a_journal_that_cannot_be_written_is_an_error() -> None:
    journal_path(GPU).mkdir(parents=True)
    with pytest.raises(OSError):
        journal()


# ---------------------------------------------------------------------------------- the processes


def test_a_process_that_is_lost_is_started_anew(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "MAX_LOST", 2)
    measure = ChildMeasuring(fragile, patience=60)
    try:
        assert measure(CASE, Blocks(16, 32, 4, 4), False) == timed(0.5)
        died = measure(CASE, Blocks(16, 32, 4, 1), False)
        assert isinstance(died, Failed) and died.reason == "its process ended with code 7"
        with pytest.raises(MeasuringLost, match=r"2 measuring .* the last: illegal address"):
            measure(CASE, Blocks(16, 32, 4, 3), False)
    finally:
        measure.close()
    assert "a compiler's remark" not in capfd.readouterr().out  # which may be JSON


def test_a_candidate_that_takes_too_long_is_given_up() -> None:
    measure = ChildMeasuring(fragile, patience=0.01)
    try:
        slow = measure(CASE, Blocks(16, 32, 4, 2), False)
        assert isinstance(slow, Failed) and slow.reason == "took longer than 0.01 s"
    finally:
        measure.close()


def test_a_process_that_cannot_start_measuring_says_why() -> None:
    ours, theirs = Pipe()
    ours.send((CASE, FAST, False))
    child.serve(theirs, unusable)
    assert ours.recv() == Failed("RuntimeError: no driver", has_broken_device=True)
    ours.close()
    child.serve(theirs, unusable)  # and ends with the other side


# ------------------------------------------------------------------------------------ the kernels


def one_launch(contenders: Any, is_final: bool) -> list[float]:
    """A clock that keeps what it was given, and runs nothing."""
    CLOCKED.append([launches[0].constants for launches in contenders])
    return [2e-5, 1e-5]


CLOCKED: list[list[dict[str, Any]]] = []
TINY = LayerShape(
    ExpertsConfig(num_experts=4, hidden_size=64, intermediate_size=32), torch.bfloat16, 2
)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    """Real launches, and times made up."""
    CLOCKED.clear()
    monkeypatch.setattr(measuring, "MIN_TURNS", 2)
    return Measuring(DEVICE, one_launch)


@pytest.mark.parametrize("kind", Product)
@pytest.mark.parametrize("tile_rows, rows", [(1, 1), (16, 4)])
def test_a_candidate_is_launched_and_its_result_compared(
    measure: Measuring, kind: Product, tile_rows: int, rows: int
) -> None:
    case = Case(TINY, kind, tile_rows, (rows,))
    for blocks in (Blocks(16, 32, 4, 2), Blocks(32, 64, 4, 2)):
        assert measure(case, blocks, False) == Timed((2e-5,), (1e-5,))
        shipped, tried = CLOCKED[-1]
        assert (tried["BLOCK_N"], tried["BLOCK_K"]) == (blocks.columns, blocks.depth)
        table = blocks_for(case.key, device_of(torch.device(DEVICE)))
        assert (shipped["BLOCK_N"], shipped["BLOCK_K"]) == (table.columns, table.depth)


MEASURED = [
    *((name, kind, 16, 4) for name in QUANTIZATIONS for kind in Product),
    *((name, kind, 1, 1) for name in ("int4", "fp8-block") for kind in Product),
]


@pytest.mark.parametrize("name, kind, tile_rows, rows", MEASURED)
def test_a_candidate_of_quantized_experts_is_measured(
    measure: Measuring, name: str, kind: Product, tile_rows: int, rows: int
) -> None:
    shape = replace(TINY, quantization=QUANTIZATIONS[name])
    case = Case(shape, kind, tile_rows, (rows,))
    packing = case.key.packing
    assert packing is not None
    blocks = Blocks(packing.columns or 32, packing.depth, 4, 2)
    assert measure(case, blocks, False) == Timed((2e-5,), (1e-5,))
    shipped, tried = CLOCKED[-1]
    table = blocks_for(case.key, device_of(torch.device(DEVICE)))
    assert (tried["BLOCK_N"], tried["num_stages"]) == (blocks.columns, 2)
    assert (shipped["BLOCK_N"], shipped["num_stages"]) == (table.columns, table.num_stages)


@pytest.mark.parametrize("name", ["int4", "fp8-block"])
@pytest.mark.parametrize("fault", ["other values", "no values"])
def test_a_wrong_result_of_quantized_experts_is_no_time(
    measure: Measuring, monkeypatch: pytest.MonkeyPatch, fault: str, name: str
) -> None:
    right = measuring.launch_of

    def wrong(case: Case, turn: Turn, out: Any, blocks: Any) -> Launch:
        launch = right(case, turn, out, blocks)
        if blocks is None:
            return launch
        if fault == "no values":
            return replace(launch, kernel=Nothing())
        x, matrix, *others = launch.arguments
        others_codes = matrix._replace(codes=matrix.codes.roll(1, 2))
        return replace(launch, arguments=(x, others_codes, *others))

    monkeypatch.setattr(measuring, "launch_of", wrong)
    shape = replace(TINY, quantization=QUANTIZATIONS[name])
    case = Case(shape, Product.GATE_UP, 16, (4,))
    found = measure(case, Blocks(128, 128, 4, 2), False)
    assert isinstance(found, Failed) and "wrong values of 256" in found.reason
    assert not CLOCKED


LAYOUTS = {
    "stacked": ExpertsConfig(num_experts=3, hidden_size=160, intermediate_size=72),
    "separate": ExpertsConfig(
        num_experts=3, hidden_size=160, intermediate_size=72, gate_up=GateUp.SEPARATE
    ),
    "ungated": ExpertsConfig(
        num_experts=2,
        hidden_size=256,
        intermediate_size=128,
        gate_up=GateUp.UNGATED,
        has_bias=True,
    ),
    "interleaved": ExpertsConfig(
        num_experts=2, hidden_size=128, intermediate_size=256, gate_up=GateUp.INTERLEAVED
    ),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_experts_that_are_made_up_are_laid_out_as_those_that_are_packed(
    name: str, config: ExpertsConfig
) -> None:
    quantization = QUANTIZATIONS[name]
    weights = random_weights(config, torch.float32)
    up, static = weights.up_proj, quantization.down_rounding
    assert static is None or not static.is_static or name == "static fp8"
    inputs = None
    if static is not None and static.is_static:
        inputs = StaticInputs(static, torch.ones(config.num_experts))
    weights = replace(
        weights,
        gate_up_proj=quantize(weights.gate_up_proj.values, quantization.gate_up),
        up_proj=None if up is None else quantize(up.values, quantization.gate_up),
        down_proj=quantize(weights.down_proj.values, quantization.down),
        gate_up_inputs=inputs,
        down_inputs=inputs,
    )
    found = pack_experts(weights, weights, None if inputs is not None else static)
    made = random_experts(config, quantization, torch.float32, torch.device("cpu"))
    for one, other in ((made.gate_up, found.gate_up), (made.down, found.down)):
        assert (one.layout, one.shape) == (other.layout, other.shape)
        for part in ("codes", "scales", "zeros", "factors"):
            tensor, true = getattr(one, part), getattr(other, part)
            assert (tensor is None) == (true is None)
            if tensor is not None:
                assert (tensor.shape, tensor.dtype) == (true.shape, true.dtype)
    assert (made.gate_up_inputs is None) == (made.down_inputs is None) == (inputs is None)
    assert made.slots().keys() <= found.slots().keys()
    factors = [made.gate_up.factors, made.down.factors]
    assert all(one.isfinite().all() for one in factors if one is not None)
    assert quantization_of(weights, static) == quantization


class Nothing:
    """A kernel that writes nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("fault", ["other values", "no values"])
def test_a_wrong_result_is_no_time(
    measure: Measuring, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = measuring.launch_of

    def wrong(case: Case, turn: Turn, out: Any, blocks: Any) -> Launch:
        if blocks is None:
            return right(case, turn, out, blocks)
        if fault == "no values":
            return replace(right(case, turn, out, blocks), kernel=Nothing())
        return right(case, replace(turn, read=turn.read * 1.5), out, blocks)

    monkeypatch.setattr(measuring, "launch_of", wrong)
    found = measure(Case(TINY, Product.DOWN, 16, (4,)), Blocks(16, 32, 4, 2), False)
    assert isinstance(found, Failed) and "wrong values of 512" in found.reason
    assert not CLOCKED


def test_a_launch_that_fails_is_an_answer(
    measure: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, blocks = Case(TINY, Product.DOWN, 16, (4,)), Blocks(16, 32, 4, 2)

    def failing(self: Launch) -> None:
        raise RuntimeError("out of resource: shared memory\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", failing)
        found = measure(case, blocks, False)
        assert isinstance(found, Failed) and found.ends_case and not found.has_broken_device
        assert found.reason.endswith("RuntimeError: out of resource: shared memory")
    assert isinstance(measure(case, blocks, False), Timed)
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", failing)
        found = measure(case, blocks, False)
        assert isinstance(found, Failed) and not found.ends_case


def test_a_capture_that_fails_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    case, blocks = Case(TINY, Product.DOWN, 16, (4,)), Blocks(16, 32, 4, 2)
    captures: list[Any] = []
    run = Launch.run

    @contextmanager
    def capture(graph: Any) -> Iterator[None]:
        captures.append(graph)
        yield

    def failing(self: Launch) -> None:
        if captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        run(self)

    monkeypatch.setattr(measuring, "MIN_TURNS", 2)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(Launch, "run", failing)
    found = Measuring(DEVICE)(case, blocks, False)
    assert captures and isinstance(found, Failed) and found.has_broken_device
    assert found.reason.endswith("RuntimeError: operation not permitted when stream is capturing")


def test_wrong_values_are_counted() -> None:
    truth = torch.randn(64, 32, dtype=torch.bfloat16)
    truth[60:] = torch.nan  # never written, as by design
    tolerance = TOLERANCE[torch.bfloat16]
    assert count_wrong(truth.clone(), truth, tolerance) == 0
    near = (truth.float() * (1 + 2**-8)).to(torch.bfloat16)
    assert count_wrong(near, truth, tolerance) == 0
    for row, value in ((3, torch.nan), (3, 9.0), (61, 0.0)):
        found = truth.clone()
        found[row, 5] = value
        assert count_wrong(found, truth, tolerance) == 1, (row, value)


def test_a_launch_uses_the_tuned_file(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(torch.device(DEVICE))
    tuned = Blocks(32, 32, 4, 2)
    key = TINY.key(Product.GATE_UP, 16)
    (weights,) = make_weights(TINY, torch.device(DEVICE))
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]], dtype=torch.int32, device=DEVICE)
    batch = ExpertBatch(
        torch.randn(4, 64, dtype=torch.bfloat16, device=DEVICE),
        ids,
        torch.full((4, 2), 0.5, device=DEVICE),
    )
    launched: list[dict[str, Any]] = []
    run = Launch.run

    def recorded(self: Launch) -> None:
        if "BLOCK_N" in self.constants:  # else it sorts slots, or adds them
            launched.append(self.constants)
        run(self)

    monkeypatch.setattr(Launch, "run", recorded)
    plain = experts.run_experts(weights, batch, WeightOn.OUTPUT, True)
    assert launched[0]["BLOCK_N"] == blocks_for(key, device).columns != tuned.columns
    write_tuned(tuned_path(device), device, {key: tuned})
    launched.clear()
    experts.run_experts(weights, batch, WeightOn.OUTPUT, True)
    assert launched[0]["BLOCK_N"] != tuned.columns  # read once in a process
    forget_tuned()
    launched.clear()
    found = experts.run_experts(weights, batch, WeightOn.OUTPUT, True)
    first, second = launched[:2]
    assert (first["BLOCK_N"], first["BLOCK_K"]) == (tuned.columns, tuned.depth)
    assert second["BLOCK_N"] == blocks_for(TINY.key(Product.DOWN, 16), device).columns
    torch.testing.assert_close(found, plain, rtol=2**-6, atol=2**-6)


def test_only_measuring_needs_triton() -> None:
    modules = ", ".join(f"mixtura.kernels.triton.{name}" for name in ("child", "tune", "tuned"))
    code = f"import sys, {modules}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="replays CUDA graphs")
def test_times_are_measured() -> None:
    found = Measuring(DEVICE)(Case(TINY, Product.DOWN, 16, (4, 8)), Blocks(16, 32, 4, 2), True)
    assert isinstance(found, Timed) and min(*found.shipped, *found.tried) > 0
