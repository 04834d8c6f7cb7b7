"""Gate and router in C++ against the steps in torch, on every instruction set that there is."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from routing_rules import (
    CHOICES,
    RULES,
    bias_for,
    equal_logits,
    few_and_infinite,
    few_with_nan,
    random_logits,
    router_of,
    router_with_bias,
    steps_for,
    whole_logits,
)
from test_routing import Problem, compare, problems
from tolerances import NOISE_FACTOR, RTOL, relative_error
from torch import Tensor

from mixtura.config import (
    GatePrecision,
    NativeGate,
    Renormalize,
    RoutingConfig,
    ScoreFunction,
    SelectionBias,
)
from mixtura.errors import InputError
from mixtura.kernels.cpu import routing as cpu_routing
from mixtura.kernels.cpu.extension import forced_path, missing, runnable_paths
from mixtura.kernels.cpu.routing import CpuRouting
from mixtura.routing import Router, RouterTensors, create_router
from mixtura.routing.gate import Choice, Gate, GatePlan, gate_logits
from mixtura.types import TokenInputs

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NO_INPUTS = TokenInputs()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = runnable_paths() if missing() is None else ()
COUNTS = [1, 3, 5, 60, 160, 896]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_path(request.param):
        yield request.param


def both(
    router: Router, logits: Tensor, given_ids: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(weights, ids) of the extension and of torch."""
    learned = router.tensors
    kernel = router.kernel
    assert kernel is not None
    assert kernel.takes_logits(logits, learned.selection_bias, learned.per_expert_scale)
    return (
        kernel.route(logits, learned.selection_bias, learned.per_expert_scale, given_ids),
        router.select_by_steps(logits, given_ids, learned),
    )


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same ids, and weights as near as scores in fp32 are."""
    assert got[1].dtype == expected[1].dtype and got[0].dtype == expected[0].dtype
    assert got[1].equal(expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=3e-6, atol=1e-30, equal_nan=True)


# ---------------------------------------------------------------- exact, ties included


@pytest.mark.parametrize("make", [whole_logits, equal_logits, few_and_infinite, few_with_nan])
@pytest.mark.parametrize("num_experts", COUNTS)
def test_ties_infinities_and_nan_are_chosen_as_the_pipeline_does(
    path: str, make: Callable[[int, RoutingConfig], Tensor], num_experts: int
):
    for config in steps_for(num_experts):
        router = router_with_bias(config)
        for num_tokens in (1, 7):
            assert_same(*both(router, make(num_tokens, config)))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("make", [whole_logits, equal_logits, few_and_infinite, few_with_nan])
def test_every_rule_is_the_pipeline_s(
    path: str, name: str, make: Callable[[int, RoutingConfig], Tensor]
):
    router = router_of(RULES[name])
    (weights, ids), (expected, expected_ids) = both(router, make(23, RULES[name]))
    assert ids.equal(expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("num_experts", COUNTS)
def test_random_logits_are_chosen_as_the_pipeline_does(path: str, num_experts: int):
    """Where scores with a bias are nearer than fp32 rounds them, either may be first."""
    num_same = num_rows = 0
    for config in steps_for(num_experts):
        router = router_with_bias(config)
        logits = random_logits(64, config)
        (weights, ids), (expected, expected_ids) = both(router, logits)
        same = (ids == expected_ids).all(-1)
        num_same, num_rows = num_same + int(same.sum()), num_rows + 64
        # Nothing but the logits decides: not one may differ.
        if config.selection_bias is not SelectionBias.ON_SCORE:
            assert same.all()
        torch.testing.assert_close(weights[same], expected[same], rtol=3e-6, atol=1e-30)
    assert num_same > 0.99 * num_rows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_the_steps_in_torch_equal_the_double_loop(problem: Problem):
    """As the extension does: test_routing.py sends this through it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_routing, "_HAS_EXTENSION", False)
        compare(problem)


def test_many_slots_and_all_experts_are_ordered():
    for num_experts, top_k in ((896, 200), (160, 160), (17, 17), (33, 16)):
        config = RoutingConfig(num_experts=num_experts, top_k=top_k)
        for logits in (random_logits(3, config), whole_logits(3, config)):
            assert_same(*both(create_router(config), logits))


# ----------------------------------------------------------------------------------- precise scores

EXACT = [ScoreFunction.SOFTMAX, ScoreFunction.SIGMOID, ScoreFunction.SQRT_SOFTPLUS]


def all_scores(score: ScoreFunction, logits: Tensor, **steps: Any) -> Tensor:
    """The scores of all experts, in their order."""
    count = logits.shape[1]
    router = create_router(RoutingConfig(num_experts=count, top_k=count, score=score, **steps))
    weights, ids = router.select(logits, NO_INPUTS, router.tensors)
    return torch.zeros_like(logits).scatter(1, ids, weights)


def exact_scores(score: ScoreFunction, logits: Tensor) -> Tensor:
    wide = logits.double()
    match score:
        case ScoreFunction.SOFTMAX:
            return wide.softmax(-1)
        case ScoreFunction.SIGMOID:
            return wide.sigmoid()
        case _:
            return torch.nn.functional.softplus(wide, threshold=1e9).sqrt()


def units_apart(actual: Tensor, expected: Tensor) -> float:
    """The largest distance in units of the last place of fp32, of normal numbers."""
    _, exponent = torch.frexp(expected)
    unit = torch.ldexp(torch.ones_like(expected), exponent.clamp(min=-125) - 24)
    return float(((actual.double() - expected).abs() / unit).max())


@pytest.mark.parametrize("score", EXACT)
def test_scores_are_exact_to_a_unit_in_the_last_place(path: str, score: ScoreFunction):
    logits = torch.cat([torch.linspace(-86, 40, 999), torch.randn(999) * 1e-3, torch.randn(999)])
    for part in logits.split(333):
        scores = all_scores(score, part.unsqueeze(0))
        exact = exact_scores(score, part.unsqueeze(0))
        # A softmax is rounded twice, the first time before the division.
        assert units_apart(scores, exact) <= (1.51 if score is ScoreFunction.SOFTMAX else 0.51)


def test_soft_capped_logits_are_exact_to_a_few_units(path: str):
    logits = torch.cat([torch.linspace(-90, 90, 601), torch.randn(400) * 0.1]).unsqueeze(0)
    capped = all_scores(ScoreFunction.LOGIT, logits, logit_softcap=30.0)
    # Division and product round besides; near zero that is all.
    assert units_apart(capped, torch.tanh(logits.double() / 30) * 30) <= 2.0


@pytest.mark.parametrize("name", RULES)
def test_all_instruction_sets_give_the_same_bits(name: str):
    logits = random_logits(50, RULES[name])
    router = router_of(RULES[name])
    found = []
    for name in PATHS:
        with forced_path(name):
            found.append(router.select(logits, NO_INPUTS, router.tensors))
    for weights, ids in found[1:]:
        assert weights.equal(found[0][0]) and ids.equal(found[0][1])


@pytest.mark.parametrize("score", EXACT)
def test_a_larger_logit_never_scores_less(score: ScoreFunction):
    logits = (torch.randn(1, 4001) * 20).sort().values
    logits[:, 2000:] = torch.linspace(-1e-4, 1e-4, 2001)
    logits = logits.sort().values
    assert (all_scores(score, logits).diff() >= 0).all()


# ----------------------------------------------------------------------------------------- the gate

SHAPES = [(1, 1), (3, 17), (5, 33), (60, 176), (160, 1407), (896, 64), (9, 2880)]


def gate_of(
    num_experts: int, hidden_size: int, dtype: torch.dtype, num_tokens: int, row_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows (T,H) and a weight (E,H)."""
    generator = torch.Generator().manual_seed(num_experts + hidden_size)
    rows = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(num_experts, hidden_size, generator=generator) / hidden_size**0.5
    return rows.to(row_dtype), weight.to(dtype)


def logits_of(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = CpuRouting.for_rule(RoutingConfig(num_experts=weight.shape[0], top_k=1))
    assert kernel is not None
    with torch.no_grad():
        assert kernel.takes_rows(rows, weight, bias, None, None)
        return kernel.choose(rows, weight, bias, None, None, None)[0]


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_as_exact_as_a_product_in_fp32(
    path: str, shape: tuple[int, int], dtype: torch.dtype, row_dtype: torch.dtype
):
    for num_tokens in (1, 2, 3, 6, 70):
        rows, weight = gate_of(*shape, dtype, num_tokens, row_dtype)
        bias = None if num_tokens == 3 else torch.linspace(-1, 1, shape[0], dtype=dtype)
        exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch_logits = gate_logits(rows, weight, bias, is_fp32=True)
        bound = max(RTOL[torch.float32], NOISE_FACTOR * relative_error(torch_logits, exact))
        assert relative_error(logits_of(rows, weight, bias), exact) <= bound


def test_fp32_weights_are_not_rounded(path: str):
    """Each row of bf16 picks one column, whose low bits survive."""
    weight = 1 + torch.arange(40 * 48).view(40, 48) * 2.0**-20
    assert logits_of(torch.eye(48, dtype=torch.bfloat16), weight).equal(weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [64, 100, 2880])
def test_a_token_s_logits_depend_on_nothing_else(path: str, dtype: torch.dtype, hidden_size: int):
    """Bitwise, whatever the batch and the number of threads."""
    rows, weight = gate_of(66, hidden_size, dtype, 150, dtype)
    alone = torch.cat([logits_of(row.unsqueeze(0), weight) for row in rows])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for size in (2, 3, 5, 64, 150):
            assert torch.cat([logits_of(part, weight) for part in rows.split(size)]).equal(alone)


def test_many_tokens_are_routed_by_several_threads_as_by_one():
    config = steps_for(160)[-1]
    router = router_with_bias(config)
    logits = random_logits(700, config)
    weights, ids = router.select(logits, NO_INPUTS, router.tensors)
    torch.set_num_threads(3)
    again = router.select(logits, NO_INPUTS, router.tensors)
    assert again[0].equal(weights) and again[1].equal(ids)


def test_two_threads_may_call_at_once():
    config = steps_for(60)[3]
    router = router_with_bias(config)
    rows, weight = gate_of(60, 300, torch.bfloat16, 40, torch.bfloat16)
    plan = GatePlan(router)
    wrong: list[int] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(50):
                choice = plan.choose(rows, weight, None, router.tensors, NO_INPUTS)
                if not choice.weights.equal(expected.weights):
                    wrong.append(1)

    with torch.no_grad():
        expected = plan.choose(rows, weight, None, router.tensors, NO_INPUTS)
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_deterministic_and_default_gates_run_the_same_call():
    config = steps_for(60)[0]
    rows, weight = gate_of(60, 96, torch.bfloat16, 9, torch.bfloat16)
    router = create_router(config)
    with torch.no_grad():
        first, second = (
            GatePlan(router, deterministic=is_on).choose(
                rows, weight, None, router.tensors, NO_INPUTS
            )
            for is_on in (False, True)
        )
    assert first.logits.equal(second.logits) and first.weights.equal(second.weights)


def test_rows_need_not_be_contiguous():
    rows, weight = gate_of(5, 34, torch.float32, 8, torch.float32)
    assert logits_of(rows[::2], weight).equal(logits_of(rows[::2].contiguous(), weight))


# ---------------------------------------------------------------- what runs, and what does not


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps in torch are an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the steps in torch ran")

    monkeypatch.setattr(Router, "select_by_steps", refuse)
    monkeypatch.setattr("mixtura.routing.gate.gate_logits", refuse)


@pytest.mark.parametrize("name", CHOICES)
def test_the_gate_is_one_call_for_every_rule(name: str, no_steps: None):
    config = CHOICES[name]
    router = create_router(config, selection_bias=bias_for(config))
    rows, weight = gate_of(config.num_logits, 20, torch.bfloat16, 9, torch.bfloat16)
    with torch.no_grad():
        choice = GatePlan(router).choose(rows, weight, None, router.tensors, NO_INPUTS)
    assert choice.logits.equal(logits_of(rows, weight))
    again = router.select(choice.logits, NO_INPUTS, router.tensors)
    assert again[0].equal(choice.weights) and again[1].equal(choice.ids)


@pytest.mark.parametrize("name", CHOICES)
def test_every_rule_weighs_as_the_pipeline_does(name: str):
    config = CHOICES[name]
    router = create_router(config, selection_bias=bias_for(config))
    (weights, ids), (expected, expected_ids) = both(router, random_logits(40, config))
    assert ids.equal(expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", CHOICES)
def test_given_ids_are_weighed_as_the_pipeline_does(name: str):
    config = CHOICES[name]
    router = create_router(config, selection_bias=bias_for(config))
    given_ids = torch.stack([torch.randperm(config.num_choices)[: config.top_k] for _ in range(9)])
    (weights, ids), (expected, expected_ids) = both(router, random_logits(9, config), given_ids)
    assert ids.equal(expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30)


def test_hash_routing_weighs_in_the_same_call(no_steps: None):
    config = RoutingConfig(num_experts=6, top_k=2, score=ScoreFunction.SIGMOID, hash_routing=True)
    table = torch.tensor([[0, 5], [3, 1], [2, 4]])
    router = create_router(config, hash_table=table)
    rows, weight = gate_of(6, 20, torch.float32, 4, torch.float32)
    input_ids = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        tokens = TokenInputs(input_ids=input_ids)
        choice = GatePlan(router).choose(rows, weight, None, router.tensors, tokens)
    assert choice.ids.equal(table[input_ids])
    torch.testing.assert_close(choice.weights, choice.logits.sigmoid().gather(1, choice.ids))


def plain_choice(rows: Tensor, weight: Tensor, config: RoutingConfig) -> Choice:
    router = router_with_bias(config)
    return GatePlan(router).choose(rows, weight, None, router.tensors, NO_INPUTS)


def test_gradients_take_the_steps_in_torch():
    config = RoutingConfig(num_experts=7, top_k=3, renormalize=Renormalize.SUM)
    rows, weight = gate_of(7, 20, torch.float32, 5, torch.float32)
    weight.requires_grad_()
    choice = plain_choice(rows, weight, config)
    choice.weights[:, 0].sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with torch.no_grad():
        without = plain_choice(rows, weight, config)
    assert not without.weights.requires_grad
    assert without.ids.equal(choice.ids)
    torch.testing.assert_close(without.weights, choice.weights)


def test_a_scale_that_learns_takes_the_steps_in_torch():
    config = RoutingConfig(num_experts=7, top_k=3, per_expert_scale=True)
    scale = torch.ones(7, requires_grad=True)
    router = create_router(config, per_expert_scale=scale)
    router.route(random_logits(4, config)).topk_weights.sum().backward()
    assert scale.grad is not None and scale.grad.abs().sum() > 0


class Marked(torch.Tensor):
    """A subclass, whose memory need not hold what it stands for."""


UNTAKEN: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "float64 rows": lambda rows, weight: (rows.double(), weight),
    "float64 weight": lambda rows, weight: (rows, weight.double()),
    "strided weight": lambda rows, weight: (rows, weight.T.contiguous().T),
    "subclass": lambda rows, weight: (rows.as_subclass(Marked), weight),
}


@pytest.mark.parametrize("name", UNTAKEN)
def test_what_the_call_does_not_take_runs_in_torch(name: str):
    config = RoutingConfig(num_experts=7, top_k=3)
    rows, weight = gate_of(7, 20, torch.float32, 5, torch.float32)
    kernel = router_with_bias(config).kernel
    assert kernel is not None
    with torch.no_grad():
        assert kernel.takes_rows(rows, weight, None, None, None)
        expected = plain_choice(rows, weight, config)
        rows, weight = UNTAKEN[name](rows, weight)
        assert not kernel.takes_rows(rows, weight, None, None, None)
        choice = plain_choice(rows, weight, config)
    assert choice.ids.equal(expected.ids)
    torch.testing.assert_close(torch.as_tensor(choice.weights), expected.weights)


@pytest.mark.parametrize("is_fp32", [False, True])
def test_a_native_gate_keeps_its_family_s_product(is_fp32: bool):
    """To the bit."""
    native = NativeGate(fp32_logits=is_fp32, fp32_weights=False)
    config = RoutingConfig(num_experts=60, top_k=3, native=native)
    rows, weight = gate_of(60, 2000, torch.bfloat16, 5, torch.bfloat16)
    router = create_router(config)
    plan = GatePlan(router, GatePrecision.NATIVE)
    with torch.no_grad():
        choice = plan.choose(rows, weight, None, router.tensors, NO_INPUTS)
    dtype = torch.float32 if is_fp32 else torch.bfloat16
    assert choice.logits.equal(torch.nn.functional.linear(rows.to(dtype), weight.to(dtype)))
    assert choice.weights.dtype == torch.bfloat16


def test_a_bias_or_scale_of_another_shape_is_not_taken():
    config = RoutingConfig(num_experts=7, top_k=3)
    kernel = CpuRouting.for_rule(config)
    assert kernel is not None
    logits = random_logits(2, config)
    assert kernel.takes_logits(logits, torch.zeros(7), torch.ones(7))
    assert not kernel.takes_logits(logits, torch.zeros(8), None)
    assert not kernel.takes_logits(logits, torch.zeros(7).double(), None)
    assert not kernel.takes_logits(logits, None, torch.ones(1, 7))
    assert not kernel.takes_logits(logits[:, :6], None, None)
    assert not kernel.takes_logits(logits.double(), None, None)


def test_without_the_extension_torch_does_it(monkeypatch: pytest.MonkeyPatch):
    config = steps_for(60)[3]
    rows, weight = gate_of(60, 40, torch.float32, 5, torch.float32)
    with torch.no_grad():
        expected = plain_choice(rows, weight, config)
        monkeypatch.setattr(cpu_routing, "_HAS_EXTENSION", False)
        monkeypatch.setattr(cpu_routing, "extension", None)
        choice = plain_choice(rows, weight, config)
    assert choice.ids.equal(expected.ids)
    torch.testing.assert_close(choice.weights, expected.weights, rtol=1e-5, atol=1e-7)


def test_a_norm_that_the_extension_covers_not_runs_in_torch():
    config = RoutingConfig(num_experts=5, top_k=2, renormalize=Renormalize.P_NORM, p_norm=-1.0)
    router = create_router(config)
    assert router.kernel is None
    weights = router.route(random_logits(3, config)).topk_weights
    torch.testing.assert_close((1 / weights).sum(-1), torch.ones(3))


def test_debug_names_the_tokens_with_nan():
    router = create_router(RoutingConfig(num_experts=5, top_k=2))
    rows, weight = gate_of(5, 20, torch.float32, 4, torch.float32)
    rows[2] = math.nan
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"logits of tokens \[2\] must be numbers"),
    ):
        GatePlan(router, debug=True).choose(rows, weight, None, router.tensors, NO_INPUTS)


@pytest.mark.parametrize("bad", [-1, 7])
def test_given_ids_outside_the_experts_are_refused(bad: int):
    config = RoutingConfig(num_experts=7, top_k=2)
    kernel = CpuRouting.for_rule(config)
    assert kernel is not None
    given_ids = torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(InputError, match=rf"must be in \[0, 7\); got .*{bad}.*Correct the ids"):
        kernel.route(random_logits(2, config), None, None, given_ids)


def test_no_token_at_all():
    rows, weight = gate_of(7, 20, torch.bfloat16, 0, torch.bfloat16)
    with torch.no_grad():
        choice = plain_choice(rows, weight, RoutingConfig(num_experts=7, top_k=3))
    assert [tuple(part.shape) for part in choice[:3]] == [(0, 7), (0, 3), (0, 3)]


# ---------------------------------------------------------------- graphs and copies


@pytest.mark.parametrize("name", CHOICES)
def test_graphs_know_the_rule_by_its_text(name: str):
    kernel = CpuRouting.for_rule(CHOICES[name])
    assert kernel is not None
    assert cpu_routing._rule_of(kernel.text) == kernel


def make_gate(config: RoutingConfig) -> Gate:
    router = create_router(config, selection_bias=bias_for(config))
    gate = Gate(GatePlan(router), 24, has_bias=True, dtype=torch.bfloat16)
    torch.nn.init.normal_(gate.weight, std=0.3)
    torch.nn.init.normal_(gate.bias, std=0.3)
    if gate.selection_bias is not None:
        gate.selection_bias.copy_(bias_for(config))
    return gate


@pytest.mark.parametrize("name", ["v3", "softmax", "gated-shared", "sparsemixer"])
def test_a_compiled_gate_is_one_graph_with_the_same_result(name: str, no_steps: None):
    gate = make_gate(CHOICES[name])
    compiled = torch.compile(gate, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for num_tokens in (1, 9, 2):
            rows = torch.randn(num_tokens, 24).bfloat16()
            for got, expected in zip(compiled(rows)[:3], gate(rows)[:3], strict=True):
                assert got.equal(expected)


def test_the_operators_keep_their_promises():
    """Schema, fake kernels and dispatch, as torch checks them."""
    config = CHOICES["v3"]
    kernel, bias = CpuRouting.for_rule(config), bias_for(config)
    assert kernel is not None
    rows, weight = gate_of(12, 20, torch.bfloat16, 5, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mixtura.cpu_gate.default,
        (rows, weight, None, bias, None, None, kernel.text),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.mixtura.cpu_route.default,
        (random_logits(5, config), bias, None, None, kernel.text),
        test_utils=checks,
    )


@pytest.mark.parametrize("again", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_a_gate_can_be_copied_and_pickled(again: Callable[[Gate], Gate], no_steps: None):
    gate = make_gate(dataclasses.replace(CHOICES["v3"], scale=3.0))
    rows = torch.randn(5, 24).bfloat16()
    with torch.no_grad():
        expected, choice = gate(rows), again(gate)(rows)
    assert choice.weights.equal(expected.weights) and choice.ids.equal(expected.ids)


def test_tensors_of_a_call_replace_the_router_s():
    config = CHOICES["sigmoid-bias"]
    router = create_router(config, selection_bias=torch.zeros(13))
    logits = random_logits(5, config)
    favoured = RouterTensors(selection_bias=torch.eye(13)[12] * 9)
    _, ids = router.select(logits, NO_INPUTS, favoured)
    assert (ids[:, 0] == 12).all()
    half = RouterTensors(selection_bias=torch.eye(13)[12].bfloat16() * 9)
    assert router.select(logits, NO_INPUTS, half)[1].equal(ids)
