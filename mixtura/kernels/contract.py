"""What every experts kernel offers: one contract for all devices, formats and parallel modes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import ActivationDtype, ExpertsConfig, WeightOn
from mixtura.lora import Adapters
from mixtura.quant.activations import ActivationScheme, activations_for
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

STATIC_CODES = (Code.INT, Code.E4M3)
"""Codes that `round_activations` knows."""


class ExpertsKernel(ABC):
    """Runs the routed experts of one rank on a batch of rows.

    Attributes:
        name: what `--kernel` and `kernel=` call it.
        has_backward: gradients flow to rows, routing weights and expert weights.
        is_row_invariant: a row's result does not depend on the rows around it or on the thread
            count.
        devices: types of device it can run on; None for any that torch has. Elsewhere it is passed
            over without counting as the preferred kernel.
        automatic_on: those of them on which it may be taken without being asked for by name; None
            for all of them.
        rounds_between: gate, up and experts' outputs are rounded to the rows' dtype on their way.
        is_capturable: `run` never waits for the host on a GPU, so that a CUDA graph can hold it;
            elsewhere it is of no account.
        comes_first: a plug-in's kernel stands before the built-in ones where both can run; else it
            runs where it is asked for by name, or where none of them can.
        activation_dtypes: the arithmetic with quantized weights that may be asked for.
        rounding_codes: codes that it rounds rows to with the stored scales of `ExpertWeights`.
        has_lora: it adds what LoRA adapters add (`with_lora`).
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None] = None
    automatic_on: ClassVar[tuple[str, ...] | None] = None
    has_backward: ClassVar[bool] = False
    is_row_invariant: ClassVar[bool] = False
    rounds_between: ClassVar[bool] = False
    is_capturable: ClassVar[bool] = False
    comes_first: ClassVar[bool] = False
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = ()
    rounding_codes: ClassVar[tuple[Code, ...]] = ()
    has_lora: ClassVar[bool] = False

    def unsupported(self, problem: ExpertsProblem) -> str | None:
        """Why this kernel cannot run the problem, or None. Pure: needs no device and no weights."""
        if not self.is_for(problem.device):
            devices = " and ".join(self.devices or ())
            return f"is for {devices}, and the experts are on {problem.device}"
        if problem.needs_grad and not self.has_backward:
            return "has no backward, and gradients are needed"
        if problem.is_deterministic and not self.is_row_invariant:
            return "its rows depend on the batch around them, and deterministic=True was asked for"
        asked = problem.activation_dtype
        if asked is not None and not problem.is_dense and asked not in self.activation_dtypes:
            return f"has no {asked.value} activations"
        for scheme in problem.roundings:
            if problem.needs_grad:
                return f"activations rounded to {scheme.code_words} have no gradient"
            if scheme.code not in self.rounding_codes:
                return f"does not round activations to {scheme.code_words} with stored scales"
        if problem.has_lora and not self.has_lora:
            return "adds no LoRA adapters"
        return self.cannot_run(problem)

    def is_for(self, device: str) -> bool:
        """Whether the kernel can run on this type of device."""
        return self.devices is None or device in self.devices

    def is_automatic(self, device: str) -> bool:
        """Whether it may be taken on this type of device without being asked for by name."""
        return self.is_for(device) and (self.automatic_on is None or device in self.automatic_on)

    def cannot_load(self) -> str | None:
        """Why a package that it calls is of no use here, or None.

        May import the package, so only a kernel that would be taken is asked.
        """
        return None

    def activations(
        self,
        asked: ActivationDtype | None,
        meant: ActivationScheme | None,
        schemes: Sequence[QuantScheme],
    ) -> ActivationScheme | None:
        """What it rounds rows to, just as `quantize_activations` does; see `activations_for`.

        None: rows as they come, or an arithmetic of its own.
        """
        return None

    def rounds_as_meant(self, problem: ExpertsProblem) -> bool:
        """Whether it rounds rows as the checkpoint means, with scales stored or found."""
        meant, asked = problem.activations, problem.activation_dtype
        found = self.activations(asked, meant, problem.schemes)
        return bool(problem.roundings) or (found is not None and found == meant)

    def shares_memory(self, is_quantized: bool) -> bool:
        """Whether `pack` returns views of the given weights, dense or not, and frees nothing."""
        return False

    def packs_in_graphs(self, is_quantized: bool) -> bool:
        """Whether torch.compile can trace `pack`; else a graph's first call packs."""
        return True

    def shortfall(self, problem: ExpertsProblem) -> str | None:
        """Why it does not round rows as the checkpoint means, on this machine, or None.

        Under strict=True such a kernel is refused.
        """
        return None

    def how(self, problem: ExpertsProblem) -> str | None:
        """How it runs the problem on this machine, in a few words, where there is a choice."""
        return None

    @abstractmethod
    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        """The kernel's own limits on device, dtype, scheme, sizes and layout."""

    @abstractmethod
    def pack(self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None) -> Any:
        """What the kernel wants in memory, experts first in every tensor.

        Args:
            weights: as they are stored.
            activation_dtype: the arithmetic that they will be run with; None is the kernel's own.
                Stored scales of the inputs are used where they hold with it (`rounded_for`).
        """

    @abstractmethod
    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        """The inverse of `pack`, bit for bit.

        A kernel that shares memory is never asked for it between calls, and may have left out what
        its arithmetic has no use for: inputs' scales, and roundings that are meant.
        """

    def slots(self, packed: Any) -> dict[str, Tensor] | None:
        """The tensors that hold the experts, (L, ...) each; None where experts cannot be moved.

        Copying row `i` of every one over row `j` of another layer's makes expert `j` there what
        `i` is here, at the same addresses; both must be packed from weights of one scheme and
        configuration.
        """
        return None

    def with_lora(self, packed: Any, adapters: Adapters) -> Any:
        """The packed weights with these adapters beside them instead of others.

        Args:
            packed: of `pack`, or of this.
            adapters: by number, as `mixtura.experts.lora.kept` lays them out; their tensors are
                read where they are, and those of `slots` hold them too.
        """
        raise AssertionError(f"{self.name} has no adapters")

    @abstractmethod
    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        """Run the experts.

        `out[m] = sum over k with id e = local_ids[m,k] >= 0 of weights[m,k] * expert_e(x[m])`,
        added in fp32 in slot order; with WeightOn.INPUT, `expert_e(weights[m,k] * x[m])`. Where
        `adapter_ids[m]` is the number of an adapter, gate, up and down of the row's experts give
        `W x + B (A x)`, with x as it is before it is rounded for W.

        Returns:
            (M, H) in the rows' dtype; with `reduce=False` the terms (M, K, H) in fp32 (float64 for
            rows of float64).
        """


class StoredWeightsKernel(ExpertsKernel):
    """A kernel that reads the weights where they are stored: nothing is copied or freed.

    Rows are rounded with scales found while running where that is asked for, and come as they are
    where the checkpoint alone means it. `activations` of the packed weights is what is done.
    """

    def shares_memory(self, is_quantized: bool) -> bool:
        return True

    def activations(
        self,
        asked: ActivationDtype | None,
        meant: ActivationScheme | None,
        schemes: Sequence[QuantScheme],
    ) -> ActivationScheme | None:
        return None if asked is None else activations_for(asked, meant, schemes)

    def pack(
        self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None
    ) -> ExpertWeights:
        held = weights.rounded_for(activation_dtype)
        found = self.activations(activation_dtype, weights.activations, weights.schemes)
        return held if found == held.activations else replace(held, activations=found)

    def how(self, problem: ExpertsProblem) -> str | None:
        found = self.activations(problem.activation_dtype, problem.activations, problem.schemes)
        return in_words(problem.roundings, found)

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        assert isinstance(packed, ExpertWeights)
        return packed

    def slots(self, packed: Any) -> dict[str, Tensor]:
        assert isinstance(packed, ExpertWeights)
        return packed.slots()

    def with_lora(self, packed: Any, adapters: Adapters) -> ExpertWeights:
        assert isinstance(packed, ExpertWeights)
        return replace(packed, lora=adapters)


def in_words(
    roundings: tuple[ActivationScheme, ...], found: ActivationScheme | None = None
) -> str | None:
    """What rows are rounded to before the products, with whose scales; None where they are not.

    Args:
        roundings: with stored scales. found: with those found while running.
    """
    codes = " and ".join(dict.fromkeys(scheme.code_words for scheme in roundings))
    parts = [f"{codes} with the file's scales"] if codes else []
    parts += [str(found)] if found is not None else []
    return f"activations rounded to {', else '.join(parts)}" if parts else None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which terms are weighed and added: fp32, or float64 for rows of float64."""
    return torch.promote_types(dtype, torch.float32)
