"""Kernels against the reference with fp32 truth; their choice; properties that every kernel has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    CONFIGS,
    batch_of,
    converted,
    cpu_products_bound,
    dense_tensors,
    dequantized,
    gradients,
    map_tensors,
    plain_experts,
    problem_of,
    quantized,
    random_batch,
    random_weights,
    sizes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import NOISE_FACTOR, RTOL, assert_close, frobenius_error, relative_error
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp, WeightOn
from mixtura.errors import ConfigError, NoKernelFits
from mixtura.kernels import (
    ExpertsKernel,
    Rejection,
    get_kernel,
    kernel_names,
    register_kernel,
    registry,
    select_kernel,
    unregister_kernel,
)
from mixtura.kernels.torch import TorchKernel
from mixtura.kernels.torch.grouped_linear import grouped_linear
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

REFERENCE = get_kernel("reference")
TESTED = [name for name in kernel_names() if name != "reference" and get_kernel(name).is_for("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = [
    WeightFormat.INT8_CHANNEL,
    WeightFormat.INT4_G32,
    WeightFormat.FP8_BLOCK,
    WeightFormat.MXFP4,
    WeightFormat.NVFP4,
]

by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(params=TESTED)
def kernel(request: pytest.FixtureRequest) -> ExpertsKernel:
    return get_kernel(request.param)


def run(
    kernel: ExpertsKernel,
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
    *,
    reduce: bool = True,
) -> Tensor:
    """Pack, run, and see that packing has an inverse."""
    problem = ExpertsProblem(
        experts=weights.config,
        schemes=weights.schemes,
        row_dtype=batch.hidden_states.dtype,
        device="cpu",
        weight_on=weight_on,
    )
    reason = kernel.unsupported(problem)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    packed = kernel.pack(weights)
    for left, right in zip(
        kernel.unpack(packed, weights.config).tensors(), weights.tensors(), strict=True
    ):
        assert left.dtype == right.dtype
        assert torch.equal(
            left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
        )
    with torch.no_grad():
        return kernel.run(packed, batch, weight_on=weight_on, reduce=reduce)


def check_against_reference(
    kernel: ExpertsKernel,
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
) -> None:
    """Rows and terms against the reference on the same numbers, widened to fp32."""
    dtype = batch.hidden_states.dtype
    wide = torch.promote_types(dtype, torch.float32)
    truth_weights = (
        dequantized(weights) if weights.gate_up_proj.is_quantized else converted(weights, wide)
    )
    truth_batch = dataclasses.replace(batch, hidden_states=batch.hidden_states.to(wide))
    with torch.no_grad():
        expected = REFERENCE.run(truth_weights, truth_batch, weight_on=weight_on)
        terms = REFERENCE.run(truth_weights, truth_batch, weight_on=weight_on, reduce=False)
        same_dtype = (
            weights if dtype == weights.gate_up_proj.dtype else converted(truth_weights, dtype)
        )
        noise = plain_experts(same_dtype, batch, weight_on)
    actual = run(kernel, weights, batch, weight_on)
    actual_terms = run(kernel, weights, batch, weight_on, reduce=False)
    assert (actual.dtype, actual_terms.dtype) == (dtype, wide)
    if kernel.name == "cpu" and weights.gate_up_proj.is_quantized:
        bound = cpu_products_bound(weights.gate_up_proj.scheme, dtype)
        assert frobenius_error(actual, expected) <= bound
        assert frobenius_error(actual_terms, terms) <= bound
        return
    assert_close(actual, expected, dtype, noise=noise)
    # Terms are rounded once by the last product, as the noise floor's are.
    floor = max(RTOL[dtype], NOISE_FACTOR * relative_error(noise, expected))
    assert relative_error(actual_terms, terms) <= floor
    assert expected.numel() == 0 or expected.abs().max() > 0


# ---------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@by_config
def test_dense_weights(kernel, config, dtype, weight_on):
    weights = random_weights(config, dtype)
    check_against_reference(kernel, weights, random_batch(config, 9, 2, dtype), weight_on)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations(kernel, activation):
    config = dataclasses.replace(sizes(), activation=activation, gate_up=GateUp.INTERLEAVED)
    check_against_reference(kernel, random_weights(config), random_batch(config, 9))


@pytest.mark.parametrize("hidden, inner", [(7, 13), (13, 7), (1, 1), (176, 13), (35, 1407)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(kernel, hidden, inner, dtype):
    config = sizes(3, hidden, inner)
    weights = random_weights(config, dtype)
    check_against_reference(kernel, weights, random_batch(config, 5, 2, dtype))


EDGES: dict[str, list[list[int]]] = {
    "one row": [[3, 0]],
    "empty experts": [[1, 3], [3, 1], [1, 3]],
    "all to the first": [[0], [0], [0]],
    "all to the last": [[4], [4], [4]],
    "slots without an expert": [[-1, 2], [2, -1], [4, 0]],
    "a row without experts": [[1, 2], [-1, -1], [0, 4]],
    "no expert at all": [[-1, -1], [-1, -1]],
    "an expert twice in a row": [[2, 2], [0, 2], [4, 4]],
    "every expert": [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("name", ["stacked", "gpt-oss", "rms-scale-first", "separate"])
@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
def test_edges(kernel, ids, name):
    config = CONFIGS[name]
    batch = batch_of(random_batch(config, len(ids)), ids)
    weights = random_weights(config)
    if all(expert < 0 for row in ids for expert in row):
        assert torch.equal(run(kernel, weights, batch), torch.zeros(len(ids), config.hidden_size))
        terms = run(kernel, weights, batch, reduce=False)
        assert torch.equal(terms, torch.zeros(len(ids), len(ids[0]), config.hidden_size))
    else:
        check_against_reference(kernel, weights, batch)
    empty = [row for row, experts in enumerate(ids) if max(experts) < 0]
    assert not run(kernel, weights, batch)[empty].any()


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(kernel, top_k, dtype):
    config = CONFIGS["bias"]
    weights, batch = random_weights(config, dtype), random_batch(config, 0, top_k, dtype)
    assert run(kernel, weights, batch).shape == (0, config.hidden_size)
    assert run(kernel, weights, batch).dtype == dtype
    terms = run(kernel, weights, batch, reduce=False)
    assert (terms.shape, terms.dtype) == ((0, top_k, config.hidden_size), torch.float32)


@pytest.mark.parametrize("num_experts", [1, 64])
def test_one_expert_and_many(kernel, num_experts):
    config = sizes(num_experts)
    check_against_reference(kernel, random_weights(config), random_batch(config, 12, 1))


def test_terms_are_added_in_fp32(kernel):
    """In bf16, 256 + 1 would be 256."""
    config = dataclasses.replace(
        sizes(2, 2, 2), gate_up=GateUp.UNGATED, activation=ACTIVATIONS["identity"]
    )
    identity = torch.eye(2).expand(2, 2, 2).bfloat16()
    weights = ExpertWeights(config, dense(identity), dense(identity))
    rows = torch.ones(1, 2, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1, 0]], dtype=torch.int32)
    batch = ExpertBatch(rows, ids, torch.tensor([[256.0, 1.0, 1.0]]))
    assert run(kernel, weights, batch).tolist() == [[258.0, 258.0]]


# -------------------------------------------------------------------------------- quantized weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["stacked", "separate", "ungated", "gpt-oss"])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.value)
def test_quantized_weights(kernel, weight_format, name, dtype):
    sized = dataclasses.replace(CONFIGS[name], hidden_size=72, intermediate_size=40)
    weights = quantized(random_weights(sized), weight_format)
    check_against_reference(kernel, weights, random_batch(sized, 7, 2, dtype))


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.value)
def test_the_reference_reads_quantized_weights_as_their_scheme_says(weight_format):
    config = sizes(3, 40, 36)
    weights, batch = quantized(random_weights(config), weight_format), random_batch(config, 4)
    expected = plain_experts(dequantized(weights, torch.float64), batch_as(batch, torch.float64))
    assert_close(REFERENCE.run(weights, batch), expected, torch.float32)


def batch_as(batch: ExpertBatch, dtype: torch.dtype) -> ExpertBatch:
    return dataclasses.replace(
        batch,
        hidden_states=batch.hidden_states.to(dtype),
        topk_weights=batch.topk_weights.to(torch.promote_types(dtype, torch.float32)),
    )


# ---------------------------------------------------------------------------------------- gradients


def skip_unless_differentiable(kernel: ExpertsKernel, config: ExpertsConfig) -> None:
    reason = kernel.unsupported(problem_of(config, needs_grad=True))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("weight_on", WeightOn)
@by_config
def test_gradients(kernel, config, weight_on):
    skip_unless_differentiable(kernel, config)
    weights = random_weights(config, torch.float64)
    batch = batch_of(random_batch(config, 4), [[0, 3], [-1, 3], [-1, -1], [3, 1]])
    batch = batch_as(batch, torch.float64)
    out, expected = gradients(REFERENCE, weights, batch, weight_on)
    actual_out, actual = gradients(kernel, weights, batch, weight_on)
    assert_close(actual_out, out, torch.float64)
    for role, gradient in expected.items():
        assert relative_error(actual[role], gradient) < 1e-12, role
        assert actual[role].dtype == gradient.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_other_dtypes(kernel, dtype):
    config = CONFIGS["bias"]
    skip_unless_differentiable(kernel, config)
    weights = random_weights(config, dtype)
    batch = random_batch(config, 6, 2, dtype)
    _, expected = gradients(
        REFERENCE,
        converted(weights, torch.float32),
        batch_as(batch, torch.float32),
        WeightOn.OUTPUT,
    )
    _, actual = gradients(kernel, weights, batch, WeightOn.OUTPUT)
    for role, gradient in expected.items():
        assert relative_error(actual[role], gradient) < 4 * RTOL[dtype], role


def test_rows_alone_have_gradients(kernel):
    """Frozen experts under layers that are trained."""
    config = CONFIGS["stacked"]
    skip_unless_differentiable(kernel, config)
    weights, batch = random_weights(config), random_batch(config, 5)
    found = []
    for candidate in (REFERENCE, kernel):
        rows = batch.hidden_states.clone().requires_grad_()
        out = candidate.run(candidate.pack(weights), dataclasses.replace(batch, hidden_states=rows))
        found.append(torch.autograd.grad(out.square().sum(), rows)[0])
    assert_close(found[1], found[0], torch.float32)


@pytest.mark.parametrize("name", ["reference", *TESTED])
def test_gradcheck(name):
    config = dataclasses.replace(CONFIGS["bias"], num_experts=3, hidden_size=3, intermediate_size=2)
    kernel = get_kernel(name)
    skip_unless_differentiable(kernel, config)
    weights = random_weights(config, torch.float64)
    roles = list(dense_tensors(weights))
    ids = torch.tensor([[0, 2], [-1, 2], [2, 2]], dtype=torch.int32)

    def function(rows: Tensor, topk_weights: Tensor, *tensors: Tensor) -> Tensor:
        packed = map_tensors(weights, dict(zip(roles, tensors, strict=True)))
        return kernel.run(kernel.pack(packed), ExpertBatch(rows, ids, topk_weights))

    leaves = [
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        torch.tensor([[0.3, 0.9], [1.0, 0.4], [0.7, 0.2]], dtype=torch.float64),
        *dense_tensors(weights).values(),
    ]
    assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_() for leaf in leaves])


def test_training_memory_does_not_grow_with_the_square_of_the_experts():
    """The gradient of a stack is made once, not once per expert."""
    made: list[int] = []

    class CountAllocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == stack.shape:
                made.append(1)
            return out

    config = sizes(32)
    weights, batch = random_weights(config), random_batch(config, 64)
    stack = weights.gate_up_proj.values.requires_grad_()
    out = TorchKernel().run(weights, batch)
    with CountAllocations():
        out.sum().backward()
    assert stack.grad is not None
    assert len(made) < 8


# ----------------------------------------------------------------------------------------- compiled


def compiled(kernel: ExpertsKernel, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()

    def function(packed: Any, batch: ExpertBatch, weight_on: WeightOn = WeightOn.OUTPUT) -> Tensor:
        return kernel.run(packed, batch, weight_on=weight_on)

    return torch.compile(function, fullgraph=True, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name, weight_on, dynamic",
    [
        ("gpt-oss", WeightOn.OUTPUT, False),
        ("separate", WeightOn.INPUT, False),
        ("rms", WeightOn.OUTPUT, True),
    ],
)
def test_compiled_equals_eager_with_gradients(name, weight_on, dynamic):
    config, kernel = CONFIGS[name], get_kernel("torch")
    weights = random_weights(config)
    batch = batch_of(random_batch(config, 5), [[0, 3], [-1, 3], [-1, -1], [3, 1], [4, 4]])
    expected_out, expected = gradients(kernel, weights, batch, weight_on)
    out, found = gradients(
        kernel, weights, batch, weight_on, compiled(kernel, backend="aot_eager", dynamic=dynamic)
    )
    assert_close(out, expected_out, torch.float32)
    for role, gradient in expected.items():
        assert relative_error(found[role], gradient) < RTOL[torch.float32], role
    with torch.no_grad():
        assert_close(out, kernel.run(weights, batch, weight_on=weight_on), torch.float32)


def test_compiled_with_dynamic_shapes_serves_every_batch_size():
    config, kernel = CONFIGS["bias"], get_kernel("torch")
    weights = random_weights(config)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = compiled(kernel, backend=backend, dynamic=True)
    with torch.no_grad():
        for num_rows in (11, 9, 3, 33):  # unlike the experts' sizes: equal ones are taken as one
            batch = random_batch(config, num_rows, seed=num_rows)
            assert_close(function(weights, batch), kernel.run(weights, batch), torch.float32)
    assert len(graphs) == 1


@pytest.mark.parametrize("num_rows", [0, 1])
def test_compiled_edges(num_rows):
    config, kernel = CONFIGS["stacked"], get_kernel("torch")
    weights, batch = random_weights(config), random_batch(config, num_rows)
    with torch.no_grad():
        out = compiled(kernel, backend="eager")(weights, batch)
        assert_close(out, kernel.run(weights, batch), torch.float32)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT4_G32, WeightFormat.NVFP4])
def test_compiled_quantized_weights(weight_format):
    config, kernel = sizes(3, 40, 36), get_kernel("torch")
    weights = quantized(random_weights(config), weight_format)
    batch = random_batch(config, 4)
    with torch.no_grad():
        out = compiled(kernel, backend="aot_eager")(weights, batch)
        assert_close(out, kernel.run(weights, batch), torch.float32)


def grouped_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 4, generator=generator).to(dtype)
    weight = torch.randn(3, 5, 4, generator=generator).to(dtype)
    return rows, weight, torch.tensor([0, 2, 2, 6])  # expert 1 has no rows, row 6 no expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_opcheck_of_the_grouped_linear_map(dtype, is_transposed):
    rows, weight, offsets = grouped_arguments(dtype)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = (rows.requires_grad_(), weight.detach().requires_grad_(), offsets)
    torch.library.opcheck(torch.ops.mixtura.grouped_linear.default, leaves)


def test_opcheck_of_the_grouped_outer_product():
    rows, _, offsets = grouped_arguments()
    grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    torch.library.opcheck(torch.ops.mixtura.grouped_outer.default, (grad, rows, offsets))


def test_grouped_linear_leaves_rows_without_an_expert_zero():
    rows, weight, offsets = grouped_arguments()
    out = grouped_linear(rows, dense(weight), offsets)
    expected = torch.stack([rows[r] @ weight[e].T for r, e in enumerate([0, 0, 2, 2, 2, 2])])
    assert_close(out[:6], expected, torch.float32)
    assert not out[6].any()


# --------------------------------------------------------------------------------------- properties


@st.composite
def batches(draw: st.DrawFn, num_experts: int) -> tuple[ExpertBatch, list[int]]:
    """A batch with any ids, -1 included, and a permutation of its rows."""
    num_rows, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    ids = draw(
        st.lists(
            st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k),
            min_size=num_rows,
            max_size=num_rows,
        )
    )
    batch = random_batch(sizes(num_experts), num_rows, seed=draw(st.integers(0, 99)))
    return batch_of(batch, ids), draw(st.permutations(range(num_rows)))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["reference", *TESTED])
def test_permuting_tokens_permutes_rows(name, data):
    batch, order = data.draw(batches(5))
    kernel, weights = get_kernel(name), random_weights(sizes(5))
    permuted = ExpertBatch(
        batch.hidden_states[order], batch.local_ids[order], batch.topk_weights[order]
    )
    out, moved = run(kernel, weights, batch), run(kernel, weights, permuted)
    if kernel.is_row_invariant:
        assert torch.equal(moved, out[order])
    else:
        assert_close(moved, out[order], torch.float32)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["reference", *TESTED])
def test_permuting_experts_with_their_ids_changes_nothing(name, data):
    batch, _ = data.draw(batches(5))
    order = data.draw(st.permutations(range(5)))
    kernel, weights = get_kernel(name), random_weights(CONFIGS["bias"])
    tensors = {role: tensor[order] for role, tensor in dense_tensors(weights).items()}
    position = torch.tensor([order.index(expert) for expert in range(5)] + [-1], dtype=torch.int32)
    renamed = dataclasses.replace(batch, local_ids=position[batch.local_ids.long()])
    out = run(kernel, weights, batch)
    assert_close(run(kernel, map_tensors(weights, tensors), renamed), out, torch.float32)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["reference", *TESTED])
def test_terms_add_up_to_the_rows(name, data):
    batch, _ = data.draw(batches(5))
    kernel, weights = get_kernel(name), random_weights(sizes(5))
    terms = run(kernel, weights, batch, reduce=False)
    assert_close(terms.sum(1), run(kernel, weights, batch), torch.float32)
    assert not terms[batch.local_ids < 0].any()


# ----------------------------------------------------------------------------------------- registry


class FakeKernel(TorchKernel):
    """A kernel that refuses what a test tells it to."""

    name: ClassVar[str] = "fake"
    reason: ClassVar[str | None] = None
    has_backward: ClassVar[bool] = False

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return self.reason


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of a machine on which only torch and the reference are built."""
    loaders = {name: registry._LOADERS[name] for name in ("torch", "reference")}
    monkeypatch.setattr(registry, "_LOADERS", loaders)


@pytest.fixture
def fake_kernel(two_kernels: None) -> Any:
    """Registers `FakeKernel` in front, and takes it out again."""
    loaded: list[FakeKernel] = []

    def load() -> FakeKernel:
        loaded.append(FakeKernel())
        return loaded[-1]

    register_kernel("fake", load)
    yield loaded
    unregister_kernel("fake")


def test_the_decision_lists_every_other_kernel_with_a_reason(two_kernels):
    decision = select_kernel(problem_of(sizes()))
    assert decision.kernel.name == "torch"
    assert decision.rejections == (Rejection("reference", "torch is preferred"),)
    assert not decision.is_fallback
    assert decision.problem == problem_of(sizes())


def test_insisting_on_a_kernel(two_kernels):
    decision = select_kernel(problem_of(sizes()), kernel="reference")
    assert decision.kernel is get_kernel("reference")
    assert decision.rejections == (Rejection("torch", "kernel='reference' was asked for"),)
    assert not decision.is_fallback
    assert select_kernel(problem_of(sizes()), kernel="reference", strict=True) == decision


def test_the_cpu_kernel_is_preferred():
    decision = select_kernel(problem_of(sizes(), is_deterministic=True), strict=True)
    assert decision.kernel.name == "cpu"
    assert decision.kernel.is_row_invariant
    rejected = {rejection.kernel: rejection.reason for rejection in decision.rejections}
    assert list(rejected) == [name for name in kernel_names() if name != "cpu"]
    assert rejected["reference"] == "cpu is preferred"
    assert select_kernel(problem_of(sizes(), needs_grad=True)).kernel.name == "torch"


def test_an_unknown_kernel_is_named_with_the_choices(two_kernels):
    with pytest.raises(ConfigError, match=r"kernel \('torhc'\) must be one of torch, reference"):
        select_kernel(problem_of(sizes()), kernel="torhc")


def test_deterministic_takes_the_row_invariant_kernel(two_kernels):
    decision = select_kernel(problem_of(sizes(), is_deterministic=True))
    assert decision.kernel.name == "reference"
    assert decision.is_fallback
    (rejection,) = decision.rejections
    assert rejection == Rejection(
        "torch", "its rows depend on the batch around them, and deterministic=True was asked for"
    )


def test_gradients_need_a_kernel_with_a_backward(fake_kernel):
    assert select_kernel(problem_of(sizes())).kernel.name == "fake"
    decision = select_kernel(problem_of(sizes(), needs_grad=True))
    assert decision.kernel.name == "torch"
    assert decision.is_fallback
    assert decision.rejections == (
        Rejection("fake", "has no backward, and gradients are needed"),
        Rejection("reference", "torch is preferred"),
    )


def test_no_kernel_fits_lists_every_reason(fake_kernel):
    scheme = WeightFormat.INT4_G32.scheme
    problem = dataclasses.replace(problem_of(sizes(), needs_grad=True), schemes=(scheme,))
    with pytest.raises(NoKernelFits) as caught:
        select_kernel(problem)
    text = str(caught.value)
    assert f"experts of torch.uint8 weights (scheme {scheme}) on cpu" in text
    assert "\n  fake: has no backward, and gradients are needed" in text
    assert f"\n  torch: has no gradient for weights in the scheme {scheme}" in text
    assert f"\n  reference: has no gradient for weights in the scheme {scheme}" in text


def test_no_kernel_fits_when_the_one_insisted_on_cannot(fake_kernel):
    with pytest.raises(NoKernelFits, match=r"kernel \('fake'\) must be able to run") as caught:
        select_kernel(problem_of(sizes(), needs_grad=True), kernel="fake")
    assert "\n  fake: has no backward, and gradients are needed" in str(caught.value)
    assert "\n  torch: kernel='fake' was asked for" in str(caught.value)


def test_strict_refuses_a_fallback(fake_kernel, monkeypatch):
    monkeypatch.setattr(FakeKernel, "reason", "needs another processor")
    decision = select_kernel(problem_of(sizes()))
    assert decision.kernel.name == "torch"
    assert decision.is_fallback
    with pytest.raises(NoKernelFits, match="strict=True") as caught:
        select_kernel(problem_of(sizes()), strict=True)
    assert "\n  fake: needs another processor" in str(caught.value)
    assert "drop strict" in str(caught.value)


def test_a_kernel_for_another_device_is_passed_over(fake_kernel, monkeypatch):
    monkeypatch.setattr(FakeKernel, "devices", ("cuda",))
    decision = select_kernel(problem_of(sizes()), strict=True)
    assert decision.kernel.name == "torch"
    assert not decision.is_fallback
    assert decision.rejections[0].reason == "is for cuda, and the experts are on cpu"
    with pytest.raises(NoKernelFits, match="fake: is for cuda"):
        select_kernel(problem_of(sizes()), kernel="fake")


def test_strict_takes_the_preferred_kernel(two_kernels):
    assert select_kernel(problem_of(sizes()), strict=True).kernel.name == "torch"


def test_dtypes_that_the_torch_kernel_cannot_run():
    kernel = get_kernel("torch")
    problem = problem_of(sizes())
    packed = dataclasses.replace(problem, row_dtype=torch.int8)
    assert kernel.unsupported(packed) == "cannot compute in torch.int8"


def test_register_puts_a_kernel_in_front_and_loads_it_once(fake_kernel):
    assert kernel_names() == ("fake", "torch", "reference")
    assert fake_kernel == []
    first = select_kernel(problem_of(sizes())).kernel
    assert select_kernel(problem_of(sizes())).kernel is first is get_kernel("fake")
    assert len(fake_kernel) == 1


def test_a_name_is_registered_once(fake_kernel):
    with pytest.raises(ConfigError, match=r"kernel name \('fake'\) must be new"):
        register_kernel("fake", FakeKernel)
    with pytest.raises(ConfigError, match=r"kernel name \('torch'\) must be new"):
        register_kernel("torch", FakeKernel)


def test_unregister_takes_one_kernel_out_and_leaves_the_others(two_kernels):
    torch_kernel = get_kernel("torch")
    register_kernel("fake", FakeKernel)
    fake = get_kernel("fake")
    unregister_kernel("fake")
    assert kernel_names() == ("torch", "reference")
    assert get_kernel("torch") is torch_kernel
    with pytest.raises(ConfigError, match="unknown name"):
        get_kernel("fake")
    register_kernel("fake", FakeKernel)
    try:
        assert get_kernel("fake") is not fake
    finally:
        unregister_kernel("fake")
    unregister_kernel("fake")  # a name that is not there is no error


def test_every_kernel_says_what_it_is_called():
    for name in kernel_names():
        assert get_kernel(name).name == name
