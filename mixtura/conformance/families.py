"""What every family promises: its blocks, taken over whole, compute what they did before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.conformance.closeness import relative_error
from mixtura.conformance.report import Cases, Promises, require
from mixtura.hf import convert
from mixtura.hf.blocks import FamilyMoE
from mixtura.hf.convert import moe_layers
from mixtura.hf.family_plug_ins import PLUG_INS, Family

TOLERANCE = 1e-5
"""Of outputs in fp32, beside the family's own."""
GRADIENT_TOLERANCE = 1e-4


def names() -> tuple[str, ...]:
    """None: Transformers' own families bring no tiny model."""
    return ()


@dataclass(frozen=True, slots=True)
class Subject:
    """A family, and the name of its block's class."""

    block: str
    family: Family

    def model(self) -> PreTrainedModel:
        """The tiny model, as its own code runs it."""
        return self.family.tiny_model().eval()

    def blocks(self, model: nn.Module) -> list[str]:
        """Paths of the family's blocks."""
        found = model.named_modules()
        return [name for name, module in found if type(module).__name__ == self.block]


def find(name: str) -> Subject:
    """The family of a block's class.

    Raises:
        PlugInError: it cannot be used.
    """
    return Subject(name, PLUG_INS.load(name))


def promises(subject: Subject, device: str = "cpu") -> Promises:
    """Everything that is tried of a family, on models of a device."""
    exam = Examination(subject, device)
    return {
        "blocks are taken over whole": lambda: [("the tiny model", exam.taken_over)],
        "a block's output": partial(exam.by_tokens, exam.output),
        "gradients of a block": partial(exam.by_tokens, exam.gradients),
        "the whole model": lambda: [("the tiny model", exam.whole)],
        "weights keep names and bits": lambda: [("the tiny model", exam.weights)],
    }


@dataclass(frozen=True)
class Examination:
    """A family, and a device to try it on."""

    subject: Subject
    device: str

    def _both(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The tiny model, and a copy that is taken over."""
        own = self.subject.model().float().to(self.device)
        return own, convert(copy.deepcopy(own))

    def taken_over(self) -> None:
        """Every block of the class is ours: gate, router, experts and shared experts."""
        own, ours = self._both()
        names = self.subject.blocks(own)
        require(bool(names), f"the tiny model must have blocks of {self.subject.block}; got none")
        left = [f"{layer.name}: {layer.reason}" for layer in moe_layers(ours) if layer.reason]
        require(not left, f"every MoE layer must be taken over whole; got {'; '.join(left)}")
        for name in names:
            is_ours = isinstance(ours.get_submodule(name), FamilyMoE)
            require(is_ours, f"{name} must be taken over whole; got its own class")

    def by_tokens(self, trial: Callable[[int, int], None]) -> Cases:
        """A trial with no tokens, one, and several."""
        for num_tokens, seed in ((0, 0), (1, 0), (5, 1), (64, 2)):
            yield f"{num_tokens} tokens, seed={seed}", partial(trial, num_tokens, seed)

    def _pairs(
        self, num_tokens: int, seed: int
    ) -> Iterator[tuple[str, nn.Module, FamilyMoE, Tensor]]:
        own, ours = self._both()
        for name in self.subject.blocks(own):
            block = ours.get_submodule(name)
            assert isinstance(block, FamilyMoE)
            generator = torch.Generator().manual_seed(seed)
            shape = (1, num_tokens, block.moe_config.hidden_size)
            rows = torch.randn(shape, generator=generator).to(self.device)
            yield name, own.get_submodule(name), block, rows

    def output(self, num_tokens: int, seed: int) -> None:
        """What a block returns, tensor by tensor."""
        for name, own, ours, rows in self._pairs(num_tokens, seed):
            with torch.no_grad():
                wanted, got = _tensors(own(rows)), _tensors(ours(rows))
            require(len(wanted) == len(got), f"{name} must return as many tensors; got {len(got)}")
            for expected, actual in zip(wanted, got, strict=True):
                _require_close(f"the output of {name}", actual, expected, TOLERANCE)

    def gradients(self, num_tokens: int, seed: int) -> None:
        """Gradients of rows and of every parameter of a block."""
        if num_tokens == 0:
            return
        for name, own, ours, rows in self._pairs(num_tokens, seed):
            wanted, got = _gradients(own, rows), _gradients(ours, rows)
            for parameter, expected in wanted.items():
                what = f"the gradient of {parameter} in {name}"
                _require_close(what, got[parameter], expected, GRADIENT_TOLERANCE)

    def whole(self) -> None:
        """Logits, or hidden states, of a text."""
        own, ours = self._both()
        size = min(own.config.get_text_config().vocab_size, 50)
        ids = (torch.arange(24, device=self.device) * 7 % size).unsqueeze(0)
        with torch.no_grad():
            wanted, got = own(input_ids=ids)[0], ours(input_ids=ids)[0]
        _require_close("the model's output", got, wanted, TOLERANCE)

    def weights(self) -> None:
        """`state_dict` is the family's own, after a forward too."""
        own, ours = self._both()
        with torch.no_grad():
            ours(input_ids=torch.zeros(1, 3, dtype=torch.long, device=self.device))
        wanted, got = own.state_dict(), ours.state_dict()
        extra = sorted(wanted.keys() ^ got.keys())
        require(not extra, f"names of weights must stay; got another set: {extra[:2]}")
        changed = [name for name, tensor in wanted.items() if not torch.equal(tensor, got[name])]
        require(not changed, f"weights must keep their bits; got others in {changed[:2]}")


def _require_close(what: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    shapes = tuple(actual.shape), tuple(expected.shape)
    require(shapes[0] == shapes[1], f"{what} must be {shapes[1]}; got {shapes[0]}")
    error = relative_error(actual, expected)
    require(error <= bound, f"{what} must be within {bound} of its own; got {error:.1e} off")


def _tensors(returned: Any) -> list[Tensor]:
    parts = returned if isinstance(returned, (tuple, list)) else (returned,)
    return [part for part in parts if isinstance(part, Tensor)]


def _gradients(block: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    rows = rows.clone().requires_grad_()
    out = _tensors(block(rows))[0]
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    leaves = {"its rows": rows, **dict(block.named_parameters())}
    found = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(t) if grad is None else grad for (name, t), grad in pairs}
