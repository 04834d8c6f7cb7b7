"""Simulated balancing: steps, replays, recommendations, synthetic traces, and the verb."""

from __future__ import annotations

import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from mixtura.cli import app
from mixtura.cli import balance as balance_part
from mixtura.cli import eplb as eplb_verb
from mixtura.config import EplbConfig
from mixtura.eplb import (
    POLICIES,
    Replay,
    Simulation,
    SimulationConfig,
    StepCosts,
    SyntheticTrace,
    TraceSizes,
    loads_of_choices,
    recommend,
    simulate,
    synthetic_choices,
)
from mixtura.eplb.chart import save_chart
from mixtura.eplb.simulation import EVERY_POLICY, OFF, QUOTA, STATIC
from mixtura.errors import ConfigError, InputError
from mixtura.observe import LayerTrace, RoutingTrace

COSTS = StepCosts(even_seconds=1.0, bytes_per_slot=100, bytes_per_second=1e9)
SIZES = TraceSizes(
    num_steps=32, num_layers=2, tokens_per_step=64, num_experts=16, top_k=2, num_ranks=4
)


def config(num_ranks: int = 2, interval: int = 2, **values) -> SimulationConfig:
    balancing = {
        name: values.pop(name) for name in ("min_gain", "max_moved_fraction") if name in values
    }
    eplb = EplbConfig(interval=interval, **{"max_moved_fraction": 1.0, **balancing})
    return SimulationConfig(num_ranks=num_ranks, eplb=eplb, **{"costs": COSTS, **values})


def loads_of(*steps: list[int]) -> np.ndarray:
    """One layer's loads."""
    return np.array(steps, np.float64)[:, None, :]


def replay_of(simulation: Simulation, policy: str) -> Replay:
    return next(found for found in simulation.replays if found.policy == policy)


# ------------------------------------------------------------------------------------- steps


def test_choices_are_counted_by_step_layer_and_expert() -> None:
    generator = torch.Generator().manual_seed(1)
    choices = [torch.randint(0, 6, (11, k), generator=generator) for k in (2, 3)]
    found = loads_of_choices([ids.to(torch.int32) for ids in choices], 4, tokens_per_step=3)
    expected = np.zeros((3, 2, 4))
    for layer, ids in enumerate(choices):
        for token in range(9):  # the last two are no whole step
            for expert in ids[token].tolist():
                if expert < 4:  # the others compute nothing
                    expected[token // 3, layer, expert] += 1
    np.testing.assert_array_equal(found, expected)


def test_choices_that_cannot_be_cut_into_steps_are_refused() -> None:
    ids = torch.zeros(8, 1, dtype=torch.int32)
    with pytest.raises(InputError, match=r"tokens_per_step \(9\) must be at most the trace's"):
        loads_of_choices([ids], 4, 9)
    with pytest.raises(InputError, match=r"saw as many tokens; got layers of \[5, 8\] tokens"):
        loads_of_choices([ids, ids[:5]], 4, 2)
    with pytest.raises(InputError, match=r"got layers of \[\] tokens"):
        loads_of_choices([], 4, 2)
    with pytest.raises(ConfigError, match="tokens_per_step"):
        loads_of_choices([ids], 4, 0)


# ----------------------------------------------------------------------------------- replays


def test_a_step_takes_as_long_as_the_busiest_ranks_of_its_layers() -> None:
    """Two layers, ranks of experts {0, 1} and {2, 3}; 16 slots a step in the mean."""
    loads = np.array(
        [
            [[4, 0, 0, 0], [1, 1, 1, 1]],  # 8 slots: maxima 4 + 2, a mean step's ranks have 8
            [[6, 6, 0, 0], [3, 3, 3, 3]],  # 24 slots: maxima 12 + 6
        ],
        np.float64,
    )
    costs = replace(COSTS, even_seconds=0.5)
    off = simulate(loads, config(interval=1, policies=(STATIC,), costs=costs)).off
    np.testing.assert_allclose(off.seconds, [6 / 8 * 0.5, 18 / 8 * 0.5])
    np.testing.assert_allclose(off.balancedness, [(0.5 + 1) / 2, (0.5 + 1) / 2])
    assert (off.policy, off.num_plans, off.moved_bytes.sum()) == (OFF, 0, 0)


@pytest.mark.parametrize("policy", ["global", "deepseek", "local_search"])
def test_a_plan_is_in_force_after_the_steps_it_is_made_of(policy: str) -> None:
    loads = loads_of(*[[3, 3, 1, 1]] * 5)
    costs = replace(COSTS, bytes_per_second=1000.0)
    found = replay_of(simulate(loads, config(policies=(policy,), costs=costs)), policy)
    np.testing.assert_allclose(found.balancedness, [4 / 6, 4 / 6, 1, 1, 1])
    # Two experts change their rank: two slots, 100 bytes each, at 1000 bytes a second.
    assert found.moved_slots.tolist() == [0, 0, 2, 0, 0]
    assert found.moved_bytes.tolist() == [0, 0, 200, 0, 0]
    np.testing.assert_allclose(found.move_seconds, [0, 0, 0.2, 0, 0])
    np.testing.assert_allclose(found.seconds, [1.5, 1.5, 1.2, 1, 1])
    assert (found.num_plans, found.num_carried_out) == (2, 1)


def test_a_plan_is_made_of_the_loads_since_the_last_one_alone() -> None:
    first, then = [300, 290, 110, 100], [3, 1, 1, 3]
    loads = loads_of(first, first, then, then, then, then)
    found = replay_of(simulate(loads, config(policies=("global",))), "global")
    np.testing.assert_allclose(found.balancedness[2:4], 4 / 6)  # planned for what came before
    np.testing.assert_allclose(found.balancedness[4:], 1)


def test_a_plan_with_too_little_gain_is_left_alone() -> None:
    loads = loads_of(*[[3, 3, 1, 1]] * 5)
    for min_gain, carried_out in ((0.33, 1), (0.34, 0)):
        simulation = simulate(loads, config(policies=("global",), min_gain=min_gain))
        found = replay_of(simulation, "global")
        assert (found.num_plans, found.num_carried_out) == (2, carried_out)
        assert bool(found.moved_slots.sum()) is bool(carried_out)


def test_quotas_that_are_in_force_are_what_the_next_plan_is_measured_against() -> None:
    loads = loads_of(*[[1, 1, 6, 3]] * 9)
    simulation = simulate(loads, config(num_redundant=2, policies=(STATIC, QUOTA)))
    static, quota = simulation.replays
    assert quota.num_carried_out == 1 < quota.num_plans
    assert quota.moved_slots.sum() == quota.moved_bytes.sum() == 0
    np.testing.assert_allclose(quota.balancedness[:2], static.balancedness[:2])
    assert quota.balancedness[2:].min() > static.balancedness.max()


@pytest.mark.parametrize(("fraction", "most"), [(0.0, 0), (0.13, 2), (1.0, 16)])
def test_an_incremental_plan_keeps_to_its_budget(fraction: float, most: int) -> None:
    choices = synthetic_choices("hot_rank", SIZES)
    loads = loads_of_choices(choices[:1], 16, 64)
    asked = config(4, 8, max_moved_fraction=fraction, policies=("local_search",))
    found = replay_of(simulate(loads, asked), "local_search")
    assert found.moved_slots.max() <= most
    assert bool(found.moved_slots.any()) is bool(most)


@pytest.mark.parametrize("kind", SyntheticTrace)
def test_every_policy_is_replayed_and_twice_alike(kind: SyntheticTrace) -> None:
    loads = loads_of_choices(synthetic_choices(kind, SIZES), 16, 64)
    asked = config(4, 8, num_redundant=4)
    once, again = simulate(loads, asked), simulate(loads, asked)
    assert {found.policy for found in once.replays} == {*POLICIES, QUOTA} == set(EVERY_POLICY)
    assert not once.refusals
    for found, other in zip((once.off, *once.replays), (again.off, *again.replays), strict=True):
        np.testing.assert_array_equal(found.seconds, other.seconds)
        np.testing.assert_array_equal(found.balancedness, other.balancedness)
        np.testing.assert_array_equal(found.moved_bytes, other.moved_bytes)
        assert ((found.balancedness > 0) & (found.balancedness <= 1)).all()
        assert (found.moved_bytes <= found.moved_slots * 100).all()
    assert recommend(once, 0.02) == recommend(again, 0.02)


def test_what_a_policy_cannot_plan_for_is_told() -> None:
    loads = loads_of_choices(synthetic_choices("balanced", SIZES), 16, 64)
    found = simulate(loads, config(4, 8, num_nodes=2, num_redundant=1))
    assert set(found.refusals) == {"deepseek", "hierarchical"}
    assert "divisible by num_ranks (4)" in found.refusals["deepseek"]
    assert {f.policy for f in found.replays} == set(EVERY_POLICY) - set(found.refusals)
    grouped = config(4, 8, num_nodes=2, num_expert_groups=4, policies=("hierarchical",))
    assert not simulate(loads, grouped).refusals


def test_memory_of_redundant_slots() -> None:
    loads = loads_of_choices(synthetic_choices("balanced", SIZES), 16, 64)
    found = simulate(loads, config(4, 8, num_redundant=5, policies=(STATIC,)))
    assert found.redundant_bytes == 5 * 2 * 100
    assert found.redundant_bytes_of_a_rank == 2 * 2 * 100  # ranks of 6, 5, 5 and 5 slots
    assert simulate(loads, config(4, 8, policies=(STATIC,))).redundant_bytes_of_a_rank == 0


def test_ranks_that_have_only_redundant_slots_idle_without_them() -> None:
    """Four experts on five ranks: a mean step has 8 / 5 a rank, the busiest has 2."""
    loads = loads_of(*[[2, 2, 2, 2]] * 3)
    found = simulate(loads, config(5, num_redundant=1, policies=(STATIC,)))
    np.testing.assert_allclose(found.off.seconds, 2 / (8 / 5))


def test_what_cannot_be_simulated_is_refused() -> None:
    loads = loads_of(*[[1, 1, 1, 1]] * 3)
    with pytest.raises(InputError, match=r"num_ranks \(6\) must be at most the slots"):
        simulate(loads, config(6, num_redundant=1))
    with pytest.raises(InputError, match=r"interval \(3\) must be below the number of steps"):
        simulate(loads, config(interval=3))
    for wrong in (loads[0], loads * -1, loads * np.nan, loads[:0]):
        with pytest.raises(InputError, match=r"must be \(steps, layers, experts\)"):
            simulate(wrong, config())
    with pytest.raises(InputError, match="must have something to do"):
        simulate(loads * 0, config())
    with pytest.raises(ConfigError, match=r"policies \(best\) must be of static, quota"):
        config(policies=("static", "best"))
    with pytest.raises(ConfigError, match=r"policies \(none\)"):
        config(policies=())
    with pytest.raises(ConfigError, match="num_nodes"):
        config(num_nodes=3)
    with pytest.raises(ConfigError, match="num_redundant"):
        config(num_redundant=-1)
    for values in ((0.0, 1, 1.0), (1.0, 0, 1.0), (1.0, 1, 0.0), (float("nan"), 1, 1.0)):
        with pytest.raises(ConfigError):
            StepCosts(*values)


# --------------------------------------------------------------------------- recommendations


def test_what_saves_most_is_recommended() -> None:
    simulation = simulate(loads_of(*[[3, 3, 1, 1]] * 9), config())
    found = recommend(simulation, 0.02)
    assert found.policy in ("global", "deepseek", "hierarchical", "local_search")
    assert found.text.startswith(f"Enable {found.policy}: it saves 25.9% of the routed")
    assert "from 0.667 to 0.926" in found.text


def test_of_equals_the_one_that_moves_least_is_recommended() -> None:
    simulation = simulate(loads_of(*[[3, 3, 1, 1]] * 9), config(policies=("global",)))
    found = simulation.replays[0]

    def like(policy: str, seconds: float, num_bytes: int) -> Replay:
        moved = np.full_like(found.moved_bytes, num_bytes)
        return replace(
            found, policy=policy, seconds=np.full_like(found.seconds, seconds), moved_bytes=moved
        )

    # Of 1.5 s without balancing, half a percent is 0.0075 s.
    best, close, far = (
        like("global", 1.0, 9),
        like("local_search", 1.007, 3),
        like(QUOTA, 1.008, 0),
    )
    several = replace(simulation, replays=(best, close, far))
    assert recommend(several, 0.02).policy == "local_search"


def test_quotas_are_recommended_under_the_name_that_the_balancer_has_for_them() -> None:
    simulation = simulate(
        loads_of(*[[1, 1, 6, 3]] * 9), config(num_redundant=2, policies=(STATIC, QUOTA))
    )
    found = recommend(simulation, 0.02)
    assert found.policy == QUOTA
    assert "Enable quota (policy 'static' of the balancer)" in found.text
    assert "Redundant slots that never change save" in found.text


@pytest.mark.parametrize(
    ("loads", "values", "reason"),
    [
        (loads_of(*[[2, 2, 2, 2]] * 5), {}, "ranks are even as they are (balancedness 1.000)"),
        (loads_of(*[[8, 1, 1, 1]] * 5), {"policies": ("global",)}, "no plan lowers the load"),
        (
            loads_of(*[[3, 3, 1, 1]] * 5),
            {"policies": ("global",), "costs": replace(COSTS, bytes_per_second=10.0)},
            "moves take about as long as they save, or longer. The best, global, loses",
        ),
        (
            loads_of(*[[5, 5, 1, 1]] * 2, *[[5, 1, 1, 5]] * 2, *[[5, 1, 5, 1]] * 2),
            {"policies": ("global",), "costs": COSTS},
            "what plans gain on the loads that they are made of, the steps after do not show",
        ),
        (loads_of(*[[3, 3, 1, 1]] * 5), {"policies": ("random",)}, "no policy that balances"),
    ],
    ids=["even", "no plan", "moves", "stale", "yardsticks"],
)
def test_do_not_enable_has_its_reason(loads, values, reason: str) -> None:
    found = recommend(simulate(loads, config(**values)), 0.02)
    assert found.policy is None
    assert found.text.startswith("Do not enable: ")
    assert reason in found.text


# -------------------------------------------------------------------------- synthetic traces


def loads_of_kind(kind: str, **sizes: int) -> np.ndarray:
    """(steps, layers, E) of a synthetic trace, each token's slots being K."""
    asked = replace(SIZES, tokens_per_step=256, **sizes)
    return loads_of_choices(synthetic_choices(kind, asked), asked.num_experts, 256)


@pytest.mark.parametrize("kind", SyntheticTrace)
def test_tokens_visit_different_experts_and_the_seed_decides_which(kind: SyntheticTrace) -> None:
    choices = synthetic_choices(kind, SIZES)
    assert len(choices) == 2
    for ids in choices:
        assert (ids.shape, ids.dtype) == ((32 * 64, 2), torch.int32)
        assert ids.min() >= 0 and ids.max() < 16
        assert (ids[:, 0] != ids[:, 1]).all()
    again, other = (synthetic_choices(kind, SIZES, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(choices, again, strict=True))
    assert not torch.equal(choices[0], other[0])


def test_draws_are_without_replacement_in_proportion_to_weights() -> None:
    """The first of two draws takes the hot one of 16 experts with 16 / 31, else the second may."""
    loads = loads_of_kind("one_hot_expert")
    expected = 16 / 31 + 15 / 31 * 16 / 30
    by_expert = loads.sum(0) / (32 * 256)  # the part of the tokens that visits it
    np.testing.assert_allclose(by_expert.max(1), expected, atol=0.02)
    np.testing.assert_allclose(np.sort(by_expert, 1)[:, :-1], (2 - expected) / 15, atol=0.02)


def test_balanced_and_hot_rank() -> None:
    by_expert = loads_of_kind("balanced").sum(0)
    assert by_expert.max() < 1.1 * by_expert.mean()
    by_expert = loads_of_kind("hot_rank").sum(0)
    hot, others = by_expert[:, :4].mean(), by_expert[:, 4:].mean()
    assert 2.4 < hot / others < 3.0  # 3 for the first draw, less for the second
    assert by_expert[:, :4].min() > 2 * by_expert[:, 4:].max()


def test_bursts_come_and_go_and_are_others_each_time() -> None:
    loads = loads_of_kind("bursts", num_steps=64)
    hottest = loads.max(2) / loads.mean(2)  # (steps, layers)
    in_burst = np.arange(64) % 16 < 4
    assert hottest[in_burst].min() > 3 > hottest[~in_burst].max()
    experts = loads[::16].argmax(2)
    assert (experts != experts[0]).any()
    assert (loads[1].argmax(1) == experts[0]).all()


def test_drift_keeps_its_spread_and_loses_its_order() -> None:
    logs = np.log(loads_of_kind("drift", num_steps=256, num_experts=32, num_layers=1)[:, 0] + 1)

    def alike(a: int, b: int) -> float:
        return float(np.corrcoef(logs[a], logs[b])[0, 1])

    assert alike(0, 1) > 0.9 > alike(0, 60) > alike(0, 250)
    assert 0.6 < logs[-1].std() / logs[0].std() < 1.6


def test_sizes_of_traces_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        replace(SIZES, num_layers=0)
    with pytest.raises(ConfigError, match=r"top_k \(17\) must be at most num_experts"):
        replace(SIZES, top_k=17)
    with pytest.raises(ConfigError, match="must be one of balanced, one_hot_expert"):
        synthetic_choices("strange", SIZES)


# --------------------------------------------------------------------------------- pictures


def test_the_chart_is_a_picture_also_where_nothing_moves(tmp_path: Path) -> None:
    loads = loads_of_choices(synthetic_choices("drift", SIZES), 16, 64)
    for policies in (EVERY_POLICY, (STATIC,)):
        path = tmp_path / f"{len(policies)}.png"
        found = simulate(loads, config(4, 8, policies=policies))
        save_chart(found, path, title="$x^ <b>")
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 1000 and height > 600
    with pytest.raises(InputError, match="must be writable"):
        save_chart(found, tmp_path, title="x")


# --------------------------------------------------------------------------------- the verb

SMALL = ("--steps", "12", "--interval", "4", "--experts", "8", "--layers", "2", "--top-k", "2")


def run(*arguments: str, **environment: str) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(app, list(arguments), env=environment)


def error_of(result: Result, code: int = 1) -> str:
    """The one line that a failed command has printed."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def test_the_kinds_on_the_command_line_are_those_there_are() -> None:
    assert [kind.value for kind in eplb_verb.Synthetic] == [kind.value for kind in SyntheticTrace]


def test_the_table_names_every_policy_and_what_was_assumed(tmp_path: Path) -> None:
    png = tmp_path / "x.png"
    result = run(
        *("eplb", "simulate", "--synthetic", "hot_rank", *SMALL, "--ep", "4", "--redundant", "4"),
        *("--png", str(png)),
    )
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "synthetic hot_rank: 12 steps of 64 tokens, 2 layers of 8 experts, 4 ranks" in shown
    assert "20 ms a step with even ranks, 42 MiB an expert, 40 GB/s; a plan every 4" in shown
    for name in ("no balancing", *EVERY_POLICY):
        assert f" {name} 0." in shown
    assert "84 MiB more on a rank, 336 MiB in all" in shown
    assert "nable" in shown
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(png) in result.stdout.replace("\n", "")


def test_a_narrow_terminal_has_fewer_columns_and_whole_figures() -> None:
    line = ("eplb", "simulate", "--synthetic", "hot_rank", *SMALL, "--ep", "4")
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}
    shown = (run(*line, COLUMNS=columns, **terminal).stdout for columns in ("100", "56"))
    wide, narrow = (re.sub("\x1b[^m]*m", "", text) for text in shown)
    assert max(len(line) for line in narrow.splitlines()) <= 56
    assert "least" in wide and "least" not in narrow
    assert "\u2026" not in narrow
    assert "local_search" in narrow


def test_json_has_the_figures_of_the_simulation() -> None:
    line = ("eplb", "simulate", "--synthetic", "drift", *SMALL, "--ep", "4", "--seed", "3")
    costs = ("--expert-mib", "2", "--step-ms", "5", "--bandwidth", "1")
    result = run(*line, *costs, "--policy", "global", "--policy", "quota", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    sizes = TraceSizes(
        num_steps=12, num_layers=2, tokens_per_step=64, num_experts=8, top_k=2, num_ranks=4
    )
    loads = loads_of_choices(synthetic_choices("drift", sizes, seed=3), 8, 64)
    costs = StepCosts(0.005, 2 * 2**20, 1e9)
    asked = config(4, 4, policies=("global", QUOTA), costs=costs, max_moved_fraction=0.15)
    expected = simulate(loads, asked)
    assert [replay["policy"] for replay in data["replays"]] == [OFF, "global", QUOTA]
    for replay, found in zip(data["replays"], (expected.off, *expected.replays), strict=True):
        assert replay["seconds"] == found.seconds.tolist()
        assert replay["moved_bytes"] == found.moved_bytes.tolist()
    assert data["recommendation"]["text"] == recommend(expected, 0.02).text


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A trace of two layers that saw 40 tokens, one with a no-compute choice, and one that saw
    none."""
    ids = torch.arange(80).reshape(40, 2) % 4
    layers = {
        "layers.0.mlp": LayerTrace(ids.byte(), 4),
        "layers.1.mlp": LayerTrace((ids + 1).byte(), 4, num_no_compute=1),
        "vision.mlp": LayerTrace(torch.empty(0, 1).byte(), 8),
    }
    path = tmp_path / "[b]kept.safetensors"
    RoutingTrace(layers).save(path)
    return path


def test_a_kept_trace_is_replayed(kept: Path) -> None:
    line = ("eplb", "simulate", str(kept), "--ep", "2", "--tokens-per-step", "4", "--interval", "3")
    result = run(*line, "--policy", "local_search")
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "[b]kept.safetensors: 10 steps of 4 tokens, 2 layers of 4 experts, 2 ranks" in shown
    assert "global" not in shown


def test_the_model_in_the_box_is_captured_and_its_experts_weighed() -> None:
    line = ("eplb", "simulate", "--ep", "4", "--tokens-per-step", "16", "--interval", "2")
    limits = ("--max-tokens", "64", "--device", "cpu", "--policy", "quota", "--json")
    result = run(*line, *limits)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["routing"] == "the model in the box on mixtura/layer.py"
    assert (data["num_steps"], data["num_layers"], data["num_experts"]) == (4, 6, 16)
    assert data["bytes_per_slot"] == 3 * 256 * 128 * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Choose from: simulate"),
        (("simulate", "x", "--synthetic", "drift"), 2, "TRACE and --synthetic exclude each other"),
        (("simulate", "--synthetic", "drift", "--text", "x"), 2, "--text goes without"),
        (("simulate", "x", "--steps", "4"), 2, "--steps goes with --synthetic"),
        (("simulate", "--expert-mib", "0"), 2, "--expert-mib"),
        (("simulate", "--expert-mib", "nan"), 2, "--expert-mib"),
        (("simulate", "--model", "/none", "--policy", "best"), 1, "policies (best) must be of"),
        (("simulate", "--model", "/none", "--ep", "2", "--nodes", "3"), 1, "num_nodes (3) must be"),
        (("simulate", "/none.safetensors"), 1, "the routing trace (/none.safetensors) must exist"),
        (("simulate", "--synthetic", "drift", "--ep", "65"), 1, "num_ranks (65) must be at most"),
        (("simulate", "--synthetic", "drift", "--steps", "9"), 1, "interval (16) must be below"),
        (("simulate", "--model", "/none", "--png", "/none/x.png"), 1, "must be a file in a"),
        (("simulate", "--model", "/none", "--text", "/none/x"), 1, "must be a readable file"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments: tuple[str, ...], code: int, message: str):
    assert message in error_of(run("eplb", *arguments), code)


def test_matplotlib_is_missed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("eplb", "simulate", "/none", "--png", str(tmp_path / "x.png"))
    assert "pip install 'mixtura[plot]'" in error_of(result)


def test_traces_of_unlike_layers_are_refused(tmp_path: Path) -> None:
    layers = {str(size): LayerTrace(torch.zeros(8, 1).byte(), size) for size in (4, 8)}
    path = tmp_path / "unlike.safetensors"
    RoutingTrace(layers).save(path)
    assert "as many experts, with tokens; got [4, 8]" in error_of(
        run("eplb", "simulate", str(path))
    )
    RoutingTrace({"0": LayerTrace(torch.zeros(0, 1).byte(), 4)}).save(path)
    assert "got no tokens" in error_of(run("eplb", "simulate", str(path)))


# ------------------------------------------------------------------------- mixtura inspect --ep


def test_inspect_shows_the_load_of_ranks_before_and_after() -> None:
    line = ("inspect", "--max-tokens", "64", "--device", "cpu")
    plain, shown = run(*line), run(*line, "--ep", "2", "--redundant", "2")
    assert plain.exit_code == shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith(plain.stdout)
    section = shown.stdout.removeprefix(plain.stdout)
    assert "2 ranks, 18 slots a layer: linear placement, and after local_search" in section
    rows = [line.split() for line in section.splitlines() if line.strip()[:1].isdigit()]
    by_layer = [row for row in rows if row[-2:] == ["of", "18"]]
    assert [row[0] for row in by_layer] == [str(layer) for layer in range(6)]
    assert all(float(row[1]) < float(row[4]) for row in by_layer)
    assert all(int(row[-3]) > 0 for row in by_layer)
    by_rank = [row for row in rows if len(row) == 5]
    assert [row[0] for row in by_rank] == ["0", "1"]
    for column in (1, 3):
        total = sum(float(row[column].replace(",", "")) for row in by_rank)
        assert abs(total - 64 * 4 * 6) <= 1


def test_ranks_of_a_layer_without_load_are_even() -> None:
    assert balance_part.evenness(np.zeros(3)) == 1.0
    assert balance_part.busiest(np.zeros(3)) == "none"
    assert balance_part.evenness(np.array([1.0, 3.0])) == pytest.approx(2 / 3)
    assert balance_part.busiest(np.array([1.0, 3.0])) == "1 (1.50x)"


def test_inspect_refuses_ranks_without_slots_and_slots_without_ranks() -> None:
    assert "--redundant goes with --ep" in error_of(run("inspect", "--redundant", "2"), 2)
    result = run("inspect", "--max-tokens", "8", "--device", "cpu", "--ep", "17")
    assert "--ep (17) must be at most the slots of a layer; got 16 experts" in error_of(result)
