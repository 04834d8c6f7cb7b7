"""Activations rounded with scales found while running: what that means, kernels, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_cases import batch_of, quantized, random_weights, sizes
from packed_files import write_packed, write_with
from static_activations import FLIPS, batch
from static_activations import INT8 as STATIC_INT8
from tolerances import frobenius_error
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

import mixtura
from mixtura.config import ActivationDtype, GateUp, WeightOn
from mixtura.experts import ExpertsOptions, PackedExperts, RoutedExperts
from mixtura.hf.explain import explain, in_format
from mixtura.hf.linears import PackedLinear
from mixtura.kernels import get_kernel, select_kernel
from mixtura.kernels.cpu.extension import missing
from mixtura.kernels.torch import TorchKernel, _run_grouped
from mixtura.parallel.shard import cut_weights
from mixtura.quant.activations import (
    ActivationExtra,
    ActivationGroup,
    ActivationScheme,
    StaticInputs,
    activations_for,
    quantize_activations,
    round_activations,
)
from mixtura.quant.codecs.output_formats import OutputFormat
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

INT8 = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
E4M3 = ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN)
INT8_GROUPS = ActivationScheme(Code.INT, 8, ActivationGroup.GROUP, 24)
E4M3_GROUPS = ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 24)
BLOCKS = ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128)
SCHEMES = (INT8, E4M3, INT8_GROUPS, E4M3_GROUPS)
EPSILON = 2.0**-23
REFERENCE = get_kernel("reference")

by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)

# ------------------------------------------------------------------------------------ the meaning

E4M3_LEVELS = sorted(
    {
        abs(level)
        for level in QuantScheme(Code.E4M3, 8, (1, None), torch.float32).levels
        if math.isfinite(level)
    }
)


def fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def plain_codes(row: list[float], scheme: ActivationScheme) -> tuple[list[float], list[float]]:
    """Codes and scales of a row, number by number."""
    width = scheme.group_columns or len(row)
    codes, scales = [], []
    for start in range(0, len(row), width):
        group = row[start : start + width]
        half_range = 127.5 if scheme.code is Code.INT else 448.0
        scale = max(fp32(max(map(abs, group)) / half_range), EPSILON)
        scales.append(scale)
        for x in group:
            quotient = fp32(x / scale)
            if scheme.code is Code.INT:
                codes.append(float(max(-128, min(127, round(quotient)))))
                continue
            size = min(abs(quotient), 448.0)
            nearest = range(len(E4M3_LEVELS))
            best = min(nearest, key=lambda code: (abs(E4M3_LEVELS[code] - size), code % 2))
            codes.append(math.copysign(E4M3_LEVELS[best], quotient))
    return codes, scales


def rows_with_edges() -> Tensor:
    """(8, 60): a last group of 12, zeros, one large number, tiny ones, ties of int8 and e4m3."""
    rows = torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    rows[1] = 0.0
    rows[2, 24:48] = 0.0
    rows[3, 7] = 1e4
    rows[4] = 1e-9 * rows[4]
    rows[5] = (torch.arange(60) - 30) / 2
    rows[5, ::12] = 127.5  # a scale of 1: halves are ties, and 127.5 is cut to 127
    rows[6] = (torch.arange(60) - 30) / 2**9
    rows[6, ::12] = -448.0
    rows[7, 5] = 3e38
    return rows


@by_scheme
def test_the_meaning_is_the_definition(scheme: ActivationScheme) -> None:
    rows = rows_with_edges()
    codes, scales = quantize_activations(rows, scheme)
    expected = [plain_codes(row, scheme) for row in rows.tolist()]
    assert codes.dtype is (torch.int8 if scheme.code is Code.INT else torch.float8_e4m3fn)
    assert scales.dtype is torch.float32
    assert torch.equal(codes.float(), torch.tensor([codes for codes, _ in expected]))
    assert torch.equal(scales, torch.tensor([scales for _, scales in expected]))
    assert scales.shape == (8, 1 if scheme.group_columns is None else 3)
    # And so for any leading dimensions.
    folded, its_scales = quantize_activations(rows.view(2, 4, 60), scheme)
    assert torch.equal(folded.flatten(0, 1).float(), codes.float())
    assert torch.equal(its_scales.flatten(0, 1), scales)
    assert torch.equal(quantize_activations(rows[3], scheme)[1], scales[3])
    assert quantize_activations(rows[:0], scheme)[1].shape == (0, scales.shape[1])


def test_codes_reach_the_ends_of_their_range() -> None:
    codes, scales = quantize_activations(torch.tensor([-127.5, 127.5, 0.5, 1.5]), INT8)
    assert codes.tolist() == [-128, 127, 0, 2] and scales.tolist() == [1.0]
    codes, scales = quantize_activations(torch.tensor([-1.0, 1.0, 0.5]), E4M3)
    assert codes.float().tolist() == [-448.0, 448.0, 224.0] and scales.tolist() == [fp32(1 / 448)]
    codes, scales = quantize_activations(torch.zeros(3), INT8)
    assert codes.tolist() == [0, 0, 0] and scales.tolist() == [EPSILON]


@by_scheme
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_poisons_what_shares_its_scale(
    scheme: ActivationScheme, odd: float
) -> None:
    rows = rows_with_edges()
    clean = round_activations(rows, scheme)
    rows[0, 30] = odd
    found = round_activations(rows, scheme)
    reached = torch.zeros(8, 60, dtype=torch.bool)
    reached[0, 24:48] = True
    if scheme.group_columns is None:
        reached[0] = True
    assert not found[reached].isfinite().any()
    assert torch.equal(found[~reached], clean[~reached])
    assert found[0, 30].isnan()
    if scheme.code is Code.INT:
        assert (quantize_activations(rows, scheme)[0][reached] == 0).all()


@by_scheme
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_activations_are_codes_times_scales(
    scheme: ActivationScheme, dtype: torch.dtype
) -> None:
    rows = rows_with_edges()[:7].to(dtype)
    codes, scales = quantize_activations(rows, scheme)
    wide = torch.promote_types(dtype, torch.float32)
    expected = torch.empty(rows.shape, dtype=wide)
    for column in range(60):
        group = 0 if scheme.group_columns is None else column // 24
        expected[:, column] = codes[:, column].to(wide) * scales[:, group].to(wide)
    found = round_activations(rows, scheme)
    assert found.dtype is dtype and torch.equal(found, expected.to(dtype))


def test_which_schemes_are_found_running() -> None:
    assert all(scheme.is_found_running and not scheme.has_one_scale for scheme in SCHEMES)
    others = [
        STATIC_INT8,
        ActivationScheme(Code.E4M3, 8, ActivationGroup.TENSOR),
        ActivationScheme(Code.INT, 4, ActivationGroup.TOKEN),
        ActivationScheme(Code.E2M1, 4, ActivationGroup.GROUP, 32),
        dataclasses.replace(INT8, is_static=True),
        *(dataclasses.replace(E4M3_GROUPS, extra=extra) for extra in ActivationExtra),
    ]
    assert not any(scheme.is_found_running for scheme in others)


def test_the_arithmetic_asked_for_says_what_is_rounded() -> None:
    asked_int8, asked_fp8 = ActivationDtype.INT8, ActivationDtype.FP8
    int4, blocks = WeightFormat.INT4_G128.scheme, WeightFormat.FP8_BLOCK.scheme
    plain = QuantScheme.dense(torch.bfloat16)
    static = STATIC_INT8
    for asked in (None, *ActivationDtype):
        assert activations_for(asked, INT8, [plain]) is None
        assert activations_for(asked, INT8, []) is None
    assert activations_for(ActivationDtype.BF16, INT8, [int4]) is None
    assert activations_for(None, None, [int4]) is None
    assert activations_for(None, static, [int4]) is None
    assert activations_for(None, E4M3_GROUPS, [int4]) == E4M3_GROUPS
    assert activations_for(asked_int8, INT8_GROUPS, [int4]) == INT8_GROUPS
    assert activations_for(asked_int8, E4M3_GROUPS, [int4]) == INT8
    assert activations_for(asked_int8, static, [int4]) == INT8
    assert activations_for(asked_fp8, None, [int4, plain]) == E4M3
    assert activations_for(asked_fp8, None, [blocks, plain]) == BLOCKS
    assert activations_for(asked_fp8, None, [blocks, int4]) == E4M3
    assert activations_for(asked_fp8, E4M3, [blocks]) == E4M3


# ------------------------------------------------------------------------------------ the kernels


def meaning(weights: ExpertWeights, meant: ActivationScheme | None) -> ExpertWeights:
    return dataclasses.replace(weights, activations=meant)


def rounded(x: Tensor, scheme: ActivationScheme | None) -> Tensor:
    if scheme is None:
        return x
    codes, scales = zip(*(plain_codes(row, scheme) for row in x.tolist()), strict=True)
    width = scheme.group_columns or x.shape[1]
    wide = torch.tensor(scales).repeat_interleave(width, 1)[:, : x.shape[1]]
    return torch.tensor(codes) * wide


def plainly(
    weights: ExpertWeights, given: ExpertBatch, scheme: ActivationScheme | None, weight_on: WeightOn
) -> Tensor:
    """A double loop over rows and slots with dense matrices, separate from the kernels."""
    gate_up, down = dequantize(weights.gate_up_proj), dequantize(weights.down_proj)
    out = torch.zeros_like(given.hidden_states)
    for row, ids in enumerate(given.local_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert < 0:
                continue
            weight = given.topk_weights[row, slot]
            x = given.hidden_states[row] * (weight if weight_on is WeightOn.INPUT else 1.0)
            gate, up = F.linear(rounded(x[None], scheme), gate_up[expert]).chunk(2, 1)
            hidden = rounded(F.silu(gate) * up, scheme)
            term = F.linear(hidden, down[expert])[0]
            out[row] += term * (1.0 if weight_on is WeightOn.INPUT else weight)
    return out


CASES = {
    "int8": (WeightFormat.INT8_CHANNEL, ActivationDtype.INT8, INT8, INT8),
    "int4, int8": (WeightFormat.INT4_G32, ActivationDtype.INT8, None, INT8),
    "int4, fp8": (WeightFormat.INT4_G32, ActivationDtype.FP8, E4M3, E4M3),
    "groups": (WeightFormat.INT8_CHANNEL, ActivationDtype.INT8, INT8_GROUPS, INT8_GROUPS),
    "fp8": (WeightFormat.FP8, ActivationDtype.FP8, E4M3, E4M3),
    "blocks": (WeightFormat.FP8_BLOCK, ActivationDtype.FP8, None, BLOCKS),
    "other codes": (WeightFormat.FP8, ActivationDtype.INT8, E4M3, INT8),
    "bf16": (WeightFormat.FP8, ActivationDtype.BF16, E4M3, None),
    "as they come": (WeightFormat.FP8, None, E4M3, None),
}
by_case = pytest.mark.parametrize(
    ("weight_format", "asked", "meant", "scheme"), CASES.values(), ids=CASES.keys()
)


@by_case
@pytest.mark.parametrize("weight_on", WeightOn, ids=lambda w: w.value)
def test_the_kernels_compute_what_is_asked_for(
    weight_format: WeightFormat,
    asked: ActivationDtype | None,
    meant: ActivationScheme | None,
    scheme: ActivationScheme | None,
    weight_on: WeightOn,
) -> None:
    weights = meaning(quantized(random_weights(sizes(5, 160, 96)), weight_format), meant)
    given = batch(weights.config, 7)
    expected = plainly(weights, given, scheme, weight_on)
    packed = REFERENCE.pack(weights, asked)
    assert packed.activations == scheme
    assert frobenius_error(REFERENCE.run(packed, given, weight_on=weight_on), expected) < FLIPS
    kernel = TorchKernel()
    packed = kernel.pack(weights, asked)
    found = kernel.run(packed, given, weight_on=weight_on)
    assert frobenius_error(found, expected) < FLIPS
    grouped = _run_grouped(packed, given, weight_on).sum(1)
    assert frobenius_error(grouped, expected) < FLIPS
    if scheme is not None:
        plain = plainly(weights, given, None, weight_on)
        assert frobenius_error(plain, expected) > 2 * FLIPS


@by_scheme
def test_weights_that_are_not_packed_round_as_they_say(scheme: ActivationScheme) -> None:
    weights = meaning(quantized(random_weights(sizes()), WeightFormat.INT8_CHANNEL), scheme)
    given = batch(weights.config, 5)
    expected = plainly(weights, given, scheme, WeightOn.OUTPUT)
    for kernel in (REFERENCE, TorchKernel()):
        assert frobenius_error(kernel.run(weights, given), expected) < FLIPS


@pytest.mark.parametrize("gate_up", GateUp, ids=lambda g: g.value)
def test_every_layout_rounds(gate_up: GateUp) -> None:
    config = dataclasses.replace(sizes(4, 64, 32), gate_up=gate_up)
    weights = meaning(quantized(random_weights(config), WeightFormat.INT8_CHANNEL), INT8)
    given = batch(config, 5)
    expected = REFERENCE.run(weights, given)
    assert frobenius_error(TorchKernel().run(weights, given), expected) < FLIPS
    plain = REFERENCE.run(meaning(weights, None), given)
    assert frobenius_error(plain, expected) > FLIPS


def test_dense_matrices_multiply_rows_as_they_come() -> None:
    whole = random_weights(sizes())
    gate_up = quantized(whole, WeightFormat.INT8_CHANNEL).gate_up_proj
    half = dataclasses.replace(whole, gate_up_proj=gate_up)
    given = batch(whole.config, 5)
    rounded_rows = round_activations(given.hidden_states, INT8)
    for kernel in (REFERENCE, TorchKernel()):
        assert torch.equal(kernel.run(meaning(whole, INT8), given), kernel.run(whole, given))
        packed = kernel.pack(half, ActivationDtype.INT8)
        assert packed.activations == INT8
        expected = kernel.run(half, dataclasses.replace(given, hidden_states=rounded_rows))
        assert frobenius_error(kernel.run(packed, given), expected) < 1e-6


def test_a_stored_scale_goes_before_one_that_is_found() -> None:
    weights = quantized(random_weights(sizes(5)), WeightFormat.INT8_CHANNEL)
    scales = torch.tensor([0.02, 0.01, 0.0, 0.03, 0.0])
    inputs = StaticInputs(STATIC_INT8, scales)
    stored = dataclasses.replace(weights, gate_up_inputs=inputs, down_inputs=inputs)
    ids = [[expert, -1] for expert in range(5)]
    given = batch_of(batch(weights.config, 5), ids)
    for kernel in (REFERENCE, TorchKernel()):
        both = kernel.run(kernel.pack(stored, ActivationDtype.INT8), given)
        static = kernel.run(kernel.pack(stored, None), given)
        found = kernel.run(kernel.pack(weights, ActivationDtype.INT8), given)
        for row, scale in enumerate(scales.tolist()):
            assert frobenius_error(both[row], (static if scale else found)[row]) < 1e-6
        # e4m3 codes are others than the stored scales'.
        packed = kernel.pack(stored, ActivationDtype.FP8)
        assert packed.inputs == () and packed.activations == E4M3


@by_scheme
def test_a_row_does_not_depend_on_the_rows_beside_it(scheme: ActivationScheme) -> None:
    weights = meaning(quantized(random_weights(sizes()), WeightFormat.INT8_CHANNEL), scheme)
    given = batch(weights.config, 6)
    rows = given.hidden_states.clone()
    expected = REFERENCE.run(weights, given)
    rows[2] = math.nan
    rows[4] *= 1e5
    for kernel in (REFERENCE, TorchKernel()):
        found = kernel.run(weights, dataclasses.replace(given, hidden_states=rows))
        assert found[2].isnan().all()
        kept = [0, 1, 3, 5]
        assert frobenius_error(found[kept], expected[kept]) < FLIPS
    found = REFERENCE.run(weights, dataclasses.replace(given, hidden_states=rows))
    assert torch.equal(found[kept], expected[kept])


def problem(**changes: Any) -> ExpertsProblem:
    scheme = WeightFormat.FP8.scheme
    found = ExpertsProblem(sizes(), (scheme,), torch.float32, "cpu", activations=E4M3)
    return dataclasses.replace(found, **changes)


def test_how_it_runs_is_said() -> None:
    fp8 = problem(activation_dtype=ActivationDtype.FP8)
    for kernel in (REFERENCE, TorchKernel()):
        assert kernel.how(problem()) is None and not kernel.rounds_as_meant(problem())
        assert kernel.how(fp8) == "activations rounded to e4m3 per token"
        assert kernel.rounds_as_meant(fp8)
        int8 = problem(activation_dtype=ActivationDtype.INT8)
        assert kernel.how(int8) == "activations rounded to int8 per token"
        assert not kernel.rounds_as_meant(int8)
        stored = dataclasses.replace(int8, roundings=(STATIC_INT8,))
        words = "activations rounded to int8 with the file's scales, else int8 per token"
        assert kernel.how(stored) == words and kernel.rounds_as_meant(stored)
    decision = select_kernel(fp8)
    assert decision.kernel.name == "torch"
    if missing() is None:
        (reason,) = [r.reason for r in decision.rejections if r.kernel == "cpu"]
        assert reason == "has no fp8 activations"


def test_a_graph_rounds_too() -> None:
    weights = meaning(quantized(random_weights(sizes()), WeightFormat.FP8), E4M3)
    options = ExpertsOptions(kernel="torch", activation_dtype=ActivationDtype.FP8)
    experts = RoutedExperts(weights.config, weights=weights, options=options)
    given = batch(weights.config, 5)

    def call(rows: Tensor) -> Tensor:
        return experts(dataclasses.replace(given, hidden_states=rows))

    with torch.no_grad():
        expected = plainly(weights, given, E4M3, WeightOn.OUTPUT)
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        assert frobenius_error(compiled(given.hidden_states), expected) < FLIPS
        assert frobenius_error(call(given.hidden_states), expected) < FLIPS


# ------------------------------------------------------------------------------- what is kept


def test_what_is_meant_survives_what_is_made_of_weights() -> None:
    weights = meaning(quantized(random_weights(sizes(4, 64, 64)), WeightFormat.INT4_G32), INT8)
    assert weights.mapped(torch.clone).activations == INT8
    assert cut_weights(weights, 1, 2).activations == INT8
    for asked in (None, *ActivationDtype):
        assert weights.rounded_for(asked).activations == INT8
    experts = RoutedExperts(weights.config, weights=weights)
    assert experts.problem(torch.float32, needs_grad=False).activations == INT8
    experts.run_batch(batch(weights.config, 2))  # the kernel may have the only copy now
    assert experts.expert_weights.activations == INT8
    assert experts.to(torch.float32).expert_weights.activations == INT8
    assert experts.problem(torch.float32, needs_grad=False).activations == INT8


@pytest.mark.parametrize("weight_format", [f for f in WeightFormat if f.scheme.is_quantized])
def test_a_format_means_what_its_files_ask_for(weight_format: WeightFormat) -> None:
    written = OutputFormat.of(weight_format).matrix_format("layer.weight", (128, 256))
    assert written.activations == weight_format.activations
    is_fp8 = weight_format in (WeightFormat.FP8, WeightFormat.FP8_BLOCK)
    assert (weight_format.activations is not None) == is_fp8


# ------------------------------------------------------------------------------------ checkpoints

CONFIG = MixtralConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    dtype="float32",
)
FP8_BLOCK = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"FP8_BLOCK": ["Linear"]},
}
INT8_PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.fixture(scope="module")
def dense_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "mixtral"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(directory)
    return directory


def is_packed(name: str) -> bool:
    return ".experts." in name or "self_attn" in name


def write_fp8_block(dense_files: Path, out: Path) -> None:
    def packed(name: str, value: Tensor) -> tuple[QuantizedMatrix, dict[str, Tensor]]:
        matrix = quantize(value, WeightFormat.FP8_BLOCK)
        codes = matrix.values.view(torch.float8_e4m3fn)
        return matrix, {"weight": codes, "weight_scale": matrix.scales}

    write_with(dense_files, out, codec_for(FP8_BLOCK), FP8_BLOCK, packed, is_packed)


def change_groups(out: Path, **changes: Any) -> None:
    config = json.loads((out / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    for name, change in changes.items():
        groups[name] = groups["group_0"] | change
    (out / "config.json").write_text(json.dumps(config))


def experts_of(model: Any) -> PackedExperts:
    return next(m for m in model.modules() if isinstance(m, PackedExperts))


FILES: dict[str, tuple[str, dict[str, Any], ActivationScheme | None]] = {
    "W8A8": ("ct_int8_channel_w8a8", {}, INT8),
    "FP8_DYNAMIC": ("ct_fp8_channel", {}, E4M3),
    "W4AFP8": ("ct_pack_int4_g128_w4a8_fp8", {}, E4M3),
    "W4A8": ("ct_pack_int4_g32_sym", {"group_0": {"input_activations": INT8_PER_TOKEN}}, INT8),
    "fp8": ("fp8_block128_exact", {}, BLOCKS),
    "W4A16": ("ct_pack_int4_g32_sym", {}, None),
    "MXFP8": ("ct_mxfp8", {}, None),
    "down asks for another": (
        "ct_fp8_channel",
        {"group_1": {"targets": ["re:.*w2$"], "input_activations": INT8_PER_TOKEN}},
        None,
    ),
    "one expert asks for none": (
        "ct_fp8_channel",
        {"group_1": {"targets": ["re:.*experts.2.w1$"], "input_activations": None}},
        None,
    ),
}


@pytest.mark.parametrize(("file", "changes", "meant"), FILES.values(), ids=FILES.keys())
def test_files_say_what_is_meant(
    file: str,
    changes: dict[str, Any],
    meant: ActivationScheme | None,
    dense_files: Path,
    tmp_path: Path,
) -> None:
    write_packed(dense_files, tmp_path / "packed", file, is_packed)
    if changes:
        change_groups(tmp_path / "packed", **changes)
    experts = experts_of(mixtura.from_pretrained(tmp_path / "packed"))
    assert experts.expert_weights.activations == meant
    assert experts.problem(torch.float32, needs_grad=False).activations == meant


def test_a_stored_scale_is_not_found_running(dense_files: Path, tmp_path: Path) -> None:
    write_packed(dense_files, tmp_path / "packed", "ct_fp8_tensor", is_packed)
    assert (
        experts_of(mixtura.from_pretrained(tmp_path / "packed")).expert_weights.activations is None
    )


def test_a_checkpoint_computes_what_it_asks_for(dense_files: Path, tmp_path: Path) -> None:
    write_fp8_block(dense_files, tmp_path / "packed")
    asked = ActivationDtype.FP8
    model = mixtura.from_pretrained(tmp_path / "packed", activation_dtype="fp8", kernel="torch")
    experts = experts_of(model)
    weights, given = experts.expert_weights, batch(sizes(4, 64, 96), 6)
    assert weights.activations == BLOCKS
    expected = REFERENCE.run(weights, given)
    with torch.no_grad():
        assert frobenius_error(experts.run_batch(given), expected) < FLIPS
        plain = REFERENCE.run(meaning(weights, None), given)
        assert frobenius_error(plain, expected) > 2 * FLIPS
    kernel = experts.decide(experts.problem(torch.float32, needs_grad=False)).kernel
    assert kernel.pack(weights, asked).activations == BLOCKS
    (layer,) = explain(tmp_path / "packed", kernel="torch").layers
    assert layer.experts is not None and layer.experts.asked == "e4m3 in groups of 128"
    assert not layer.experts.rounds_as_asked


@pytest.mark.parametrize("weight_format", [WeightFormat.FP8, WeightFormat.INT4_G32])
def test_a_layer_quantized_in_memory_means_what_a_file_would(
    weight_format: WeightFormat, dense_files: Path
) -> None:
    model = mixtura.from_pretrained(dense_files, weights=weight_format)
    assert experts_of(model).expert_weights.activations == weight_format.activations
    explained = in_format(random_weights(sizes()), weight_format)
    assert explained.activations == weight_format.activations


@pytest.mark.parametrize("asked", [ActivationDtype.FP8, ActivationDtype.INT8])
@pytest.mark.parametrize("file", ["ct_fp8_channel", "ct_pack_int4_g32_sym", "fp8_block128_exact"])
def test_linear_layers_round_where_it_is_asked_for(
    file: str, asked: ActivationDtype, dense_files: Path, tmp_path: Path
) -> None:
    means = write_packed(dense_files, tmp_path / "packed", file, is_packed)
    model = mixtura.from_pretrained(tmp_path / "packed", activation_dtype=asked)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(linears) == 4
    rows = torch.randn(3, 64)
    for path, linear in linears.items():
        weight = means[f"{path}.weight"]
        scheme = activations_for(asked, None, [linear.matrix.scheme])
        assert scheme is not None
        expected = F.linear(round_activations(rows, scheme), weight)
        # In torch: the same with float64.
        assert frobenius_error(linear(rows.double()), expected) < 1e-6
        if asked is ActivationDtype.FP8:
            # Multiplied in bf16, where the processor has its products.
            assert frobenius_error(linear(rows), expected) < 4e-3
            assert frobenius_error(linear(rows), F.linear(rows, weight)) > 1e-2
