"""Ranks on the command line: the options, and the group of processes that torchrun has started."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.config import DispatcherName, EplbConfig, ParallelConfig, PlacementStrategy
from mixtura.env import Launch, read_launch
from mixtura.errors import ParallelError

if TYPE_CHECKING:
    from mixtura.parallel import ExpertParallel

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for one that says nothing: longer than a rank may load behind others."""

ExpertRanks = Annotated[
    int | None,
    typer.Option("--ep", min=1, help="Spread the experts over so many groups of ranks."),
]
CutRanks = Annotated[
    int | None,
    typer.Option("--tp", min=1, help="Cut each expert in so many parts, a rank of the group each."),
]
DispatcherOption = Annotated[
    DispatcherName | None,
    typer.Option(
        "--dispatcher",
        help="How rows meet their experts: all_reduce, all_gather, all_to_all, or deep_ep. "
        "Default: decided from sizes.",
        metavar="NAME",
    ),
]
PlacementOption = Annotated[
    PlacementStrategy,
    typer.Option("--placement", help="Which rank holds which experts at the start."),
]


INTERVAL = 32
"""Forwards between plans: one text has few hundred."""

Balance = Annotated[
    bool,
    typer.Option("--eplb", help="With --ep, move experts between ranks as their load asks for."),
]
Redundant = Annotated[
    int | None,
    typer.Option(
        "--redundant", min=0, help="With --eplb, slots for second copies. Default: one a rank."
    ),
]
Interval = Annotated[
    int | None,
    typer.Option("--eplb-interval", min=1, help="With --eplb, forwards between plans."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """What the command line says about ranks."""

    ep: int | None = None
    tp: int | None = None
    dispatcher: DispatcherName | None = None
    placement: PlacementStrategy = PlacementStrategy.LINEAR
    eplb: bool = False
    redundant: int | None = None
    interval: int | None = None

    def config(self) -> ParallelConfig | None:
        """How the model is spread; None where no ranks are asked for.

        Raises:
            ConfigError: the options contradict each other.
        """
        if not self.eplb and (self.redundant is not None or self.interval is not None):
            raise typer.TyperException(
                "--redundant and --eplb-interval go with --eplb. Give --eplb too."
            )
        if self.ep is None and self.tp is None:
            is_placed = self.placement is not PlacementStrategy.LINEAR
            if self.dispatcher is not None or is_placed or self.eplb:
                raise typer.TyperException(
                    "--dispatcher, --placement and --eplb go with --ep. Give --ep too."
                )
            return None
        eplb = None
        if self.eplb:
            eplb = EplbConfig(interval=self.interval or INTERVAL)
        redundant = self.redundant if self.redundant is not None else self.ep or 1
        return ParallelConfig(
            ep_size=self.ep or 1,
            tp_size=self.tp or 1,
            dispatcher=self.dispatcher,
            placement=self.placement,
            eplb=eplb,
            num_redundant_experts=redundant if eplb is not None else 0,
        )


def is_speaker() -> bool:
    """Whether this process is the one of its group that prints."""
    launch = read_launch()
    return launch is None or launch.rank == 0


@contextmanager
def open_ranks(
    config: ParallelConfig | None, device: str | None
) -> Iterator[tuple[ExpertParallel | None, str | None]]:
    """Meet the other ranks, and leave them at the end.

    Args:
        config: how the model is spread, or None: this process has all of it.
        device: what the user asked for.

    Yields:
        This rank's place, and its device.

    Raises:
        ParallelError: the processes are not as many as the ranks; the message has the command.
    """
    launch = read_launch()
    if config is None:
        if launch is not None and launch.num_ranks > 1:
            raise ParallelError(
                f"--ep must be given to {launch.num_ranks} processes, which would all do the same "
                f"without; got none. Add --ep {launch.num_ranks}, or start one process."
            )
        yield None, device
        return
    found = 1 if launch is None else launch.num_ranks
    if config.num_ranks != found:
        arguments = shlex.join(sys.argv[1:])
        raise ParallelError(
            f"--ep x --tp ({config.ep_size} x {config.tp_size}) must equal the number of "
            f"processes; got {found}. Run `torchrun --nproc-per-node {config.num_ranks} -m mixtura "
            f"{arguments}`."
        )
    with _group(launch, device) as own_device:
        from mixtura.hf.parallel import create_ranks

        num_nodes = 1 if launch is None else launch.num_nodes
        yield create_ranks(config, num_nodes=num_nodes), own_device


@contextmanager
def _group(launch: Launch | None, device: str | None) -> Iterator[str | None]:
    """The process group, on the backend of the device; -> this rank's own device."""
    if launch is None:
        yield device
        return
    import torch
    import torch.distributed as dist

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if launch.num_local_ranks > torch.cuda.device_count():
            raise ParallelError(
                f"every rank of a machine ({launch.num_local_ranks}) must have a GPU of its own; "
                f"got {torch.cuda.device_count()}. Start fewer ranks, or use --device cpu."
            )
        device = f"cuda:{launch.local_rank}"
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        timeout=TIMEOUT,
        device_id=torch.device(device) if is_cuda else None,
    )
    try:
        yield device
    finally:
        if dist.is_initialized():  # a rank that has lost another has left by itself
            dist.destroy_process_group()


def from_first(ranks: ExpertParallel | None, make: Callable[[], str]) -> str:
    """What rank 0 makes, on every rank.

    Raises:
        ParallelError: rank 0 could not; its own error there.
    """
    if ranks is None:
        return make()
    from mixtura.parallel import agree

    transport = ranks.transport
    made = agree(transport, lambda: ({}, make() if transport.rank == 0 else ""))
    found: str = transport.exchange_values(made)[0]
    return found


def check_alike(ranks: ExpertParallel | None, values: dict[str, Any]) -> None:
    """Raise `ParallelError` on all ranks unless they were told the same."""
    if ranks is not None:
        from mixtura.parallel import agree

        agree(ranks.transport, lambda: (values, None))


def shared_seed(ranks: ExpertParallel | None, seed: int | None) -> int | None:
    """A seed that all ranks draw with; without ranks None is left as it is."""
    if ranks is None or seed is not None:
        return seed
    return int(from_first(ranks, lambda: str(secrets.randbelow(2**63))))
