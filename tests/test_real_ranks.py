"""Two processes with gloo: the same text as one, and an end on both where they cannot agree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import real_ranks
import test_cli

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROMPT = "Once upon a time"


def start(*arguments: str) -> subprocess.Popen[str]:
    """Two processes under torchrun."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return subprocess.Popen(
        [*TORCHRUN, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(*arguments)
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    real_ranks.prepare(found)
    return found


def check(directory: Path, *names: str) -> None:
    code, out, errors = run("tests/real_ranks.py", str(directory), *names)
    assert re.findall(r"^holds (\w+)$", out, re.MULTILINE) == list(names), errors
    assert code == 0


def test_the_same_text_and_the_same_errors(directory):
    check(
        directory,
        "the_wrong_number_of_ranks",
        "a_file_that_one_rank_cannot_read",
        "another_checkpoint_on_one_rank",
        "a_packed_checkpoint",
        "transformers_own_parallelism",
        "the_model_in_the_box",
        "quantized_as_it_is_read",
        "balanced_experts",
    )


@pytest.mark.slow
def test_cuts_and_requests_of_their_own(directory):
    check(directory, "cut_experts", "requests_of_their_own")


def test_the_command_line_prints_once_and_draws_alike():
    options = ["generate", PROMPT, "--max-new-tokens", "12", "--temperature", "1", "--seed", "5"]
    options += ["--dtype", "fp32"]  # in bf16 a draw may turn on the last bit of a sum
    ranks = ["--ep", "2", "--dispatcher", "all_to_all", "--eplb", "--eplb-interval", "3"]
    code, out, errors = run("-m", "mixtura", *options, *ranks)
    assert code == 0, errors
    assert errors.count("MoE layers") == 1
    assert re.search(r"^ranks +2, by all_to_all; 20\.\d MiB of experts on the first", errors, re.M)
    assert re.search(
        r"^balance +[1-9]\d* plans, \d+ slots moved; (counting|planning|moving): ", errors, re.M
    )
    assert not re.search(r"destroy_process_group|Warning", errors), errors
    assert out == test_cli.run(*options).stdout


@pytest.mark.slow
def test_processes_without_ep_are_told_what_is_missing():
    code, out, errors = run("-m", "mixtura", "generate", PROMPT)
    assert code != 0
    assert "--ep must be given to 2 processes" in errors
    assert not out


@pytest.mark.slow
def test_an_interruption_ends_all_ranks():
    process = start("-m", "mixtura", "generate", PROMPT, "--max-new-tokens", "2000", "--ep", "2")
    assert process.stdout is not None
    first = process.stdout.read(5)
    assert first
    os.killpg(process.pid, signal.SIGINT)
    before = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - before < 45
    assert errors.count("MoE layers") == 1
    assert "error:" not in errors
    assert process.returncode != 0
