"""Whole models whose experts are spread over ranks (threads here) give one process's logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import virtual_ranks
from families import TinyCase, tiny_model
from tolerances import assert_close
from torch import Tensor

from mixtura.config import DispatcherName, EplbConfig, ParallelConfig, TokensHeld
from mixtura.eplb import Activity
from mixtura.errors import ConfigError, InputError, ParallelError
from mixtura.hf import convert
from mixtura.hf.balance import find_balancer
from mixtura.hf.blocks import spread_out
from mixtura.hf.experts import BlockExperts, plan_experts
from mixtura.hf.parallel import find_ranks, finish_requests
from mixtura.parallel import ExpertParallel, Transport
from mixtura.runner import OverlappedMoERunner

BLOCKS = ["qwen3_moe", "deepseek_v3"]
EXPERTS_ONLY = ["ernie4_5_moe"]
OTHERS = ["gpt_oss", "longcat_flash", "llama4", "dbrx", "jetmoe", "glm4_moe", "nemotron_h"]
by_family = pytest.mark.parametrize(
    "family",
    [*BLOCKS, *EXPERTS_ONLY, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
OWN = TokensHeld.OWN
DISPATCHERS = [name for name in DispatcherName if name is not DispatcherName.DEEP_EP]


def over_ranks(
    case: TinyCase, parallel: ParallelConfig, rows: list[Tensor] | None = None, **options: Any
) -> list[Tensor]:
    """The logits of every rank, for its own rows of ids or for the case's inputs."""
    models = [copy.deepcopy(case.model) for _ in range(parallel.num_ranks)]

    def work(transport: Transport) -> Tensor:
        ranks = ExpertParallel.over(parallel, transport)
        model = convert(models[transport.rank], kernel="reference", parallel=ranks, **options)
        if rows is None:
            return case.output(model)
        with torch.no_grad():
            found: Tensor = model(rows[transport.rank]).logits
        return found

    return virtual_ranks.run(parallel.num_ranks, work)


def alone(case: TinyCase, **options: Any) -> Any:
    return convert(copy.deepcopy(case.model), kernel="reference", **options)


@by_family
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_ranks_that_share_a_batch(family, dispatcher):
    case = tiny_model(family)
    with torch.no_grad():
        expected = case.output(alone(case))
    for found in over_ranks(case, ParallelConfig(ep_size=3, dispatcher=dispatcher)):
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", *EXPERTS_ONLY])
@pytest.mark.parametrize("dispatcher", [DispatcherName.ALL_GATHER, DispatcherName.ALL_TO_ALL])
def test_ranks_with_tokens_of_their_own(family, dispatcher):
    case = tiny_model(family)
    model = alone(case)
    rows = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9]]), torch.tensor([[10, 11]])]
    parallel = ParallelConfig(ep_size=3, tokens=OWN, dispatcher=dispatcher)
    for found, ids in zip(over_ranks(case, parallel, rows), rows, strict=True):
        with torch.no_grad():
            assert torch.allclose(found, model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_deterministic_ranks_are_bitwise_alike(dispatcher):
    case = tiny_model("qwen3_moe")
    with torch.no_grad():
        expected = case.output(alone(case, deterministic=True))
    parallel = ParallelConfig(ep_size=2, dispatcher=dispatcher)
    for found in over_ranks(case, parallel, deterministic=True, max_rows_per_pass=4):
        assert torch.equal(found, expected)


def test_chunks_and_cuts():
    case = tiny_model("qwen3_moe")
    with torch.no_grad():
        expected = case.output(alone(case))
    for found in over_ranks(case, ParallelConfig(ep_size=2, tp_size=2), max_rows_per_pass=5):
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("held", list(TokensHeld))
def test_two_batches_at_a_time(held):
    case = tiny_model("qwen3_moe")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = alone(case)(ids).logits
    parallel = ParallelConfig(ep_size=2, tokens=held)
    models = [copy.deepcopy(case.model) for _ in range(2)]

    def work(transport: Transport) -> tuple[Tensor, bool]:
        ranks = ExpertParallel.over(parallel, transport, overlap_min_tokens=2)
        model = convert(models[transport.rank], kernel="reference", parallel=ranks)
        layer: Any = model.get_submodule(case.block_modules[0])
        return model(ids).logits, isinstance(layer.plan.runner, OverlappedMoERunner)

    for found, is_overlapped in virtual_ranks.run(2, work):
        assert is_overlapped
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


def generated(model: Any, ids: Tensor, count: int) -> list[int]:
    tokens: Tensor = model.generate(ids, max_new_tokens=count, do_sample=False)
    found: list[int] = tokens[0].tolist()
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", *EXPERTS_ONLY])
def test_ranks_run_along_until_the_last_one_is_done(family):
    case = tiny_model(family)
    whole = alone(case)
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 4]]), torch.tensor([[8]])]
    lengths = [2, 7, 4]
    models = [copy.deepcopy(case.model) for _ in prompts]
    parallel = ParallelConfig(ep_size=3, tokens=OWN)

    def work(transport: Transport) -> tuple[list[int], int]:
        rank = transport.rank
        ranks = ExpertParallel.over(parallel, transport)
        model = convert(models[rank], kernel="reference", parallel=ranks)
        text = generated(model, prompts[rank], lengths[rank])
        return text, finish_requests(model)

    found = virtual_ranks.run(3, work)
    expected = [generated(whole, ids, count) for ids, count in zip(prompts, lengths, strict=True)]
    assert [text for text, _ in found] == expected
    assert [count for _, count in found] == [5, 0, 3]


def test_one_exchange_opens_a_forward_and_none_where_the_batch_is_shared():
    case = tiny_model("qwen3_moe")
    calls = {}
    for parallel in (ParallelConfig(ep_size=2, tokens=OWN), ParallelConfig(ep_size=2)):
        models = [copy.deepcopy(case.model) for _ in range(2)]

        def work(transport: Any, parallel=parallel, models=models) -> list[str]:
            ranks = ExpertParallel.over(parallel, transport)
            model = convert(models[transport.rank], kernel="reference", parallel=ranks)
            before = len(transport.world.calls[transport.rank])
            model(torch.tensor([[3, 4]]))
            return list(transport.world.calls[transport.rank][before:])

        calls[parallel.tokens] = virtual_ranks.run(2, work)[0]
    num_layers = len(case.block_modules)
    assert calls[TokensHeld.SHARED] == ["all_reduce"] * num_layers
    assert calls[OWN][0] == "all_gather"
    assert len(calls[OWN]) in (1 + 2 * num_layers, 1 + 3 * num_layers)


def test_a_step_is_closed_where_a_forward_fails():
    case = tiny_model("qwen3_moe")
    ranks = ExpertParallel.over(ParallelConfig(tokens=OWN))
    model = convert(copy.deepcopy(case.model), parallel=ranks)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert not ranks.clock.is_open
    with torch.no_grad():
        model(torch.tensor([[1]]))


def test_what_is_spread_stays_so():
    model = convert(copy.deepcopy(tiny_model("qwen3_moe").model), parallel=ParallelConfig())
    ranks = find_ranks(model)
    assert ranks is not None
    assert find_ranks(convert(model, gate="native")) is ranks
    other = ExpertParallel.over(ParallelConfig(tokens=OWN))
    with pytest.raises(InputError, match="must stay so"):
        convert(model, parallel=other)
    with pytest.raises(InputError, match="must be dense to be written to a state_dict"):
        model.state_dict()


def test_tables_follow_a_model_that_was_moved():
    ranks = ExpertParallel.over(ParallelConfig())
    model = convert(copy.deepcopy(tiny_model("qwen3_moe").model), parallel=ranks)
    experts: Any = next(m for m in model.modules() if isinstance(m, BlockExperts))
    plan = plan_experts(experts, experts.options)
    assert plan.given is not None
    moved = replace(plan, given=plan.given.mapped(lambda tensor: tensor.to("meta")))
    spread = spread_out(moved, None, lambda ranks, placement: experts.spread).spread
    assert spread is not None
    assert spread.slots.here.device.type == spread.slots.owner.device.type == "meta"


def test_refusals():
    case = tiny_model("qwen3_moe")
    with pytest.raises(ParallelError, match="must equal the number of ranks in the group; got 1"):
        convert(case.model, parallel=ParallelConfig(ep_size=2))
    ranks = ExpertParallel.over(ParallelConfig())
    with pytest.raises(ConfigError, match=r"overlap_min_tokens \(8\) must be that of the ranks"):
        convert(case.model, parallel=ranks, overlap_min_tokens=8)
    with pytest.raises(ParallelError, match="must be spread over ranks to finish together"):
        finish_requests(case.model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_rows'"):
        convert(case.model, max_rows=3)  # type: ignore[call-arg]


def test_ranks_that_differ_end_in_an_error_on_all():
    case = tiny_model("qwen3_moe")
    models = [copy.deepcopy(case.model) for _ in range(2)]

    def work(transport: Transport) -> str:
        ranks = ExpertParallel.over(ParallelConfig(ep_size=2), transport)
        with pytest.raises(ParallelError) as caught:
            convert(
                models[transport.rank],
                kernel="torch" if transport.rank else "reference",
                parallel=ranks,
            )
        return str(caught.value)

    for text in virtual_ranks.run(2, work):
        assert "kernel of model.layers.1.mlp of rank 1 (torch) must be that of rank 0" in text


def test_a_model_that_is_converted_again_finds_its_experts_where_they_are_now():
    """They have moved since they were loaded; also with a layer under way."""
    case = tiny_model("qwen3_moe")
    expected = case.output(alone(case))
    models = [copy.deepcopy(case.model) for _ in range(2)]
    eplb = EplbConfig(interval=1, policy="global", min_gain=0.0)
    parallel = ParallelConfig(ep_size=2, num_redundant_experts=2, eplb=eplb)

    def work(transport: Transport) -> int:
        ranks = ExpertParallel.over(parallel, transport)
        model = convert(models[transport.rank], kernel="reference", parallel=ranks)
        moved, start = 0, find_balancer(model).placement.physical_to_logical  # type: ignore[union-attr]
        for number in range(6):
            assert_close(case.output(model), expected, torch.float32)
            balancer = find_balancer(model)
            assert balancer is not None
            while balancer.activity is Activity.PLANNING:
                balancer.step()
            for _ in range(2 + number):
                if balancer.activity is Activity.MOVING:
                    balancer.step()
            found = balancer.placement.physical_to_logical
            convert(model, kernel="reference")
            again = find_balancer(model)
            assert again is not None
            assert torch.equal(again.placement.physical_to_logical, found)
            moved += int((found != start).sum())
            assert_close(case.output(model), expected, torch.float32)
        with pytest.raises(ConfigError, match="must not be copied"):
            copy.deepcopy(model)
        return moved

    assert min(virtual_ranks.run(2, work)) > 0
