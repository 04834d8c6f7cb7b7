"""What is compared: the interface of a contender, our kernels, and which of them fit in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.machine import available_memory
from mixtura.bench.plain_router import PlainRouter
from mixtura.bench.weights import LayerWeights, num_weight_sets
from mixtura.config import ActivationDtype
from mixtura.errors import InputError, NoKernelFits
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels import get_kernel, select_kernel
from mixtura.routing import RouterTensors, router_for
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights, Routing

RunBatch = Callable[[Any], Tensor]
"""What `prepare` has made of a batch -> (M,H)."""

Route = Callable[[Tensor], Routing]
"""Router logits (T, choices) -> which experts, with what weight."""

PREFERRED = "mixtura"
"""The name of whichever of our kernels is chosen when none is asked for."""

OURS = "mixtura:"
"""Begins the name of a kernel of ours that a peer is called as well."""

MEMORY_LIMIT = 12 * 2**30
"""Bytes that the weights of one case may take, whatever is free."""

STACKS = "stacks"
"""The name of the experts as they are made, which several contenders may read."""


@dataclass(frozen=True)
class Layer:
    """One layer's experts, made when first asked for and shared by the contenders that ask."""

    case: Case
    source: LayerWeights
    number: int

    @cached_property
    def stacks(self) -> ExpertWeights:
        """In the case's format."""
        return self.source.stacks(self.number)

    @cached_property
    def dense_stacks(self) -> ExpertWeights:
        """In the dtype of the case's hidden states."""
        if not self.case.weights.scheme.is_quantized:
            return self.stacks
        return self.source.dense_stacks(self.number, self.case.dtype)


class Contender(ABC):
    """A way to run the experts of a layer.

    Attributes:
        name: what the command line and the results call it.
        is_ours: it is one of our kernels, not what they are measured against.
    """

    name: str
    is_ours: bool = False

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why it is not run on a case, or None."""

    @abstractmethod
    def bind(self, layer: Layer) -> RunBatch:
        """The function that runs one layer."""

    def kernel(self, case: Case) -> str:
        """What runs the case: a kernel's name, or the contender's own."""
        return self.name

    def weights(self, case: Case) -> str:
        """The format of the weights that it reads."""
        return case.weights.value

    def expert_bytes(self, case: Case) -> int:
        """Bytes that it reads of an expert."""
        return case.expert_bytes

    def holds(self, case: Case) -> str:
        """A name for the weights that it keeps; those of one name are in memory once."""
        return self.name

    def prepare(self, case: Case, batch: ExpertBatch) -> Any:
        """The batch in the form in which this contender is given it in practice."""
        return batch

    def route(self, case: Case, tensors: RouterTensors) -> Route:
        """How it chooses experts, where a layer is measured from its logits on."""
        return PlainRouter(case.shape.routing, tensors).route

    def rounds_once(self, case: Case) -> bool:
        """Whether it keeps fp32 between the products, as kernels written for a device do."""
        return False

    def rounds_to(self, case: Case) -> ActivationDtype | None:
        """What it rounds the rows of products to by itself; None where rows are 16 bits or more."""
        return None


@dataclass(frozen=True)
class KernelContender(Contender):
    """`RoutedExperts` with one of our kernels by name, or with the preferred one."""

    name: str
    is_ours: bool = True

    def refusal(self, case: Case) -> str | None:
        try:
            kernel = self.kernel(case)
        except NoKernelFits as error:
            return str(error)
        if kernel == "reference" and case.flops > 2**30:
            return "a loop over rows, too slow for this size"
        return get_kernel(kernel).unsupported(_problem(case))

    def kernel(self, case: Case) -> str:
        if self.name == PREFERRED:
            return select_kernel(_problem(case)).kernel.name
        return self.name.removeprefix(OURS)

    def route(self, case: Case, tensors: RouterTensors) -> Route:
        return router_for(case.shape.routing, tensors).route

    def rounds_once(self, case: Case) -> bool:
        return not get_kernel(self.kernel(case)).rounds_between

    def rounds_to(self, case: Case) -> ActivationDtype | None:
        return case.rounds_to

    def holds(self, case: Case) -> str:
        kernel = get_kernel(self.kernel(case))
        return STACKS if kernel.shares_memory(case.weights.scheme.is_quantized) else kernel.name

    def bind(self, layer: Layer) -> RunBatch:
        options = ExpertsOptions(
            kernel=self.kernel(layer.case), activation_dtype=layer.case.activation_dtype
        )
        experts = RoutedExperts(layer.case.shape.experts, weights=layer.stacks, options=options)
        problem = experts.problem(layer.case.dtype, needs_grad=False)
        experts.pack(experts.decide(problem).kernel)
        return experts.run_batch


def _problem(case: Case) -> ExpertsProblem:
    scheme = case.weights.scheme
    return ExpertsProblem(
        experts=case.shape.experts,
        schemes=(scheme,),
        row_dtype=case.dtype,
        device=case.device,
        activation_dtype=case.activation_dtype,
    )


def refusals(case: Case, contenders: Sequence[Contender]) -> dict[str, str]:
    """Why contenders are not run, by name: their own reasons, and weights that do not fit.

    Ours go first; a peer is left out where its weights do not fit beside those before it.

    Raises:
        InputError: the weights of one of ours do not fit.
    """
    limit = min(MEMORY_LIMIT, available_memory())
    num_experts = case.shape.experts.num_experts
    taken = {STACKS: num_experts * case.expert_bytes}  # one layer, from which others are made
    found: dict[str, str] = {}
    for contender in sorted(contenders, key=lambda c: not c.is_ours):
        reason = contender.refusal(case)
        if reason is not None:
            found[contender.name] = reason
            continue
        each = contender.expert_bytes(case)
        needed = num_weight_sets(case, each) * num_experts * each
        kind = contender.holds(case)
        more = {**taken, kind: max(needed, taken.get(kind, 0))}
        if sum(more.values()) <= limit:
            taken = more
        elif contender.is_ours:
            raise InputError(
                f"the weights of {case} ({sum(more.values()) / 1e9:.1f} GB) must fit in memory; "
                f"got room for {limit / 1e9:.1f} GB. Take another shape, narrower weights or "
                f"fewer kernels, or end other programs."
            )
        else:
            found[contender.name] = (
                f"its {needed / 1e9:.1f} GB of weights do not fit beside the others in "
                f"{limit / 1e9:.1f} GB"
            )
    return found


def rotate(layers: Sequence[RunBatch], batches: Sequence[Any]) -> Callable[[int], Tensor]:
    """Call `number` runs another layer and another routing than the call before it."""

    @torch.no_grad()
    def call(number: int) -> Tensor:
        return layers[number % len(layers)](batches[number % len(batches)])

    return call
