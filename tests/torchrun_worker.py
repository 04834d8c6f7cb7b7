"""One rank under torchrun: `torchrun ... torchrun_worker.py die_once|until_cut DIRECTORY`.

What it finds goes into DIRECTORY/rank<N>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_cases import build_layer, moe_config, rows_of
from spread_layers import rank_layer
from tolerances import assert_close

from mixtura.config import DispatcherName, ParallelConfig, TokensHeld
from mixtura.errors import RankLost
from mixtura.layer import FusedMoE
from mixtura.parallel import ModelPlacement, TorchTransport

EXCHANGE_SECONDS = 10.0
"""How long an exchange waits where a link is cut; and for the other rank to start."""

START_SECONDS = 60.0


def layers(
    seconds: float, placement: ModelPlacement | None = None
) -> tuple[FusedMoE, FusedMoE, TorchTransport]:
    """A whole layer, this rank's part of it, and its group, from torchrun's environment."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    transport = TorchTransport()
    whole = build_layer(moe_config(), kernel="reference")
    parallel = ParallelConfig(
        ep_size=transport.size, tokens=TokensHeld.OWN, dispatcher=DispatcherName.ALL_TO_ALL
    )
    layer = rank_layer(
        whole, parallel, transport, placement=placement.layer(0) if placement else None
    )
    return whole, layer, transport


def run_once(whole: FusedMoE, layer: FusedMoE, rank: int, number: int) -> None:
    """One forward, compared with the whole layer's."""
    rows = rows_of(4, seed=100 * number + rank)
    assert_close(layer(rows), whole(rows), torch.float32)


def die_once(directory: Path) -> dict[str, Any]:
    """Rank 1 is killed in mid-run, the first time; the placement is the saved one each time."""
    placement = ModelPlacement.load(directory / "placement.safetensors")
    whole, layer, transport = layers(START_SECONDS, placement)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for number in range(4):
        if (transport.rank, restarts, number) == (1, 0, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        run_once(whole, layer, transport.rank, number)
    spread = layer.plan.spread
    return {
        "restarts": restarts,
        "digests": transport.exchange_values(placement.digest),
        "slots": spread.placement.physical_to_logical.tolist(),
    }


def until_cut(directory: Path) -> dict[str, Any]:
    """Run until another rank cannot be reached."""
    whole, layer, transport = layers(EXCHANGE_SECONDS)
    started = time.monotonic()
    for number in range(4000):
        try:
            run_once(whole, layer, transport.rank, number)
        except RankLost as error:
            return {"number": number, "seconds": time.monotonic() - started, "error": str(error)}
        started = time.monotonic()
        (directory / f"ready{transport.rank}").touch()
        time.sleep(0.05)
    raise AssertionError("the link was never cut")


if __name__ == "__main__":
    task, path = sys.argv[1:]
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {"die_once": die_once, "until_cut": until_cut}[task](Path(path))
    (Path(path) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
