"""A model whose experts are spread over ranks: forming the ranks, and what they must agree on.

Ranks that hold one batch need nothing here while they run. Ranks with requests of their own meet
once a forward (`StepClock`), which `watch_steps` sees to, and have to go on meeting until the last
of them is done: `finish_requests`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mixtura.config import ParallelConfig, RunnerConfig, TokensHeld
from mixtura.errors import ConfigError, ParallelError
from mixtura.hf.experts import AdoptedExperts, ExpertsPlan
from mixtura.hf.lora.selection import find_selection
from mixtura.kernels import KernelDecision
from mixtura.parallel import (
    ExpertParallel,
    LoneTransport,
    TorchTransport,
    Transport,
    agree,
)
from mixtura.types import StepContext

if TYPE_CHECKING:
    from mixtura.hf.blocks import BlockOptions
    from mixtura.hf.stored import StoredCheckpoint


BALANCER = "mixtura_balancer"
"""The attribute of a base model that holds the balancer of its experts."""


class Running(TypedDict, total=False):
    """How converted blocks run, and where.

    Attributes:
        max_rows_per_pass: bound on the tokens that go through a block at a time.
        overlap_min_tokens: from so many tokens on every rank on, a batch goes through a block in
            two, one's exchange between ranks beside the other's experts.
        parallel: ranks that share the experts; a configuration stands for the default group of
            torch.distributed, or for this process alone where there is none.
    """

    max_rows_per_pass: int | None
    overlap_min_tokens: int | None
    parallel: ParallelConfig | ExpertParallel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """`Running` with its defaults."""

    max_rows_per_pass: int | None = None
    overlap_min_tokens: int | None = None
    parallel: ParallelConfig | ExpertParallel | None = None

    def runner(self, ranks: ExpertParallel | None) -> RunnerConfig:
        """When things run; ranks that were formed before have their own threshold.

        Raises:
            ConfigError: it is another than the one that is asked for.
        """
        overlap = self.overlap_min_tokens
        if ranks is not None:
            own = ranks.clock.overlap_min_tokens
            if overlap is not None and overlap != own:
                raise ConfigError(
                    f"overlap_min_tokens ({overlap}) must be that of the ranks that were formed "
                    f"before; got {own} there. Give it where they are formed."
                )
            overlap = own
        return RunnerConfig(max_rows_per_pass=self.max_rows_per_pass, overlap_min_tokens=overlap)


def create_ranks(
    parallel: ParallelConfig | ExpertParallel,
    overlap_min_tokens: int | None = None,
    *,
    num_nodes: int = 1,
) -> ExpertParallel:
    """This rank's place among those that share the experts.

    Args:
        parallel: the place itself, or how a model is spread over the default group of
            torch.distributed.
        overlap_min_tokens: see `Running`. num_nodes: machines that the ranks are on.

    Raises:
        ParallelError: the group has another number of ranks, or ranks were told different things.
    """
    if isinstance(parallel, ExpertParallel):
        return parallel
    transport: Transport = LoneTransport()
    if dist.is_initialized():
        transport = TorchTransport()

    def create() -> tuple[Mapping[str, Any], ExpertParallel]:
        ranks = ExpertParallel.over(
            parallel, transport, overlap_min_tokens=overlap_min_tokens, num_nodes=num_nodes
        )
        return {}, ranks

    told = {**config_values(parallel), "overlap_min_tokens": overlap_min_tokens}
    agree(transport, lambda: (told, None))
    return agree(transport, create)


def transport_of(ranks: ExpertParallel | None) -> Transport:
    """The ranks' transport, or one of a rank alone."""
    return LoneTransport() if ranks is None else ranks.transport


def config_values(config: ParallelConfig) -> dict[str, Any]:
    """What every rank must have been told, by name; and the versions that it runs."""
    return {
        "version of mixtura": _version("mixtura"),
        "version of transformers": _version("transformers"),
        "version of torch": ".".join(torch.__version__.split(".")[:2]),
        "instructions of the processor": torch.backends.cpu.get_cpu_capability(),
        **asdict(config),
    }


def _version(package: str) -> str | None:
    """The installed version; None where it runs from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkpoint_values(checkpoint: StoredCheckpoint, config: Any) -> dict[str, Any]:
    """What a checkpoint is, without its data: sizes of files, digests of headers and settings."""
    headers = sorted((name, one.dtype, one.shape) for name, one in checkpoint.headers.items())
    settings = config.to_dict()
    for name in ("_name_or_path", "name_or_path"):
        settings.pop(name, None)
    return {
        "format of the checkpoint": checkpoint.family,
        **{f"bytes of {file.name}": file.stat().st_size for file in checkpoint.files()},
        **{f"samples of {file.name}": _samples(file) for file in checkpoint.files()},
        "digest of the tensors' headers": _digest(headers),
        "digest of config.json": _digest(settings),
    }


NUM_SAMPLES, SAMPLE_BYTES = 16, 4096
"""Of each file: enough to tell a model from one that was trained further."""


def _samples(file: Path) -> str:
    """A digest of parts of a file, evenly spaced."""
    digest = hashlib.blake2b(digest_size=8)
    size = file.stat().st_size
    with file.open("rb") as opened:
        for number in range(NUM_SAMPLES):
            opened.seek(max(0, size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def layer_values(
    model: PreTrainedModel,
    options: BlockOptions,
    plans: Mapping[str, ExpertsPlan],
    decisions: Mapping[str, KernelDecision],
) -> dict[str, Any]:
    """What every rank must be about to run, by name."""
    found: dict[str, Any] = {
        "dtype of the model": str(model.dtype),
        "gate": options.gate.value,
        "deterministic": options.experts.deterministic,
        "activation_dtype": options.experts.activation_dtype,
        "router": getattr(options.router, "__qualname__", repr(options.router)),
        "max_rows_per_pass": options.runner.max_rows_per_pass,
    }
    for path, plan in plans.items():
        decision, spread = decisions[path], plan.spread
        found |= {
            f"weights of {path}": plan.weights().scheme,
            f"dtype of the rows of {path}": str(decision.problem.row_dtype),
            f"kernel of {path}": decision.kernel.name,
            f"path of the kernel of {path}": decision.kernel.how(decision.problem),
            f"placement of {path}": None if spread is None else spread.placement.digest,
        }
    return found


def find_ranks(model: nn.Module) -> ExpertParallel | None:
    """The ranks that a model's experts were spread over when it was loaded or converted."""
    for module in model.modules():
        if isinstance(module, AdoptedExperts) and module.spread is not None:
            return module.spread.ranks
    return None


class StepWatch:
    """Tells the other ranks of every forward of a model, before its first layer.

    Args:
        ranks: the ranks.
    """

    def __init__(self, ranks: ExpertParallel) -> None:
        self.ranks = ranks
        self._open = ExitStack()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a step for the tokens of this forward, unless one is open."""
        if not self.ranks.clock.is_open:
            step = self.ranks.clock.step(_num_tokens(args, kwargs))
            self._open.enter_context(step)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close it, also where the forward has failed."""
        self._open.close()


def _num_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return int(ids.numel())
    shape = kwargs["inputs_embeds"].shape
    return int(shape[0] * shape[1])


def watch_steps(model: PreTrainedModel, ranks: ExpertParallel, layers: Iterable[str]) -> None:
    """Let every forward of a model begin a step, where ranks have tokens of their own."""
    base = base_of(model, layers)
    if ranks.config.tokens is TokensHeld.SHARED or hasattr(base, "mixtura_steps"):
        return
    watch = StepWatch(ranks)
    base.register_forward_pre_hook(watch.begin, with_kwargs=True)
    base.register_forward_hook(watch.end, always_call=True)
    base.mixtura_steps = watch


def base_of(model: PreTrainedModel, layers: Iterable[str]) -> Any:
    """The innermost Transformers model around all MoE layers: what takes ids and runs layers."""
    paths = tuple(layers)
    around = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and all(path.startswith(f"{name}." if name else "") for path in paths)
    ]
    return max(around, key=lambda found: len(found[0]))[1]


@torch.no_grad()
def finish_requests(model: PreTrainedModel) -> int:
    """Run along with the other ranks, one token at a time, until none has a request left.

    Every rank of a model with tokens of its own (`TokensHeld.OWN`) must call this when its requests
    are done: the layers of the others wait for it until then. Ranks that hold one batch are done
    together, and return at once.

    Returns:
        Forwards that were run for the others.

    Raises:
        ParallelError: the experts are not spread over ranks.
    """
    ranks = find_ranks(model)
    if ranks is None:
        raise ParallelError(
            "the model's experts must be spread over ranks to finish together; got a model that "
            "has them all. Load it with parallel=."
        )
    if ranks.config.tokens is TokensHeld.SHARED:
        return 0
    base = next(module for module in model.modules() if hasattr(module, "mixtura_steps"))
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    balancer = getattr(base, BALANCER, None)
    if balancer is not None:
        balancer.ledger.record(False)  # these are nobody's tokens
    selection = find_selection(model)
    count = 0
    with nullcontext() if selection is None else selection.without():
        while not _run_along(base, token, ranks.clock.step(1, is_done=True)):
            count += 1
    if balancer is not None:
        balancer.ledger.record(balancer.is_on)
    return count


def _run_along(base: nn.Module, token: Any, step: AbstractContextManager[StepContext]) -> bool:
    """One forward for the others -> whether all are done, so that none was needed."""
    with step as context:
        if all(context.is_done):
            return True
        base(input_ids=token, use_cache=False)
    return False
