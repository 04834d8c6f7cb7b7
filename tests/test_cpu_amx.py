"""The kernels in tiles of AMX, with the tiles emulated: no instruction of AMX runs here."""

from __future__ import annotations

import pytest
import torch
from expert_cases import random_batch, random_weights, sizes
from test_cpu_kernel import SCHEMES, SMALL_SAMPLE, bound, matrices, truth_of, with_format
from tolerances import frobenius_error
from torch import Tensor

from mixtura.config import ActivationDtype
from mixtura.kernels.cpu import PackedLayer, pack_layer, run_packed
from mixtura.kernels.cpu.arithmetic import Arithmetic, arithmetic_for
from mixtura.kernels.cpu.extension import (
    cpu_flags,
    current_path,
    emulated_paths,
    forced_path,
    missing,
    runnable_paths,
)
from mixtura.kernels.cpu.linear import pack_linear, run_linear
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense
from mixtura.quant.packing import pack_codes
from mixtura.types import ExpertBatch, ExpertWeights

EMULATED, BLOCKS = "amx_emulated", "avx512_bf16"

pytestmark = pytest.mark.skipif(
    missing() is not None or EMULATED not in emulated_paths(),
    reason="the emulation needs AVX-512-BF16",
)

NUM_ROWS = 70
ROW_COUNTS = (1, 6, 7, 16, 17, 33, 49)
"""Around what streams, one and two tiles of rows, and blocks of them."""

FORMATS = [format for format in WeightFormat if format.value not in ("fp16", "fp32")]


def rows_from(batch: ExpertBatch, last: int) -> ExpertBatch:
    ids, weights = batch.local_ids[:last], batch.topk_weights[:last]
    return ExpertBatch(batch.hidden_states[:last], ids, weights)


def run_on(path: str, packed: PackedLayer, batch: ExpertBatch) -> Tensor:
    with forced_path(path):
        return run_packed(packed, batch, False, True)


def check(weights: ExpertWeights, activation_dtype: ActivationDtype | None = None) -> None:
    """Against the reference; a row alone against a row among others; int8 against AVX-512."""
    batch = random_batch(weights.config, NUM_ROWS, 1)
    with forced_path(EMULATED):
        packed = pack_layer(weights, activation_dtype)
        limit = bound(weights, torch.float32, activation_dtype) * SMALL_SAMPLE
    found = run_on(EMULATED, packed, batch)
    assert frobenius_error(found, truth_of(weights, batch)[0]) <= limit
    for count in ROW_COUNTS:
        assert torch.equal(run_on(EMULATED, packed, rows_from(batch, count)), found[:count]), count
    other = run_on(BLOCKS, packed, batch)
    found_in = {arithmetic_for(s, activation_dtype, has_bf16=True) for s in weights.schemes}
    if found_in == {Arithmetic.INT8}:
        assert torch.equal(found, other)
    assert frobenius_error(found, other) <= limit


# 704 columns are more than are unpacked at once.
@pytest.mark.parametrize("hidden, inner", [(176, 352), (70, 37), (704, 33)])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.value)
def test_formats_and_odd_sizes(weight_format, hidden, inner):
    check(with_format(random_weights(sizes(1, hidden, inner)), weight_format))


@pytest.mark.parametrize("name", SCHEMES)
def test_zero_points_and_groups_of_every_length(name):
    weights = matrices(sizes(1, 336, 80), *SCHEMES[name])
    check(weights)
    check(weights, ActivationDtype.BF16)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT4_G32, WeightFormat.BF16])
def test_every_number_of_rows(weight_format):
    weights = with_format(random_weights(sizes(1, 70, 37)), weight_format)
    packed, batch = pack_layer(weights), random_batch(weights.config, NUM_ROWS, 1)
    found = run_on(EMULATED, packed, batch)
    for count in range(1, NUM_ROWS):
        assert torch.equal(run_on(EMULATED, packed, rows_from(batch, count)), found[:count]), count


@pytest.mark.parametrize("num_columns", [1, 37, 64, 70, 352])
@pytest.mark.parametrize("num_rows", [7, 16, 31, 41])
def test_products_of_integers_are_exact(num_rows, num_columns):
    """The emulation against three loops: what every tile holds, its ends and both signs."""
    generator = torch.Generator().manual_seed(num_columns)
    rows = torch.randint(-127, 128, (num_rows, num_columns), generator=generator)
    rows[:, ::32] = 127  # so that the scale of every group is 1
    codes = torch.randint(256, (1, 20, num_columns), generator=generator)
    whole = QuantizedMatrix(
        WeightFormat.INT8_CHANNEL.scheme,
        tuple(codes.shape),
        values=pack_codes(codes.to(torch.uint8), 8),
        scales=torch.ones(1, 20, 1),
    )
    weights = codes[0] - 128
    expected = [
        [sum(x * w for x, w in zip(row, column, strict=True)) for column in weights.tolist()]
        for row in rows.tolist()
    ]
    narrow = dense(weights.to(torch.bfloat16))
    for matrix in (whole.expert(0), narrow):
        with forced_path(EMULATED):
            found = run_linear(pack_linear(matrix), rows.float())
        assert found.tolist() == expected


@pytest.mark.parametrize(
    "weight_format", [WeightFormat.INT8_CHANNEL, WeightFormat.BF16, WeightFormat.FP8]
)
def test_what_is_not_finite_stays_in_its_row(weight_format):
    weights = with_format(random_weights(sizes(1, 70, 37)), weight_format)
    packed, batch = pack_layer(weights), random_batch(weights.config, 40, 1)
    clean = run_on(EMULATED, packed, batch)
    batch.hidden_states[9, 5] = float("nan")
    found = run_on(EMULATED, packed, batch)
    assert found[9].isnan().all()
    others = torch.arange(40) != 9
    assert torch.equal(found[others], clean[others])


def test_threads_have_tiles_of_their_own():
    weights = with_format(random_weights(sizes(3, 176, 352)), WeightFormat.INT8_G128)
    packed, batch = pack_layer(weights), random_batch(weights.config, 60, 2)
    alone = run_on(EMULATED, packed, batch)
    torch.set_num_threads(3)
    try:
        assert torch.equal(run_on(EMULATED, packed, batch), alone)
    finally:
        torch.set_num_threads(1)


def test_the_emulation_is_chosen_by_name_only():
    assert current_path() == runnable_paths()[0]
    assert not set(emulated_paths()) & set(runnable_paths())
    assert runnable_paths()[-1] == "portable"
    if "amx" in runnable_paths():
        assert {"amx_tile", "amx_int8", "amx_bf16"} <= set(cpu_flags())
        assert runnable_paths()[0] == "amx"
    with forced_path(EMULATED):
        assert current_path() == EMULATED
