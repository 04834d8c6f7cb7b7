"""Ranks on the command line: what is refused before a process group is formed, and what is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import virtual_ranks
from test_cli import error_of, run

from mixtura.cli.ranks import from_first, shared_seed
from mixtura.config import ParallelConfig
from mixtura.env import Launch, read_launch
from mixtura.errors import ParallelError
from mixtura.parallel import ExpertParallel

VARIABLES = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def launched(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def test_what_torchrun_says_is_read(launched):
    assert read_launch() == Launch(3, 4, 1, 2)
    assert read_launch().num_nodes == 2


def test_a_variable_that_is_missing_or_no_number_is_named(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ParallelError, match=r"LOCAL_RANK \('one'\) must be a number"):
        read_launch()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ParallelError, match=r"LOCAL_WORLD_SIZE \(''\) must be a number"):
        read_launch()


def test_without_torchrun_there_is_no_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert read_launch() is None


def test_ranks_without_torchrun_are_told_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mixtura", "generate", "Once upon", "--ep", "2"])
    error = error_of(run("generate", "Once upon", "--ep", "2"))
    assert "--ep x --tp (2 x 1) must equal the number of processes; got 1" in error
    assert "torchrun --nproc-per-node 2 -m mixtura generate 'Once upon' --ep 2" in error


def test_more_processes_than_ranks_are_refused():
    error = error_of(run("generate", "Once", "--ep", "2", **VARIABLES))
    assert "--ep x --tp (2 x 1) must equal the number of processes; got 4" in error
    assert "--ep must be given to 4 processes" in error_of(run("generate", "Once", **VARIABLES))


def test_options_of_ranks_need_ranks():
    go_with = "--dispatcher, --placement and --eplb go with --ep"
    for options in (["--dispatcher", "all_reduce"], ["--eplb"]):
        assert go_with in error_of(run("generate", "Once", *options), code=2)
    assert go_with in error_of(run("explain", "--placement", "round_robin"), code=2)
    for option in ("--redundant", "--eplb-interval"):
        error = error_of(run("generate", "Once", "--ep", "2", option, "3"), code=2)
        assert "--redundant and --eplb-interval go with --eplb" in error


def over_ranks(work: Callable[[ExpertParallel], Any]) -> list[Any]:
    parallel = ParallelConfig(ep_size=3)
    return virtual_ranks.run(3, lambda transport: work(ExpertParallel.over(parallel, transport)))


def test_ranks_draw_with_one_seed():
    seeds = over_ranks(lambda ranks: shared_seed(ranks, None))
    assert len(set(seeds)) == 1
    assert 0 <= seeds[0] < 2**63
    assert over_ranks(lambda ranks: shared_seed(ranks, None)) != seeds
    assert over_ranks(lambda ranks: shared_seed(ranks, 7)) == [7, 7, 7]
    assert shared_seed(None, None) is None


def test_the_first_rank_reads_for_all():
    def work(ranks: ExpertParallel) -> str:
        return from_first(ranks, lambda: f"read by {ranks.transport.rank}")

    assert over_ranks(work) == ["read by 0"] * 3
    assert from_first(None, lambda: "alone") == "alone"


def test_explain_says_what_ranks_would_be():
    result = run("explain", "--ep", "3", "--nodes", "3", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "3 ranks on 3 machines" in result.stdout
    assert "rows meet  all_reduce: all ranks hold the same tokens" in result.stdout
    assert "rank 0: 6.75 MiB, rank 1: 5.62 MiB, rank 2: 5.62 MiB" in result.stdout
    assert "do not use ranks: 0.0" in result.stdout
    assert "200 GB/s from memory" in result.stdout


def test_explain_gives_ranks_to_programs():
    result = run("explain", "--ep", "2", "--tp", "2", "--dispatcher", "all_to_all", "--json")
    found = json.loads(result.stdout)["ranks"]
    assert found["num_ranks"] == 4
    assert found["expert_bytes"] == [18 * 2**20 // 4] * 4
    assert found["advice"].startswith("do not use ranks")
    assert found["ranks_rate"] < found["alone_rate"]
    assert found["choices"][0][0]["reason"] == "it was asked for"
