"""End to end: how fast a model reads a prompt and writes tokens, and where the time goes."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mixtura.bench.machine import Machine, read_bandwidth
from mixtura.bench.parts import Part, PartClock
from mixtura.config import require_positive
from mixtura.errors import InputError
from mixtura.experts import PackedExperts
from mixtura.hf.cache import growing_cache
from mixtura.hf.linears import PackedLinear

REPETITIONS = 3
"""Runs that are timed; their median counts."""

ATTEMPTS = 3
"""A run during which pages came from the disk is thrown away and tried again so many times."""

WARM_UP = 16
"""Tokens of prompt, and a few new ones, before anything is timed."""

PROBE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One generation.

    Attributes:
        prompt_seconds: from the call to the first new token.
        decode_seconds: from the first new token to the last.
        major_faults: pages that had to come from the disk meanwhile.
    """

    prompt_seconds: float
    decode_seconds: float
    major_faults: int


GenerateOnce = Callable[[Tensor, int], Run]
"""A prompt (1, T) and a number of new tokens -> how long they took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRuns:
    """Runs that count, and the bandwidth around them in bytes per second.

    All of the runs were paged where none could be had that was not.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    runs: tuple[Run, ...]
    bandwidth_before: float
    bandwidth_after: float

    @property
    def is_valid(self) -> bool:
        """Whether no page came from the disk during the runs."""
        return not any(run.major_faults for run in self.runs)

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, the median over the runs."""
        return statistics.median(self.num_prompt_tokens / run.prompt_seconds for run in self.runs)

    @property
    def decode_rates(self) -> list[float]:
        """New tokens after the first per second, by run."""
        return [(self.num_new_tokens - 1) / run.decode_seconds for run in self.runs]

    @property
    def decode_rate(self) -> float:
        """Their median."""
        return statistics.median(self.decode_rates)

    @property
    def bandwidth(self) -> float:
        """The mean of the probes just before and just after the runs."""
        return (self.bandwidth_before + self.bandwidth_after) / 2

    def record(self) -> dict[str, Any]:
        """The part of a line of JSON that says how fast it was."""
        return {
            **dataclasses.asdict(self),
            "prompt_tokens_per_s": self.prompt_rate,
            "decode_tokens_per_s": self.decode_rate,
            "is_valid": self.is_valid,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What a model has shown.

    Attributes:
        weights, linears: formats that were asked for; None is the checkpoint's.
        kernels: number of MoE layers by the name of the kernel that runs them.
        timed: how fast it was.
        active_bytes: stored bytes of weights that one new token reads.
        prompt_parts, decode_parts: seconds by part, of one run with hooks.
    """

    model: str
    weights: str | None
    linears: str | None
    kernels: dict[str, int]
    timed: TimedRuns
    active_bytes: int
    prompt_parts: dict[Part, float]
    decode_parts: dict[Part, float]

    @property
    def fraction_of_bandwidth(self) -> float:
        """Decode tokens/s x active bytes, as a fraction of what memory gives."""
        return self.timed.decode_rate * self.active_bytes / self.timed.bandwidth

    def to_json(self, machine: Machine) -> str:
        """One line; the keys are those of docs/benchmarks/cpu.md."""
        parts = {"prompt_parts": self.prompt_parts, "decode_parts": self.decode_parts}
        record = {
            "model": self.model,
            "weights": self.weights,
            "linears": self.linears,
            "kernels": self.kernels,
            **self.timed.record(),
            "active_bytes": self.active_bytes,
            "fraction_of_bandwidth": self.fraction_of_bandwidth,
            **{
                name: {part.value: seconds for part, seconds in found.items()}
                for name, found in parts.items()
            },
            "machine": dataclasses.asdict(machine),
        }
        return json.dumps(record)


class _Watch(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come, and tells when the first one has."""

    def __init__(self, on_first: Callable[[], None] | None = None) -> None:
        self.on_first = on_first
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """The prompt at the first call, then a token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1 and self.on_first is not None:
            self.on_first()

    def end(self) -> None:
        """Nothing is held back."""


def random_prompt(vocab_size: int, num_tokens: int) -> Tensor:
    """(1, T) token ids, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, num_tokens), generator=generator)


def major_faults() -> int:
    """Pages that this process has had to wait for the disk to bring."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def time_runs(
    generate: GenerateOnce, prompt: Tensor, num_new_tokens: int, repetitions: int = REPETITIONS
) -> TimedRuns:
    """Warm up, probe the bandwidth, run, and probe again.

    A run during which pages came from the disk is thrown away, `ATTEMPTS` times at most.
    """

    def run() -> Run:
        for _ in range(ATTEMPTS):
            found = generate(prompt, num_new_tokens)
            if not found.major_faults:
                break
        return found

    generate(prompt[:, :WARM_UP], min(num_new_tokens, WARM_UP))
    before = read_bandwidth(PROBE_SECONDS)
    runs = tuple(run() for _ in range(repetitions))
    return TimedRuns(
        num_prompt_tokens=prompt.shape[1],
        num_new_tokens=num_new_tokens,
        runs=runs,
        bandwidth_before=before,
        bandwidth_after=read_bandwidth(PROBE_SECONDS),
    )


def measure_generation(
    model: PreTrainedModel,
    names: dict[str, Any],
    *,
    num_prompt_tokens: int = 512,
    num_new_tokens: int = 64,
    repetitions: int = REPETITIONS,
) -> GenerationResult:
    """Time a model on random tokens, greedily, one sequence; then once more with hooks.

    Args:
        model: converted, with its kernels packed.
        names: what the result is to call the model: `model`, `weights`, `linears`, `kernels`.
        num_prompt_tokens, num_new_tokens: their number.
        repetitions: runs that are timed.

    Raises:
        ConfigError: a number is not positive.
        InputError: fewer than two new tokens, or more tokens than the model has positions for.
    """
    require_positive("prompt_tokens", num_prompt_tokens)
    require_positive("new_tokens", num_new_tokens)
    check_length(model, num_prompt_tokens, num_new_tokens)
    prompt = random_prompt(model.config.get_text_config().vocab_size, num_prompt_tokens)
    timed = time_runs(partial(generate_once, model), prompt, num_new_tokens, repetitions)
    prompt_parts, decode_parts = _time_parts(model, prompt, num_new_tokens)
    return GenerationResult(
        **names,
        timed=timed,
        active_bytes=active_bytes(model),
        prompt_parts=prompt_parts,
        decode_parts=decode_parts,
    )


def check_length(model: PreTrainedModel, num_prompt_tokens: int, num_new_tokens: int) -> None:
    """Raise `InputError` for fewer than two new tokens, or more than the model has positions."""
    if num_new_tokens < 2:
        raise InputError(
            f"new_tokens ({num_new_tokens}) must be at least 2, the first of which belongs to the "
            f"prompt; got fewer. Ask for 64."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and num_prompt_tokens + num_new_tokens > positions:
        raise InputError(
            f"prompt_tokens and new_tokens ({num_prompt_tokens} + {num_new_tokens}) must fit the "
            f"model's positions; got {positions}. Ask for fewer."
        )


def _generate(model: Any, prompt: Tensor, num_new_tokens: int, watch: _Watch) -> None:
    with torch.inference_mode():
        model.generate(
            input_ids=prompt.to(model.device),
            attention_mask=torch.ones_like(prompt, device=model.device),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            min_new_tokens=num_new_tokens,
            max_new_tokens=num_new_tokens,
            pad_token_id=0,
            streamer=watch,
            past_key_values=growing_cache(model),
        )


def generate_once(model: PreTrainedModel, prompt: Tensor, num_new_tokens: int) -> Run:
    """One timed generation from a prompt (1, T)."""
    watch = _Watch()
    faults = major_faults()
    start = time.perf_counter()
    _generate(model, prompt, num_new_tokens, watch)
    return Run(
        prompt_seconds=watch.times[0] - start,
        decode_seconds=watch.times[-1] - watch.times[0],
        major_faults=major_faults() - faults,
    )


def _time_parts(
    model: PreTrainedModel, prompt: Tensor, num_new_tokens: int
) -> tuple[dict[Part, float], dict[Part, float]]:
    """Seconds by part: of the prompt up to the first new token, and of the other tokens."""
    clock = PartClock(model)
    found: list[dict[Part, float]] = []

    def on_first() -> None:
        found.append(clock.stop())
        clock.restart()

    with clock.running():
        clock.restart()
        _generate(model, prompt, num_new_tokens, _Watch(on_first))
        found.append(clock.stop())
    prompt_parts, decode_parts = found
    return prompt_parts, decode_parts


def active_bytes(model: PreTrainedModel) -> int:
    """Stored bytes of the weights that one token reads: K of E experts, and all of the rest.

    The input embedding is left out, as a token reads one row of it, and so is the cache. A head
    that is tied to the embedding counts.
    """
    text: Any = model.config.get_text_config()
    found, counted = 0, set()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    has_own_head = head is None or isinstance(head, PackedLinear)
    if has_own_head or head.weight is not embedding.weight:
        counted.add(id(embedding.weight))
    for module in model.modules():
        if isinstance(module, PackedExperts):
            counted |= {id(parameter) for parameter in module.parameters()}
            config = module.experts_config
            found += _expert_bytes(module) * min(
                _top_k(text, config.num_experts), config.num_experts
            )
        elif isinstance(module, PackedLinear):
            found += module.matrix.num_bytes
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                found += parameter.numel() * parameter.element_size()
    return found


def _top_k(text: Any, num_experts: int) -> int:
    """Experts that a token visits, as the families spell it."""
    for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return num_experts


def _expert_bytes(experts: PackedExperts) -> int:
    """Stored bytes of one expert, also where a kernel keeps the only copy in its own layout."""
    if experts.given is not None:
        return experts.given.num_bytes // experts.experts_config.num_experts
    c = experts.experts_config
    num_up = 2 if c.is_gated else 1
    elements = (num_up + 1) * c.hidden_size * c.intermediate_size
    return elements * experts.problem(torch.float32, needs_grad=False).weight_dtype.itemsize
