"""Whole jobs under torchrun: a restart after a loss, and two hosts with a link that is cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from torchrun_worker import EXCHANGE_SECONDS

from mixtura.parallel import ModelPlacement, Placement, Topology

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("torchrun_worker.py")
JOB_SECONDS = 180.0
"""Until a job has done what it is watched for, on a machine that does other things too."""


@contextmanager
def torchrun(
    *options: str, task: str, directory: Path, within: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A job that runs a task of the worker; ended at the end of a block."""
    command = [*within, sys.executable, "-m", "torch.distributed.run", *options]
    log = directory / f"log{len(list(directory.glob('log*')))}"
    with log.open("w") as output:
        job = subprocess.Popen(
            [*command, str(WORKER), task, str(directory)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def wait_for(files: Sequence[Path], jobs: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until all files are there."""
    deadline = time.monotonic() + JOB_SECONDS
    while not all(file.exists() for file in files):
        is_over = time.monotonic() > deadline or any(job.poll() not in (None, 0) for job in jobs)
        assert not is_over, "\n".join(log.read_text() for log in files[0].parent.glob("log*"))
        time.sleep(0.05)


def results(directory: Path) -> list[Any]:
    """What the ranks have found."""
    return [json.loads(file.read_text()) for file in sorted(directory.glob("rank*.json"))]


STORE_PER_START = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else torchrun keeps one store for all starts, and restarted ranks race the addresses of those
that died, which are in it still (pytorch issue 135712)."""


def test_a_restarted_job_has_the_same_placement(tmp_path):
    """A worker is killed in mid-run; torchrun starts all of them again, once."""
    placement = Placement.round_robin(6, Topology.even(6, 2))
    saved = ModelPlacement.stack([placement])
    saved.save(tmp_path / "placement.safetensors")
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    with torchrun(*options, task="die_once", directory=tmp_path, **STORE_PER_START) as job:
        assert job.wait(JOB_SECONDS) == 0, (tmp_path / "log0").read_text()
    expected = {
        "restarts": 1,
        "digests": [saved.digest] * 2,
        "slots": placement.physical_to_logical.tolist(),
    }
    assert results(tmp_path) == [expected] * 2


HOSTS = ("mixtura-test-a", "mixtura-test-b")
LINKS = ("mixtura-a", "mixtura-b")
ADDRESSES = ("10.203.17.1", "10.203.17.2")


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces with a link between them."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", host)
            ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            ip("-n", host, "link", "set", link, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def test_two_hosts_and_a_link_that_is_cut(hosts, tmp_path):
    """Both ranks get right answers, and then the one error in time."""
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=mixtura")
    meet = f"--rdzv-endpoint={ADDRESSES[0]}:29512"

    def job(nth: int) -> Any:
        return torchrun(
            *options,
            meet,
            f"--rdzv-conf=is_host={int(nth == 0)}",
            f"--local-addr={ADDRESSES[nth]}",
            task="until_cut",
            directory=tmp_path,
            within=("ip", "netns", "exec", HOSTS[nth]),
            GLOO_SOCKET_IFNAME=LINKS[nth],
        )

    with job(0) as first, job(1) as second:
        wait_for([tmp_path / "ready0", tmp_path / "ready1"], [first, second])
        subprocess.run(["ip", "-n", HOSTS[1], "link", "set", LINKS[1], "down"], check=True)
        wait_for([tmp_path / "rank0.json", tmp_path / "rank1.json"], [])
    for found in results(tmp_path):
        assert found["number"] > 0
        assert found["seconds"] < EXCHANGE_SECONDS + 5.0
        assert "must reach every rank of generation 0" in found["error"]
