"""What every experts kernel promises, tried on one: against the reference, and against itself.

A kernel is asked before every case (`ExpertsKernel.unsupported`). What it refuses is counted, with
its first reason; what it takes must be right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.conformance.adapters import check_adapters
from mixtura.conformance.closeness import NOISE_FACTOR, RTOL, relative_error
from mixtura.conformance.expert_cases import ACTIVATIONS, LAYOUTS, Case, Ids, truth_of
from mixtura.conformance.report import Cases, Promises, Refused, require
from mixtura.kernels import ExpertsKernel, get_kernel, kernel_names
from mixtura.kernels.reference import ReferenceKernel
from mixtura.kernels.torch import TorchKernel
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch, ExpertWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((32, 24), (8, 6), (33, 17), (64, 64), (128, 128))
"""Hidden and intermediate sizes; the usual case has the first that the kernel takes."""

FORMATS = (
    WeightFormat.INT8_CHANNEL,
    WeightFormat.INT4_G32,
    WeightFormat.FP8_BLOCK,
    WeightFormat.MXFP4,
    WeightFormat.NVFP4,
)
PACKED_BOUND = 3e-2
"""Of `|a - b| / |b|` with packed weights: rounding rows to int8 shows up to 2.2e-2."""

GRADIENT_FACTOR = 10.0
"""A gradient sums over rows too."""


def names() -> tuple[str, ...]:
    """Kernels that can be examined."""
    return kernel_names()


def find(name: str) -> ExpertsKernel:
    """The kernel of a name; see `get_kernel` for errors."""
    return get_kernel(name)


def promises(kernel: ExpertsKernel, device: str = "cpu") -> Promises:
    """Everything that is tried of a kernel, on tensors of a device."""
    exam = Examination(kernel, device)
    return {
        "it runs something": exam.something,
        "dtypes": exam.dtypes,
        "layouts": exam.layouts,
        "activations": exam.activations,
        "packed weights": exam.formats,
        "uneven sizes": exam.sizes,
        "zero tokens": partial(exam.variants, num_rows=0),
        "one token": partial(exam.variants, num_rows=1),
        "experts without rows": partial(exam.variants, ids=Ids.FEW, num_experts=9),
        "all rows to one expert": partial(exam.variants, ids=Ids.ONE, num_rows=12),
        "every expert (K = E)": partial(exam.variants, top_k=5),
        "slots without an expert (-1)": partial(exam.variants, ids=Ids.GAPS, top_k=3),
        "terms (reduce=False)": exam.terms,
        "weight on the input": exam.weight_on_input,
        "arguments are left alone": exam.purity,
        "determinism": exam.determinism,
        "pack and unpack": exam.round_trip,
        "gradients": exam.gradients,
        "experts can be moved": exam.moves,
        "adapters": exam.adapters,
    }


@dataclass(frozen=True)
class Examination:
    """A kernel, and a device to try it on."""

    kernel: ExpertsKernel
    device: str

    def usual(self, *, needs_grad: bool = False) -> Case:
        """The first dense case that the kernel takes.

        Raises:
            Refused: it takes none.
        """
        reason = ""
        for dtype, sizes in product(DTYPES, SIZES):
            case = self._sized(sizes, dtype=dtype)
            try:
                self._ask(case, needs_grad=needs_grad)
            except Refused as refused:
                reason = reason or str(refused)
            else:
                return case
        raise Refused(reason)

    def _sized(self, sizes: tuple[int, int], **fields: Any) -> Case:
        hidden, inner = sizes
        return Case(hidden_size=hidden, intermediate_size=inner, device=self.device, **fields)

    def _ask(
        self, case: Case, weight_on: WeightOn = WeightOn.OUTPUT, *, needs_grad: bool = False
    ) -> None:
        reason = self.kernel.unsupported(case.problem(weight_on, needs_grad=needs_grad))
        require(
            reason is None or (isinstance(reason, str) and bool(reason.strip())),
            f"unsupported must return None or a reason in words; got {reason!r}",
        )
        reason = reason or self.kernel.cannot_load()
        if reason is not None:
            raise Refused(reason)

    def _run(
        self,
        case: Case,
        batch: ExpertBatch | None = None,
        weight_on: WeightOn = WeightOn.OUTPUT,
        *,
        reduce: bool = True,
    ) -> Tensor:
        self._ask(case, weight_on)
        with torch.no_grad():
            packed = self.kernel.pack(case.expert_weights())
            rows = case.batch() if batch is None else batch
            return self.kernel.run(packed, rows, weight_on=weight_on, reduce=reduce)

    def _compare(
        self, case: Case, weight_on: WeightOn = WeightOn.OUTPUT, *, reduce: bool = True
    ) -> None:
        """Run a case, and hold it against the reference."""
        actual = self._run(case, None, weight_on, reduce=reduce)
        truth = truth_of(case, weight_on, reduce=reduce)
        wanted = case.dtype if reduce else truth.dtype
        got = (tuple(actual.shape), actual.dtype)
        require(
            got == (tuple(truth.shape), wanted),
            f"the result must be {tuple(truth.shape)} of {wanted}; got {got[0]} of {got[1]}",
        )
        require(bool(actual.isfinite().all()), "the result must be finite; got NaN or infinities")
        if case.weights is not None:
            error, bound = _norm_error(actual, truth), PACKED_BOUND + RTOL[case.dtype]
        else:
            error = relative_error(actual, truth)
            bound = self._bound(case, truth, weight_on, reduce)
        require(error <= bound, f"the error must be at most {bound:.1e}; got {error:.1e}")

    def _bound(self, case: Case, truth: Tensor, weight_on: WeightOn, reduce: bool) -> float:
        """The dtype's, or twice what torch's own products err by."""
        with torch.no_grad():
            plain = TorchKernel().run(
                case.expert_weights(), case.batch(), weight_on=weight_on, reduce=reduce
            )
        return max(RTOL[case.dtype], NOISE_FACTOR * relative_error(plain, truth))

    def _cases(self, cases: Iterator[Case] | list[Case]) -> Cases:
        return ((case, partial(self._compare, case)) for case in cases)

    # ------------------------------------------------------------------------------------- checks

    def something(self) -> Cases:
        """A kernel that refuses all of it has shown nothing, and fails."""

        def run() -> None:
            try:
                self.usual()
            except Refused as reason:
                require(False, f"it must take some dense experts on {self.device}; got: {reason}")

        yield f"{len(DTYPES)} dtypes, {len(SIZES)} sizes", run

    def dtypes(self) -> Cases:
        """Dense experts in every float dtype."""
        usual = self.usual()
        return self._cases([replace(usual, dtype=dtype, num_rows=12) for dtype in DTYPES])

    def layouts(self) -> Cases:
        """Every way to store experts."""
        usual = self.usual()
        return self._cases([replace(usual, layout=layout, num_rows=4) for layout in LAYOUTS])

    def activations(self) -> Cases:
        """Every activation, gated, and without a gate where it has no use for one."""
        usual = self.usual()
        return self._cases([replace(usual, activation=name, num_rows=3) for name in ACTIVATIONS])

    def formats(self) -> Cases:
        """Packed weights under rows of fp32 and bf16."""
        dtypes = (torch.float32, torch.bfloat16)
        return self._cases([self._packed(f, d) for f, d in product(FORMATS, dtypes)])

    def _packed(self, weights: WeightFormat, dtype: torch.dtype) -> Case:
        return self._sized((128, 128), num_experts=3, num_rows=3, weights=weights, dtype=dtype)

    def sizes(self) -> Cases:
        """Sizes that no tile divides, and numbers of rows."""
        dtype = self.usual().dtype
        pairs = product(SIZES, (3, 11))
        return self._cases(
            [self._sized(s, dtype=dtype, num_rows=rows, seed=rows) for s, rows in pairs]
        )

    def variants(self, **fields: Any) -> Cases:
        """The usual case with these fields, with three seeds."""
        usual = self.usual()
        return self._cases([replace(usual, seed=seed, **fields) for seed in range(3)])

    def terms(self) -> Cases:
        """(M, K, H) in fp32, zero where there is no expert."""
        for ids in (Ids.DISTINCT, Ids.GAPS):
            case = replace(self.usual(), ids=ids)

            def run(case: Case = case) -> None:
                self._compare(case, reduce=False)
                terms = self._run(case, reduce=False)
                rest = terms[case.batch().local_ids < 0]
                require(not rest.any(), "terms of slots without an expert must be 0; got others")

            yield case, run

    def weight_on_input(self) -> Cases:
        """`expert(w * x)` in place of `w * expert(x)`."""
        for ids in (Ids.DISTINCT, Ids.GAPS):
            case = replace(self.usual(), ids=ids)
            yield case, partial(self._compare, case, WeightOn.INPUT)

    def purity(self) -> Cases:
        """A call changes neither the batch nor the packed weights."""
        case = replace(self.usual(), ids=Ids.GAPS)

        def run() -> None:
            self._ask(case)
            packed, batch = self.kernel.pack(case.expert_weights()), case.batch()
            with torch.no_grad():
                first, second = (self.kernel.run(packed, batch) for _ in range(2))
            fresh = case.batch()
            for field in ("hidden_states", "local_ids", "topk_weights"):
                same = torch.equal(getattr(batch, field), getattr(fresh, field))
                require(same, f"{field} must be left as they are; got others")
            error = relative_error(second, first)
            require(error <= RTOL[case.dtype], f"a second call must agree; got {error:.1e} off")

        yield case, run

    def determinism(self) -> Cases:
        """Bit for bit alone, in batches and with other threads, where the kernel claims it; else
        the same call twice gives the same within the dtype's bound."""
        for num_rows in (2, 17, 40):
            case = replace(self.usual(), num_rows=num_rows, ids=Ids.GAPS, top_k=3)
            claims = self.kernel.is_row_invariant
            yield case, partial(self._invariant if claims else self._repeatable, case)

    def _repeatable(self, case: Case) -> None:
        error = relative_error(self._run(case), self._run(case))
        require(error <= RTOL[case.dtype], f"runs must agree; got {error:.1e} apart")

    def _invariant(self, case: Case) -> None:
        self._ask(case)
        packed, batch = self.kernel.pack(case.expert_weights()), case.batch()

        def run(rows: slice | Tensor) -> Tensor:
            part = (batch.hidden_states[rows], batch.local_ids[rows], batch.topk_weights[rows])
            with torch.no_grad():
                return self.kernel.run(packed, ExpertBatch(*part))

        whole = run(slice(None))
        for row in range(case.num_rows):
            alone = run(slice(row, row + 1))
            require(
                torch.equal(alone[0], whole[row]),
                f"row {row} must be the same alone; got other bits",
            )
        backwards = torch.arange(case.num_rows - 1, -1, -1, device=whole.device)
        same = torch.equal(run(backwards).flip(0), whole)
        require(same, "rows must be the same in another order; got other bits")
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            same = torch.equal(run(slice(None)), whole)
        finally:
            torch.set_num_threads(threads)
        require(same, "rows must be the same with other threads; got other bits")

    def round_trip(self) -> Cases:
        """`unpack(pack(weights))` are the weights, to the bit."""
        usual = self.usual()
        dense = [replace(usual, layout=layout) for layout in LAYOUTS]
        packed = [self._packed(f, torch.bfloat16) for f in FORMATS]
        for case in (*dense, *packed):

            def run(case: Case = case) -> None:
                self._ask(case)
                back = self.kernel.unpack(self.kernel.pack(case.expert_weights()), case.config)
                _require_same_bits(back, case.expert_weights())

            yield case, run

    def gradients(self) -> Cases:
        """Those of rows, routing weights and every weight, against the reference's."""
        if not self.kernel.has_backward:
            return
        usual = self.usual(needs_grad=True)
        for layout, weight_on in product(LAYOUTS, WeightOn):
            case = replace(usual, layout=layout, ids=Ids.GAPS, num_rows=5)

            def run(case: Case = case, weight_on: WeightOn = weight_on) -> None:
                self._ask(case, weight_on, needs_grad=True)
                found = _gradients(self.kernel, case, weight_on)
                plain = _gradients(TorchKernel(), case, weight_on)
                for role, truth in _gradients(ReferenceKernel(), case, weight_on).items():
                    noise = NOISE_FACTOR * relative_error(plain[role], truth)
                    bound = max(GRADIENT_FACTOR * RTOL[case.dtype], noise)
                    error = relative_error(found[role], truth)
                    fault = f"the gradient of {role} must be within {bound:.1e}; got {error:.1e}"
                    require(error <= bound, fault)

            yield f"{case}, weight on the {weight_on.value}", run

    def adapters(self) -> Cases:
        """LoRA adapters, of a kernel that adds them."""
        if not self.kernel.has_lora:
            return
        for layout in LAYOUTS:
            case = replace(self.usual(), layout=layout, num_rows=9)
            yield case, partial(check_adapters, self.kernel, case)

    def moves(self) -> Cases:
        """A row of every slot tensor, copied, is an expert, copied."""
        usual = self.usual()
        if self.kernel.slots(self.kernel.pack(usual.expert_weights())) is None:
            return
        for layout in LAYOUTS:
            case = replace(usual, layout=layout, ids=Ids.ONE)
            if case.config.post_norm is None:  # a norm is one vector for all experts
                yield case, partial(self._move, case)

    def _move(self, case: Case) -> None:
        self._ask(case)
        source, other = (replace(case, seed=case.seed + n).expert_weights() for n in range(2))
        here, there = self.kernel.pack(source), self.kernel.pack(other)
        slots_here, slots_there = self.kernel.slots(here), self.kernel.slots(there)
        require(bool(slots_here) and bool(slots_there), "slots must hold the experts; got none")
        assert slots_here is not None and slots_there is not None
        batch, moved, kept = case.batch(), 0, case.num_experts - 1
        to_moved = replace(batch, local_ids=torch.full_like(batch.local_ids, moved))
        with torch.no_grad():
            untouched = self.kernel.run(there, to_moved)
            for name, tensor in slots_there.items():
                tensor[kept].copy_(slots_here[name][moved])
            wanted, got = self.kernel.run(here, to_moved), self.kernel.run(there, batch)
            beside = self.kernel.run(there, to_moved)
        error = relative_error(got, wanted)
        require(error <= RTOL[case.dtype], f"a moved expert must be the same; got {error:.1e} off")
        require(torch.equal(beside, untouched), "other experts must stay; got other results")


def _norm_error(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|`."""
    size = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (size or 1.0)


def _require_same_bits(found: ExpertWeights, given: ExpertWeights) -> None:
    require(found.config == given.config, "unpack must give the configuration; got another")
    require(not found.lora, "unpack must give no adapters where there were none; got some")
    for role in (
        f.name for f in dataclasses.fields(ExpertWeights) if f.name not in ("config", "lora")
    ):
        left, right = getattr(found, role), getattr(given, role)
        require((left is None) == (right is None), f"unpack must give {role} back; got {left}")
        if right is None:
            continue
        is_vector = isinstance(right, Tensor)
        pairs = {role: (left, right)} if is_vector else _parts(role, left, right)
        for name, (one, other) in pairs.items():
            same = (one.dtype, one.shape) == (other.dtype, other.shape)
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
            require(same and torch.equal(*bits), f"unpack must give the bits of {name}; got others")


def _parts(role: str, left: Any, right: Any) -> dict[str, tuple[Tensor, Tensor]]:
    require(
        left.scheme == right.scheme, f"unpack must keep the scheme of {role}; got {left.scheme}"
    )
    return {f"{role}.{name}": (left.tensors[name], t) for name, t in right.tensors.items()}


def _gradients(kernel: ExpertsKernel, case: Case, weight_on: WeightOn) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the output, by what they are of; zeros where there is none."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().clone().requires_grad_()
        return leaves[name]

    weights = case.expert_weights().mapped(lambda t: leaf(f"weight {len(leaves)}", t))
    given = case.batch()
    rows, topk = leaf("rows", given.hidden_states), leaf("topk_weights", given.topk_weights)
    batch = ExpertBatch(rows, given.local_ids, topk)
    out = kernel.run(kernel.pack(weights), batch, weight_on=weight_on)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    total = (out * cotangent).sum()
    require(total.requires_grad, "the output must have gradients; got none")
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(t) if grad is None else grad for (name, t), grad in pairs}
