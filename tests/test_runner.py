"""Runners: chunks, what travels with them, and schedules that take turns."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from mixtura.config import (
    MoEConfig,
    NoComputeExperts,
    NoComputeKind,
    RunnerConfig,
    SharedExpertsConfig,
)
from mixtura.errors import ConfigError, InputError
from mixtura.layer import FusedMoE
from mixtura.runner import (
    ChunkingMoERunner,
    DefaultMoERunner,
    LayerOutput,
    create_runner,
    in_parts,
    one_batch,
    run_to_end,
)
from mixtura.types import Routing, TokenInputs

ROWS_PER_PASS = 4
NUM_TOKENS = [0, 1, ROWS_PER_PASS - 1, ROWS_PER_PASS, ROWS_PER_PASS + 1, 3 * ROWS_PER_PASS + 1]
SHARED = SharedExpertsConfig(intermediate_size=10, has_sigmoid_gate=True)

CONFIGS: dict[str, MoEConfig] = {
    "plain": moe_config(),
    "shared": moe_config(shared=SHARED),
    "identity experts": moe_config(
        routing={"no_compute": NoComputeExperts(kind=NoComputeKind.IDENTITY, count=3)}
    ),
    "constant experts": moe_config(
        routing={"no_compute": NoComputeExperts(kind=NoComputeKind.CONSTANT, count=3)}, top_k=3
    ),
    "latent": moe_config(has_latent=True, experts={"hidden_size": 12}, shared=SHARED),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def in_chunks(config: MoEConfig, max_rows_per_pass: int = ROWS_PER_PASS) -> MoEConfig:
    return dataclasses.replace(config, runner=RunnerConfig(max_rows_per_pass=max_rows_per_pass))


def pair(config: MoEConfig, **options: Any) -> tuple[FusedMoE, FusedMoE]:
    """A layer that runs in one pass, and the same in chunks."""
    return build_layer(config, **options), build_layer(in_chunks(config), **options)


# ------------------------------------------------------------------------------------------- chunks


@given(num_tokens=st.integers(0, 200), limit=st.integers(1, 50))
def test_chunks_are_a_partition_into_even_parts(num_tokens, limit):
    rows = torch.arange(num_tokens).unsqueeze(1)
    parts = in_parts(rows, TokenInputs(), ChunkingMoERunner(limit).num_passes(num_tokens), None)
    chunks = [part.hidden_states.flatten().tolist() for part in parts]
    covered = [token for chunk in chunks for token in chunk]
    assert covered == list(range(num_tokens))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert len(chunks) == max(1, -(-num_tokens // limit))


def test_zero_tokens_are_one_empty_chunk():
    assert ChunkingMoERunner(4).num_passes(0) == 1


def test_a_pass_has_at_least_one_row():
    with pytest.raises(ConfigError, match=r"max_rows_per_pass \(0\) must be an integer >= 1"):
        ChunkingMoERunner(0)
    with pytest.raises(ConfigError, match="max_rows_per_pass"):
        RunnerConfig(max_rows_per_pass=0)


def test_the_configuration_says_which_runner():
    assert type(create_runner(RunnerConfig())) is DefaultMoERunner
    runner = create_runner(RunnerConfig(max_rows_per_pass=7))
    assert isinstance(runner, ChunkingMoERunner)
    assert runner.max_rows_per_pass == 7


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@by_config
def test_chunks_are_bitwise_one_pass_where_the_layer_is_deterministic(config, num_tokens):
    whole, chunked = pair(dataclasses.replace(config, deterministic=True))
    rows = rows_of(num_tokens)
    with torch.no_grad():
        assert torch.equal(chunked(rows), whole(rows))
    assert whole.experts.state.held.kernel.is_row_invariant


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("kernel", ["reference", "torch"])
@by_config
def test_chunks_agree_with_one_pass(config, kernel, num_tokens):
    whole, chunked = pair(config, kernel=kernel)
    rows = rows_of(num_tokens)
    with torch.no_grad():
        assert_close(chunked(rows), whole(rows), torch.float32)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_no_pass_is_larger_than_the_limit(num_tokens):
    layer = build_layer(in_chunks(moe_config()))
    seen: list[int] = []
    run_experts = layer.run_experts
    layer.run_experts = lambda batch, *, reduce: (  # type: ignore[method-assign]
        seen.append(len(batch.hidden_states)),
        run_experts(batch, reduce=reduce),
    )[1]
    layer(rows_of(num_tokens))
    assert sum(seen) == num_tokens
    assert max(seen) <= ROWS_PER_PASS


def test_external_shared_experts_in_chunks():
    shared = dataclasses.replace(SHARED, is_external=True)
    whole, chunked = pair(moe_config(shared=shared, deterministic=True))
    rows = rows_of(9)
    with torch.no_grad():
        for left, right in zip(chunked(rows), whole(rows), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_the_routing_of_chunks_is_that_of_one_pass(num_tokens):
    whole, chunked = pair(moe_config(deterministic=True))
    with torch.no_grad():
        expected, actual = (layer.run(rows_of(num_tokens)) for layer in (whole, chunked))
    for name in ("topk_ids", "topk_weights", "router_logits"):
        assert torch.equal(getattr(actual.routing, name), getattr(expected.routing, name)), name


def test_gradients_through_chunks():
    whole, chunked = pair(moe_config(shared=SHARED))
    found = []
    for layer in (whole, chunked):
        rows = rows_of(9).requires_grad_()
        layer(rows).square().sum().backward()
        found.append([rows.grad, *(p.grad for p in layer.parameters())])
    for left, right in zip(*found, strict=True):
        assert_close(right, left, torch.float32)


# -------------------------------------------------------------------------- what tokens bring along


def hash_layer(config: MoEConfig) -> FusedMoE:
    layer = build_layer(config)
    generator = torch.Generator().manual_seed(5)
    layer.gate.hash_table = torch.rand(20, 6, generator=generator).argsort(1)[:, :2].int()
    return layer


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_hash_routing_through_chunks(num_tokens):
    config = moe_config(routing={"hash_routing": True}, deterministic=True)
    whole, chunked = hash_layer(config), hash_layer(in_chunks(config))
    ids = torch.randint(0, 20, (num_tokens,))
    with torch.no_grad():
        outputs = [
            layer.run(rows_of(num_tokens), TokenInputs(input_ids=ids)) for layer in (whole, chunked)
        ]
    assert torch.equal(outputs[1].hidden_states, outputs[0].hidden_states)
    for output in outputs:
        assert torch.equal(output.routing.topk_ids, whole.gate.hash_table[ids])


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_replayed_ids_and_padding_through_chunks(num_tokens):
    whole, chunked = pair(moe_config(deterministic=True))
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(num_tokens, 6, generator=generator).argsort(1)[:, :2].int()
    mask = torch.rand(num_tokens, generator=generator) > 0.3
    tokens = TokenInputs(replayed_ids=ids, padding_mask=mask)
    with torch.no_grad():
        outputs = [layer.run(rows_of(num_tokens), tokens) for layer in (whole, chunked)]
    assert torch.equal(outputs[1].hidden_states, outputs[0].hidden_states)
    for output in outputs:
        assert torch.equal(output.routing.topk_ids, ids.masked_fill(~mask.unsqueeze(1), -1))
        assert not output.hidden_states[~mask].any()


def test_token_inputs_are_sliced_together():
    tokens = TokenInputs(
        input_ids=torch.arange(5), replayed_ids=torch.arange(10).view(5, 2), padding_mask=None
    )
    part = tokens.slice(1, 3)
    assert part.input_ids.tolist() == [1, 2]
    assert part.replayed_ids.tolist() == [[2, 3], [4, 5]]
    assert part.padding_mask is None


@pytest.mark.parametrize(
    "tokens, message",
    [
        (TokenInputs(input_ids=torch.arange(4)), r"input_ids \(\(4,\)\) must be \(tokens,\)"),
        (TokenInputs(input_ids=torch.zeros(3, 1)), r"input_ids \(\(3, 1\)\) must be \(tokens,\)"),
        (TokenInputs(padding_mask=torch.ones(1, 3)), r"padding_mask \(\(1, 3\)\) must be"),
        (TokenInputs(padding_mask=torch.ones(())), r"padding_mask \(\(\)\) must be"),
        (
            TokenInputs(replayed_ids=torch.zeros(3)),
            r"replayed_ids \(\(3,\)\) must be \(tokens, top_k",
        ),
        (TokenInputs(replayed_ids=torch.zeros(2, 2)), "one row per token; got 3 tokens"),
    ],
)
def test_token_inputs_must_be_one_row_per_token(tokens, message):
    with pytest.raises(InputError, match=message):
        build_layer(moe_config())(rows_of(3), tokens)


# ---------------------------------------------------------------------------------------- schedules


class Interleaved:
    """Runs schedules in turns, the way a test says."""

    def __init__(self, *schedules: Any) -> None:
        self.schedules = schedules
        self.outputs: list[LayerOutput | None] = [None] * len(schedules)

    def run(self, turns: list[int]) -> list[Tensor]:
        for turn in turns:
            self.outputs[turn] = next(self.schedules[turn])
        for schedule in self.schedules:
            with pytest.raises(StopIteration):
                next(schedule)
        results = []
        for output in self.outputs:
            assert output is not None
            results.append(output.hidden_states)
        return results


def orders(num_steps: int) -> list[list[int]]:
    """Every way in which two schedules of so many steps may take turns."""
    positions = itertools.combinations(range(2 * num_steps), num_steps)
    return [[0 if step in chosen else 1 for step in range(2 * num_steps)] for chosen in positions]


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@by_config
def test_interleaved_schedules_are_bitwise_the_sequential_ones(config, kernel):
    layer, tokens = build_layer(config, kernel=kernel), TokenInputs()
    batches = [rows_of(5, seed=1), rows_of(3, seed=2)]
    with torch.no_grad():
        expected = [run_to_end(one_batch(layer, rows, tokens)).hidden_states for rows in batches]
        for turns in orders(3):
            schedules = [one_batch(layer, rows, tokens) for rows in batches]
            for actual, wanted in zip(Interleaved(*schedules).run(turns), expected, strict=True):
                assert torch.equal(actual, wanted), turns


def test_a_schedule_yields_twice_before_its_output():
    layer = build_layer(moe_config())
    steps = list(one_batch(layer, rows_of(3), TokenInputs()))
    assert steps[:2] == [None, None]
    assert isinstance(steps[2], LayerOutput)
    assert len(steps) == 3
    assert torch.equal(steps[2].hidden_states, layer(rows_of(3)))


def test_routing_of_consecutive_batches_is_put_together():
    ids, weights = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[0.5, 0.25]])
    part = Routing(ids, weights)
    both = Routing.concatenate([part, part])
    assert both.topk_ids.tolist() == [[1, 2], [1, 2]]
    assert both.topk_weights.tolist() == [[0.5, 0.25]] * 2
    assert both.router_logits is None
    assert both.bypass is None
