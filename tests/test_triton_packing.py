"""Quantized experts in the Triton kernel's layout and back; which are refused; modules with them.

`test_triton_packed.py` compares what the kernels compute.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from covering import covering_cases
from expert_cases import random_batch, random_weights, sizes
from gpu_device import DEVICE
from packed_experts import (
    BF16,
    E4M3_GROUPS,
    E4M3_TOKENS,
    FP16,
    FP32,
    INT8_TOKENS,
    KERNEL,
    SCHEMES,
    any_experts,
    assert_same_weights,
    experts_in,
    floats,
    ints,
    on_device,
    packed_as,
    random_rows,
    run_packed,
    sized,
)
from tolerances import assert_close, frobenius_error
from torch import Tensor

import mixtura.kernels.triton as triton_kernels
from mixtura import FusedMoE, MoEConfig, RoutingConfig
from mixtura.config import ActivationDtype, GateUp
from mixtura.errors import InputError, NoKernelFits
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels import register_kernel, select_kernel, unregister_kernel
from mixtura.kernels.triton import TritonKernel
from mixtura.kernels.triton.device import HOPPER, INTERPRETER
from mixtura.kernels.triton.packed.call import PackedCall
from mixtura.kernels.triton.packed.layout import layout_for
from mixtura.kernels.triton.table import DIRECT_TILE, Blocks, Product
from mixtura.quant.activations import (
    ActivationExtra,
    ActivationGroup,
    ActivationScheme,
    StaticInputs,
)
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint
from mixtura.types import ExpertsProblem, ExpertWeights

STATIC_INT8 = ActivationScheme(Code.INT, 8, ActivationGroup.TENSOR, is_static=True)
STATIC_E4M3 = dataclasses.replace(STATIC_INT8, code=Code.E4M3)

# ----------------------------------------------------------------------------------- back and forth


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, elsewhere in memory and not one after the other."""
    wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=torch.uint8)
    wide = wide.repeat_interleave(tensor.itemsize, -1).view(tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(
    "case",
    covering_cases(
        {
            "scheme": list(SCHEMES),
            "name": ["stacked", "interleaved", "separate", "ungated-bias", "rms"],
            "size": [(40, 24), (7, 3), (130, 65), (257, 129)],
            "activations": [None, INT8_TOKENS, E4M3_TOKENS, E4M3_GROUPS],
            "is_strided": [False, True],
        }
    ),
    ids=lambda case: f"{case['scheme']}-{case['name']}-{case['size']}-{case['activations']}",
)
def test_what_is_packed_comes_back(case: dict[str, Any]) -> None:
    """Bit for bit: blocks that gate and up share, odd sizes, zero points of either dtype."""
    weights = any_experts(sized(case["name"], 3, *case["size"]), SCHEMES[case["scheme"]])
    weights = dataclasses.replace(weights, activations=case["activations"])
    given = weights.mapped(strided) if case["is_strided"] else weights
    assert_same_weights(KERNEL.unpack(packed_as(given), weights.config), weights)


@pytest.mark.parametrize("asked", [None, *ActivationDtype])
def test_stored_scales_come_back(asked: ActivationDtype | None) -> None:
    weights = experts_in(sized("bias", 3, 40, 24), SCHEMES["int8-channel"])
    inputs = StaticInputs(STATIC_INT8, torch.tensor([0.5, 0.0, 2.0]))
    weights = dataclasses.replace(weights, gate_up_inputs=inputs, activations=INT8_TOKENS)
    assert_same_weights(KERNEL.unpack(packed_as(weights, asked), weights.config), weights)


def test_dense_experts_are_packed_as_they_are() -> None:
    weights = random_weights(sizes(), FP16)
    assert KERNEL.pack(weights) is weights and KERNEL.unpack(weights, weights.config) is weights
    assert KERNEL.shares_memory(is_quantized=False) and not KERNEL.shares_memory(is_quantized=True)


@pytest.mark.parametrize(
    "scheme, activations",
    [
        ("int4-g32", None),
        ("int4-channel-zeros", INT8_TOKENS),
        ("nvfp4-rows", None),
        ("fp8-block", E4M3_GROUPS),
        ("int8-g128-zeros", None),
    ],
)
def test_an_expert_is_copied_over_another(
    scheme: str, activations: ActivationScheme | None
) -> None:
    """Every slot of a layer's experts, into those of another layer."""
    config = sized("gpt-oss", 3, 40, 24)
    here, there = (
        dataclasses.replace(experts_in(config, SCHEMES[scheme], seed=seed), activations=activations)
        for seed in (0, 1)
    )
    packed, other = packed_as(here), packed_as(there)
    rows = random_rows(config, 3, 1, FP16, absent=0.0)

    def of_expert(layer: Any, expert: int) -> Tensor:
        ids = torch.full((3, 1), expert, dtype=torch.int32)
        return run_packed(layer, dataclasses.replace(rows, local_ids=ids))

    before = [of_expert(other, expert) for expert in range(3)]
    wanted = of_expert(packed, 2)
    slots, others = KERNEL.slots(packed), KERNEL.slots(other)
    assert slots.keys() == others.keys() and {t.shape[0] for t in slots.values()} == {3}
    for name, tensor in slots.items():
        others[name][0] = tensor[2]
    assert torch.equal(of_expert(other, 0), wanted) and not torch.equal(before[0], wanted)
    assert torch.equal(of_expert(other, 1), before[1])
    back = KERNEL.unpack(other, config)
    for mine, theirs in zip(back.projections(), here.projections(), strict=True):
        for name, tensor in mine.tensors.items():
            assert torch.equal(tensor[0].cpu(), theirs.tensors[name][2])


@pytest.mark.parametrize("scheme", ["nvfp4-rows", "int8-channel-zeros", "fp8-block", "fp8"])
def test_slots_are_not_the_memory_that_was_given(scheme: str) -> None:
    """Experts that move change nobody else's weights, and files that were mapped can be let go."""
    weights = experts_in(sized("bias", 3, 40, 24), SCHEMES[scheme])
    inputs = StaticInputs(STATIC_E4M3, torch.tensor([0.5, 0.0, 2.0]))
    if KERNEL.unsupported(problem(SCHEMES[scheme], roundings=(STATIC_E4M3,))) is None:
        weights = dataclasses.replace(weights, gate_up_inputs=inputs, down_inputs=inputs)
    given = {tensor.untyped_storage().data_ptr() for tensor in weights.tensors()}
    packed = KERNEL.pack(weights)
    found = {tensor.untyped_storage().data_ptr() for tensor in KERNEL.slots(packed).values()}
    assert not found & given


def test_stored_scales_are_slots() -> None:
    config = sized("bias", 3, 40, 24)
    inputs = StaticInputs(STATIC_INT8, torch.tensor([0.5, 0.0, 2.0]))
    weights = experts_in(config, SCHEMES["int8-channel"])
    weights = dataclasses.replace(weights, gate_up_inputs=inputs, down_inputs=inputs)
    assert {"gate_up_inputs", "down_inputs"} <= KERNEL.slots(packed_as(weights)).keys()


# ------------------------------------------------------------------------------------ what is wrong


def spoiled(weights: ExpertWeights, name: str, value: float) -> ExpertWeights:
    tensor = getattr(weights.down_proj, name).clone()
    tensor.view(-1)[-1] = value
    return dataclasses.replace(
        weights, down_proj=dataclasses.replace(weights.down_proj, **{name: tensor})
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "scheme, name",
    [("int4-g32", "scales"), ("fp8", "scales"), ("fp8-block", "scales"), ("nvfp4", "global_scale")],
)
def test_scales_that_are_no_numbers_are_refused(scheme: str, name: str, value: float) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    with pytest.raises(InputError, match=rf"{name} \(.*\) must be finite; got -?(nan|inf)"):
        packed_as(spoiled(weights, name, value))


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "nvfp4"])
def test_small_scales_that_are_no_numbers_are_refused(scheme: str) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    scales = weights.gate_up_proj.scales
    assert scales is not None
    bits = scales.clone().view(torch.uint8)
    bits[1, 2, 0] = 0x7F if scales.dtype is torch.float8_e4m3fn else 0xFF
    bad = dataclasses.replace(weights.gate_up_proj, scales=bits.view(scales.dtype))
    with pytest.raises(InputError, match=r"scales \(\(1, 2, 0\)\) must be finite; got nan"):
        packed_as(dataclasses.replace(weights, gate_up_proj=bad))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("activations", [None, E4M3_TOKENS])
def test_codes_that_are_no_numbers_are_refused(
    code: int, activations: ActivationScheme | None
) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES["fp8"])
    bad = dataclasses.replace(spoiled(weights, "values", code), activations=activations)
    with pytest.raises(InputError, match=r"values \(expert 2\) must be numbers; got NaN codes"):
        packed_as(bad)


@pytest.mark.parametrize("code", [0x7C, 0xFC, 0x7F])
@pytest.mark.parametrize("scheme", ["e5m2", "e5m2-g32"])
def test_infinite_codes_are_refused(scheme: str, code: int) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    with pytest.raises(InputError, match=r"values \(expert 2\) must be numbers"):
        packed_as(spoiled(weights, "values", code))


@pytest.mark.parametrize("scheme", ["int4-g32-fp16-zeros", "int4-channel-zeros", "int8-g128-zeros"])
def test_zero_points_that_no_code_is_near_are_refused(scheme: str) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    wide = weights.down_proj.zero_points
    assert wide is not None
    down = dataclasses.replace(weights.down_proj, zero_points=wide.short())
    weights = dataclasses.replace(weights, down_proj=down)
    limit = 2 ** SCHEMES[scheme].bits
    packed_as(spoiled(weights, "zero_points", limit))
    for value in (-1, limit + 1):
        with pytest.raises(InputError, match=rf"zero points \(.*\) must be in 0..{limit}.*got"):
            packed_as(spoiled(weights, "zero_points", value))


@pytest.mark.parametrize(
    "scheme, value", [("int4-g32-fp32", 1e5), ("int8-g32", -1e6), ("fp8-block", 1e6)]
)
def test_scales_that_operands_cannot_have_are_refused(scheme: str, value: float) -> None:
    """Those of groups, where weights are multiplied in 16 bits."""
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    with pytest.raises(
        InputError, match=r"scales \(.*\) must be at most .* for the Triton kernels"
    ):
        packed_as(spoiled(weights, "scales", value))


@pytest.mark.parametrize("scheme, activations", [("fp8", None), ("fp8-block", E4M3_GROUPS)])
def test_scales_of_sums_may_be_anything(scheme: str, activations: ActivationScheme | None) -> None:
    weights = experts_in(sized("stacked", 3, 40, 24), SCHEMES[scheme])
    packed_as(dataclasses.replace(spoiled(weights, "scales", 1e6), activations=activations))


def problem(*schemes: QuantScheme, **changes: Any) -> ExpertsProblem:
    given = ExpertsProblem(sizes(), schemes, BF16, "cuda")
    return dataclasses.replace(given, **changes)


INT4, FP8 = SCHEMES["int4-g32"], SCHEMES["fp8"]
NF4 = QuantScheme(
    Code.CODEBOOK, 4, (1, 64), FP32, codebook=tuple(float(level) for level in range(16))
)
UNREAD: dict[str, tuple[ExpertsProblem, str]] = {
    "codebook": (problem(NF4), "has no decode step for codebook codes"),
    "super-blocks": (
        problem(
            QuantScheme(Code.INT, 4, (1, 32), torch.uint8, ZeroPoint.MINIMUM, super_columns=256)
        ),
        "has no decode step for scales of super-blocks",
    ),
    "blocks": (problem(QuantScheme.of_blocks("iq2_xxs")), "has no decode step for iq2_xxs codes"),
    "permuted": (
        problem(dataclasses.replace(INT4, has_permutation=True)),
        "reads columns in the order of the rows', and these are permuted",
    ),
    "minima": (
        problem(ints(4, 32, FP16, ZeroPoint.MINIMUM)),
        "subtracts zero points from codes, not minima from weights",
    ),
    "odd groups": (problem(ints(4, 24, BF16)), "groups of a multiple of 16 columns, not of 24"),
    "groups of all rows": (
        problem(floats(Code.E4M3, 8, (None, 32))),
        "reads groups of some rows, not of all",
    ),
    "gate unlike up": (
        problem(INT4, FP8, has_unlike_gate_up=True),
        "reads gate and up of one scheme, and they have two",
    ),
    "dense too": (
        problem(INT4, QuantScheme.dense(BF16)),
        "reads quantized matrices, or dense ones, and not both in one layer",
    ),
    "asked int8": (
        problem(FP8, activation_dtype=ActivationDtype.INT8),
        "multiplies no int8 activations with 'e4m3",
    ),
    "asked fp8": (
        problem(SCHEMES["int8-channel"], activation_dtype=ActivationDtype.FP8),
        "multiplies no e4m3 activations with 'int8",
    ),
    "asked int8 with zero points": (
        problem(SCHEMES["int8-channel-zeros"], activation_dtype=ActivationDtype.INT8),
        "multiplies no int8 activations with 'int8",
    ),
    "asked int8 of narrow groups": (
        problem(ints(4, 16, BF16), activation_dtype=ActivationDtype.INT8),
        "multiplies int8 activations with groups of a multiple of 32, not 16",
    ),
    "stored e4m3": (
        problem(SCHEMES["int8-channel"], roundings=(STATIC_E4M3,)),
        "multiplies no e4m3 activations with 'int8",
    ),
    "fp32 rows": (problem(INT4, row_dtype=FP32), "computes rows of bf16 and fp16"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_run_says_why_and_runs_in_torch(name: str) -> None:
    asked, reason = UNREAD[name]
    found = KERNEL.unsupported(asked)
    assert found is not None and reason in found
    decision = select_kernel(asked)
    assert decision.kernel.name == "torch" and decision.is_fallback
    reasons = {rejection.kernel: rejection.reason for rejection in decision.rejections}
    assert reasons["triton"] == found and {"cpu", "reference"} <= reasons.keys()
    for options in ({"strict": True}, {"kernel": "triton"}):
        with pytest.raises(NoKernelFits) as caught:
            select_kernel(asked, **options)
        assert f"triton: {found}" in str(caught.value)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_run_is_chosen(scheme: str, dtype: torch.dtype) -> None:
    asked = problem(SCHEMES[scheme], row_dtype=dtype)
    assert KERNEL.unsupported(asked) is None
    # Where another library is installed it may come first, and that is no fallback.
    assert select_kernel(asked, kernel="triton", strict=True).kernel.name == "triton"


# ------------------------------------------------------------------------------- what rows become

MX = dataclasses.replace(E4M3_GROUPS, group_columns=32, extra=ActivationExtra.POWER_SCALES)
NVFP4 = ActivationScheme(Code.E2M1, 4, ActivationGroup.GROUP, 16)
KEPT = "packed weights, 16-bit activations"
OWN = f"{KEPT}, as the kernel"

HOW: list[tuple[str, ActivationScheme | None, ActivationDtype | None, str]] = [
    ("fp8", None, None, KEPT),
    ("fp8", E4M3_TOKENS, None, "activations rounded to e4m3 per token"),
    ("fp8-block", E4M3_GROUPS, None, "activations rounded to e4m3 in groups of 128"),
    ("int8-channel", INT8_TOKENS, None, "activations rounded to int8 per token"),
    ("int4-g128", E4M3_TOKENS, None, "activations rounded to e4m3 per token"),
    ("mxfp8", MX, None, f"{OWN} rounds no rows to {MX}"),
    ("nvfp4", NVFP4, None, f"{OWN} rounds no rows to {NVFP4}"),
    ("nvfp4", E4M3_TOKENS, None,
     f"{OWN} multiplies e4m3 activations with groups of a multiple of 32, not 16"),
    ("int8-channel-zeros", INT8_TOKENS, None,
     f"{OWN} multiplies no int8 activations with '{SCHEMES['int8-channel-zeros']}'"),
    ("fp8-block-32", E4M3_GROUPS, None,
     f"{OWN} rounds 128 columns of a row together, beside weights in steps of as many"),
    ("fp8", E4M3_TOKENS, ActivationDtype.BF16, KEPT),
    ("fp8-block", None, ActivationDtype.FP8, "activations rounded to e4m3 in groups of 128"),
    ("int4-g32", None, ActivationDtype.FP8, "activations rounded to e4m3 per token"),
    ("int4-g32", None, ActivationDtype.INT8, "activations rounded to int8 per token"),
    ("int8-channel", E4M3_TOKENS, ActivationDtype.INT8, "activations rounded to int8 per token"),
]  # fmt: skip


@pytest.mark.parametrize("scheme, meant, asked, expected", HOW)
def test_how_rows_are_multiplied(
    scheme: str, meant: ActivationScheme | None, asked: ActivationDtype | None, expected: str
) -> None:
    given = problem(SCHEMES[scheme], activations=meant, activation_dtype=asked)
    assert KERNEL.unsupported(given) is None
    assert KERNEL.how(given) == expected
    found = KERNEL.activations(asked, meant, given.schemes)
    assert (found is None) == expected.startswith(KEPT)
    assert found is None or str(found) in expected
    if asked is None:
        assert KERNEL.rounds_as_meant(given) == (meant is not None and found is not None)


def test_how_rows_with_stored_scales_are_multiplied() -> None:
    given = problem(FP8, roundings=(STATIC_E4M3,))
    assert KERNEL.unsupported(given) is None
    assert KERNEL.how(given) == "activations rounded to e4m3 with the file's scales"
    assert KERNEL.how(problem(QuantScheme.dense(BF16))) is None


def test_gpus_without_products_of_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only meant gives way; what is asked for does not, nor do stored scales."""
    monkeypatch.setattr(triton_kernels, "has_e4m3_products", lambda: False)
    reason = "multiplies e4m3 activations from compute capability 8.9 on"
    meant = problem(FP8, activations=E4M3_TOKENS)
    assert KERNEL.unsupported(meant) is None and KERNEL.how(meant) == f"{OWN} {reason}"
    assert KERNEL.activations(None, E4M3_TOKENS, (FP8,)) is None
    assert KERNEL.unsupported(problem(FP8, activation_dtype=ActivationDtype.FP8)) == reason
    assert KERNEL.unsupported(problem(FP8, roundings=(STATIC_E4M3,))) == reason
    assert KERNEL.unsupported(problem(INT4, activation_dtype=ActivationDtype.INT8)) is None


# -------------------------------------------------------------------------------------- in modules


@pytest.fixture
def anywhere() -> Iterator[str]:
    """The name of the kernel where any device will do."""

    class AnyDevice(TritonKernel):
        name = "triton-anywhere"
        devices = None

    register_kernel(AnyDevice.name, AnyDevice)
    yield AnyDevice.name
    unregister_kernel(AnyDevice.name)


FORMATS: list[tuple[WeightFormat, ActivationDtype | None]] = [
    (WeightFormat.INT4_G128, None),
    (WeightFormat.FP8_BLOCK, ActivationDtype.FP8),
    (WeightFormat.MXFP4, None),
    (WeightFormat.INT8_CHANNEL, ActivationDtype.INT8),
]


@pytest.mark.parametrize("weight_format, asked", FORMATS)
def test_a_layer_gives_what_torch_gives(
    weight_format: WeightFormat, asked: ActivationDtype | None, anywhere: str
) -> None:
    config = MoEConfig(
        hidden_size=40,
        routing=RoutingConfig(num_experts=4, top_k=2),
        experts=sizes(4, 40, 24),
        activation_dtype=asked,
    )
    weights = experts_in(config.experts, weight_format.scheme)
    weights = weights.mapped(lambda tensor: tensor.to(DEVICE))

    def layer(kernel: str) -> FusedMoE:
        made = FusedMoE(config, weights=weights, kernel=kernel, dtype=FP16, device=DEVICE)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        return made

    mine, plain = layer(anywhere), layer("torch")
    for num_rows in (0, 1, 6):
        rows = random_rows(config.experts, num_rows, 2, FP16).hidden_states.to(DEVICE)
        with torch.no_grad():
            assert_close(mine(rows).cpu(), plain(rows).cpu(), BF16 if asked else FP16)


def stored_bytes(module: RoutedExperts) -> int:
    assert module.given is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in module.given.tensors())


@pytest.mark.parametrize("weight_format, asked", FORMATS)
def test_a_module_holds_the_weights_once(
    weight_format: WeightFormat, asked: ActivationDtype | None, anywhere: str
) -> None:
    """What they were packed from is freed, and comes back; copies and moves pack anew."""
    config = sized("bias", 3, 40, 24)
    weights = experts_in(config, weight_format.scheme)
    given = weights.mapped(lambda tensor: tensor.to(DEVICE))
    options = ExpertsOptions(kernel=anywhere, activation_dtype=asked)
    module = RoutedExperts(config, weights=given, options=options)
    batch = on_device(random_batch(config, 3, dtype=FP16))

    def found(of: RoutedExperts) -> Tensor:
        with torch.no_grad():
            return of.run_batch(batch).cpu()

    expected = found(module)
    assert stored_bytes(module) < weights.num_bytes / 4
    assert torch.equal(found(module), expected)
    assert_same_weights(module.expert_weights, weights)
    clone = copy.deepcopy(module)
    assert_same_weights(clone.expert_weights, weights)
    assert torch.equal(found(clone), expected)
    module.to(torch.bfloat16)  # moves; packed weights have no other dtype
    assert_same_weights(module.expert_weights, weights)
    assert torch.equal(found(module), expected)
    module.options = ExpertsOptions(kernel="torch", activation_dtype=asked)
    module.state.decisions.clear()
    module.state.choices.clear()
    assert frobenius_error(found(module), expected) < 5e-3
    assert_same_weights(module.expert_weights, weights)
    module.to("meta")
    assert module.expert_weights.device.type == "meta"


def test_stored_scales_are_held_with_the_weights(anywhere: str) -> None:
    """Also where the arithmetic asked for has no use for them."""
    config = sized("bias", 3, 40, 24)
    inputs = StaticInputs(STATIC_INT8, torch.tensor([0.01, 0.0, 0.02]))
    weights = experts_in(config, SCHEMES["int8-channel"])
    weights = dataclasses.replace(weights, gate_up_inputs=inputs, down_inputs=inputs)
    for asked in (None, ActivationDtype.BF16):
        given = weights.mapped(lambda tensor: tensor.to(DEVICE))
        options = ExpertsOptions(kernel=anywhere, activation_dtype=asked)
        module = RoutedExperts(config, weights=given, options=options)
        with torch.no_grad():
            module.run_batch(on_device(random_batch(config, 2, dtype=FP16)))
        assert_same_weights(module.expert_weights, weights)


def test_weights_are_not_packed_within_a_graph() -> None:
    assert KERNEL.packs_in_graphs(is_quantized=False)
    assert not KERNEL.packs_in_graphs(is_quantized=True)


@pytest.mark.parametrize("code", [Code.E2M1, Code.E2M3, Code.E3M2, Code.E4M3, Code.E5M2])
@pytest.mark.parametrize("deviation", [0.02, 0.001])
def test_fp16_holds_what_codes_become(code: Code, deviation: float) -> None:
    """What the interpreter, which is in fp32, cannot show: operands in the rows' dtype."""
    bits = 1 + code.exponent_bits + code.mantissa_bits
    scheme = floats(code, bits, (1, 32), FP32)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * deviation
    matrix = quantize(weight, scheme)
    layout = layout_for(scheme, None).for_rows(FP16)
    assert matrix.scales is not None
    scales = matrix.scales.repeat_interleave(32, 1)
    levels = dequantize(matrix) / scales
    field = (levels * 2.0**-layout.field_exponent).half()
    operand = field * (scales * 2.0**layout.level_exponent).half()
    found = operand.float() * 2.0**layout.left_exponent
    bound = 1e-3 if deviation == 0.02 else 4e-3
    assert frobenius_error(found, dequantize(matrix)) <= bound


def test_down_may_be_unlike_gate_and_up() -> None:
    separate = dataclasses.replace(sizes(), gate_up=GateUp.SEPARATE)
    assert KERNEL.unsupported(problem(INT4, FP8, experts=separate)) is None


def test_strict_refuses_what_falls_short_of_the_checkpoint() -> None:
    tokens = ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN)
    given = problem(dataclasses.replace(INT4, bits=8), activations=tokens)
    decision = select_kernel(given)
    assert decision.kernel.name == "triton"
    assert "16-bit activations, as the kernel multiplies no e4m3" in str(decision.kernel.how(given))
    with pytest.raises(NoKernelFits, match="triton: multiplies no e4m3 activations with 'int8"):
        select_kernel(given, strict=True)
    asked = dataclasses.replace(given, activation_dtype=ActivationDtype.BF16)
    assert select_kernel(asked, strict=True).kernel.name == "triton"


def test_slots_that_keep_all_processors_busy_have_the_blocks_of_small_tiles() -> None:
    def blocks(num_rows: int, tuned: dict[Any, Blocks]) -> int:
        weights = experts_in(sized("stacked", 4, 64, 640), INT4)
        rows = torch.zeros(num_rows, 64, dtype=BF16)
        ids, slot_weights = torch.zeros(num_rows, 4).int(), torch.zeros(num_rows, 4)
        call = PackedCall(packed_as(weights), rows, ids, slot_weights, False, INTERPRETER, tuned)
        return call.cut(Product.GATE_UP, None)[1].columns

    weights = packed_as(experts_in(sized("stacked", 4, 64, 640), INT4))
    row = torch.zeros(1, 64, dtype=BF16)
    one = PackedCall(weights, row, torch.zeros(1, 4).int(), torch.zeros(1, 4), False, INTERPRETER)
    key = one.key(Product.GATE_UP, DIRECT_TILE)
    assert blocks(1, {}) == one.blocks(Product.GATE_UP, 16).columns == 64  # 4 x 10 programs
    tuned = Blocks(32, key.packing.depth if key.packing else 0, 4, 2)
    assert blocks(8, {key: tuned}) == 32
    few = dataclasses.replace(one, device=HOPPER)
    assert few.cut(Product.GATE_UP, None)[1] == few.blocks(Product.GATE_UP, DIRECT_TILE)
