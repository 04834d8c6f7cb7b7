"""Kernels that call others' products: torch's grouped_mm, DeepGEMM and FlashInfer.

grouped_mm runs here as it is; the packages are stand-ins that check what they are given and do what
they document. Memory that nobody wrote is NaN in these tests, as a kernel may leave it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    CONFIGS,
    batch_of,
    converted,
    gradients,
    plain_experts,
    problem_of,
    random_batch,
    random_weights,
    sizes,
)
from optional_packages import install_deep_gemm, install_flashinfer, module_of
from tolerances import NOISE_FACTOR, RTOL, assert_close, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from mixtura.cli.options import DEMO
from mixtura.config import ActivationFunction, ExpertsConfig, WeightOn
from mixtura.errors import NoKernelFits
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.hf.explain import explain
from mixtura.kernels import (
    ExpertsKernel,
    get_kernel,
    optional,
    registry,
    select_kernel,
)
from mixtura.kernels.deep_gemm import aligned
from mixtura.kernels.torch.sorted_slots import sort_slots
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

REFERENCE, GROUPED_MM = get_kernel("reference"), get_kernel("grouped_mm")
DEEP_GEMM, FLASHINFER = get_kernel("deep_gemm"), get_kernel("flashinfer")

EDGES: dict[str, list[list[int]]] = {
    "one row": [[3, 0]],
    "empty experts": [[1, 3], [3, 1], [1, 3]],
    "all to the first": [[0], [0], [0], [0], [0]],
    "all to the last": [[4], [4], [4]],
    "slots without an expert": [[-1, 2], [2, -1], [4, 0]],
    "a row without experts": [[1, 2], [-1, -1], [0, 4]],
    "no expert at all": [[-1, -1], [-1, -1]],
    "an expert twice in a row": [[2, 2], [0, 2], [4, 4], [-1, 1]],
    "every expert": [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]],
}


def resized(config: ExpertsConfig, hidden_size: int, intermediate_size: int) -> ExpertsConfig:
    return dataclasses.replace(config, hidden_size=hidden_size, intermediate_size=intermediate_size)


SMALL = {name: resized(config, 16, 8) for name, config in CONFIGS.items()}
WIDE = {name: resized(config, 128, 64) for name, config in CONFIGS.items()}
"""Sizes of DeepGEMM's."""

FLASHINFER_CONFIGS = {
    name: SMALL[name] for name in ("stacked", "interleaved", "separate", "ungated", "transposed")
}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return install_deep_gemm(monkeypatch)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flashinfer(monkeypatch)


def check(
    kernel: ExpertsKernel,
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
) -> None:
    """Rows and terms against the reference on the same numbers, widened to fp32."""
    dtype = batch.hidden_states.dtype
    truth, wide = converted(weights, torch.float32), batch.hidden_states.float()
    wide_batch = dataclasses.replace(batch, hidden_states=wide)
    with torch.no_grad():
        expected = REFERENCE.run(truth, wide_batch, weight_on=weight_on)
        terms = REFERENCE.run(truth, wide_batch, weight_on=weight_on, reduce=False)
        noise = plain_experts(weights, batch, weight_on)
        packed = kernel.pack(weights)
        actual = kernel.run(packed, batch, weight_on=weight_on)
        actual_terms = kernel.run(packed, batch, weight_on=weight_on, reduce=False)
    assert (actual.dtype, actual_terms.dtype) == (dtype, torch.float32)
    assert actual_terms.shape == terms.shape
    assert_close(actual, expected, dtype, noise=noise)
    bound = max(RTOL[dtype], NOISE_FACTOR * relative_error(noise, expected))
    assert relative_error(actual_terms, terms) <= bound
    assert not actual_terms[batch.local_ids < 0].any()


def check_edge(kernel: ExpertsKernel, config: ExpertsConfig, ids: list[list[int]]) -> None:
    weights = random_weights(config, torch.bfloat16)
    batch = batch_of(random_batch(config, len(ids), dtype=torch.bfloat16), ids)
    check(kernel, weights, batch)
    absent = [row for row, experts in enumerate(ids) if max(experts) < 0]
    assert not kernel.run(kernel.pack(weights), batch)[absent].any()


def check_no_rows(kernel: ExpertsKernel, config: ExpertsConfig) -> None:
    weights = random_weights(config, torch.bfloat16)
    batch = random_batch(config, 0, 3, torch.bfloat16)
    out, terms = (kernel.run(kernel.pack(weights), batch, reduce=r) for r in (True, False))
    assert (out.shape, out.dtype) == ((0, config.hidden_size), torch.bfloat16)
    assert (terms.shape, terms.dtype) == ((0, 3, config.hidden_size), torch.float32)


def cuda(config: ExpertsConfig, dtype: torch.dtype = torch.bfloat16, **other: Any) -> Any:
    return dataclasses.replace(problem_of(config, dtype), device="cuda", **other)


# --------------------------------------------------------------------------------------- grouped_mm


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SMALL)
def test_grouped_mm_runs_every_layout_and_term(name, dtype, weight_on):
    weights = random_weights(SMALL[name], dtype)
    ids = [[0, 3], [-1, 3], [-1, -1], [3, 1], [4, 4]]
    batch = batch_of(random_batch(SMALL[name], 5, dtype=dtype), ids)
    check(GROUPED_MM, weights, batch, weight_on)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_grouped_mm_runs_every_activation(activation):
    config = dataclasses.replace(SMALL["interleaved"], activation=activation)
    check(GROUPED_MM, random_weights(config), random_batch(config, 9))


@pytest.mark.parametrize("name", ["stacked", "gpt-oss", "rms-scale-first", "separate"])
@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
def test_grouped_mm_edges(ids, name):
    check_edge(GROUPED_MM, SMALL[name], ids)


def test_grouped_mm_without_rows():
    check_no_rows(GROUPED_MM, SMALL["bias"])


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_grouped_mm(name, weight_on):
    """Of rows, routing weights and every weight, with slots that have no expert."""
    weights = random_weights(SMALL[name])
    batch = batch_of(random_batch(SMALL[name], 4), [[0, 3], [-1, 3], [-1, -1], [3, 1]])
    wide = converted(weights, torch.float64)
    wide_batch = ExpertBatch(
        batch.hidden_states.double(), batch.local_ids, batch.topk_weights.double()
    )
    expected_out, expected = gradients(REFERENCE, wide, wide_batch, weight_on)
    out, found = gradients(GROUPED_MM, weights, batch, weight_on)
    assert_close(out, expected_out, torch.float32)
    for role, gradient in expected.items():
        assert relative_error(found[role], gradient) < 4 * RTOL[torch.float32], role


def test_gradients_of_grouped_mm_without_rows():
    config = SMALL["bias"]
    _, found = gradients(
        GROUPED_MM, random_weights(config), random_batch(config, 0), WeightOn.OUTPUT
    )
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_grouped_mm_equals_eager(dtype):
    """torch traces the operator for bf16 alone."""
    torch._dynamo.reset()
    weights, batch = random_weights(SMALL["gpt-oss"], dtype), random_batch(SMALL["gpt-oss"], 5)
    batch = dataclasses.replace(batch, hidden_states=batch.hidden_states.to(dtype))
    run = torch.compile(GROUPED_MM.run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(run(weights, batch), GROUPED_MM.run(weights, batch), dtype)


def test_experts_that_insist_on_grouped_mm_run_and_train_on_a_cpu():
    config = SMALL["bias"]
    options = [ExpertsOptions(kernel=name, strict=True) for name in ("grouped_mm", "torch")]
    experts = [RoutedExperts(config, options=part) for part in options]
    with torch.no_grad():
        for first, second in zip(*(module.parameters() for module in experts), strict=True):
            first.copy_(torch.randn(first.shape) * 0.3)
            second.copy_(first)
    batch = random_batch(config, 5)
    outs = [module.run_batch(batch) for module in experts]
    assert_close(outs[0], outs[1], torch.float32)
    for out in outs:
        out.sum().backward()
    for left, right in zip(experts[0].parameters(), experts[1].parameters(), strict=True):
        assert relative_error(left.grad, right.grad) < 4 * RTOL[torch.float32]


DENSE = SMALL["stacked"]
INT4 = (WeightFormat.INT4_G32.scheme,)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (
            problem_of(DENSE, torch.float64),
            "multiplies only torch.bfloat16, torch.float16, torch.float32, not torch.float64",
        ),
        (cuda(DENSE, schemes=INT4), f"multiplies dense weights, and these are {INT4[0]}"),
        (
            dataclasses.replace(problem_of(DENSE), row_dtype=torch.bfloat16),
            "multiplies rows and weights of one dtype, not torch.bfloat16 and torch.float32",
        ),
        (
            cuda(DENSE, torch.float16),
            "is one launch for bf16 alone; with torch.float16 it would wait for the host",
        ),
        (
            problem_of(sizes(3, 18, 16)),
            "needs sizes that are multiples of 4, and hidden_size is 18",
        ),
        (
            cuda(sizes(3, 16, 12)),
            "needs sizes that are multiples of 8, and intermediate_size is 12",
        ),
        (
            problem_of(DENSE, is_deterministic=True),
            "its rows depend on the batch around them, and deterministic=True was asked for",
        ),
    ],
)
def test_grouped_mm_says_why_it_cannot(problem, reason):
    assert GROUPED_MM.unsupported(problem) == reason


def test_grouped_mm_needs_a_gpu_on_which_it_is_one_launch(monkeypatch):
    for here, reason in {
        (8, 0): "needs compute capability 9.x or 10.x, and the GPU here has 8.0",
        (12, 0): "needs compute capability 9.x or 10.x, and the GPU here has 12.0",
        (9, 0): None,
        (10, 3): None,
        None: None,  # a GPU that is not here may be of any kind
    }.items():
        monkeypatch.setattr(optional, "capability", lambda here=here: here)
        assert GROUPED_MM.unsupported(cuda(DENSE)) == reason
        assert GROUPED_MM.unsupported(problem_of(DENSE)) is None


# -------------------------------------------------------------------- no kernel waits for the host


def install_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that look at no value."""
    install_flashinfer(
        monkeypatch, cutlass_fused_moe=lambda *args, output, **kwargs: output.zero_()
    )
    package = module_of(
        "deep_gemm",
        m_grouped_bf16_gemm_nt_contiguous=lambda a, b, d, layout: d.zero_(),
        get_mk_alignment_for_contiguous_layout=lambda: 128,
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", package)


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("name", ["grouped_mm", "deep_gemm", "flashinfer"])
def test_a_call_reads_no_value_on_the_host(name, reduce, weight_on, monkeypatch):
    """On tensors without values every attempt is an error; so a CUDA graph can hold the call."""
    install_silent(monkeypatch)
    kernel, config = get_kernel(name), WIDE["stacked"]
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(), torch.no_grad():
        weights = random_weights(config, torch.bfloat16)
        rows = torch.empty(5, config.hidden_size, dtype=torch.bfloat16)
        batch = ExpertBatch(rows, torch.empty(5, 2, dtype=torch.int32), torch.empty(5, 2))
        out = kernel.run(kernel.pack(weights), batch, weight_on=weight_on, reduce=reduce)
    assert out.shape == ((5, 128) if reduce else (5, 2, 128))


@pytest.mark.parametrize("name", ["deep_gemm", "flashinfer"])
def test_a_graph_of_torch_compile_holds_a_call(name, deep_gemm, flashinfer):
    torch._dynamo.reset()
    kernel, config = get_kernel(name), WIDE["stacked"]
    weights = random_weights(config, torch.bfloat16)
    ids = [[0, 3], [-1, 3], [-1, -1], [3, 1], [4, 4]]
    batch = batch_of(random_batch(config, 5, dtype=torch.bfloat16), ids)
    packed = kernel.pack(weights)
    run = torch.compile(kernel.run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(run(packed, batch), kernel.run(packed, batch), torch.bfloat16)


# ----------------------------------------------------------------------------------------- DeepGEMM


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("name", [name for name in WIDE if not WIDE[name].is_transposed])
def test_deep_gemm_runs_every_layout_and_term(name, weight_on, deep_gemm):
    config = WIDE[name]
    ids = [[0, 3], [-1, 3], [-1, -1], [3, 1], [4, 4]]
    batch = batch_of(random_batch(config, 5, dtype=torch.bfloat16), ids)
    check(DEEP_GEMM, random_weights(config, torch.bfloat16), batch, weight_on)
    assert deep_gemm


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
def test_deep_gemm_edges(ids, alignment, monkeypatch):
    calls = install_deep_gemm(monkeypatch, alignment)
    check_edge(DEEP_GEMM, WIDE["bias"], ids)
    num_slots = len(ids) * len(ids[0])
    assert max(calls) <= num_slots + min(num_slots, 5) * (alignment - 1)


def test_deep_gemm_without_rows(deep_gemm):
    check_no_rows(DEEP_GEMM, WIDE["bias"])


def test_the_rows_of_any_choice_have_room():
    """The worst one fills all that is made: an expert for each slot, or one slot too many each."""
    for ids, num_experts, alignment in [
        ([[0], [1], [2]], 8, 4),
        ([[0, 0], [0, 0], [0, 1]], 2, 4),
        ([[1, 1], [1, 1], [1, 1]], 2, 3),
    ]:
        local_ids = torch.tensor(ids, dtype=torch.int32)
        slots = aligned(sort_slots(local_ids, num_experts), alignment)
        flat = local_ids.reshape(-1).long()
        assert slots.expert_of_row[slots.row_of_slot].tolist() == flat.tolist()
        assert slots.slot_of_row[slots.row_of_slot].tolist() == list(range(flat.numel()))
        assert int(slots.has_expert.sum()) == flat.numel()
        assert slots.has_expert.shape[0] % alignment == 0


WIDE_DENSE = WIDE["stacked"]


@pytest.mark.parametrize(
    "problem, reason",
    [
        (cuda(WIDE_DENSE), None),
        (problem_of(WIDE_DENSE), "is for cuda, and the experts are on cpu"),
        (cuda(WIDE_DENSE, needs_grad=True), "has no backward, and gradients are needed"),
        (
            cuda(WIDE_DENSE, schemes=INT4),
            f"multiplies dense weights, and these are {INT4[0]}",
        ),
        (cuda(WIDE_DENSE, torch.float16), "multiplies only torch.bfloat16, not torch.float16"),
        (
            cuda(WIDE_DENSE, row_dtype=torch.float32),
            "multiplies only torch.bfloat16, not torch.float32",
        ),
        (
            cuda(WIDE["transposed"]),
            "reads weights stored (experts, out, in), and these are (experts, in, out)",
        ),
        (
            cuda(sizes(3, 128, 96)),
            "needs sizes that are multiples of 64, and intermediate_size is 96",
        ),
    ],
)
def test_deep_gemm_says_why_it_cannot(problem, reason, deep_gemm):
    assert DEEP_GEMM.unsupported(problem) == reason


def test_packages_that_are_not_there_or_not_as_they_should_be(monkeypatch):
    wide, small = cuda(WIDE_DENSE), cuda(DENSE)
    assert DEEP_GEMM.unsupported(wide) == "DeepGEMM is not installed"
    assert FLASHINFER.unsupported(small) == "FlashInfer is not installed"
    install_deep_gemm(monkeypatch)
    install_flashinfer(monkeypatch)
    assert DEEP_GEMM.cannot_load() is FLASHINFER.cannot_load() is None
    install_flashinfer(monkeypatch, ActivationType=None)
    assert FLASHINFER.cannot_load() == "FlashInfer has no ActivationType"
    install_flashinfer(monkeypatch, cutlass_fused_moe=lambda input: input)
    reason = "FlashInfer adds slots in the rows' dtype: it has no use_fused_finalize"
    assert FLASHINFER.cannot_load() == reason
    with pytest.raises(NoKernelFits, match=f"\n  flashinfer: {reason}"):
        select_kernel(small, kernel="flashinfer")
    monkeypatch.setattr(optional, "capability", lambda: (8, 9))
    reason = "needs compute capability 9.x or 10.x, and the GPU here has 8.9"
    assert DEEP_GEMM.unsupported(wide) == FLASHINFER.unsupported(small) == reason


def test_a_package_is_imported_only_when_its_kernel_is_asked_for(monkeypatch):
    install_deep_gemm(monkeypatch)
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        raise AssertionError("CUDA_HOME is not set")

    monkeypatch.setattr(optional.importlib, "import_module", load)
    select_kernel(cuda(WIDE_DENSE))
    assert asked == []
    reason = "DeepGEMM cannot be imported: CUDA_HOME is not set"
    with pytest.raises(NoKernelFits, match=f"\n  deep_gemm: {reason}"):
        select_kernel(cuda(WIDE_DENSE), kernel="deep_gemm")
    assert asked == ["deep_gemm"]


# --------------------------------------------------------------------------------------- FlashInfer


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FLASHINFER_CONFIGS)
def test_flashinfer_runs_every_layout(name, dtype, weight_on, flashinfer):
    config = FLASHINFER_CONFIGS[name]
    assert FLASHINFER.unsupported(cuda(config, dtype, weight_on=weight_on)) is None
    ids = [[0, 3], [-1, 3], [-1, -1], [3, 1], [4, 4]]
    batch = batch_of(random_batch(config, 5, dtype=dtype), ids)
    check(FLASHINFER, random_weights(config, dtype), batch, weight_on)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_flashinfer_runs_an_activation_or_refuses_it(name, flashinfer):
    config = dataclasses.replace(DENSE, activation=ACTIVATIONS[name])
    reason = FLASHINFER.unsupported(cuda(config))
    runs = {"silu", "silu-alpha", "swiglu-oai", "limit-gate"}
    assert (reason is None) == (name in runs), reason
    if reason is None:
        rows = 3 * random_batch(config, 9, dtype=torch.bfloat16).hidden_states  # past the limits
        batch = dataclasses.replace(random_batch(config, 9), hidden_states=rows)
        check(FLASHINFER, random_weights(config, torch.bfloat16), batch)


@pytest.mark.parametrize("name", ["stacked", "ungated"])
@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
def test_flashinfer_edges(ids, name, flashinfer):
    check_edge(FLASHINFER, FLASHINFER_CONFIGS[name], ids)


def test_flashinfer_without_rows(flashinfer):
    check_no_rows(FLASHINFER, DENSE)


@pytest.mark.parametrize("name", FLASHINFER_CONFIGS)
def test_flashinfer_weights_come_back_bit_for_bit(name):
    weights = random_weights(FLASHINFER_CONFIGS[name], torch.bfloat16)
    back = FLASHINFER.unpack(FLASHINFER.pack(weights), weights.config)
    for left, right in zip(back.tensors(), weights.tensors(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", FLASHINFER_CONFIGS)
def test_flashinfer_experts_can_be_moved(name):
    weights = random_weights(FLASHINFER_CONFIGS[name], torch.bfloat16)
    packed = FLASHINFER.pack(weights)
    expected = weights.down_proj.values[4].clone(), weights.gate_up_proj.values[4].clone()
    for tensor in FLASHINFER.slots(packed).values():
        tensor[1] = tensor[4].clone()
    moved = FLASHINFER.unpack(packed, weights.config)
    assert torch.equal(moved.down_proj.values[1], expected[0])
    assert torch.equal(moved.gate_up_proj.values[1], expected[1])


RELU = dataclasses.replace(DENSE.activation, function=ActivationFunction.RELU)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (problem_of(DENSE), "is for cuda, and the experts are on cpu"),
        (cuda(DENSE, schemes=INT4), f"multiplies dense weights, and these are {INT4[0]}"),
        (
            cuda(DENSE, torch.float32),
            "multiplies only torch.bfloat16, torch.float16, not torch.float32",
        ),
        (
            cuda(DENSE, row_dtype=torch.float16),
            "multiplies rows and weights of one dtype, not torch.float16 and torch.bfloat16",
        ),
        (cuda(SMALL["bias"]), "its biases are not used here, and these experts have some"),
        (cuda(SMALL["rms"]), "has no norm over an expert's output"),
        (
            cuda(dataclasses.replace(SMALL["ungated"], activation=RELU)),
            "runs ungated experts with relu2 alone, not relu",
        ),
        (
            cuda(dataclasses.replace(DENSE, activation=RELU)),
            "runs gated experts with silu alone, not relu",
        ),
        (
            cuda(dataclasses.replace(DENSE, activation=ACTIVATIONS["up-softcap"])),
            "has no soft caps",
        ),
        (
            cuda(dataclasses.replace(DENSE, activation=ACTIVATIONS["limit-activated"])),
            "limits the gate before the function, not after it",
        ),
        (
            cuda(sizes(3, 16, 12)),
            "needs sizes that are multiples of 8, and intermediate_size is 12",
        ),
        (cuda(DENSE, needs_grad=True), "has no backward, and gradients are needed"),
    ],
)
def test_flashinfer_says_why_it_cannot(problem, reason, flashinfer):
    assert FLASHINFER.unsupported(problem) == reason


# ------------------------------------------------------------------------------------- their choice


@pytest.fixture
def without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry without kernels of ours for a GPU."""
    names = {"cpu", "grouped_mm", "deep_gemm", "flashinfer", "torch", "reference"}
    loaders = {name: load for name, load in registry._LOADERS.items() if name in names}
    monkeypatch.setattr(registry, "_LOADERS", loaders)


def reasons_of(problem: ExpertsProblem, **options: Any) -> tuple[str, bool, dict[str, str]]:
    found = select_kernel(problem, **options)
    rejected = {rejection.kernel: rejection.reason for rejection in found.rejections}
    return found.kernel.name, found.is_fallback, rejected


def test_on_a_gpu_grouped_mm_comes_before_the_loop(without_ours, deep_gemm, flashinfer):
    kernel, is_fallback, reasons = reasons_of(cuda(WIDE_DENSE), strict=True)
    assert (kernel, is_fallback) == ("grouped_mm", False)
    assert reasons == {
        "cpu": "is for cpu, and the experts are on cuda",
        "deep_gemm": "runs on cuda only when asked for: kernel='deep_gemm'",
        "flashinfer": "runs on cuda only when asked for: kernel='flashinfer'",
        "torch": "grouped_mm is preferred",
        "reference": "grouped_mm is preferred",
    }


def test_what_runs_only_when_asked_for_is_no_preferred_kernel(without_ours, monkeypatch):
    """Neither a package that is not there nor one that could run makes another a fallback."""
    for install in (None, install_deep_gemm, install_flashinfer):
        if install is not None:
            install(monkeypatch)
        assert not select_kernel(cuda(WIDE_DENSE)).is_fallback
    odd = cuda(sizes(3, 20, 12))
    assert select_kernel(odd).kernel.name == "torch"
    assert select_kernel(odd).is_fallback  # grouped_mm is preferred there
    with pytest.raises(NoKernelFits, match="grouped_mm: needs sizes that are multiples of 8"):
        select_kernel(odd, strict=True)


@pytest.mark.parametrize("name", ["deep_gemm", "flashinfer", "grouped_mm"])
def test_they_are_taken_when_asked_for(name, deep_gemm, flashinfer):
    kernel, is_fallback, reasons = reasons_of(cuda(WIDE_DENSE), kernel=name, strict=True)
    assert (kernel, is_fallback) == (name, False)
    assert reasons["torch"] == f"kernel={name!r} was asked for"


def test_asking_for_a_package_that_is_not_there_says_so():
    with pytest.raises(NoKernelFits, match="\n  deep_gemm: DeepGEMM is not installed"):
        select_kernel(cuda(WIDE_DENSE), kernel="deep_gemm")


@pytest.mark.parametrize("needs_grad", [False, True])
def test_on_a_cpu_grouped_mm_runs_only_when_asked_for(needs_grad):
    problem = problem_of(DENSE, torch.bfloat16, needs_grad=needs_grad)
    kernel, _, reasons = reasons_of(problem)
    assert kernel == ("torch" if needs_grad else "cpu")
    assert reasons["grouped_mm"] == "runs on cpu only when asked for: kernel='grouped_mm'"
    assert reasons_of(problem, kernel="grouped_mm", strict=True)[0] == "grouped_mm"


def test_on_a_cpu_they_make_no_fallback(monkeypatch):
    loaders = {name: load for name, load in registry._LOADERS.items() if name != "cpu"}
    monkeypatch.setattr(registry, "_LOADERS", loaders)
    kernel, is_fallback, _ = reasons_of(problem_of(DENSE, torch.float64), strict=True)
    assert (kernel, is_fallback) == ("torch", False)


def test_explain_says_why_each_was_not_taken(without_ours):
    part = next(layer.experts for layer in explain(DEMO, device="cuda").layers if layer.experts)
    reasons = {rejection.kernel: rejection.reason for rejection in part.rejections}
    assert (part.kernel, part.is_fallback) == ("grouped_mm", False)
    assert reasons["deep_gemm"] == "DeepGEMM is not installed"
    assert reasons["flashinfer"] == "FlashInfer is not installed"
    asked = explain(DEMO, device="cpu", kernel="grouped_mm").layers
    assert {layer.experts.kernel for layer in asked if layer.experts} == {"grouped_mm"}


def test_explain_names_the_package_and_its_version(deep_gemm, monkeypatch):
    monkeypatch.setattr(optional.metadata, "version", lambda name: "2.8.0")
    assert DEEP_GEMM.how(cuda(WIDE_DENSE)) == "DeepGEMM 2.8.0"
    assert FLASHINFER.how(cuda(DENSE)) == "FlashInfer 2.8.0"
