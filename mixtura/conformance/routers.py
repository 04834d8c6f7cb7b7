"""What every routing function promises: K experts for each token, and weights that are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mixtura.config import (
    GroupLimit,
    Renormalize,
    RoutingConfig,
    ScoreFunction,
    ScoreOrder,
)
from mixtura.conformance.closeness import RTOL, relative_error
from mixtura.conformance.report import Cases, Promises, Refused, require
from mixtura.errors import ConfigError, InputError
from mixtura.routing import Router, create_router
from mixtura.routing.custom import PLUG_INS, find_custom
from mixtura.types import Routing, TokenInputs

MakeRouter = Callable[[int, int], Router]
"""`make(num_experts, top_k) -> Router`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Router logits; equal cases are equal to the bit."""

    num_experts: int = 8
    top_k: int = 2
    num_tokens: int = 16
    scale: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def logits(self) -> Tensor:
        """(T, E) fp32."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_tokens, self.num_experts)
        return (torch.randn(shape, generator=generator) * self.scale).to(self.device)


def _rule(num_experts: int, top_k: int, **steps: object) -> Router:
    config = RoutingConfig(num_experts=num_experts, top_k=top_k, **steps)  # type: ignore[arg-type]
    return create_router(config)


BUILT_IN: dict[str, MakeRouter] = {
    "softmax": _rule,
    "softmax_renormalized": partial(_rule, renormalize=Renormalize.SUM),
    "top_k_softmax": partial(_rule, score_order=ScoreOrder.AFTER_TOP_K),
    "sigmoid_in_groups": partial(
        _rule,
        score=ScoreFunction.SIGMOID,
        groups=GroupLimit(num_expert_groups=2, topk_groups=1),
    ),
}
"""Rules of the pipeline, to compare a plug-in's report with."""


def names() -> tuple[str, ...]:
    """Rules that can be examined beside plug-ins."""
    return tuple(BUILT_IN)


def find(name: str) -> MakeRouter:
    """A plug-in's routing function as a router, or a rule."""
    return BUILT_IN[name] if name not in PLUG_INS.names() else partial(custom, find_custom(name))


def custom(function: Callable[[Tensor, int], tuple[Tensor, Tensor]], e: int, k: int) -> Router:
    """The router of a function for E experts, of which a token visits K."""
    return create_router(RoutingConfig(num_experts=e, top_k=k), custom=function)


def promises(make: MakeRouter, device: str = "cpu") -> Promises:
    """Everything that is tried of what routes, on logits of a device."""
    exam = Examination(make, device)
    pairs = list(product((4, 8, 60), (1, 2, 4)))
    return {
        "it routes something": exam.something,
        "ids and weights": lambda: exam.cases(
            exam.valid, [exam.case(num_experts=e, top_k=k, seed=e) for e, k in pairs]
        ),
        "zero tokens": lambda: exam.cases(exam.valid, [exam.case(num_tokens=0)]),
        "one token": lambda: exam.cases(exam.valid, [exam.case(num_tokens=1)]),
        "every expert (K = E)": lambda: exam.cases(exam.valid, [exam.case(num_experts=4, top_k=4)]),
        "equal logits": lambda: exam.cases(exam.valid, [exam.case(scale=0.0)]),
        "large logits": lambda: exam.cases(exam.valid, [exam.case(scale=1e4)]),
        "padding becomes -1": lambda: exam.cases(exam.padding, [exam.case()]),
        "NaN stays in its token, and shows": lambda: exam.cases(exam.nan, [exam.case()]),
        "determinism": lambda: exam.cases(exam.repeatable, [exam.case(num_tokens=64)]),
        "a token is the same alone": lambda: exam.cases(exam.alone, [exam.case()]),
        "logits are left alone": lambda: exam.cases(exam.pure, [exam.case()]),
    }


@dataclass(frozen=True)
class Examination:
    """What makes routers, and a device to try them on."""

    make: MakeRouter
    device: str

    def case(self, **fields: object) -> Case:
        """A case on the device."""
        return Case(device=self.device, **fields)  # type: ignore[arg-type]

    def cases(self, trial: Callable[[Case], None], cases: list[Case]) -> Cases:
        """A trial of each."""
        return [(case, partial(trial, case)) for case in cases]

    def route(self, case: Case, logits: Tensor, mask: Tensor | None = None) -> Routing:
        """Route logits; settings that it cannot have are refused."""
        try:
            router = self.make(case.num_experts, case.top_k)
        except ConfigError as error:
            raise Refused(str(error)) from error
        return router.route(logits, tokens=TokenInputs(padding_mask=mask))

    def something(self) -> Cases:
        """What refuses the plainest case has shown nothing, and fails."""

        def run() -> None:
            try:
                self.valid(self.case())
            except Refused as reason:
                require(False, f"it must route to 2 of 8 experts; got: {reason}")

        return [(self.case(), run)]

    def valid(self, case: Case) -> None:
        """Distinct ids in range, finite weights."""
        try:
            found = self.route(case, case.logits())
        except InputError as error:
            require(False, str(error))
        ids, weights = found.topk_ids, found.topk_weights
        shape = (case.num_tokens, case.top_k)
        got = (tuple(ids.shape), tuple(weights.shape))
        require(got == (shape, shape), f"ids and weights must be {shape}; got {got}")
        if case.num_tokens == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        in_range = low >= 0 and high < case.num_experts
        require(in_range, f"ids must be in [0, {case.num_experts}); got {low} to {high}")
        ordered = ids.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero().flatten().tolist()
        require(
            not twice, f"a token's experts must be distinct; got token {twice[:1]} with two alike"
        )
        require(bool(weights.isfinite().all()), "weights must be finite; got others")

    def padding(self, case: Case) -> None:
        """A padding token's slots are -1 with weight 0; the others are as without padding."""
        mask = torch.arange(case.num_tokens, device=self.device) % 3 != 0
        found, plain = self.route(case, case.logits(), mask), self.route(case, case.logits())
        gone = (found.topk_ids[~mask] == -1).all() and not found.topk_weights[~mask].any()
        require(bool(gone), "padding must have ids of -1 and weights of 0; got others")
        same = torch.equal(found.topk_ids[mask], plain.topk_ids[mask])
        require(same, "padding must leave other tokens alone; got other ids")

    def nan(self, case: Case) -> None:
        """A NaN logit makes a weight of its token NaN, and touches no other token."""
        logits, plain = case.logits(), self.route(case, case.logits())
        for expert in range(case.num_experts):
            broken = logits.clone()
            broken[3, expert] = float("nan")
            found = self.route(case, broken)
            low, high = int(found.topk_ids.min()), int(found.topk_ids.max())
            in_range = low >= 0 and high < case.num_experts
            require(in_range, f"ids must stay in range beside NaN; got {low} to {high}")
            shows = bool(found.topk_weights[3].isnan().any())
            require(shows, f"NaN for expert {expert} must show in the token's weights; got none")
            others = [row for row in range(case.num_tokens) if row != 3]
            same = torch.equal(found.topk_ids[others], plain.topk_ids[others])
            same = same and torch.equal(found.topk_weights[others], plain.topk_weights[others])
            require(same, "NaN must leave other tokens alone; got other results")

    def repeatable(self, case: Case) -> None:
        """The same logits give the same bits."""
        first, second = (self.route(case, case.logits()) for _ in range(2))
        same = torch.equal(first.topk_ids, second.topk_ids)
        same = same and torch.equal(first.topk_weights, second.topk_weights)
        require(same, "equal logits must give equal choices; got two")

    def alone(self, case: Case) -> None:
        """A token's choice does not depend on the batch; its weights within rounding."""
        logits = case.logits()
        whole = self.route(case, logits)
        for token in range(case.num_tokens):
            one = self.route(case, logits[token : token + 1])
            same = torch.equal(one.topk_ids[0], whole.topk_ids[token])
            require(same, f"token {token} must visit the same experts alone; got others")
            error = relative_error(one.topk_weights[0], whole.topk_weights[token])
            require(error <= RTOL[torch.float32], f"weights must agree alone; got {error:.1e} off")

    def pure(self, case: Case) -> None:
        """Logits are not written to."""
        logits = case.logits()
        self.route(case, logits)
        require(torch.equal(logits, case.logits()), "logits must be left as they are; got others")
