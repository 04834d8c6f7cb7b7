"""The layer on ranks that are processes, whatever it is made of, equals the layer on one."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from covering import Case, covering_cases, every_combination
from expert_cases import moe_config, quantized, random_weights, rows_of
from rank_processes import RankProcesses, Seat
from spread_layers import WAYS, rank_layer
from tolerances import RTOL, relative_error
from torch import Tensor

from mixtura.config import (
    DispatcherName,
    NoComputeExperts,
    NoComputeKind,
    ParallelConfig,
    RunnerConfig,
    SharedExpertsConfig,
    TokensHeld,
)
from mixtura.layer import FusedMoE
from mixtura.quant.formats import WeightFormat

HIDDEN, INTERMEDIATE = 64, 32
"""Two groups of 32 codes, and one."""

AXES: dict[str, list[Any]] = {
    "ep_size": [1, 2, 3, 4],
    "num_experts": [6, 16, 60, 64],
    "weights": ["bf16", "int8-g32", "int4-g32"],
    "has_shared": [False, True],
    "has_zero_experts": [False, True],
    "tokens": ["zero", "one", "odd", "to one rank"],
    "way": [f"{dispatcher.value} {held.value}" for dispatcher, held in WAYS],
    "runner": ["default", "chunking", "overlapped"],
    "deterministic": [False, True],
}

COUNTS = {"zero": [0, 3, 0, 5], "one": [1, 1, 1, 1], "odd": [7, 5, 1, 3], "to one rank": [4] * 4}
"""Tokens of each rank; where all hold one batch, it is the first's."""

RUNNERS = {
    "default": RunnerConfig(),
    "chunking": RunnerConfig(max_rows_per_pass=2),
    "overlapped": RunnerConfig(overlap_min_tokens=2),
}

COVERING = covering_cases(AXES, 3)


@functools.lru_cache(maxsize=64)
def whole_layer(
    num_experts: int,
    weights: str,
    has_shared: bool,
    has_zero_experts: bool,
    deterministic: bool,
    to_one_rank: bool,
) -> FusedMoE:
    """The layer on one rank, its parameters drawn the same way in every process."""
    zero = NoComputeExperts(kind=NoComputeKind.ZERO, count=3)
    config = moe_config(
        num_experts,
        top_k=3,
        hidden_size=HIDDEN,
        routing={"no_compute": zero if has_zero_experts else None},
        experts={"intermediate_size": INTERMEDIATE},
        shared=SharedExpertsConfig(intermediate_size=INTERMEDIATE) if has_shared else None,
        deterministic=deterministic,
    )
    experts = random_weights(config.experts, torch.bfloat16)
    if weights != "bf16":
        experts = quantized(experts, WeightFormat.parse(weights))
    layer = FusedMoE(config, weights=experts, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        )
    if to_one_rank:
        layer.gate.weight.zero_()
        layer.gate.weight[num_experts - 3 : num_experts, 0] = torch.tensor([3.0, 2.0, 1.0])
    return layer


def run_case(seat: Seat, case: Case) -> tuple[Tensor, Tensor]:
    """What this rank's part of the layer makes of its tokens, and what the whole layer does."""
    size, rank = seat.transport.size, seat.transport.rank
    dispatcher, held = case["way"].split()
    names = ("num_experts", "weights", "has_shared", "has_zero_experts", "deterministic")
    whole = whole_layer(*(case[name] for name in names), case["tokens"] == "to one rank")
    place = 0 if held == TokensHeld.SHARED.value else rank
    rows = rows_of(COUNTS[case["tokens"]][place], HIDDEN, seed=place).to(torch.bfloat16)
    rows[:, 0].abs_().add_(1.0)
    parallel = ParallelConfig(
        ep_size=size, dispatcher=DispatcherName(dispatcher), tokens=TokensHeld(held)
    )
    layer = rank_layer(whole, parallel, seat.transport, runner=RUNNERS[case["runner"]], kernel=None)
    return layer(rows), whole(rows)


def walk(seat: Seat, *, cases: list[Case]) -> list[str]:
    """Run cases one after the other -> those in which this rank's answer is wrong."""
    wrong = []
    for case in cases:
        try:
            actual, expected = run_case(seat, case)
        except Exception as error:
            raise AssertionError(f"no answer in {case}") from error
        bound = 0.0 if case["deterministic"] else RTOL[torch.bfloat16]
        error = relative_error(actual, expected)
        if not error <= bound:
            wrong.append(f"{case}: relative error {error:.2e} is above {bound:.2e}")
    return wrong


def check(ep_size: int, cases: list[Case], seconds: float) -> None:
    cases = [case for case in cases if case["ep_size"] == ep_size]
    assert cases
    with RankProcesses(ep_size) as ranks:
        wrong = ranks.run("test_parallel_matrix:walk", cases=cases, seconds=seconds)
    assert wrong == [[]] * ep_size


@pytest.mark.parametrize("ep_size", AXES["ep_size"])
def test_ranks_agree_with_one_process(ep_size):
    """Every three properties of a layer meet in some case."""
    check(ep_size, COVERING, seconds=120.0)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", AXES["ep_size"])
def test_ranks_agree_with_one_process_whatever_the_layer(ep_size):
    """The whole product."""
    product = itertools.product(*AXES.values())
    check(ep_size, [dict(zip(AXES, values, strict=True)) for values in product], seconds=3600.0)


def test_the_cases_hold_every_three():
    found = {three for case in COVERING for three in itertools.combinations(case.items(), 3)}
    assert found == every_combination(AXES, 3)
    assert len(COVERING) < 150
