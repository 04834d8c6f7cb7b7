"""Routing kernels of a GPU against the steps in torch and `Router.finish`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_device import DEVICE
from routing_rules import (
    CHOICES,
    equal_logits,
    few_and_infinite,
    few_with_nan,
    random_logits,
    router_with_bias,
    steps_for,
    whole_logits,
)
from test_triton_align import check as check_order
from torch import Tensor

from mixtura import ExpertsConfig, FusedMoE, MoEConfig
from mixtura.config import (
    GatePrecision,
    NativeGate,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScoreFunction,
    SelectionBias,
)
from mixtura.kernels.triton import routing as triton_routing
from mixtura.kernels.triton.regimes import tiling_for
from mixtura.kernels.triton.routing import TritonRouting
from mixtura.routing import Router, RouterTensors, create_router, routers
from mixtura.routing.gate import Choice, GatePlan
from mixtura.types import Bypass, ExpertBatch, Routing, TokenInputs

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)

Makers = Callable[[int, RoutingConfig], Tensor]
COVERED = {
    name: config
    for name, config in CHOICES.items()
    if config.score is not ScoreFunction.SPARSEMIXER
} | {
    f"{kind.value}-experts": RoutingConfig(
        num_experts=9, top_k=4, no_compute=NoComputeExperts(kind=kind, count=3), scale=1.5
    )
    for kind in NoComputeKind
}


def learned(config: RoutingConfig) -> Router:
    """The router of a rule with all that it asks for, on the device."""
    kind = config.no_compute.kind if config.no_compute else None
    found = router_with_bias(config) if kind is not NoComputeKind.CONSTANT else None
    bias, scale = (
        (found.tensors.selection_bias, found.tensors.per_expert_scale) if found else (None, None)
    )
    return create_router(
        config,
        selection_bias=None if bias is None else bias.to(DEVICE),
        per_expert_scale=None if scale is None else scale.to(DEVICE),
        constants=torch.ones(3, 8, device=DEVICE) if found is None else None,
    )


def expected(
    router: Router, logits: Tensor, given: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Routing]:
    """What torch makes of the same, step by step, on the CPU where its ties are the pipeline's."""
    tensors = RouterTensors(
        *(
            None if part is None else part.cpu()
            for part in (getattr(router.tensors, f.name) for f in dataclasses.fields(RouterTensors))
        )
    )
    given = None if given is None else given.cpu()
    weights, ids = router.select_by_steps(logits.cpu(), given, tensors)
    tokens = TokenInputs(padding_mask=None if mask is None else mask.cpu())
    return weights, ids, router.finish(weights, ids, tokens, tensors)


def near(got: Tensor | None, wanted: Tensor | None) -> None:
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None:
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got.cpu(), wanted, rtol=3e-6, atol=3e-7, equal_nan=True)


def compare(
    router: Router, logits: Tensor, given: Tensor | None = None, mask: Tensor | None = None
) -> Routing:
    """Ids, order and tiles to the bit, weights as near as fp32 is; returns the kernel's."""
    logits = logits.to(DEVICE)
    kernel, tensors = TritonRouting.for_rule(router.config), router.tensors
    assert kernel is not None
    learned_tensors = (tensors.selection_bias, tensors.per_expert_scale)
    assert kernel.takes_logits(logits, *learned_tensors)
    weights, ids, routing = kernel.route(logits, *learned_tensors, given, mask, tensors.constants)
    raw_weights, raw_ids, wanted = expected(router, logits, given, mask)
    assert ids.dtype is torch.int32 and ids.cpu().equal(raw_ids.int())
    near(weights, raw_weights)
    assert routing.topk_ids.cpu().equal(wanted.topk_ids)
    near(routing.topk_weights, wanted.topk_weights)
    assert (routing.bypass is None) == (wanted.bypass is None)
    for field in dataclasses.fields(Bypass):
        near(getattr(routing.bypass, field.name, None), getattr(wanted.bypass, field.name, None))
    config = router.config
    num_experts = config.num_experts + config.num_fused_shared_experts
    tiling = tiling_for(logits.shape[0], config.num_slots, num_experts)
    assert (routing.order is None) == (tiling is None)
    if routing.order is not None:
        assert routing.order.tiling == tiling
        check_order(routing.order, routing.topk_ids, num_experts)
    return routing


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches for any number of tokens, and blocks of a few."""
    monkeypatch.setattr(triton_routing, "ONE_LAUNCH_SLOTS", -1)
    monkeypatch.setattr(triton_routing, "BLOCK_TOKENS", ((1 << 30, 8),))


@pytest.mark.parametrize("name", COVERED)
def test_every_rule_is_the_pipeline_s(name: str) -> None:
    config = COVERED[name]
    for make in (whole_logits, few_with_nan):
        compare(learned(config), make(13, config))


@pytest.mark.parametrize("name", ["v3", "gated-shared", "identity-experts", "after"])
def test_three_launches_route_as_one(in_blocks: None, name: str) -> None:
    config = COVERED[name]
    compare(learned(config), whole_logits(21, config))


RULES = [(count, rule) for count in (1, 3, 60, 160) for rule in steps_for(count)]


@pytest.mark.parametrize("make", [equal_logits, few_and_infinite, random_logits])
def test_ties_infinities_and_odd_numbers_of_experts(make: Makers) -> None:
    """Rules of every kind and count, in turn for every way to make logits."""
    first = [equal_logits, few_and_infinite, random_logits].index(make)
    for _, config in RULES[first::5]:
        compare(learned(config), make(7, config))


def test_zeros_of_both_signs_tie_and_nan_of_both_signs_comes_first() -> None:
    config = RoutingConfig(num_experts=8, top_k=8, score=ScoreFunction.LOGIT)
    zeros = [-0.0, 0.0, -1.0, -0.0, 0.0, math.inf, -math.inf, 1.0]
    numbers = [1.0, math.nan, -math.nan, math.inf, 0.0, math.nan, -0.0, 2.0]
    compare(learned(config), torch.tensor([zeros, numbers]))


def test_many_experts_and_slots() -> None:
    for num_experts, top_k in ((896, 16), (17, 17), (64, 64)):
        config = RoutingConfig(
            num_experts=num_experts,
            top_k=top_k,
            score=ScoreFunction.SQRT_SOFTPLUS,
            selection_bias=SelectionBias.ON_SCORE,
            renormalize=Renormalize.SUM,
        )
        compare(learned(config), whole_logits(3, config))


def test_small_scores_are_not_rounded_away() -> None:
    """log(1 + exp(x)) of logits far below zero."""
    config = RoutingConfig(num_experts=8, top_k=8, score=ScoreFunction.SQRT_SOFTPLUS)
    logits = torch.linspace(-60, 20, 24).view(3, 8)
    kernel = TritonRouting.for_rule(config)
    assert kernel is not None
    weights, ids, _ = kernel.route(logits.to(DEVICE))
    exact = logits.double().exp().log1p().sqrt().gather(1, ids.cpu().long())
    torch.testing.assert_close(weights.cpu().double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9, 65])
def test_tokens_in_every_number(num_tokens: int) -> None:
    config = RoutingConfig(num_experts=20, top_k=3, renormalize=Renormalize.SUM)
    compare(learned(config), whole_logits(num_tokens, config))


def test_a_token_s_weights_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in one launch, in three, and alone."""
    config = RoutingConfig(num_experts=20, top_k=5, renormalize=Renormalize.SUM)
    kernel, logits = TritonRouting.for_rule(config), random_logits(33, config).to(DEVICE)
    assert kernel is not None
    whole = kernel.route(logits)[0]
    parts = torch.cat([kernel.route(part)[0] for part in logits.split([1, 32])])
    monkeypatch.setattr(triton_routing, "ONE_LAUNCH_SLOTS", -1)
    assert parts.equal(whole) and kernel.route(logits)[0].equal(whole)


@pytest.mark.parametrize("name", ["v3", "identity-experts", "shared", "constant-experts"])
def test_given_ids_replace_the_choice(name: str) -> None:
    config = COVERED[name]
    given = torch.stack([torch.randperm(config.num_choices)[: config.top_k] for _ in range(9)])
    compare(learned(config), random_logits(9, config), given.to(DEVICE))


def test_given_ids_out_of_range_are_no_expert() -> None:
    config = RoutingConfig(num_experts=6, top_k=2)
    kernel = TritonRouting.for_rule(config)
    assert kernel is not None
    given = torch.tensor([[7, 1], [-5, 2**31 - 1], [3, 0]], device=DEVICE)
    _, ids, routing = kernel.route(random_logits(3, config).to(DEVICE), given_ids=given)
    assert ids.tolist() == [[-1, 1], [-1, -1], [3, 0]]
    assert (routing.topk_weights.cpu() > 0).tolist() == [[False, True], [False, False], [True] * 2]


@pytest.mark.parametrize("name", ["v3", "identity-experts", "constant-experts", "shared"])
def test_padding_tokens_visit_no_expert(name: str) -> None:
    config = COVERED[name]
    mask = torch.arange(11, device=DEVICE) % 3 > 0
    routing = compare(learned(config), few_with_nan(11, config), mask=mask)
    assert (routing.topk_ids[~mask] == -1).all() and (routing.topk_weights[~mask] == 0).all()


def test_logits_may_be_columns_of_a_wider_tensor() -> None:
    config = RoutingConfig(num_experts=12, top_k=2)
    compare(learned(config), whole_logits(5, dataclasses.replace(config, num_experts=30))[:, 3:15])
    compare(learned(config), whole_logits(12, dataclasses.replace(config, num_experts=5)).T)


@pytest.mark.parametrize("kind", ["bf16 bias", "p=3", "p=1", "negative multiplier", "cap"])
def test_what_else_a_rule_may_say(kind: str) -> None:
    sizes: dict[str, Any] = {"num_experts": 12, "top_k": 4}
    more: dict[str, dict[str, Any]] = {
        "bf16 bias": {"selection_bias": SelectionBias.ON_LOGIT},
        "p=3": {"renormalize": Renormalize.P_NORM, "p_norm": 3.0},
        "p=1": {"renormalize": Renormalize.P_NORM, "p_norm": 1.0, "score": ScoreFunction.LOGIT},
        "negative multiplier": {"logit_multiplier": -0.5, "score": ScoreFunction.SIGMOID},
        "cap": {"logit_softcap": 2.0, "score": ScoreFunction.LOGIT},
    }
    config = RoutingConfig(**sizes, **more[kind])
    router = learned(config)
    if kind == "bf16 bias":
        bias = torch.arange(12, device=DEVICE, dtype=torch.bfloat16) / 16
        router = create_router(config, selection_bias=bias)
    compare(router, whole_logits(9, config))


# ------------------------------------------------------------------------------ what is not covered


@pytest.mark.parametrize(
    "config",
    [
        RoutingConfig(num_experts=4, top_k=2, score=ScoreFunction.SPARSEMIXER),
        RoutingConfig(num_experts=4, top_k=2, renormalize=Renormalize.P_NORM, p_norm=-1.0),
        RoutingConfig(num_experts=1025, top_k=2),
        RoutingConfig(num_experts=65, top_k=65),
    ],
)
def test_rules_that_stay_in_torch(config: RoutingConfig) -> None:
    assert TritonRouting.for_rule(config) is None


def test_tensors_that_stay_in_torch() -> None:
    class Marked(torch.Tensor):
        pass

    config = RoutingConfig(num_experts=7, top_k=3, per_expert_scale=True)
    kernel, logits = TritonRouting.for_rule(config), random_logits(2, config).to(DEVICE)
    assert kernel is not None
    scale = torch.ones(7, device=DEVICE)
    assert kernel.takes_logits(logits, None, scale)
    assert kernel.takes_logits(logits, torch.zeros(7, device=DEVICE).bfloat16(), scale)
    assert not kernel.takes_logits(logits.double(), None, scale)
    assert not kernel.takes_logits(logits.bfloat16(), None, scale)
    assert not kernel.takes_logits(logits[:, :6], None, scale)
    assert not kernel.takes_logits(logits, torch.zeros(8, device=DEVICE), scale)
    assert not kernel.takes_logits(logits, None, scale.double())
    assert not kernel.takes_logits(logits.as_subclass(Marked), None, scale)
    scale.requires_grad_()
    assert not kernel.takes_logits(logits, None, scale)
    with torch.no_grad():
        assert kernel.takes_logits(logits, None, scale)


# -------------------------------------------------------------------------------------- the wiring


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers ask Triton for logits on a CPU too, and the extension for none."""
    monkeypatch.setattr(routers, "GPU_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr("mixtura.kernels.cpu.routing._HAS_EXTENSION", False)
    monkeypatch.setattr(Router, "select_by_steps", None)


def test_a_router_asks_the_kernel(kernels_on_cpu: None) -> None:
    config = COVERED["identity-experts"]
    router, logits = learned(config), random_logits(12, config).to(DEVICE)
    routing = router.route(logits)
    assert routing.order is not None and routing.order.ids is routing.topk_ids
    assert routing.bypass is not None
    assert routing.bypass.identity_weight is not None
    with pytest.raises(TypeError):  # the steps are out of the way: nothing else can have routed
        router.select(logits, TokenInputs(), router.tensors)


def test_hash_routing_and_replay_are_weighed_by_the_kernel(kernels_on_cpu: None) -> None:
    config = RoutingConfig(num_experts=6, top_k=2, score=ScoreFunction.SIGMOID, hash_routing=True)
    table = torch.tensor([[0, 5], [3, 1], [2, 4]], device=DEVICE)
    router, logits = create_router(config, hash_table=table), random_logits(4, config).to(DEVICE)
    input_ids = torch.tensor([2, 0, 0, 1], device=DEVICE)
    routing = router.route(logits, input_ids)
    assert routing.topk_ids.long().equal(table[input_ids])
    replayed = TokenInputs(input_ids=input_ids, replayed_ids=table[[1, 1, 0, 2]].int())
    assert router.route(logits, tokens=replayed).topk_ids.tolist()[0] == [3, 1]
    near(routing.topk_weights, logits.cpu().sigmoid().gather(1, table[input_ids].cpu()))


def layer_of(routing: RoutingConfig) -> FusedMoE:
    experts = ExpertsConfig(num_experts=routing.num_experts, hidden_size=8, intermediate_size=6)
    layer = FusedMoE(MoEConfig(hidden_size=8, routing=routing, experts=experts), device=DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


class Seen(FusedMoE):
    """Keeps the batches that its experts were given."""

    batches: list[ExpertBatch]

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        self.batches.append(batch)
        return super().run_experts(batch, reduce=reduce)


@pytest.mark.parametrize("name", ["softmax-sum", "identity-experts"])
def test_the_experts_get_the_order(request: pytest.FixtureRequest, name: str) -> None:
    layer, rows = layer_of(COVERED[name]), torch.randn(13, 8, device=DEVICE)
    shown: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        wanted = layer(rows)
        request.getfixturevalue("kernels_on_cpu")
        layer.__class__, layer.batches = Seen, []
        layer.observers = (lambda ids, weights: shown.append((ids, weights)),)
        got = layer(rows)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    (batch,) = layer.batches
    assert batch.order is not None and batch.order.ids is batch.local_ids
    ((ids, _),) = shown
    no_compute = COVERED[name].no_compute
    assert int(ids.min()) >= 0 and bool((batch.local_ids == -1).any()) == (no_compute is not None)


def test_a_native_gate_s_weights_are_rounded(kernels_on_cpu: None) -> None:
    config = RoutingConfig(num_experts=9, top_k=2, native=NativeGate(fp32_weights=False))
    plan = GatePlan(create_router(config), GatePrecision.NATIVE)
    rows, weight = torch.randn(10, 8).bfloat16().to(DEVICE), torch.randn(9, 8).to(DEVICE)
    with torch.no_grad():
        choice = plan.choose(rows, weight, None, RouterTensors(), TokenInputs())
    assert choice.weights.dtype is torch.bfloat16 and choice.routing is None


# ------------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize("name", ["v3", "identity-experts", "constant-experts", "shared"])
def test_graphs_know_the_rule_by_its_text(name: str) -> None:
    kernel = TritonRouting.for_rule(COVERED[name])
    assert kernel is not None
    assert triton_routing._routing_of(kernel.text) == kernel


@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_hook_makes_of_a_choice_counts(
    kernels_on_cpu: None, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """What was made along with the choice, routing and order, is of the choice before the hook."""
    config = RoutingConfig(num_experts=6, top_k=2, renormalize=Renormalize.SUM)
    layer = layer_of(config)
    seen: list[Routing] = []
    finish = layer.finish_routing

    def seeing(*given: Any) -> Routing:
        seen.append(finish(*given))
        return seen[-1]

    monkeypatch.setattr(layer, "finish_routing", seeing)
    rows = torch.randn(9, 8, device=DEVICE)

    def to_the_last(_: Any, __: Any, choice: Choice) -> Choice | None:
        if in_place:
            choice.ids.fill_(5)
            return None
        return choice._replace(ids=torch.full_like(choice.ids, 5))

    layer.gate.register_forward_hook(to_the_last)
    with torch.no_grad():
        layer.route(rows, TokenInputs())
    (routing,) = seen
    assert (routing.topk_ids == 5).all() and routing.order is None


@pytest.mark.parametrize("name", ["v3", "identity-experts"])
def test_a_compiled_router_is_one_graph(kernels_on_cpu: None, name: str) -> None:
    router = learned(COVERED[name])

    def route(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        routing = router.route(logits)
        order = routing.order
        assert order is not None
        return routing.topk_ids, routing.topk_weights, order.tiles, order.ids is routing.topk_ids

    compiled = torch.compile(route, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for num_tokens in (12, 17):
            logits = random_logits(num_tokens, COVERED[name]).to(DEVICE)
            ids, weights, tiles, is_same = compiled(logits)
            wanted = router.route(logits)
            assert is_same and ids.equal(wanted.topk_ids) and weights.equal(wanted.topk_weights)
            assert wanted.order is not None and tiles.shape == wanted.order.tiles.shape


def test_the_operator_keeps_its_promises() -> None:
    config = COVERED["identity-experts"]
    kernel = TritonRouting.for_rule(config)
    assert kernel is not None
    arguments = (random_logits(5, config).to(DEVICE), None, None, None, None, 16, kernel.text)
    checks = ("test_schema", "test_faketensor")
    operator = torch.ops.mixtura.triton_route.default
    torch.library.opcheck(operator, arguments, test_utils=checks)
