"""What `deterministic=True` costs: one model with and without it in turns, rows checked first."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.bench.generation import (
    REPETITIONS,
    WARM_UP,
    Run,
    check_length,
    generate_once,
    random_prompt,
)
from mixtura.bench.machine import Machine
from mixtura.hf.convert import convert
from mixtura.hf.generate import prepare_experts
from mixtura.layer import FusedMoE

BATCHES = (1, 2, 7, 64)
"""Numbers of rows that each checked layer is given at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """Runs of one model in both modes, in turns.

    Attributes:
        model: what it is called.
        num_prompt_tokens, num_new_tokens: of every run.
        plain, deterministic: the runs of each mode.
        num_layers: MoE layers. wrong_layers: paths of those with a row that depended on its batch.
    """

    model: str
    num_prompt_tokens: int
    num_new_tokens: int
    plain: tuple[Run, ...]
    deterministic: tuple[Run, ...]
    num_layers: int
    wrong_layers: tuple[str, ...]

    @property
    def prompt_ratio(self) -> float:
        """Time of the prompt with determinism over that without, of the medians."""
        return self._ratio(lambda run: run.prompt_seconds)

    @property
    def decode_ratio(self) -> float:
        """The same of the tokens after the first."""
        return self._ratio(lambda run: run.decode_seconds)

    def _ratio(self, seconds: Callable[[Run], float]) -> float:
        found = [statistics.median(map(seconds, runs)) for runs in (self.deterministic, self.plain)]
        return found[0] / found[1]

    def to_json(self, machine: Machine) -> str:
        """One line."""
        ratios = {"prompt_ratio": self.prompt_ratio, "decode_ratio": self.decode_ratio}
        return json.dumps(
            {**dataclasses.asdict(self), **ratios, "machine": dataclasses.asdict(machine)}
        )

    def summary(self) -> str:
        """A line on the check, and one for each phase."""
        wrong = ", ".join(self.wrong_layers)
        check = f"WRONG: rows depend on their batch in {wrong}" if wrong else "bitwise equal"
        lines = [f"rows alone and in batches of {BATCHES}, {self.num_layers} layers: {check}"]
        phases = (
            ("prompt", self.num_prompt_tokens, self.prompt_ratio, "prompt_seconds"),
            ("decode", self.num_new_tokens - 1, self.decode_ratio, "decode_seconds"),
        )
        for name, count, ratio, seconds in phases:
            plain, strict = (
                count / statistics.median(getattr(run, seconds) for run in runs)
                for runs in (self.plain, self.deterministic)
            )
            lines.append(f"{name}: {plain:.1f} -> {strict:.1f} tokens/s, {ratio:.2f}x the time")
        return "\n".join(lines)


def measure_slowdown(
    model: PreTrainedModel,
    name: str,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    repetitions: int = REPETITIONS,
) -> Slowdown:
    """Time a model with and without determinism, in turns, on random tokens and one sequence.

    Raises:
        InputError: as `measure_generation`.
        UnsupportedModel, NoKernelFits: the model cannot be deterministic.
    """
    check_length(model, num_prompt_tokens, num_new_tokens)
    prompt = random_prompt(model.config.get_text_config().vocab_size, num_prompt_tokens)
    runs: dict[bool, list[Run]] = {False: [], True: []}
    wrong: list[str] = []
    for repetition in range(repetitions):
        for is_on in (True, False):
            convert(model, deterministic=is_on)
            prepare_experts(model)
            if is_on and not repetition:
                wrong = wrong_layers(model, prompt)
            generate_once(model, prompt[:, :WARM_UP], min(num_new_tokens, WARM_UP))
            runs[is_on].append(generate_once(model, prompt, num_new_tokens))
    return Slowdown(
        model=name,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        plain=tuple(runs[False]),
        deterministic=tuple(runs[True]),
        num_layers=len(_layers(model)),
        wrong_layers=tuple(wrong),
    )


@torch.inference_mode()
def wrong_layers(model: PreTrainedModel, prompt: Tensor) -> list[str]:
    """Paths of MoE layers that give a row of a prompt (1, T) other bits in another batch."""
    layers, seen = _layers(model), dict[str, Tensor]()

    def keep(path: str) -> Callable[..., None]:
        def hook(module: object, args: tuple[Tensor, ...], output: object) -> None:
            seen[path] = args[0].flatten(0, -2).clone()

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        model(prompt.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, rows in seen.items() if not _is_row_invariant(layers[path], rows)]


def _layers(model: PreTrainedModel) -> dict[str, FusedMoE]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, FusedMoE)}


def _is_row_invariant(layer: FusedMoE, rows: Tensor) -> bool:
    rows = rows[: max(BATCHES)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))

    def run(batch: Tensor) -> Tensor:
        return layer.run(batch).hidden_states

    whole = run(rows)
    return all(
        torch.equal(run(rows[part]), whole[part])
        for size in BATCHES
        for part in torch.split(order, size)
    )
