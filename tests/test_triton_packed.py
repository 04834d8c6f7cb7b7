"""Quantized experts in the Triton kernel against the reference that rounds alike.

On the CPU in Triton's interpreter, or on a GPU. Without kernels: `test_triton_packing.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from covering import covering_cases
from expert_cases import ACTIVATIONS, sizes
from gpu_device import DEVICE, IS_INTERPRETED
from packed_experts import (
    BF16,
    E4M3_GROUPS,
    E4M3_TOKENS,
    FP16,
    INT8_GROUPS,
    INT8_TOKENS,
    KERNEL,
    ROUNDED,
    SCHEMES,
    any_experts,
    expected_of,
    experts_in,
    packed_as,
    random_rows,
    run_packed,
    sized,
    with_stored_scales,
)
from tolerances import frobenius_error
from torch import Tensor

from mixtura.config import ExpertsConfig, WeightOn
from mixtura.kernels import get_kernel
from mixtura.kernels.triton import experts
from mixtura.kernels.triton.packed import call
from mixtura.kernels.triton.regimes import Regime, regime_for
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertWeights

MAX_ERROR = {FP16: 1e-3, BF16: 1.2e-2 if IS_INTERPRETED else 5e-3}
"""Of a result, relative (Frobenius). The interpreter cuts digits off where a GPU rounds to bf16, so
that what is stored three times gets smaller three times."""

MAX_FLIPS = 4e-3
"""More where rows are rounded: sums that differ in their last bit may get neighbouring codes."""

MAX_TIES = 4e-3

AXES: dict[str, list[Any]] = {
    "name": ["stacked", "interleaved", "separate", "ungated", "gpt-oss", "bias",
             "ungated-bias", "rms", "rms-scale-first"],
    "num_rows": [1, 2, 5],
    "dtype": [FP16, BF16],
    "weight_on": list(WeightOn),
    "reduce": [True, False],
    "size": [(40, 24), (136, 24), (24, 136)],
}  # fmt: skip
"""How experts are stored and run, whatever their scheme."""


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is NaN, or a code that is large."""
    empty = experts.Call.empty

    def poisoned(self: experts.Call, name: str, *shape: int, dtype: Any = None) -> Tensor:
        found = empty(self, name, *shape, dtype=dtype)
        return found.fill_(float("nan") if found.is_floating_point() else 99)

    monkeypatch.setattr(experts.Call, "empty", poisoned)


def bound(weights: ExpertWeights, dtype: torch.dtype) -> float:
    activations = weights.activations
    is_rounded = activations is not None or bool(weights.inputs)
    most = MAX_ERROR[dtype] + (MAX_FLIPS if is_rounded else 0.0)
    # int8's largest number of a group is a tie by its meaning, 127.5: the last bit decides.
    has_ties = activations is not None and activations.code is Code.INT
    return most + (MAX_TIES if has_ties else 0.0)


def check(weights: ExpertWeights, batch: ExpertBatch, **options: Any) -> Tensor:
    dtype = batch.hidden_states.dtype
    found = run_packed(packed_as(weights), batch, **options)
    expected = expected_of(weights, batch, **options)
    assert found.dtype == (dtype if options.get("reduce", True) else torch.float32)
    error = frobenius_error(found, expected)
    assert error <= bound(weights, dtype), f"error {error:.2e} with {weights.scheme}"
    return found


def check_case(scheme: str, activations: ActivationScheme | None = None, **case: Any) -> None:
    hidden_size, intermediate_size = case["size"]
    weights = experts_in(sized(case["name"], 5, hidden_size, intermediate_size), SCHEMES[scheme])
    weights = dataclasses.replace(weights, activations=activations)
    batch = random_rows(weights.config, case["num_rows"], 2, case["dtype"])
    if activations is not None and case["weight_on"] is WeightOn.INPUT:
        # The largest number of a row is half a code from the next: only exact weights keep it.
        weights_of_slots = 2.0 ** -torch.arange(batch.topk_weights.numel()).view(-1, 2)
        batch = dataclasses.replace(batch, topk_weights=weights_of_slots)
    check(weights, batch, weight_on=case["weight_on"], reduce=case["reduce"])


def in_turn(kinds: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Every kind once, with cases of which every two values come together."""
    cases = covering_cases(AXES)
    count = max(len(kinds), len(cases))
    return [(kinds[i % len(kinds)], cases[i % len(cases)]) for i in range(count)]


def words(case: Any) -> str:
    values = case.values() if isinstance(case, dict) else [case]
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in values)


# ----------------------------------------------------------------------------- layouts and schemes


def every_fourth(cases: list[Any]) -> list[Any]:
    """The cases, all but every fourth one slow."""
    slow = pytest.mark.slow
    return [pytest.param(*one, marks=slow if i % 4 else ()) for i, one in enumerate(cases)]


@pytest.mark.parametrize("scheme, case", every_fourth(in_turn(list(SCHEMES))), ids=words)
def test_every_scheme(scheme: str, case: dict[str, Any]) -> None:
    check_case(scheme, **case)


@pytest.mark.parametrize(
    "pair, case",
    every_fourth(in_turn(ROUNDED)),
    ids=lambda v: words(v) if isinstance(v, dict) else words(v[0]),
)
def test_every_scheme_with_rounded_rows(
    pair: tuple[str, ActivationScheme], case: dict[str, Any]
) -> None:
    scheme, activations = pair
    check_case(scheme, activations, **case)


@pytest.mark.slow
@pytest.mark.parametrize("case", covering_cases({"scheme": list(SCHEMES), **AXES}), ids=words)
def test_every_scheme_in_every_layout(case: dict[str, Any]) -> None:
    check_case(**case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", covering_cases({"pair": list(range(len(ROUNDED))), **AXES}), ids=words
)
def test_every_scheme_with_rounded_rows_in_every_layout(case: dict[str, Any]) -> None:
    scheme, activations = ROUNDED[case["pair"]]
    check_case(scheme, activations, **case)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_code(scheme: str) -> None:
    """With scales of either sign and of unlike sizes, and the zero points of wide checkpoints."""
    for seed in (0, 1):
        weights = any_experts(sized("ungated", 2, 40, 24), SCHEMES[scheme], seed)
        # Sums are as large as they come: terms are not rounded to the rows' dtype.
        check(weights, random_rows(weights.config, 1, 1, BF16, absent=0.0), reduce=False)


def of_large(scheme: str, activations: ActivationScheme | None, name: str = "gpt-oss") -> None:
    """100 rows: a full tile of one expert, and the ends of two, of which few rows are left."""
    config = sized(name, 2, 40, 24)
    assert regime_for(100, 2, 2) is Regime.LARGE
    weights = dataclasses.replace(experts_in(config, SCHEMES[scheme]), activations=activations)
    batch = random_rows(config, 100, 2, FP16)
    ids = torch.zeros(200).int()
    ids[::5], ids[::14] = 1, -1
    check(weights, dataclasses.replace(batch, local_ids=ids.view(100, 2)))


@pytest.mark.parametrize(
    "scheme, activations",
    [
        ("int4-g32", None),
        ("fp8-block", E4M3_GROUPS),
        pytest.param("int8-channel", INT8_TOKENS, marks=pytest.mark.slow),
    ],
)
def test_tiles_of_many_rows(scheme: str, activations: ActivationScheme | None) -> None:
    of_large(scheme, activations)


@pytest.mark.parametrize("scheme, activations", [("int4-g32", None), ("fp8", E4M3_TOKENS)])
def test_tiles_of_many_rows_without_a_gate(
    scheme: str, activations: ActivationScheme | None
) -> None:
    of_large(scheme, activations, "ungated")


@pytest.mark.slow
@pytest.mark.parametrize("scheme, activations", [*((name, None) for name in SCHEMES), *ROUNDED])
def test_tiles_of_many_rows_in_every_scheme(
    scheme: str, activations: ActivationScheme | None
) -> None:
    of_large(scheme, activations)


@pytest.mark.parametrize("num_rows", [20, 40, 80])
@pytest.mark.parametrize("scheme, activations", [("mxfp4", None), ("fp8", E4M3_TOKENS)])
def test_tiles_of_every_height(
    scheme: str, activations: ActivationScheme | None, num_rows: int
) -> None:
    """32 and 64 rows, and what is left of them."""
    config = sized("separate", 1, 40, 24)
    weights = dataclasses.replace(experts_in(config, SCHEMES[scheme]), activations=activations)
    check(weights, random_rows(config, num_rows, 1, FP16, absent=0.1))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_projections_of_unlike_schemes(num_rows: int) -> None:
    for first, last, activations in (
        ("int4-g32", "fp8-block", None),
        ("mxfp4", "int8-channel-zeros", None),
        ("int8-channel", "int4-g64-zeros", INT8_TOKENS),
        ("fp8-block", "fp8", E4M3_GROUPS),
    ):
        weights = experts_in(sized("stacked", 5, 72, 40), SCHEMES[first], SCHEMES[last])
        weights = dataclasses.replace(weights, activations=activations)
        check(weights, random_rows(weights.config, num_rows, 2, FP16))


# -------------------------------------------------------------------------------- sizes and choices

ODD: list[tuple[str, ActivationScheme | None]] = [
    ("int4-g128", None),
    ("mxfp4", None),
    ("int2-g16", None),
    ("fp8-block", E4M3_GROUPS),
    ("int4-channel-zeros", INT8_TOKENS),
]


@pytest.mark.parametrize("scheme, activations", ODD)
@pytest.mark.parametrize("size", [(1, 1), (7, 3), pytest.param((130, 65), marks=pytest.mark.slow)])
def test_sizes_that_no_block_divides(
    size: tuple[int, int], scheme: str, activations: ActivationScheme | None
) -> None:
    weights = experts_in(sized("interleaved", 5, *size), SCHEMES[scheme])
    weights = dataclasses.replace(weights, activations=activations)
    batch = random_rows(weights.config, 4, 2, FP16)
    # Of a row with one number, what that is rounded to is all that there is.
    check(weights, batch)


@pytest.mark.slow
@pytest.mark.parametrize("scheme, activations", [*((name, None) for name in SCHEMES), *ROUNDED])
@pytest.mark.parametrize("size", [(7, 3), (130, 65), (257, 129)])
def test_sizes_that_no_block_divides_in_every_scheme(
    size: tuple[int, int], scheme: str, activations: ActivationScheme | None
) -> None:
    for name, num_rows in itertools.product(("separate", "interleaved"), (1, 7)):
        weights = experts_in(sized(name, 5, *size), SCHEMES[scheme])
        weights = dataclasses.replace(weights, activations=activations)
        check(weights, random_rows(weights.config, num_rows, 2, FP16))


@pytest.mark.parametrize(
    "num_experts",
    [1, 3, 896, *(pytest.param(number, marks=pytest.mark.slow) for number in (60, 160))],
)
def test_any_number_of_experts(num_experts: int) -> None:
    config = sizes(num_experts, 16, 8)
    kinds = [("int4-g32", None), ("fp8-block", E4M3_GROUPS)]
    for scheme, activations in kinds[: 1 if num_experts > 60 else 2]:
        weights = dataclasses.replace(experts_in(config, SCHEMES[scheme]), activations=activations)
        packed = packed_as(weights)
        for num_rows in (1, 10):
            batch = random_rows(config, num_rows, min(num_experts, 2), FP16)
            error = frobenius_error(run_packed(packed, batch), expected_of(weights, batch))
            assert error <= bound(weights, FP16)


KINDS: list[tuple[str, ActivationScheme | None]] = [
    ("int4-g32", None),
    ("fp8-block", E4M3_GROUPS),
    ("int8-channel", INT8_TOKENS),
]
"""Rows as they come, in groups, and whole."""

by_kind = pytest.mark.parametrize("scheme, activations", KINDS)


def of_kind(
    scheme: str, activations: ActivationScheme | None, config: ExpertsConfig | None = None
) -> ExpertWeights:
    weights = experts_in(config or sized("gpt-oss", 5, 40, 24), SCHEMES[scheme])
    return dataclasses.replace(weights, activations=activations)


@by_kind
def test_no_rows_and_rows_without_experts(
    scheme: str, activations: ActivationScheme | None
) -> None:
    weights = of_kind(scheme, activations)
    packed = packed_as(weights)
    for num_rows, reduce in itertools.product((0, 1, 4), (True, False)):
        batch = random_rows(weights.config, num_rows, 2, FP16)
        batch = dataclasses.replace(batch, local_ids=torch.full((num_rows, 2), -1).int())
        expected = torch.zeros_like(expected_of(weights, batch, reduce=reduce))
        found = run_packed(packed, batch, reduce=reduce)
        assert torch.equal(found.float(), expected) and found.shape == expected.shape


@by_kind
@pytest.mark.parametrize("num_rows", [1, 6])
def test_ids_of_no_expert_reach_no_memory(
    num_rows: int, scheme: str, activations: ActivationScheme | None
) -> None:
    weights = of_kind(scheme, activations)
    packed, batch = packed_as(weights), random_rows(weights.config, num_rows, 2, FP16)
    wrong = torch.where(batch.local_ids < 0, 2**30, batch.local_ids)
    wrong[0, 0] = weights.config.num_experts
    right = torch.where(wrong < weights.config.num_experts, wrong, -1)
    found = run_packed(packed, dataclasses.replace(batch, local_ids=wrong))
    assert torch.equal(found, run_packed(packed, dataclasses.replace(batch, local_ids=right)))
    odd = batch.topk_weights.masked_fill(right < 0, float("nan"))
    unweighed = dataclasses.replace(batch, local_ids=wrong, topk_weights=odd)
    assert torch.equal(found, run_packed(packed, unweighed))


@pytest.mark.parametrize("is_rounded", [False, True])
def test_an_id_behind_the_last_expert_reads_no_weights(
    is_rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even unsorted, where ids index the weights: nothing is written of its slot."""
    buffers: list[Tensor] = []
    empty = experts.Call.empty

    def kept(self: experts.Call, name: str, *shape: int, dtype: Any = None) -> Tensor:
        buffers.append(empty(self, name, *shape, dtype=dtype))
        return buffers[-1]

    monkeypatch.setattr(experts.Call, "empty", kept)
    weights = experts_in(sized("bias", 5, 40, 24), SCHEMES["fp8"])
    if is_rounded:
        weights = with_stored_scales(weights, Code.E4M3, [3.0] * 5, [4.0] * 5)
    batch = random_rows(weights.config, 1, 2, FP16, absent=0.0)
    ids = torch.tensor([[weights.config.num_experts, 1]], dtype=torch.int32)
    found = run_packed(packed_as(weights), dataclasses.replace(batch, local_ids=ids))
    assert found.isfinite().all()
    # Hidden rows and outputs; codes and scales of rows and of hidden ones.
    by_slot = [buffer for buffer in buffers if buffer.shape[0] == 2]
    assert len(by_slot) == (6 if is_rounded else 2)
    for buffer in by_slot:
        without, with_one = buffer.float().view(2, -1).isnan()
        assert without.all() and not with_one.all()


@by_kind
def test_one_expert_takes_all(scheme: str, activations: ActivationScheme | None) -> None:
    weights = of_kind(scheme, activations)
    batch = random_rows(weights.config, 10, 2, FP16)
    check(weights, dataclasses.replace(batch, local_ids=torch.full((10, 2), 2).int()))


# ------------------------------------------------------------------------------------ rounded rows


@by_kind
@pytest.mark.parametrize("num_rows", [4, 8])
def test_what_is_not_finite_stays_in_its_row(
    num_rows: int, scheme: str, activations: ActivationScheme | None
) -> None:
    weights = of_kind(scheme, activations, sized("bias", 5, 40, 24))
    packed = packed_as(weights)
    batch = random_rows(weights.config, num_rows, 2, FP16, absent=0.0)
    clean = run_packed(packed, batch)
    rows, ids = batch.hidden_states.clone(), batch.local_ids.clone()
    rows[0, 3], rows[1, 5], rows[2, 7], ids[0] = float("nan"), float("nan"), float("inf"), -1
    found = run_packed(packed, dataclasses.replace(batch, hidden_states=rows, local_ids=ids))
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()
    assert torch.equal(found[3:], clean[3:])


@by_kind
def test_rows_of_zeros_and_rows_that_saturate(
    scheme: str, activations: ActivationScheme | None
) -> None:
    """A scale that is not 0; and one number so large that the others are near nothing."""
    weights = of_kind(scheme, activations, sized("bias", 5, 144, 24))
    batch = random_rows(weights.config, 6, 2, FP16)
    rows = batch.hidden_states.clone()
    rows[0], rows[1] = 0.0, 1e-7 * rows[1]
    rows[2, 5] = 300.0
    rows[3] = 20.0 * rows[3].sign()
    check(weights, dataclasses.replace(batch, hidden_states=rows))


def test_columns_behind_the_last_have_no_part_in_scales() -> None:
    """What the activation makes of nothing may be larger than all that there is."""
    config = sized("ungated-bias", 5, 40, 24)
    config = dataclasses.replace(config, activation=ACTIVATIONS["sigmoid"])
    weights = of_kind("int8-g128", INT8_GROUPS, config)
    assert weights.gate_up_bias is not None and weights.down_bias is not None
    low, none = torch.full_like(weights.gate_up_bias, -6.0), torch.zeros_like(weights.down_bias)
    weights = dataclasses.replace(weights, gate_up_bias=low, down_bias=none)
    check(weights, random_rows(config, 3, 2, FP16))


@pytest.mark.parametrize("scheme, activations", KINDS[1:])
def test_scales_are_never_below_the_least(scheme: str, activations: ActivationScheme) -> None:
    config = sized("ungated", 5, 40, 24)
    config = dataclasses.replace(config, activation=ACTIVATIONS["identity"])
    batch = random_rows(config, 3, 2, FP16)
    small = dataclasses.replace(batch, hidden_states=batch.hidden_states * 3e-7)
    check(of_kind(scheme, activations, config), small, reduce=False)


@pytest.mark.parametrize("scheme, activations", [KINDS[2], ("fp8", E4M3_TOKENS)])
def test_rows_wider_than_a_program(
    scheme: str, activations: ActivationScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's scale is that of all its parts; NaN in the first of them, too."""
    weights = of_kind(scheme, activations, sized("stacked", 5, 40, 24))
    packed, batch = packed_as(weights), random_rows(weights.config, 3, 2, FP16, absent=0.0)
    expected = run_packed(packed, batch)
    monkeypatch.setattr(call, "ROUNDED_COLUMNS", 16)
    assert torch.equal(run_packed(packed, batch), expected)
    batch.hidden_states[1, 3] = float("nan")
    found = run_packed(packed, batch)
    assert found[1].isnan().all() and torch.equal(found[::2], expected[::2])


STORED = [
    ("int8-channel", Code.INT),
    ("int4-g32", Code.INT),
    ("int4-channel-zeros", Code.INT),
    ("fp8", Code.E4M3),
    ("fp8-tensor", Code.E4M3),
    ("fp8-block-32", Code.E4M3),
    ("int4-g128", Code.E4M3),
]


@pytest.mark.parametrize("scheme, code", STORED)
def test_stored_scales(scheme: str, code: Code) -> None:
    """Expert by expert; some values are cut off, and what has no scale finds one for each row."""
    config = sized("gpt-oss", 5, 72, 40)
    weights = with_stored_scales(
        experts_in(config, SCHEMES[scheme]), code, [1.5, 3.0, 0.0, 2.0, 5.0], [2, 0, 0, 9, 1]
    )
    for num_rows, weight_on in ((1, WeightOn.OUTPUT), (6, WeightOn.INPUT)):
        batch = random_rows(config, num_rows, 2, FP16, absent=0.1)
        check(weights, batch, weight_on=weight_on)


def test_stored_scales_of_one_projection() -> None:
    """The other's are found where the checkpoint means so; else its rows stay as they come."""
    config = sized("stacked", 5, 72, 40)
    plain = experts_in(config, SCHEMES["int8-channel"])
    batch = random_rows(config, 5, 2, FP16)
    weights = with_stored_scales(plain, Code.INT, [1.5, 3.0, 0.5, 2.0, 5.0], None)
    check(dataclasses.replace(weights, activations=INT8_TOKENS), batch)
    found = run_packed(packed_as(weights), batch)
    rows = dataclasses.replace(batch, hidden_states=batch.hidden_states.float())
    expected = get_kernel("reference").run(weights, rows)
    assert frobenius_error(found, expected) <= MAX_ERROR[FP16] + MAX_FLIPS


@pytest.mark.parametrize("num_rows", [1, 7])
def test_rows_apart_from_each_other(num_rows: int) -> None:
    weights = of_kind("fp8", E4M3_TOKENS, sized("bias", 5, 40, 24))
    packed, plain = packed_as(weights), random_rows(weights.config, num_rows, 2, FP16)
    expected = run_packed(packed, plain)
    wide = torch.zeros(num_rows, 100, dtype=FP16)
    wide[:, 50:90] = plain.hidden_states
    for rows in (wide[:, 50:90], plain.hidden_states.T.contiguous().T):
        batch = ExpertBatch(
            rows.to(DEVICE),
            plain.local_ids.T.contiguous().T.to(DEVICE),
            plain.topk_weights.T.contiguous().T.to(DEVICE),
        )
        assert torch.equal(KERNEL.run(packed, batch).cpu(), expected)
