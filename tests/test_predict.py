"""The prediction of ranks against one process: exact counts, and a sound no."""

from __future__ import annotations

import itertools

import pytest

from mixtura.config import DispatcherName, ParallelConfig, TokensHeld
from mixtura.errors import ConfigError
from mixtura.parallel.predict import MACHINES, LayerBytes, MachineSpeed, expected_most, predict

ALL_REDUCE = DispatcherName.ALL_REDUCE
V3 = [LayerBytes(256, 8, 44e6, 14336)] * 58
"""DeepSeek-V3 in fp8: 256 experts of 44 MB a layer, of which a token visits 8."""
BESIDE = 20e9
OWN_MEMORIES = MachineSpeed(1e12, 10e-6, 1e11, shares_memory=False)


@pytest.mark.parametrize(
    "sizes", [(10, 3, 4), (8, 4, 3), (6, 6, 2), (9, 1, 3), (7, 5, 1), (5, 2, 5)]
)
def test_the_most_of_one_set_is_the_mean_over_all_choices(sizes):
    num_experts, top_k, num_sets = sizes
    owner = [
        next(n for n in range(num_sets) if expert < num_experts * (n + 1) // num_sets)
        for expert in range(num_experts)
    ]
    most = [
        max(sum(owner[e] == one for e in chosen) for one in range(num_sets))
        for chosen in itertools.combinations(range(num_experts), top_k)
    ]
    assert expected_most(*sizes) == pytest.approx(sum(most) / len(most))


def test_one_rank_is_one_process():
    found = predict(BESIDE, V3, ParallelConfig(), OWN_MEMORIES, dispatcher=None)
    assert found.ranks_rate == pytest.approx(found.alone_rate)
    assert found.alone_seconds == pytest.approx((BESIDE + 58 * 8 * 44e6) / 1e12)
    assert found.memory_bytes == found.alone_bytes == BESIDE + 58 * 256 * 44e6


def test_the_formula():
    parallel = ParallelConfig(ep_size=4)
    layers = [LayerBytes(8, 2, 100.0, 50)]
    machine = MachineSpeed(10.0, 2.0, 5.0, shares_memory=True)
    found = predict(30.0, layers, parallel, machine, dispatcher=ALL_REDUCE, num_nodes=2)
    most = 2 * (4 * 3 / 2) / 28 * 2 + (1 - 2 * (4 * 3 / 2) / 28)  # both on one machine, or apart
    assert found.read_seconds == pytest.approx((2 * 30 + most * 100) / 10)
    assert found.exchange_seconds == pytest.approx(2 + 2 * 50 / 5)
    assert found.memory_bytes == 2 * 30 + 4 * 100


def test_cuts_share_an_expert_between_memories():
    layers = [LayerBytes(8, 2, 100.0, 0)]
    cut = ParallelConfig(tp_size=4)
    found = predict(0, layers, cut, OWN_MEMORIES, dispatcher=ALL_REDUCE)
    assert found.read_seconds == pytest.approx(found.alone_seconds / 4)
    assert found.memory_bytes == 200
    both = ParallelConfig(ep_size=2, tp_size=2)
    found = predict(0, layers, both, OWN_MEMORIES, dispatcher=ALL_REDUCE)
    assert found.memory_bytes == 200


def test_ranks_of_one_memory_are_advised_against():
    """All of them read attention's weights from it, and nothing is read faster."""
    for ep_size in (2, 8):
        parallel = ParallelConfig(ep_size=ep_size)
        found = predict(BESIDE, V3, parallel, MACHINES["cpu"], dispatcher=ALL_REDUCE)
        assert found.ranks_rate < found.alone_rate
        assert found.advice().startswith("do not use ranks: 0.")
        assert found.advice(capacity=10e12) == found.advice()


def test_a_small_model_is_advised_against_on_any_machine():
    layers = [LayerBytes(16, 4, 200e3, 512)] * 6
    for machine in MACHINES.values():
        found = predict(4e6, layers, ParallelConfig(ep_size=2), machine, dispatcher=ALL_REDUCE)
        assert "do not use ranks" in found.advice()


def test_memories_of_their_own_are_advised_for():
    parallel = ParallelConfig(ep_size=8)
    found = predict(BESIDE, V3, parallel, MACHINES["cuda"], dispatcher=ALL_REDUCE)
    assert found.advice().startswith("use ranks: 1.")


def test_what_does_not_fit_one_memory_needs_ranks():
    small = ParallelConfig(ep_size=4)
    large = ParallelConfig(ep_size=16)
    one = predict(BESIDE, V3, small, MACHINES["cuda"], dispatcher=ALL_REDUCE)
    other = predict(BESIDE, V3, large, MACHINES["cuda"], dispatcher=ALL_REDUCE)
    assert one.advice(80e9).startswith("use more memories")
    assert other.advice(80e9).startswith("use ranks: one memory does not hold the weights")


@pytest.mark.parametrize(
    "name, held, count",
    [
        (ALL_REDUCE, TokensHeld.SHARED, 1),
        (DispatcherName.ALL_GATHER, TokensHeld.OWN, 2),
        (DispatcherName.ALL_GATHER, TokensHeld.SHARED, 3),
        (DispatcherName.ALL_TO_ALL, TokensHeld.OWN, 3),
        (DispatcherName.ALL_TO_ALL, TokensHeld.SHARED, 4),
    ],
)
def test_every_dispatcher_costs_its_collectives(name, held, count):
    layers = [LayerBytes(8, 2, 1.0, 0)] * 5
    parallel = ParallelConfig(ep_size=2, tokens=held, dispatcher=name)
    found = predict(0, layers, parallel, OWN_MEMORIES, dispatcher=name)
    assert found.exchange_seconds == pytest.approx(5 * count * 10e-6)


def test_more_machines_than_ranks_are_refused():
    with pytest.raises(ConfigError, match="ranks of a machine"):
        predict(1, V3, ParallelConfig(), OWN_MEMORIES, dispatcher=None, num_nodes=2)
