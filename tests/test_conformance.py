"""The reference suites: what is built in passes, and what is wrong is caught by the right check."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from plugged import EXAMPLES
from torch import Tensor
from typer.testing import CliRunner

from mixtura.cli import app
from mixtura.config import Activation, GateUp, WeightOn
from mixtura.conformance import codecs, kernels, plug_ins_of, policies, routers, run_suite
from mixtura.conformance.expert_cases import Case, Ids
from mixtura.conformance.report import Cases, Outcome, Refused, require, run_check
from mixtura.entry_points import Group
from mixtura.eplb import POLICIES, Policy
from mixtura.errors import ConfigError
from mixtura.kernels import get_kernel
from mixtura.kernels.torch import TorchKernel
from mixtura.parallel import ModelPlacement, Placement
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch, ExpertsProblem

# ------------------------------------------------------------------------------------ what is ours


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "torch", "cpu", "grouped_mm"])
def test_built_in_kernels_keep_their_contract(name: str) -> None:
    if get_kernel(name).cannot_load() is not None:
        pytest.skip(str(get_kernel(name).cannot_load()))
    report = run_suite(name, "kernels")
    assert [f"{check.name}: {check.detail}" for check in report.failed] == []
    assert report.origin == "built in"
    passed = {check.name for check in report.checks if check.outcome is Outcome.PASSED}
    assert len(passed) >= 17


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_built_in_policies_keep_their_contract(name: str) -> None:
    assert run_suite(name, "policies").failed == ()


@pytest.mark.parametrize("name", routers.BUILT_IN)
def test_rules_keep_the_contract_of_routers(name: str) -> None:
    assert run_suite(name, "routers").failed == ()


@pytest.mark.parametrize("name", codecs.WRITTEN)
def test_built_in_codecs_keep_their_contract(name: str) -> None:
    assert run_suite(name, "codecs").failed == ()


# ------------------------------------------------------------------------------------------ kernels


class Wrong(TorchKernel):
    """Sound as torch's is, which passes every check; until a subclass makes it wrong."""

    name = "wrong"

    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        out: Tensor = super().run(packed, batch, **how)
        return out


class IgnoresGaps(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, replace(batch, local_ids=batch.local_ids.clamp(min=0)), **how)


class DropsTheWeight(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        ones = torch.ones_like(batch.topk_weights)
        return super().run(packed, replace(batch, topk_weights=ones), **how)


class ClaimsInvariance(Wrong):
    is_row_invariant = True

    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, batch, **how) * (1 + 1e-6 * (len(batch.local_ids) % 2))


class RollsDice(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        out = super().run(packed, batch, **how)
        return out * (1 + 1e-3 * torch.rand(()))


class AlwaysReduces(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, batch, **{**how, "reduce": True})


class WeighsOutputsAlone(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, batch, **{**how, "weight_on": WeightOn.OUTPUT})


class NeedsTokens(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        assert int(batch.local_ids.max()) < packed.config.num_experts
        return super().run(packed, batch, **how)


class DoublesOneToken(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, batch, **how) * (2 if len(batch.local_ids) == 1 else 1)


class WritesToRows(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        out = super().run(packed, batch, **how)
        if not batch.hidden_states.requires_grad:
            batch.hidden_states.zero_()
        return out


class LosesBits(Wrong):
    def unpack(self, packed: Any, config: Any) -> Any:
        return packed.mapped(lambda t: t.bfloat16().to(t.dtype) if t.is_floating_point() else t)


class LosesGradients(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        rows = batch.hidden_states.detach()
        return super().run(packed, replace(batch, hidden_states=rows), **how)


class CopiesSlots(Wrong):
    def slots(self, packed: Any) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in super().slots(packed).items()}


class ForgetsAdapters(Wrong):
    def with_lora(self, packed: Any, adapters: Any) -> Any:
        return packed


class GivesAllAnAdapter(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        if batch.adapter_ids is not None:
            batch = replace(batch, adapter_ids=batch.adapter_ids.clamp(min=0))
        return super().run(packed, batch, **how)


class TakesAllForStacked(Wrong):
    def pack(self, weights: Any, activation_dtype: Any = None) -> Any:
        if weights.config.gate_up is GateUp.INTERLEAVED:
            weights = replace(weights, config=replace(weights.config, gate_up=GateUp.STACKED))
        return super().pack(weights, activation_dtype)


class KnowsOneActivation(Wrong):
    def pack(self, weights: Any, activation_dtype: Any = None) -> Any:
        config = replace(weights.config, activation=Activation())
        return super().pack(replace(weights, config=config), activation_dtype)


class ForgetsScales(Wrong):
    def pack(self, weights: Any, activation_dtype: Any = None) -> Any:
        down = weights.down_proj
        if down.is_quantized:
            ones = torch.ones_like(down.scales.float()).to(down.scales.dtype)
            weights = replace(weights, down_proj=replace(down, scales=ones))
        return super().pack(weights, activation_dtype)


class NeedsEveryExpert(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        out = super().run(packed, batch, **how)
        return out / (packed.config.num_experts < 9)


class HasCapacity(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        ids = batch.local_ids
        dropped = (ids == packed.config.num_experts - 1).cumsum(0) > 10
        return super().run(packed, replace(batch, local_ids=ids.masked_fill(dropped, -1)), **how)


class TakesFourSlots(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        kept = replace(
            batch, local_ids=batch.local_ids[:, :4], topk_weights=batch.topk_weights[:, :4]
        )
        return super().run(packed, kept, **how)


class CutsToTiles(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        rows = batch.hidden_states.clone()
        rows[:, rows.shape[1] // 8 * 8 :] = 0
        return super().run(packed, replace(batch, hidden_states=rows), **how)


class SaysNothing(Wrong):
    def unsupported(self, problem: ExpertsProblem) -> str | None:
        return ""


class RefusesAll(Wrong):
    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return "is shy"


class Returns16Bits(Wrong):
    def run(self, packed: Any, batch: ExpertBatch, **how: Any) -> Tensor:
        return super().run(packed, batch, **how).bfloat16()


CAUGHT: dict[type[Wrong], str] = {
    IgnoresGaps: "slots without an expert (-1)",
    DropsTheWeight: "dtypes",
    ClaimsInvariance: "determinism",
    RollsDice: "determinism",
    AlwaysReduces: "terms (reduce=False)",
    WeighsOutputsAlone: "weight on the input",
    NeedsTokens: "zero tokens",
    DoublesOneToken: "one token",
    WritesToRows: "arguments are left alone",
    LosesBits: "pack and unpack",
    LosesGradients: "gradients",
    CopiesSlots: "experts can be moved",
    ForgetsAdapters: "adapters",
    GivesAllAnAdapter: "adapters",
    TakesAllForStacked: "layouts",
    KnowsOneActivation: "activations",
    ForgetsScales: "packed weights",
    NeedsEveryExpert: "experts without rows",
    HasCapacity: "all rows to one expert",
    TakesFourSlots: "every expert (K = E)",
    CutsToTiles: "uneven sizes",
    SaysNothing: "it runs something",
    RefusesAll: "it runs something",
    Returns16Bits: "dtypes",
}
SHOWS_AT_ONCE = (DropsTheWeight, RollsDice, SaysNothing, RefusesAll, Returns16Bits)
"""Wrong in the plainest case, too."""


@pytest.mark.parametrize("wrong", CAUGHT, ids=lambda wrong: wrong.__name__)
def test_a_wrong_kernel_is_caught_by_the_right_check(wrong: type[Wrong]) -> None:
    name = CAUGHT[wrong]
    found = run_check(name, kernels.promises(wrong())[name])
    assert found.outcome is Outcome.FAILED, found
    assert "; got" in str(found.detail) or "Error" in str(found.detail)
    if wrong not in SHOWS_AT_ONCE:
        plain = run_check("plain", kernels.promises(wrong())["it runs something"])
        assert plain.outcome is Outcome.PASSED
        kernels.Examination(wrong(), "cpu")._compare(Case())


def test_every_check_of_kernels_has_caught_something() -> None:
    assert set(CAUGHT.values()) == kernels.promises(Wrong()).keys()


def test_what_a_kernel_refuses_is_counted_with_its_reason() -> None:
    class Shy(Wrong):
        def cannot_run(self, problem: ExpertsProblem) -> str | None:
            is_wide = problem.row_dtype is torch.float32
            return None if is_wide else "runs fp32 alone"

    found = run_check("dtypes", kernels.promises(Shy())["dtypes"])
    assert (found.outcome, found.num_cases, found.num_refused) == (Outcome.PASSED, 4, 3)
    assert found.detail == "runs fp32 alone"
    every = run_check("dtypes", kernels.promises(RefusesAll())["dtypes"])
    assert (every.outcome, every.detail) == (Outcome.REFUSED, "is shy")
    none = run_check("gradients", kernels.promises(get_kernel("cpu"))["gradients"])
    assert none.outcome is Outcome.NOT_CLAIMED


def test_a_failed_case_is_made_again_from_its_words() -> None:
    case = Case(
        dtype=torch.bfloat16,
        weights=WeightFormat.INT4_G32,
        ids=Ids.GAPS,
        num_rows=3,
        seed=5,
        layout="separate",
    )
    assert str(case) == (
        "Case(layout='separate', weights=WeightFormat.INT4_G32, dtype=torch.bfloat16, num_rows=3, "
        "ids=Ids.GAPS, seed=5)"
    )
    again = eval(str(case))
    assert str(again) == str(case)
    for one, other in zip(
        case.expert_weights().tensors(), again.expert_weights().tensors(), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(case.batch().local_ids, again.batch().local_ids)
    assert (case.batch().local_ids[0] == -1).all()
    assert case.batch().topk_weights.min() > 0


def test_a_check_ends_with_its_first_fault() -> None:
    def promise() -> Cases:
        def refuse() -> None:
            raise Refused("not this")

        yield "first", refuse
        yield "second", lambda: require(False, "it must be; got less")
        raise AssertionError("no case is made after a fault")

    found = run_check("a", promise)
    assert (found.outcome, found.num_cases, found.num_refused) == (Outcome.FAILED, 2, 1)
    assert found.detail == "second: it must be; got less."


# ------------------------------------------------------------------------------------------- codecs


def sample_codec() -> Any:
    """The module of the sample package."""
    path = EXAMPLES / "mixtura-rowwise-codec" / "mixtura_rowwise_codec.py"
    spec = importlib.util.spec_from_file_location("rowwise_for_tests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ROWWISE = sample_codec()


class WrongCodec(ROWWISE.RowwiseInt8):  # type: ignore[misc, name-defined]
    """Sound, until a subclass makes it or its matrices wrong."""

    matrix = ROWWISE.RowwiseMatrix

    def format_of(self, name: str, headers: Mapping[str, Any]) -> Any:
        return None if super().format_of(name, headers) is None else self.matrix()


def with_matrix(**methods: Any) -> type[WrongCodec]:
    matrix = type("Matrix", (ROWWISE.RowwiseMatrix,), methods)
    return type("Wrong", (WrongCodec,), {"matrix": matrix})


def _read_anything(self: Any, name: str, tensors: Mapping[str, Tensor], shape: Any = None) -> Any:
    return self.decode(tensors, tuple(tensors["qweight"].shape))


def _forgets_the_offset(self: Any, tensors: Mapping[str, Tensor], shape: Any) -> Any:
    found = ROWWISE.RowwiseMatrix().decode(tensors, shape)
    codes = tensors["qweight"].view(torch.uint8)
    return replace(found, matrix=replace(found.matrix, values=codes))


def _is_never_odd(self: Any, tensors: Mapping[str, Tensor], shape: Any) -> Any:
    scales = tensors["row_scale"].nan_to_num(0, 0, 0)
    return ROWWISE.RowwiseMatrix().decode({**tensors, "row_scale": scales}, shape)


def _writes_zeros(self: Any, decoded: Any) -> dict[str, Tensor]:
    found = ROWWISE.RowwiseMatrix().encode(decoded)
    return {name: torch.zeros_like(part) for name, part in found.items()}


class NeedsItsKey(WrongCodec):
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        return cls(tuple(config["dense_modules"]))


class PacksDense(WrongCodec):
    def format_of(self, name: str, headers: Mapping[str, Any]) -> Any:
        return self.matrix()


class HasNoNames(WrongCodec):
    suffixes: ClassVar[Mapping[str, str]] = {".qweight": "weight", ".row_scale": "row_scale"}


class TakesBiases(WrongCodec):
    suffixes: ClassVar[Mapping[str, str]] = {**ROWWISE.RowwiseInt8.suffixes, ".bias": "qweight"}


WRONG_CODECS = {
    "configuration": NeedsItsKey,
    "names of tensors": HasNoNames,
    "meaning": with_matrix(decode=_forgets_the_offset),
    "written back to the bit": with_matrix(encode=_writes_zeros),
    "damaged headers are refused": with_matrix(read=_read_anything),
    "another shape is refused": with_matrix(read=_read_anything),
    "contents that are no numbers are refused": with_matrix(decode=_is_never_odd),
    "dense matrices stay dense": PacksDense,
    "the ledger names every tensor": TakesBiases,
}


@pytest.mark.parametrize("check", WRONG_CODECS)
def test_a_wrong_codec_is_caught_by_the_right_check(check: str) -> None:
    held = plug_ins_of(Group.CODECS)
    for codec, outcome in ((WRONG_CODECS[check], Outcome.FAILED), (WrongCodec, Outcome.PASSED)):
        held.add("rowwise_int8", codec)
        try:
            found = codecs.promises(codecs.find("rowwise_int8"))
            assert found.keys() == WRONG_CODECS.keys()
            assert run_check(check, found[check]).outcome is outcome
        finally:
            held.remove("rowwise_int8")


def test_a_codec_without_a_sample_says_so() -> None:
    held = plug_ins_of(Group.CODECS)
    held.add("rowwise_int8", type("NoSample", (WrongCodec,), {"sample": lambda: None}))
    try:
        with pytest.raises(ValueError, match="must bring a sample to be examined"):
            run_suite("rowwise_int8", "codecs")
    finally:
        held.remove("rowwise_int8")


# ------------------------------------------------------------------------------------------ routers


def sound(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights, ids


def _shows_no_nan(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return sound(logits.nan_to_num(-9.0), top_k)


def _one_twice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = sound(logits, top_k)
    return weights, ids[:, :1].expand(-1, top_k)


def _beyond(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = sound(logits, top_k)
    return weights, ids + 1


def _overflows(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.exp().topk(top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def _looks_around(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return sound(logits - logits.mean(0) if len(logits) else logits, top_k)


def _looks_for_the_largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return sound(logits / logits.abs().max().clamp(min=1e30) * 1e30, top_k)


def _writes(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    found = sound(logits, top_k)
    logits.zero_()
    return found


def _rolls_dice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return sound(logits + torch.rand_like(logits), top_k)


def _divides_by_the_spread(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = sound(logits, top_k)
    spread = logits.amax(-1, keepdim=True) - logits.amin(-1, keepdim=True)
    return weights / spread, ids


def _leaves_one_out(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = sound(logits[:, 1:], top_k)
    return weights, ids + 1


def _needs_two(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return sound(logits.squeeze(0), top_k)


WRONG_ROUTERS: list[tuple[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]]] = [
    ("ids and weights", _one_twice),
    ("ids and weights", _beyond),
    ("it routes something", _beyond),
    ("zero tokens", _looks_for_the_largest),
    ("one token", _needs_two),
    ("every expert (K = E)", _leaves_one_out),
    ("equal logits", _divides_by_the_spread),
    ("large logits", _overflows),
    ("padding becomes -1", _rolls_dice),
    ("NaN stays in its token, and shows", _shows_no_nan),
    ("NaN stays in its token, and shows", _looks_around),
    ("determinism", _rolls_dice),
    ("a token is the same alone", _looks_around),
    ("logits are left alone", _writes),
]


@pytest.mark.parametrize("check, function", WRONG_ROUTERS)
def test_a_wrong_router_is_caught_by_the_right_check(
    check: str, function: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> None:
    def outcome(chosen: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Outcome:
        promises = routers.promises(lambda e, k: routers.custom(chosen, e, k))
        assert {name for name, _ in WRONG_ROUTERS} == promises.keys()
        return run_check(check, promises[check]).outcome

    assert (outcome(function), outcome(sound)) == (Outcome.FAILED, Outcome.PASSED)


# ----------------------------------------------------------------------------------------- policies


def deal(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    layer = Placement.round_robin(loads.shape[1], topology)
    return ModelPlacement.stack([layer] * len(loads))


def _one_layer(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    return deal(loads[:1], old, topology, budget)


def _shuffles(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    table = deal(loads, old, topology, budget).physical_to_logical
    order = torch.randperm(table.shape[1])
    return ModelPlacement(table[:, order], loads.shape[1], topology)


def _normalizes(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    loads /= loads.sum() or 1.0
    return deal(loads, old, topology, budget)


def _divides(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    assert np.isfinite(loads.max() / np.where(loads.any(), loads.max(), np.nan))
    return deal(loads, old, topology, budget)


def _splits(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    if loads.shape[1] < 2:
        raise IndexError("two experts")
    return deal(loads, old, topology, budget)


def _needs_spare(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    _ = 1 // (topology.num_physical_experts - loads.shape[1])
    return deal(loads, old, topology, budget)


def _needs_like_ranks(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    np.zeros(topology.num_physical_experts).reshape(-1, topology.slots_per_rank[0])
    return deal(loads, old, topology, budget)


def _refuses(loads: Any, old: Any, topology: Any, budget: Any) -> ModelPlacement:
    raise ConfigError("not today")


def _remembers(loads: Any, old: Any, topology: Any, budget: Any) -> Any:
    return None if loads.max() > 20 else deal(loads, old, topology, budget)


WRONG_POLICIES = [
    ("it plans something", _refuses),
    ("valid placements", _one_layer),
    ("deterministic", _shuffles),
    ("arguments are left alone", _normalizes),
    ("no load at all", _divides),
    ("one expert in every slot", _splits),
    ("one slot for each expert", _needs_spare),
    ("ranks of unlike slots", _needs_like_ranks),
    ("many seeds", _remembers),
    ("it keeps to its budget", _shuffles),
]


@pytest.mark.parametrize("check, plan", WRONG_POLICIES)
def test_a_wrong_policy_is_caught_by_the_right_check(check: str, plan: Any) -> None:
    is_incremental = check == "it keeps to its budget"

    def outcome(policy: Policy) -> Outcome:
        return run_check(check, policies.promises(policy)[check]).outcome

    assert outcome(Policy("wrong", plan, is_incremental)) is Outcome.FAILED
    assert outcome(Policy("sound", deal, is_incremental)) is Outcome.PASSED
    names = policies.promises(Policy("sound", deal, is_incremental=True)).keys()
    assert {name for name, _ in WRONG_POLICIES} == names


# -------------------------------------------------------------------------------- the command line


@pytest.fixture
def beyond() -> Iterator[None]:
    held = plug_ins_of(Group.ROUTERS)
    held.add("beyond", _beyond)
    held.add("sound", sound)
    yield
    held.remove("beyond")
    held.remove("sound")


def test_the_verb_prints_what_failed_and_how_to_make_it_again(beyond: None) -> None:
    command = ["conformance", "beyond", "--group", "routers"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "beyond of routers, this process" in result.stdout
    assert "Case(num_experts=4, top_k=1, num_tokens=16" in result.stdout
    assert "ids must be in [0, 4); got 1 to 4" in result.stdout
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    failed = [check for check in found["checks"] if check["outcome"] == "failed"]
    assert f"{len(failed)} of {len(found['checks'])} checks failed" in result.stdout


def test_the_verb_says_that_a_contract_is_kept(beyond: None) -> None:
    result = CliRunner().invoke(app, ["conformance", "sound", "--group", "routers"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "the contract is kept")


def test_the_verb_names_what_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["conformance", "nobody", "--group", "codecs"])
    assert result.exit_code == 1
    assert "'nobody') must be one of codecs that can be examined: compressed-tensors, fp8" in (
        result.stderr
    )
