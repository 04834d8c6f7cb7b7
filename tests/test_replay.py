"""Routing of whole models: which token is where in a trace, and forcing it on tokens again."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_ranks
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from mixtura import capture_routing, convert, replay_routing
from mixtura.config import EplbConfig, ParallelConfig, TokensHeld
from mixtura.eplb import Activity
from mixtura.errors import CaptureUnsupported, InputError, TraceError, UnsupportedModel
from mixtura.hf.balance import find_balancer
from mixtura.hf.capture import observed_layers
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.parallel import finish_requests
from mixtura.observe import LayerTrace, RoutingTrace, TokenTable, capture_layers
from mixtura.parallel import ExpertParallel, Transport

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
NEW = 4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
FAMILIES = ["deepseek_v3", "longcat_flash", "gpt_oss", "llama4", "dbrx", "glm4_moe", "afmoe"]
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
}


@functools.cache
def model_of(family: str = "qwen3_moe") -> PreTrainedModel:
    """A family's tiny model, converted; it must not be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)
        return convert(copy.deepcopy(tiny_model(family).model)).eval()


def turned(family: str = "qwen3_moe") -> PreTrainedModel:
    """The same model with gates that choose other experts."""
    model = copy.deepcopy(model_of(family))
    with torch.no_grad():
        for block in observed_layers(model).values():
            block.gate.weight.neg_()  # type: ignore[union-attr]
    return model


def generate(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens (B, prompt + new), and their logits (B, new, vocabulary)."""
    found = model.generate(
        PROMPTS,
        attention_mask=MASK,
        **GREEDY,
        **options,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits, 1)


def generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], num_new: int = NEW, **options: Any
) -> list[list[int]]:
    """New tokens of a continuous batch."""
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=num_new, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            **({"page_size": 4, "num_blocks": 16, "max_batch_tokens": 6} | options)
        ),
        progress_bar=False,
    )
    return [result.generated_tokens for result in results.values()]


@functools.cache
def recorded() -> tuple[RoutingTrace, Tensor]:
    """The routing of a generation, and its tokens."""
    with capture_routing(model_of()) as routing:
        tokens, _ = generate(model_of())
    return routing.trace(), tokens


def pairs(trace: RoutingTrace) -> list[tuple[int, int]]:
    assert trace.tokens is not None
    return list(zip(trace.tokens.sequence.tolist(), trace.tokens.position.tolist(), strict=True))


def assert_same(found: RoutingTrace, expected: RoutingTrace) -> None:
    assert pairs(found) == pairs(expected)
    assert found.tokens is not None and expected.tokens is not None
    assert found.tokens.requests == expected.tokens.requests
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert found.layers[name].ids.equal(layer.ids)


def ids_at(trace: RoutingTrace, sequence: int, positions: range) -> list[Tensor]:
    """Ids of a part of a sequence, a tensor a layer."""
    assert trace.tokens is not None
    rows = trace.tokens.find(torch.full((len(positions),), sequence), torch.tensor([*positions]))
    assert bool((rows >= 0).all())
    return [layer.topk_ids[rows] for layer in trace.layers.values()]


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("way", WAYS)
def test_a_replay_is_the_same_to_the_bit(way: str) -> None:
    model = model_of()
    with capture_routing(model) as routing:
        tokens, logits = generate(model, **WAYS[way])
    trace = routing.trace()
    assert pairs(trace) == [(0, p) for p in range(-2, 3 + NEW - 1)] + [
        (1, p) for p in range(5 + NEW - 1)
    ]
    with replay_routing(model, routing), capture_routing(model) as again:
        replayed = generate(model, **WAYS[way])
    assert replayed[0].equal(tokens) and replayed[1].equal(logits)
    assert_same(again.trace(), trace)
    assert all(not b.observers and not b.sources for b in observed_layers(model).values())


def test_other_experts_are_really_forced() -> None:
    trace, _ = recorded()
    model = turned()
    with capture_routing(model) as own:
        plain = generate(model)
    assert (
        own.trace()
        .layers["model.layers.1.mlp"]
        .ids.ne(trace.layers["model.layers.1.mlp"].ids)
        .any()
    )
    with replay_routing(model, trace), capture_routing(model) as forced:
        assert not generate(model)[1].equal(plain[1])
    assert_same(forced.trace(), trace)


def test_every_generation_of_a_block_is_new_sequences() -> None:
    model, (trace, _) = model_of(), recorded()
    with capture_routing(model) as routing:
        generate(model)
        generate(model, **WAYS["static"])
        generate(model, **WAYS["static"])  # in the same cache, which is emptied
    found = routing.trace()
    for first in (0, 2, 4):
        for row, positions in ((0, range(6)), (1, range(8))):
            for one, other in zip(
                ids_at(found, first + row, positions), ids_at(trace, row, positions), strict=True
            ):
                assert one.equal(other)
    with replay_routing(model, found), capture_routing(model) as again:
        for way in ("dynamic", "static", "static"):
            generate(model, **WAYS[way])
    assert_same(again.trace(), found)


def test_a_cache_goes_on_in_its_sequence() -> None:
    model = model_of()
    ids = PROMPTS[1:]
    with torch.no_grad(), capture_routing(model) as whole:
        model(ids, use_cache=False)
    with torch.no_grad(), capture_routing(model) as parts:
        cache = model(ids[:, :2]).past_key_values  # made by the model
        model(ids[:, 2:3], past_key_values=cache)
        model(ids[:, 3:], past_key_values=cache)
    assert_same(parts.trace(), whole.trace())
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"behind 5 tokens in a cache must come after .* got 0"),
        capture_routing(model),
    ):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"num_beams": 2}, "beam search"), ({"prompt_lookup_num_tokens": 2}, "assisted decoding")],
)
def test_searches_that_cannot_be_followed_are_refused(options: Any, told: str) -> None:
    with pytest.raises(CaptureUnsupported, match=told), capture_routing(model_of()):
        model_of().generate(PROMPTS[1:], **GREEDY, **options)


@contextmanager
def paged() -> Iterator[PreTrainedModel]:
    """A model whose attention a continuous batch can use."""
    model = copy.deepcopy(model_of())
    model.set_attn_implementation("sdpa")
    yield model


def test_a_continuous_batch_is_replayed_by_request() -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24, 25, 26]]
    with paged() as model:
        with capture_routing(model) as routing:
            tokens = generate_batch(model, prompts)  # the longest prompt in two parts
        trace = routing.trace()
        with replay_routing(model, trace), capture_routing(model) as again:
            assert generate_batch(model, prompts) == tokens
        assert_same(again.trace(), trace)
        assert trace.tokens is not None
        assert sorted(map(str, trace.tokens.requests)) == ["req_0", "req_1", "req_2"]
        order = [str(name) for name in trace.tokens.requests]
        lengths = [len(prompts[int(name[-1])]) + NEW - 1 for name in order]
        assert pairs(trace) == [(n, p) for n, size in enumerate(lengths) for p in range(size)]
        # A trainer's batch: rows in its own order, padded on the right.
        rows = [prompts[n] + tokens[n][:-1] for n in range(3)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        names = [f"req_{n}" for n in range(3)]
        model = turned()
        with (
            replay_routing(model, trace, sequences=names),
            capture_routing(model) as trained,
            torch.no_grad(),
        ):
            model(ids, attention_mask=mask)
        for row, name in enumerate(names):
            found = ids_at(trained.trace(), row, range(len(rows[row])))
            expected = ids_at(trace, order.index(name), range(len(rows[row])))
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        with (
            pytest.raises(InputError, match=r"got 'req_\d' there\. Say which sequences"),
            replay_routing(model, trace),
        ):
            model(ids, attention_mask=mask)


def test_a_prefix_that_another_request_has_run_is_refused() -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11]]
    told = r"the request 'req_\d' must run its tokens itself; got position 4 first"
    with (
        paged() as model,
        pytest.raises(InputError, match=told),
        capture_routing(model),
    ):
        generate_batch(model, prompts, max_requests_per_batch=1)


# ----------------------------------------------------------------------------------- one forward


def test_a_trainers_forward_over_whole_sequences_is_forced() -> None:
    trace, tokens = recorded()
    model = turned()
    ids, mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
    mask[0, :2] = 0
    with replay_routing(model, trace), capture_routing(model) as routing, torch.no_grad():
        model(ids, attention_mask=mask)
    assert_same(routing.trace(), trace)
    packed = torch.cat([ids[:1, 2:], ids[1:]], 1)
    positions = torch.cat([torch.arange(6), torch.arange(8)]).unsqueeze(0)
    with replay_routing(model, trace), capture_routing(model) as one_row, torch.no_grad():
        model(packed, position_ids=positions, use_cache=False)
    assert pairs(one_row.trace()) == [pair for pair in pairs(trace) if pair[1] >= 0]
    told = "the token at position 8 of sequence 1 must have been recorded"
    with pytest.raises(InputError, match=told), replay_routing(model, trace, sequences=[1]):
        model(tokens[1:], attention_mask=torch.ones_like(tokens[1:]))
    told = "sequences must name one for each"
    with pytest.raises(InputError, match=told), replay_routing(model, trace, sequences=[1]):
        model(ids, attention_mask=mask)


def test_forced_experts_are_the_layer_computed_by_hand() -> None:
    case = tiny_model("qwen3_moe")
    model, name = model_of(), "model.layers.2.mlp"
    ids = {path: torch.rand(5, 8).argsort(-1)[:, :3].byte() for path in observed_layers(model)}
    table = TokenTable(torch.zeros(5).int(), torch.arange(5).int(), (None,))
    trace = RoutingTrace({path: LayerTrace(chosen, 8) for path, chosen in ids.items()}, table)
    seen: list[Any] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    with replay_routing(model, trace), torch.no_grad():
        model(PROMPTS[1:])
    hook.remove()
    rows, output = seen[0][0].double(), seen[1][0]
    block: Any = case.model.get_submodule(name)
    assert not case.model.config.norm_topk_prob
    scores = (rows @ block.gate.weight.double().T).softmax(-1)
    expected = torch.zeros_like(rows)
    for token in range(5):
        chosen = ids[name][token].long()
        for expert, weight in zip(chosen.tolist(), scores[token, chosen], strict=True):
            gate, up = (block.experts.gate_up_proj[expert].double() @ rows[token]).chunk(2)
            down = block.experts.down_proj[expert].double()
            expected[token] += weight * (down @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-5)


def loss_of(model: PreTrainedModel, mask: Tensor, ids: Tensor) -> Tensor:
    loss: Tensor = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    return loss


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_flow_through_the_weights_of_forced_experts(is_checkpointed: bool) -> None:
    trace, tokens = recorded()
    ids, mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
    mask[0, :2] = 0
    model = turned().train()
    expected = turned().train()
    replayed = {name: layer.topk_ids for name, layer in trace.layers.items()}
    for name, block in observed_layers(expected).items():  # the long way: ids in the rows' order
        block.sources = (  # type: ignore[assignment]
            lambda found, count, name=name: type(found)(replayed_ids=replayed[name]),
        )
    loss_of(expected, mask, ids).backward()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    with replay_routing(model, trace), capture_routing(model) as routing:
        loss_of(model, mask, ids).backward()
    assert_same(routing.trace(), trace)
    gates = 0
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7), name
        gates += name.endswith("gate.weight") and bool(one.grad.any())
    assert gates == len(trace.layers)


def test_recomputed_activations_must_be_of_the_last_forward() -> None:
    trace, tokens = recorded()
    model = turned().train()
    model.activation_checkpointing_enable()
    ids, mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
    mask[0, :2] = 0
    names = [0, 1, 0, 1]
    with replay_routing(model, trace, sequences=names):
        for _ in range(2):
            loss_of(model, mask, ids).backward()
    with replay_routing(model, trace), capture_routing(model) as routing:  # all of it again
        inputs = {"attention_mask": mask, "labels": ids, "use_cache": False}
        checkpoint(lambda: model(ids, **inputs).loss, use_reentrant=False).backward()
    assert_same(routing.trace(), trace)
    told = "must be those of the last forward; got 2 forwards"
    with pytest.raises(InputError, match=told), replay_routing(model, trace, sequences=names):
        (loss_of(model, mask, ids) + loss_of(model, mask, ids)).backward()


# ------------------------------------------------------------------------------------------ errors


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    trace, _ = recorded()
    experts_only = model_of("ernie4_5_moe")
    with (
        pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.experts \(only its"),
        replay_routing(experts_only, trace),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"routing \(int\) must be"),
        replay_routing(experts_only, 3),
    ):
        pass
    name, layer = next(iter(trace.layers.items()))
    less = {path: one for path, one in trace.layers.items() if path != name}
    narrow = {**trace.layers, name: LayerTrace(layer.ids[:, :2], 8)}
    few = {**trace.layers, name: LayerTrace(layer.ids.clamp(max=6), 7)}
    changed: dict[str, RoutingTrace] = {
        rf"only one of the two has {name}": RoutingTrace(less, trace.tokens),
        r"\(\(8, 0, 2\)\) must be those of the layer; got \(8, 0, 3\)": RoutingTrace(
            narrow, trace.tokens
        ),
        r"\(\(7, 0, 3\)\) must be": RoutingTrace(few, trace.tokens),
        "must say which token each row is": RoutingTrace(trace.layers),
    }
    for told, wrong in changed.items():
        with pytest.raises(InputError, match=told), replay_routing(model_of(), wrong):
            pass
    with (
        pytest.raises(InputError, match=r"got 'req_0', which is 0 of 2"),
        replay_routing(model_of(), trace, sequences=["req_0"]),
    ):
        pass
    assert all(not block.sources for block in observed_layers(model_of()).values())


def test_a_layer_that_was_never_called_is_not_guessed() -> None:
    trace, _ = recorded()
    name, layer = next(iter(trace.layers.items()))
    layers = {**trace.layers, name: LayerTrace(layer.ids[:0], 8)}
    with (
        pytest.raises(InputError, match="no call of it in the trace"),
        replay_routing(model_of(), RoutingTrace(layers, trace.tokens)),
    ):
        generate(model_of())


def test_two_replays_at_once_are_refused() -> None:
    trace, _ = recorded()
    with (
        pytest.raises(InputError, match="got two replays at once"),
        replay_routing(model_of(), trace),
        replay_routing(model_of(), trace),
    ):
        generate(model_of())


def test_calls_that_are_no_forward_of_the_model() -> None:
    model, (trace, _) = model_of(), recorded()
    layer = next(iter(observed_layers(model).values()))
    rows = torch.zeros(1, 2, 64)
    with pytest.raises(CaptureUnsupported, match="got no forward"), capture_routing(model):
        layer(rows)
    with pytest.raises(InputError, match="got 2 for no forward"), replay_routing(model, trace):
        layer(rows)
    told = r"called for all tokens of the model's forwards \(\d+\), and for no others; got \d+"
    with pytest.raises(InputError, match=told), capture_routing(model):
        generate(model)
        layer(rows)


def test_of_a_token_that_ran_again_the_last_choice_counts() -> None:
    with torch.no_grad(), capture_routing(model_of()) as routing:
        model_of()(PROMPTS[1:], use_cache=False)
    routing._forwards *= 2  # as of a preempted request
    again = torch.tensor([[7, 6, 5]]).repeat(5, 1)
    for recorder in routing._recorders.values():
        recorder(again, torch.ones(5, 3))
    trace = routing.trace()
    assert pairs(trace) == [(0, position) for position in range(5)]
    assert all(ids.equal(again.int()) for ids in ids_at(trace, 0, range(5)))


def test_a_forward_that_fails_leaves_nothing() -> None:
    model, (trace, _) = model_of(), recorded()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with capture_routing(model) as routing:
        hook = model.get_submodule("model.layers.2").register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            generate(model)
        hook.remove()
        generate(model)
    assert_same(routing.trace(), trace)


# -------------------------------------------------------------------------------------------- file


def test_a_saved_recording_is_replayed_from_its_file(tmp_path: Path) -> None:
    model, path = model_of(), tmp_path / "routing.safetensors"
    with capture_routing(model) as routing:
        _, logits = generate(model)
    routing.save(path)
    assert_same(RoutingTrace.load(path), routing.trace())
    with replay_routing(model, path):
        assert generate(model)[1].equal(logits)


Tensors, Metadata = dict[str, Tensor], dict[str, str]
BAD_TOKENS: dict[str, tuple[Callable[[Tensors, Metadata], Any], str]] = {
    "a token less": (
        lambda t, m: t.update({k: t[k][:-1] for k in ("tokens.sequence", "tokens.position")}),
        r"a row for each of the \d+ tokens, or none",
    ),
    "one column shorter": (
        lambda t, m: t.update({"tokens.position": t["tokens.position"][:-1]}),
        "the position of tokens must be int32, one number a row",
    ),
    "other numbers": (
        lambda t, m: t.update({"tokens.sequence": t["tokens.sequence"].long()}),
        "the sequence of tokens must be int32",
    ),
    "a sequence too many": (
        lambda t, m: m.update(requests=json.dumps([None])),
        r"must be in \[0, 1\)",
    ),
    "a negative sequence": (
        lambda t, m: t.update({"tokens.sequence": t["tokens.sequence"] - 1}),
        r"got -1 to 0",
    ),
    "another order": (
        lambda t, m: t.update({"tokens.position": t["tokens.position"].flip(0)}),
        "in rising order of sequence and position",
    ),
    "no requests": (lambda t, m: m.pop("requests"), "one tensor for each layer it names"),
    "no positions": (lambda t, m: t.pop("tokens.position"), "the two of its tokens"),
    "requests that are numbers": (
        lambda t, m: m.update(requests="[0, 1]"),
        "must list the requests of its sequences",
    ),
    "requests that are no list": (
        lambda t, m: m.update(requests="{"),
        "must list the requests of its sequences",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_are_damaged_are_a_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    recorded()[0].save(path)
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change, message = BAD_TOKENS[name]
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load(path)


# ------------------------------------------------------------------------------------ other models


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        "longcat_flash",
        "gpt_oss",
        "llama4",
        "dbrx",
        "glm4_moe",
        "minimax_m2",
        "afmoe",
    ],
)
def test_families_are_replayed_to_the_bit(family: str) -> None:
    model = model_of(family)
    with capture_routing(model) as routing:
        tokens, logits = generate(model)
    with replay_routing(model, routing), capture_routing(model) as again:
        replayed = generate(model)
    assert replayed[0].equal(tokens) and replayed[1].equal(logits)
    assert_same(again.trace(), routing.trace())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ernie4_5_moe", "jetmoe"])
def test_routers_of_the_family_are_recorded(family: str) -> None:
    model = model_of(family)
    with capture_routing(model) as routing:
        generate(model)
    with capture_layers(observed_layers(model)) as layers:
        generate(model)
    for name, layer in layers.trace().layers.items():
        found = routing.trace().layers[name]
        assert found.counts.equal(layer.counts) and found.num_tokens == 16


@pytest.mark.slow
def test_ids_stay_logical_on_ranks_that_balance() -> None:
    case = tiny_model("qwen3_moe")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    eplb = EplbConfig(interval=1, policy="global", min_gain=0.0)
    parallel = ParallelConfig(ep_size=2, num_redundant_experts=2, eplb=eplb)
    whole = convert(copy.deepcopy(case.model), kernel="reference")

    def traced(model: PreTrainedModel) -> list[RoutingTrace]:
        found = []
        for _ in range(4):
            with capture_routing(model) as routing:
                case.output(model)
            found.append(routing.trace())
        return found

    def work(transport: Transport) -> tuple[list[RoutingTrace], int]:
        ranks = ExpertParallel.over(parallel, transport)
        model = convert(models[transport.rank], kernel="reference", parallel=ranks)
        found = traced(model)
        balancer = find_balancer(model)
        assert balancer is not None
        while balancer.activity is Activity.PLANNING:
            balancer.step()
        with replay_routing(model, found[0]), capture_routing(model) as again:
            case.output(model)
        return [*found, again.trace()], balancer.report().num_plans

    expected = traced(whole)[0]
    for traces, num_plans in virtual_ranks.run(2, work):
        assert num_plans > 0
        for trace in traces:
            assert_same(trace, expected)


@pytest.mark.slow
def test_forwards_for_other_ranks_are_nobodys_tokens() -> None:
    case = tiny_model("qwen3_moe")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    parallel = ParallelConfig(ep_size=2, tokens=TokensHeld.OWN)
    rows = [PROMPTS[1:], PROMPTS[1:, :2]]

    def work(transport: Transport) -> list[RoutingTrace]:
        ranks = ExpertParallel.over(parallel, transport)
        model = convert(models[transport.rank], kernel="reference", parallel=ranks)
        found = []
        with torch.no_grad(), capture_routing(model) as routing:
            for _ in range(1 + transport.rank):
                model(rows[transport.rank], use_cache=False)
            finish_requests(model)
        found.append(routing.trace())
        with torch.no_grad(), replay_routing(model, routing), capture_routing(model) as again:
            for _ in range(1 + transport.rank):
                model(rows[transport.rank], use_cache=False)
            finish_requests(model)
        return [*found, again.trace()]

    for rank, (trace, again) in enumerate(virtual_ranks.run(2, work)):
        assert len(pairs(trace)) == (5, 4)[rank]
        assert_same(again, trace)


@pytest.mark.slow
def test_compiled_forwards_are_recorded_or_refused() -> None:
    model = model_of()
    ids = PROMPTS[1:]
    with torch.no_grad(), capture_routing(model) as expected:
        model(ids, use_cache=False)
    for is_full in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=is_full)
        with torch.no_grad():
            compiled(ids, use_cache=False)
            if is_full:
                with (
                    pytest.raises(Exception, match=r"Observed exception|torch\.compile"),
                    capture_routing(model),
                ):
                    compiled(ids, use_cache=False)
            else:
                with capture_routing(model) as routing:
                    compiled(ids, use_cache=False)
                assert_same(routing.trace(), expected.trace())
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_request_that_is_preempted_stays_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    preempted: list[str] = []
    begin_again = RequestState.create_equivalent_initial_request

    def note(state: RequestState) -> RequestState:
        preempted.append(state.request_id)
        return begin_again(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", note)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    with paged() as model:
        with capture_routing(model) as routing:
            options = {"num_blocks": 6, "allow_block_sharing": False, "safety_margin": 0.0}
            tokens = generate_batch(model, prompts, 12, **options)
        trace = routing.trace()
        assert preempted
        assert len(pairs(trace)) == 3 * (5 + 12 - 1)
        rows = torch.tensor([row + new[:-1] for row, new in zip(prompts, tokens, strict=True)])
        with torch.no_grad(), capture_routing(model) as whole:
            model(rows)
        assert trace.tokens is not None
        for number, name in enumerate(trace.tokens.requests):
            found = ids_at(trace, number, range(5 + 12 - 1))
            expected = ids_at(whole.trace(), int(str(name)[-1]), range(5 + 12 - 1))
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_a_cache_that_is_cropped_is_refused() -> None:
    model, cache = model_of(), DynamicCache(config=model_of().config)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"behind 3 tokens in a cache .* got 5 of that cache"),
        capture_routing(model),
    ):
        model(PROMPTS[1:], past_key_values=cache)
        cache.crop(-2)
        model(PROMPTS[1:, 3:4], past_key_values=cache)
