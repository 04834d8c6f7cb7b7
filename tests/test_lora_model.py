"""Adapters on models: equal to PEFT and to merged weights, row by row, wherever experts are."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import virtual_ranks
from families import TinyCase, tiny_model
from lora_files import FUSED, PREFIX, Trained, by_peft, changed, train, write
from tolerances import relative_error
from torch import Tensor

import mixtura
from mixtura.config import DispatcherName, ParallelConfig, TokensHeld
from mixtura.errors import CheckpointError, InputError, ParallelError, UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf.linears import PackedLinear
from mixtura.hf.parallel import finish_requests
from mixtura.parallel import ExpertParallel, Transport
from mixtura.quant.matrix import dequantize

QWEN = {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*FUSED, "mlp.gate.weight"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN,
    "gpt_oss": {
        "target_modules": ["q_proj"],
        "target_parameters": [*FUSED, "router.weight"],
    },
    "mixtral": {"target_modules": ["v_proj"], "target_parameters": FUSED},
    "deepseek_v3": {
        "target_modules": ["kv_b_proj"],
        "target_parameters": [*FUSED[1:], "mlp.gate.weight"],
    },
    "olmoe": {"target_modules": ["q_proj"], "target_parameters": FUSED},
    "llama4": {
        "target_modules": ["q_proj", "shared_expert.up_proj"],
        "target_parameters": [*FUSED, "router.weight"],
    },
    "qwen3_5_moe": {
        "target_modules": ["q_proj", "in_proj_qkv", "shared_expert_gate"],
        "target_parameters": FUSED,
    },
    "step3p7": {"target_modules": ["q_proj"], "target_parameters": FUSED},
    "longcat_flash": {"target_modules": ["q_b_proj"], "target_parameters": FUSED},
    "jetmoe": {
        "target_modules": ["kv_proj"],
        "target_parameters": ["mlp.input_linear.weight", "mlp.output_linear.weight"],
    },
    "nemotron_h": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.up_proj", "experts.down_proj"],
    },
    "ernie4_5_moe": {"target_modules": ["q_proj"], "target_parameters": FUSED},
}
QUICK = ("qwen3_moe", "gpt_oss", "ernie4_5_moe")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def logits(case: TinyCase, model: Any) -> Tensor:
    with torch.no_grad():
        return case.output(model)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """Two adapters of one model, of different ranks, scalings and factors."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return (
        train("qwen3_moe", first, seed=1, **QWEN),
        train("qwen3_moe", second, seed=2, rank=5, use_rslora=True, **QWEN),
    )


def loaded(pair: tuple[Trained, Trained], **options: Any) -> tuple[TinyCase, Any]:
    """A model with both, called "a" and "b"."""
    case = tiny_model("qwen3_moe")
    model = mixtura.convert(case.model, **options)
    for name, one in zip("ab", pair, strict=True):
        assert mixtura.load_adapter(model, one.directory, name) == name
    return case, model


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_the_model_with_an_adapter_is_that_of_peft(family, tmp_path):
    made = train(family, tmp_path, **FAMILIES[family])
    case = made.case
    stock = logits(case, case.model)
    model = mixtura.convert(case.model)
    before = logits(case, model)
    mixtura.load_adapter(model, tmp_path, "one")
    found = logits(case, model)
    assert relative_error(stock, made.output) > 0.2, "the adapter does next to nothing"
    # Families whose layers add up rounding have as much without an adapter.
    torch.testing.assert_close(found, made.output, atol=2e-5, rtol=2e-5)
    mixtura.select_adapters(model, [None, "one"])
    mixed = logits(case, model)
    close(mixed[0], before[0])
    torch.testing.assert_close(mixed[1], made.output[1], atol=2e-5, rtol=2e-5)
    mixtura.unload_adapter(model, "one")
    assert torch.equal(logits(case, model), before)


def test_shared_experts_and_their_gate(tmp_path):
    """With Transformers 5, PEFT takes these names for routed experts'; so merged by hand."""
    case = tiny_model("qwen2_moe")
    path = "model.layers.1.mlp"
    sizes = {"shared_expert.gate_proj": (64, 40), "shared_expert.down_proj": (40, 64)}
    sizes["shared_expert_gate"] = (64, 1)
    tensors = {}
    for name, (num_in, num_out) in sizes.items():
        tensors[f"{PREFIX}{path}.{name}.lora_A.weight"] = torch.randn(2, num_in)
        tensors[f"{PREFIX}{path}.{name}.lora_B.weight"] = torch.randn(num_out, 2)
    source = write(tmp_path, tensors)
    merged = copy.deepcopy(case.model)
    for name in sizes:
        a, b = (tensors[f"{PREFIX}{path}.{name}.lora_{side}.weight"] for side in "AB")
        merged.get_submodule(f"{path}.{name}").weight.data += 1.5 * b @ a
    expected = logits(case, merged)
    for options in ({"max_rows_per_pass": 5}, {}):
        model = mixtura.convert(copy.deepcopy(case.model), **options)
        before = logits(case, model)
        mixtura.load_adapter(model, source, "shared")
        found = logits(case, model)
        assert relative_error(before, expected) > 0.05
        close(found, expected)
    mixtura.select_adapters(model, ["shared", None])
    mixed = logits(case, model)
    close(mixed[0], expected[0])
    close(mixed[1], before[1])


def test_rows_of_chunks_cannot_be_told_apart_in_shared_experts(tmp_path):
    case = tiny_model("qwen2_moe")
    name = f"{PREFIX}model.layers.1.mlp.shared_expert.up_proj.lora_"
    source = write(
        tmp_path, {f"{name}A.weight": torch.randn(2, 64), f"{name}B.weight": torch.randn(40, 2)}
    )
    model = mixtura.convert(case.model, max_rows_per_pass=5)
    mixtura.load_adapter(model, source, "shared")
    mixtura.select_adapters(model, [None, "shared"])
    with pytest.raises(InputError, match=r"rows .* must be the tokens of the batch"):
        logits(case, model)


def test_deterministic_rows_with_an_adapter_do_not_depend_on_the_batch(tmp_path):
    case = tiny_model("qwen2_moe")
    paths = ("mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "self_attn.o_proj", "mlp.gate")
    tensors = {}
    model = mixtura.convert(case.model, deterministic=True)
    for path in paths:
        rows, columns = model.get_submodule(f"model.layers.1.{path}").weight.shape
        name = f"{PREFIX}model.layers.1.{path}.lora_"
        tensors[f"{name}A.weight"] = torch.randn(2, columns)
        tensors[f"{name}B.weight"] = torch.randn(rows, 2)
    before = logits(case, model)
    mixtura.load_adapter(model, write(tmp_path, tensors), "shared")
    mixtura.select_adapters(model, ["shared", None])
    found = logits(case, model)
    assert torch.equal(found[1], before[1])
    mixtura.select_adapters(model, "shared")
    with torch.no_grad():
        alone = model(case.inputs["input_ids"][:1]).logits
    assert torch.equal(alone[0], found[0])
    assert not torch.allclose(found[0], before[0], atol=1e-3)


def test_a_map_that_a_mixer_reads_past_the_layer_takes_no_adapter(tmp_path):
    case = tiny_model("nemotron_h")
    model = mixtura.convert(case.model)
    path = next(n for n, m in model.named_modules() if n.endswith(".mixer.out_proj"))
    rows, columns = model.get_submodule(path).weight.shape
    name = f"{PREFIX}{path}.lora_"
    tensors = {f"{name}A.weight": torch.randn(2, columns), f"{name}B.weight": torch.randn(rows, 2)}
    with pytest.raises(UnsupportedModel, match=rf"^{re.escape(name)}A.weight .*do not call it"):
        mixtura.load_adapter(model, write(tmp_path, tensors), "mixer")


def test_a_map_that_is_called_by_keyword_has_its_adapter(pair):
    _, model = loaded(pair)
    maps = [m for n, m in model.named_modules() if n.endswith("_proj") and m._forward_hooks]
    assert maps
    rows = torch.randn(3, maps[0].in_features)
    found = maps[0](input=rows)
    assert torch.equal(found, maps[0](rows))
    assert not torch.allclose(found, maps[0].forward(rows), atol=1e-3)


def test_rows_have_adapters_of_their_own(pair):
    case, model = loaded(pair)
    first, second = (one.output for one in pair)
    close(logits(case, model), first)  # the first that is loaded is chosen
    with mixtura.select_adapters(model, "b"):
        close(logits(case, model), second)
    close(logits(case, model), first)
    mixtura.select_adapters(model, ["b", "a"])
    mixed = logits(case, model)
    close(mixed[0], second[0])
    close(mixed[1], first[1])
    numbers = torch.tensor([[1] * 9, [0] * 9])
    mixtura.select_adapters(model, numbers)
    assert torch.equal(logits(case, model), mixed)
    mixtura.select_adapters(model, numbers.flatten())
    assert torch.equal(logits(case, model), mixed)


def test_tokens_of_one_sequence_have_adapters_of_their_own(pair):
    """Tokens before a change are those of the adapter before it; attention looks back."""
    case, model = loaded(pair)
    numbers = torch.zeros(2, 9, dtype=torch.long)
    numbers[:, 5:] = 1
    mixtura.select_adapters(model, numbers)
    found = logits(case, model)
    close(found[:, :5], pair[0].output[:, :5])
    assert not torch.allclose(found[:, 5:], pair[1].output[:, 5:], atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [{"max_rows_per_pass": 5}, pytest.param({"deterministic": True}, marks=pytest.mark.slow)],
)
def test_mixed_batches_in_other_runs(pair, options):
    case, model = loaded(pair, **options)
    mixtura.select_adapters(model, ["b", None])
    found = logits(case, model)
    close(found[0], pair[1].output[0])
    mixtura.select_adapters(model, None)
    close(found[1], logits(case, model)[1])


def test_generation_with_an_adapter_for_each_row(pair):
    case, model = loaded(pair)
    ids = case.inputs["input_ids"]

    def write_on(ids: Tensor, **options: Any) -> Tensor:
        return model.generate(ids, max_new_tokens=5, do_sample=False, **options)

    mixtura.select_adapters(model, ["b", "a"])
    both = write_on(ids)
    assert torch.equal(write_on(ids, cache_implementation="static"), both)
    with pytest.raises(InputError, match=r"4 sequences of 9 tokens.*got 2\. Choose 4"):
        write_on(ids, num_beams=2)
    for row, name in enumerate("ba"):
        mixtura.select_adapters(model, name)
        assert torch.equal(write_on(ids[row : row + 1])[0], both[row])
    assert not torch.equal(both[0], both[1])


def test_copies_pickles_and_moves_take_adapters_along(pair):
    case, model = loaded(pair)
    mixtura.select_adapters(model, ["b", "a"])
    found = logits(case, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(logits(case, other), found)
    other = copy.deepcopy(model)
    mixtura.select_adapters(other, "a")
    assert torch.equal(logits(case, model), found)


def test_the_checkpoint_has_no_adapter(pair):
    stock = tiny_model("qwen3_moe").model
    _, model = loaded(pair)
    state = model.state_dict()
    assert state.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_unloading_renumbers_and_leaves_nothing(pair):
    case = tiny_model("qwen3_moe")
    stock = mixtura.convert(copy.deepcopy(case.model))
    _, model = loaded(pair)
    mixtura.select_adapters(model, ["a", "b"])
    mixtura.unload_adapter(model, "a")
    assert mixtura.adapter_names(model) == ("b",)
    found = logits(case, model)
    close(found[0], logits(case, stock)[0])
    close(found[1], pair[1].output[1])
    mixtura.unload_adapter(model, "b")
    assert torch.equal(logits(case, model), logits(case, stock))
    names = [{name for name, _ in one.named_modules()} for one in (model, stock)]
    assert names[0] == names[1]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InputError, match="must have an adapter loaded"):
        mixtura.select_adapters(model, None)


@pytest.mark.slow
def test_compiled_models_see_what_is_loaded_and_chosen(pair):
    case = tiny_model("qwen3_moe")
    model = mixtura.convert(case.model)
    before = logits(case, model)
    compiled = torch.compile(model, backend="eager")
    close(logits(case, compiled), before)
    mixtura.load_adapter(model, pair[0].directory, "a")
    close(logits(case, compiled), pair[0].output)
    mixtura.load_adapter(model, pair[1].directory, "b")
    for first, second in ("ba", "ab"):
        mixtura.select_adapters(model, [first, second])
        found = logits(case, compiled)
        close(found[0], pair["ab".index(first)].output[0])
        close(found[1], pair["ab".index(second)].output[1])
    mixtura.select_adapters(model, None)
    close(logits(case, compiled), before)
    mixtura.unload_adapter(model, "a")
    mixtura.select_adapters(model, "b")
    close(logits(case, compiled), pair[1].output)


def with_packed_weights(case: TinyCase, model: Any) -> TinyCase:
    """The dense model that a packed one stands for."""
    for name, module in model.named_modules():
        own: Any = case.model.get_submodule(name)
        if isinstance(module, PackedExperts):
            weights = module.expert_weights
            own.gate_up_proj.data = dequantize(weights.gate_up_proj, torch.float32)
            own.down_proj.data = dequantize(weights.down_proj, torch.float32)
        elif isinstance(module, PackedLinear):
            own.weight.data = module.weight.float()
    return case


@pytest.mark.parametrize(
    "formats",
    [
        {"weights": "int8", "linears": "int8"},
        pytest.param({"weights": "int4-g32"}, marks=pytest.mark.slow),
        pytest.param({"weights": "fp8-block"}, marks=pytest.mark.slow),
        pytest.param({"weights": "mxfp4", "linears": "int4-g32"}, marks=pytest.mark.slow),
    ],
)
def test_packed_weights_with_an_adapter_are_those_merged(formats, pair, tmp_path):
    tiny_model("qwen3_moe").model.save_pretrained(tmp_path)
    model = mixtura.from_pretrained(tmp_path, dtype=torch.float32, **formats)
    case = with_packed_weights(tiny_model("qwen3_moe"), model)
    alone = logits(case, model)
    expected = by_peft(case, pair[1].directory)
    mixtura.load_adapter(model, pair[1].directory, "b")
    assert relative_error(alone, expected) > 0.2
    assert relative_error(logits(case, model), expected) < 0.03  # packed rows are rounded
    mixtura.unload_adapter(model, "b")
    assert torch.equal(logits(case, model), alone)


@pytest.mark.slow
def test_in_16_bits(pair):
    case = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    expected = by_peft(tiny_model("qwen3_moe", dtype=torch.bfloat16), pair[0].directory)
    model = mixtura.convert(case.model)
    mixtura.load_adapter(model, pair[0].directory, "a")
    assert relative_error(logits(case, model).float(), expected.float()) < 0.06
    assert relative_error(expected.float(), pair[0].output) < 0.06


def over_ranks(work: Any, parallel: ParallelConfig, **options: Any) -> list[Any]:
    """What every rank makes of a model of its own, its experts spread."""
    models = [tiny_model("qwen3_moe").model for _ in range(parallel.num_ranks)]

    def run(transport: Transport) -> Any:
        ranks = ExpertParallel.over(parallel, transport)
        model = mixtura.convert(models[transport.rank], parallel=ranks, **options)
        return work(model, transport.rank)

    return virtual_ranks.run(parallel.num_ranks, run)


@pytest.mark.parametrize(
    "dispatcher",
    [
        DispatcherName.ALL_REDUCE,
        pytest.param(DispatcherName.ALL_GATHER, marks=pytest.mark.slow),
        pytest.param(DispatcherName.ALL_TO_ALL, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_a_batch(pair, dispatcher):
    case = tiny_model("qwen3_moe")

    def work(model: Any, rank: int) -> Tensor:
        for name, one in zip("ab", pair, strict=True):
            mixtura.load_adapter(model, one.directory, name)
        mixtura.select_adapters(model, ["b", "a"])
        return logits(case, model)

    parallel = ParallelConfig(ep_size=2, dispatcher=dispatcher)
    for found in over_ranks(work, parallel):
        close(found[0], pair[1].output[0])
        close(found[1], pair[0].output[1])


@pytest.mark.slow
def test_ranks_with_cuts_of_experts(pair):
    case = tiny_model("qwen3_moe")

    def work(model: Any, rank: int) -> Tensor:
        mixtura.load_adapter(model, pair[1].directory, "b")
        return logits(case, model)

    for found in over_ranks(work, ParallelConfig(ep_size=2, tp_size=2)):
        close(found, pair[1].output)


@pytest.mark.slow
def test_ranks_run_along_without_adapters_for_nobodys_tokens(pair):
    rows = tiny_model("qwen3_moe").inputs["input_ids"]

    def work(model: Any, rank: int) -> Tensor:
        for name, one in zip("ab", pair, strict=True):
            mixtura.load_adapter(model, one.directory, name)
        mixtura.select_adapters(model, ["b", "a"])
        with torch.no_grad():
            found = model(rows).logits if rank == 0 else None
        finish_requests(model)
        return found

    parallel = ParallelConfig(
        ep_size=2, tokens=TokensHeld.OWN, dispatcher=DispatcherName.ALL_TO_ALL
    )
    found = over_ranks(work, parallel)[0]
    close(found[0], pair[1].output[0])
    close(found[1], pair[0].output[1])


def test_ranks_with_different_adapters_are_told(pair):
    def work(model: Any, rank: int) -> Any:
        with pytest.raises(ParallelError, match=r"tensors of a of rank 1 .* must be that of rank"):
            mixtura.load_adapter(model, pair[rank].directory, "a")
        return mixtura.adapter_names(model), [
            module.has_lora for module in model.modules() if isinstance(module, PackedExperts)
        ]

    for names, has_lora in over_ranks(work, ParallelConfig(ep_size=2)):
        assert names == () and not any(has_lora)


def test_names_are_checked(pair):
    case, model = loaded(pair)
    before = logits(case, model)
    wrong = dict.fromkeys(["", "../x", "a b", "-a", "x" * 129], "must be letters, digits")
    for name, message in {"a": "^an adapter's name .'a'. must be free", **wrong}.items():
        with pytest.raises(InputError, match=message):
            mixtura.load_adapter(model, pair[0].directory, name)
    assert mixtura.adapter_names(model) == ("a", "b")
    assert torch.equal(logits(case, model), before)


@pytest.mark.parametrize("choice", ["b", ["b", None], torch.tensor([[1] * 9, [-1] * 9])])
def test_what_is_restored_is_the_same_adapter_after_another_is_unloaded(pair, choice):
    case, model = loaded(pair)
    mixtura.load_adapter(model, pair[0].directory, "c")  # has the number of "b" then
    mixtura.select_adapters(model, choice)
    before = logits(case, model)
    with mixtura.select_adapters(model, "a"):
        mixtura.unload_adapter(model, "a")
    close(logits(case, model), before)
    with mixtura.select_adapters(model, None):
        none = logits(case, model)
        mixtura.unload_adapter(model, "b")
    close(logits(case, model), none)


def test_what_is_loaded_in_inference_mode_can_be_trained_past(pair):
    case = tiny_model("qwen3_moe")
    model = mixtura.convert(case.model)
    with torch.inference_mode():
        mixtura.load_adapter(model, pair[0].directory, "a")
        logits(case, model)
    found = case.output(model)
    found.sum().backward()
    close(found, pair[0].output)


def test_numbers_that_were_chosen_are_a_copy(pair):
    case, model = loaded(pair)
    numbers = torch.zeros(18, dtype=torch.int32)
    mixtura.select_adapters(model, numbers)
    before = logits(case, model)
    numbers.fill_(1)
    assert torch.equal(logits(case, model), before)


def test_what_is_chosen_is_checked(pair):
    case, model = loaded(pair)
    for wrong, message in [
        ("c", r"^adapter .'c'. must be one that is loaded; got a, b"),
        (["a", "c"], "must be one that is loaded"),
        (3, r"^adapters .3. must be a name, None, a list of these"),
        (torch.tensor([0.5]), "must be whole ones"),
        (torch.tensor([[0, 2]]), r"must be in \[-1, 2\).*got 0 to 2"),
    ]:
        with pytest.raises(InputError, match=message):
            mixtura.select_adapters(model, wrong)  # type: ignore[arg-type]
    close(logits(case, model), pair[0].output)
    mixtura.select_adapters(model, ["a"])
    with pytest.raises(InputError, match=r"2 sequences of 9 tokens.*got 1\. Choose 2"):
        logits(case, model)
    mixtura.select_adapters(model, torch.zeros(5, dtype=torch.long))
    with pytest.raises(InputError, match=r"for each token; got 5\. Choose 18"):
        logits(case, model)


def test_an_error_leaves_the_model_as_it_was(pair, tmp_path):
    case = tiny_model("qwen3_moe")
    model = mixtura.convert(case.model)
    before = logits(case, model)

    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in reversed(tensors) if "o_proj.lora_B" in name)
        tensors[name] = tensors[name][:-1].contiguous()

    with pytest.raises(CheckpointError, match=r"o_proj\.lora_B"):
        mixtura.load_adapter(model, changed(pair[0].directory, tmp_path, spoil), "a")
    assert torch.equal(logits(case, model), before)
    assert mixtura.adapter_names(model) == ()
    mixtura.load_adapter(model, pair[0].directory, "a")
    with pytest.raises(CheckpointError, match=r"o_proj\.lora_B"):
        mixtura.load_adapter(model, tmp_path, "b")
    close(logits(case, model), pair[0].output)


def test_a_model_is_converted_before_adapters_are_loaded(pair):
    case = tiny_model("qwen3_moe")
    with pytest.raises(UnsupportedModel, match="Convert it first"):
        mixtura.load_adapter(case.model, pair[0].directory)
    model = mixtura.convert(case.model)
    mixtura.load_adapter(model, pair[0].directory, "a")
    with pytest.raises(InputError, match=r"before adapters are loaded; got a\. Unload"):
        mixtura.convert(model, deterministic=True)


def test_the_head_and_its_copy(tmp_path):
    made = train("qwen3_moe", tmp_path / "whole", target_modules=["lm_head"])
    model = mixtura.convert(made.case.model)
    mixtura.load_adapter(model, made.directory)
    assert mixtura.adapter_names(model) == ("whole",)
    close(logits(made.case, model), made.output)

    def other_head(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}lm_head.base_layer.weight"] += 1

    source = changed(made.directory, tmp_path / "other", other_head)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.base_layer\.weight .* another one"):
        mixtura.load_adapter(model, source, "other")


def test_a_router_that_is_not_ours_is_refused(tmp_path):
    made = train("ernie4_5_moe", tmp_path, target_parameters=["mlp.gate.weight"], target_modules=[])
    model = mixtura.convert(made.case.model)
    with pytest.raises(UnsupportedModel, match=r"^base_model.*mlp\.gate.*no linear layer of ours"):
        mixtura.load_adapter(model, tmp_path)
