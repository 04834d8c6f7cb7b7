"""A converted block stays the family's own module to everything around it."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from expert_cases import quantized
from families import TinyCase, tiny_model
from tolerances import NOISE_FACTOR, RTOL, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mixtura import FusedMoE, convert, from_pretrained, is_moe_layer
from mixtura.errors import (
    ConfigError,
    GradientUnsupported,
    InputError,
    NoKernelFits,
    UnsupportedModel,
)
from mixtura.experts import PackedExperts
from mixtura.hf import is_converted, moe_layers
from mixtura.hf.blocks import FamilyMoE
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.gate import FamilyGate
from mixtura.observe.capture import capture_layers
from mixtura.quant.formats import WeightFormat

FAMILIES = (
    "afmoe",
    "dbrx",
    "deepseek_v3",
    "gpt_oss",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "minimax_m2",
    "qwen2_moe",
    "qwen3_moe",
    "step3p7",
)
DECORATED = tuple(
    name
    for name in FAMILIES
    if name not in ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7")
)
JITTER = {
    "dbrx": ("ffn_config", "moe_jitter_eps"),
    "minimax_m2": (None, "router_jitter_noise"),
    "mixtral": (None, "router_jitter_noise"),
}
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@functools.cache
def stock(family: str, seed: int = 0) -> TinyCase:
    """A family's tiny model; it must not be changed."""
    return tiny_model(family, seed=seed)


def stock_copy(family: str, seed: int = 0) -> PreTrainedModel:
    return copy.deepcopy(stock(family, seed).model)


def quietly_converted(model: PreTrainedModel, **options: object) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)  # JetMoE's attention
        return convert(model, **options)


def converted(family: str, seed: int = 0, **options: object) -> PreTrainedModel:
    return quietly_converted(stock_copy(family, seed), **options)


def one_line(family: str) -> PreTrainedModel:
    model = stock_copy(family)
    model.set_experts_implementation("mixtura")
    return model


def blocks(model: nn.Module) -> dict[str, FamilyMoE]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FamilyMoE)}


@torch.no_grad()
def output(family: str, model: PreTrainedModel) -> Tensor:
    return stock(family).output(model)


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# ------------------------------------------------------------------------------ weights and files


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_keys_and_tensors_are_unchanged(family):
    expected, found = stock(family).model.state_dict(), converted(family).state_dict()
    assert list(found) == list(expected)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def load_stock(model: PreTrainedModel, directory: Path, **arguments: object) -> PreTrainedModel:
    has_head = type(model.config) in AutoModelForCausalLM._model_mapping
    loader = AutoModelForCausalLM if has_head else stock_class(model)
    loaded = loader.from_pretrained(directory, attn_implementation="eager", **arguments)
    return loaded.eval()


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return type(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_one_of_transformers(family, tmp_path):
    model = converted(family)
    expected = output(family, model)
    model.save_pretrained(tmp_path)
    assert "mixtura" not in "".join(p.read_text() for p in tmp_path.glob("*.json")).lower()
    loaded = load_stock(model, tmp_path, experts_implementation="eager")
    assert not blocks(loaded)
    assert relative_error(output(family, loaded), expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_can_be_loaded_into_a_converted_model(family):
    model = converted(family)
    before = output(family, model)
    model.load_state_dict(stock(family, seed=1).model.state_dict())
    after = output(family, model)
    assert relative_error(after, output(family, stock(family, seed=1).model)) <= TOLERANCE
    assert relative_error(before, after) > 0.1


def usual_error(actual: Tensor, expected: Tensor) -> float:
    """The relative error that three quarters of the tokens stay below."""
    difference = (actual.double() - expected.double()).norm(dim=-1)
    return (difference / expected.double().norm(dim=-1)).quantile(0.75).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_can_change_its_dtype(family, dtype):
    truth = output(family, stock(family).model)
    noise = usual_error(output(family, stock_copy(family).to(dtype)), truth)
    model = converted(family)
    output(family, model)
    model = model.half() if dtype is torch.float16 else model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = output(family, model)
    assert usual_error(found, truth) <= max(NOISE_FACTOR * noise, RTOL[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_independent(family):
    model = converted(family)
    expected = output(family, model)
    other = copy.deepcopy(model)
    assert classes(other) == classes(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert output(family, other).equal(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_can_be_pickled(family):
    model = converted(family)
    expected = output(family, model)
    assert output(family, pickle.loads(pickle.dumps(model))).equal(expected)


def test_a_model_in_the_one_line_form_can_be_pickled():
    model = one_line("qwen3_moe")
    expected = output("qwen3_moe", model)
    assert output("qwen3_moe", pickle.loads(pickle.dumps(model))).equal(expected)


def test_transformers_loads_a_checkpoint_for_our_experts(tmp_path):
    model = stock_copy("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = load_stock(model, tmp_path, experts_implementation="mixtura")
    assert {layer.kind for layer in moe_layers(loaded)} == {"experts"}
    found = output("qwen3_moe", loaded)
    assert relative_error(found, output("qwen3_moe", model)) <= TOLERANCE


def test_our_from_pretrained_gives_a_converted_model(tmp_path):
    model = stock_copy("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, strict=True, attn_implementation="eager")
    assert {layer.kind for layer in moe_layers(loaded)} == {"block"}
    assert not loaded.training
    found = output("qwen3_moe", loaded)
    assert relative_error(found, output("qwen3_moe", model)) <= TOLERANCE


# ------------------------------------------------------------------- what is around a block sees it


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_and_auxiliary_loss_are_those_of_the_family(family):
    arguments = {**stock(family).inputs, "output_router_logits": True}
    model = stock_copy(family)
    if hasattr(model, "lm_head"):
        arguments["labels"] = arguments["input_ids"]
    expected, found = model(**arguments), converted(family)(**arguments)
    assert found.keys() == expected.keys()
    assert len(found.router_logits) == len(expected.router_logits) > 0
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= TOLERANCE
    for name in ("aux_loss", "loss"):
        if expected.get(name) is not None:
            assert found[name].item() == pytest.approx(expected[name].item(), rel=TOLERANCE)


def test_some_family_has_an_auxiliary_loss():
    arguments = {**stock("qwen3_moe").inputs, "output_router_logits": True}
    assert converted("qwen3_moe")(**arguments).aux_loss.item() > 0


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_returns_what_the_family_returns(family):
    model = converted(family)
    assert blocks(model)
    for name, block in blocks(model).items():
        hidden_states = torch.randn(2, 5, model.config.hidden_size)
        theirs = stock(family).model.get_submodule(name)(hidden_states.clone())
        ours = block(hidden_states)
        assert type(ours) is type(theirs)
        pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
        for our, their in pairs:
            assert our.shape == their.shape
            assert our.dtype == their.dtype
            assert relative_error(our, their) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (7,), (2, 3, 2)])
def test_a_block_takes_tokens_in_any_arrangement(family, shape):
    model = converted(family)
    block = next(iter(blocks(model).values()))
    hidden_states = torch.randn(*shape, model.config.hidden_size)
    found, flat = block(hidden_states), block(hidden_states.flatten(0, -2).unsqueeze(0))
    if isinstance(found, tuple):
        found, flat = found[0], flat[0]
    assert found.numel() == hidden_states.numel()
    assert found.flatten().equal(flat.flatten())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_gate_is_the_family_s_own_to_the_bit(family):
    model = tiny_model(family, dtype=torch.bfloat16).model
    ours = quietly_converted(copy.deepcopy(model), gate="native")
    for name, block in blocks(ours).items():
        hidden_states = torch.randn(2, 5, model.config.hidden_size).bfloat16()
        theirs = model.get_submodule(name)
        returned: list[object] = []
        for module in (theirs, block):
            gate = module.get_submodule(block.spec.gate)
            gate.register_forward_hook(lambda *call, returned=returned: returned.append(call[2]))
        expected, output = theirs(hidden_states.clone()), block(hidden_states)
        their_logits, our_logits = (logits_of(block, value) for value in returned)
        assert our_logits.equal(their_logits.to(our_logits.dtype))
        assert type(output) is type(expected)
        pairs = [(output, expected)]
        if isinstance(output, tuple):
            pairs = list(zip(output, expected, strict=True))
        for our, their in pairs:
            assert our.dtype == their.dtype
            assert relative_error(our, their) <= RTOL[torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_stay_instances_of_the_family_classes(family):
    model = converted(family)
    adopted = 0
    for name, module in stock(family).model.named_modules():
        found = model.get_submodule(name)
        assert isinstance(found, type(module))
        adopted += type(found) is not type(module)
    assert adopted >= 2 * len(blocks(model))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_router_and_experts_see_every_call(family):
    model = converted(family)
    seen: list[str] = []
    expected = []
    for name, block in blocks(model).items():
        gate = getattr(block, block.spec.gate)
        inner = [gate] if block.packed_experts is block else [gate, block.packed_experts]
        for module in inner:
            label = f"{name}:{type(module).__name__}"
            module.register_forward_hook(lambda *_, label=label: seen.append(label))
            expected.append(label)
    output(family, model)
    assert seen == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_observers_see_what_the_router_chose(family):
    model = converted(family)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    returned: dict[str, object] = {}
    for name, block in blocks(model).items():

        def observe(ids: Tensor, weights: Tensor, name: str = name) -> None:
            seen[name] = (ids, weights)

        block.observers = (observe,)
        gate: FamilyGate = getattr(block, block.spec.gate)

        def keep(module: nn.Module, _: object, value: object, name: str = name) -> None:
            returned[name] = value

        gate.register_forward_hook(keep)
    output(family, model)
    assert seen.keys() == blocks(model).keys() == returned.keys()
    for name, (ids, weights) in seen.items():
        assert ids.shape == weights.shape
        assert ids.shape[0] == stock(family).inputs["input_ids"].numel()
        assert (ids >= 0).all()
        logits = logits_of(blocks(model)[name], returned[name])
        assert int(ids.max()) < logits.shape[1]
    if family in ("qwen2_moe", "qwen3_moe", "gpt_oss", "jetmoe", "llama4"):  # no selection bias
        for name, (ids, _) in seen.items():
            logits = logits_of(blocks(model)[name], returned[name])
            best = logits.topk(ids.shape[1], dim=-1).indices
            assert ids.sort(-1).values.equal(best.sort(-1).values)


def logits_of(block: FamilyMoE, returned: object) -> Tensor:
    """The router's logits in what the family's router returns."""
    if isinstance(returned, Tensor):
        return returned
    width = block.plan.router.config.num_logits
    found = [
        value
        for value in returned
        if isinstance(value, Tensor) and value.shape[-1] == width and value.dtype.is_floating_point
    ]
    return found[-1]


def test_observers_of_the_one_line_form_see_every_layer():
    model = one_line("qwen3_moe")
    output("qwen3_moe", model)
    experts = {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}
    assert experts.keys() == set(stock("qwen3_moe").experts_modules)
    with capture_layers(experts) as capture:
        output("qwen3_moe", model)
    whole = converted("qwen3_moe")
    with capture_layers(blocks(whole)) as expected:
        output("qwen3_moe", whole)
    for ours, theirs in zip(
        capture.trace().layers.values(), expected.trace().layers.values(), strict=True
    ):
        assert ours.ids.equal(theirs.ids)


def test_converting_again_keeps_observers():
    model = converted("qwen3_moe")
    seen = []
    for block in blocks(model).values():
        block.observers = (lambda ids, weights: seen.append(ids),)
    convert(model, gate="native")
    output("qwen3_moe", model)
    assert len(seen) == len(blocks(model)) > 0


def test_is_moe_layer():
    model = converted("qwen3_moe")
    found = [name for name, module in model.named_modules() if is_moe_layer(module)]
    case = stock("qwen3_moe")
    assert sorted(found) == sorted([*case.block_modules, *case.experts_modules])
    assert not any(is_moe_layer(module) for module in case.model.modules())
    assert all(isinstance(block, FusedMoE) for block in blocks(model).values())


def test_capture_of_a_converted_model():
    model = converted("longcat_flash")
    with capture_layers(blocks(model)) as capture:
        output("longcat_flash", model)
    layers = capture.trace().layers
    assert layers.keys() == set(stock("longcat_flash").block_modules)
    assert any((layer.ids >= layer.num_experts).any() for layer in layers.values())  # zero experts


# --------------------------------------------------------------------------------------- gradients


def gradients(family: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the embeddings that go in and of every parameter behind them."""
    case = stock(family)
    embeddings = model.get_input_embeddings()(case.inputs["input_ids"]).detach().requires_grad_()
    result = model(inputs_embeds=embeddings, use_cache=False)
    last = result.logits if "logits" in result else result.last_hidden_state
    last.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embeddings.grad is not None
    return {"inputs_embeds": embeddings.grad, **found}


@functools.cache
def eager_gradients(family: str) -> dict[str, Tensor]:
    return gradients(family, stock_copy(family))


def assert_gradients_equal(family: str, model: PreTrainedModel) -> None:
    expected, found = eager_gradients(family), gradients(family, model)
    assert found.keys() == expected.keys()
    assert any("experts" in name or "linear" in name for name in found)
    assert any("gate" in name or "router" in name for name in found)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_converted_model(family):
    assert_gradients_equal(family, converted(family))


@pytest.mark.parametrize("family", DECORATED)
def test_gradients_of_the_one_line_form(family):
    assert_gradients_equal(family, one_line(family))


@pytest.mark.parametrize("form", [converted, one_line])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_gradient_checkpointing(form, use_reentrant):
    model = form("qwen3_moe")
    arguments = {"use_reentrant": use_reentrant}
    model.activation_checkpointing_enable(arguments)
    assert model.is_activation_checkpointing
    model.train()  # dropout is 0
    assert_gradients_equal("qwen3_moe", model)


def test_quantized_experts_refuse_gradients():
    block = next(iter(blocks(converted("qwen3_moe")).values()))
    experts = block.packed_experts
    packed = quantized(experts.expert_weights, WeightFormat.INT8_CHANNEL)
    experts.adopt(experts.experts_config, experts.options, {}, packed)
    hidden_states = torch.randn(1, 3, block.moe_config.hidden_size, requires_grad=True)
    with pytest.raises(GradientUnsupported, match="dense"):
        block(hidden_states)
    with torch.no_grad():
        assert block(hidden_states).shape == hidden_states.shape


@torch.no_grad()
@pytest.mark.parametrize("family", JITTER)
def test_jitter_of_the_training_mode(family):
    part, name = JITTER[family]
    case = tiny_model(family)
    config = case.model.config
    setattr(getattr(config, part) if part else config, name, 0.3)
    stock_model = type(case.model)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    stock_model.load_state_dict(case.model.state_dict())
    model = quietly_converted(copy.deepcopy(stock_model))
    block = next(iter(blocks(model)))
    hidden_states = torch.randn(2, 4, config.hidden_size)
    results = []
    for owner in (stock_model, model):
        module = owner.get_submodule(block)
        calm = module.eval()(hidden_states.clone())
        torch.manual_seed(0)
        shaken = module.train()(hidden_states.clone())
        results.append(shaken)
        assert relative_error(shaken, calm) > 0.01
    assert relative_error(results[1], results[0]) <= TOLERANCE


# ---------------------------------------------------------------------------------- taking over


def test_converting_twice_takes_the_new_options():
    model = converted("qwen3_moe")
    expected = output("qwen3_moe", model)
    convert(model, kernel="reference", gate="native", max_rows_per_pass=4, deterministic=True)
    assert relative_error(output("qwen3_moe", model), expected) <= TOLERANCE
    for block in blocks(model).values():
        assert block.moe_config.runner.max_rows_per_pass == 4
        assert block.moe_config.deterministic
        assert block.packed_experts.state.held.kernel.name == "reference"
    convert(model)
    assert output("qwen3_moe", model).equal(expected)


@pytest.mark.parametrize("family", DECORATED)
def test_converting_after_the_one_line_form(family):
    model = one_line(family)
    output(family, model)
    quietly_converted(model)
    assert {layer.kind for layer in moe_layers(model)} == {"block"}
    found = output(family, model)
    assert relative_error(found, output(family, stock(family).model)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"gate": "native"}, {"max_rows_per_pass": 5}, {"deterministic": True}, {"debug": True}],
    ids=["native", "chunks", "deterministic", "debug"],
)
def test_options_do_not_change_what_is_computed(family, options):
    if family == "jetmoe" and "deterministic" in options:
        pytest.skip("its mixture of attention is not ours, so that it is refused")
    found = output(family, converted(family, **options))
    assert relative_error(found, output(family, stock(family).model)) <= TOLERANCE


@pytest.mark.parametrize("debug", [False, True])
def test_experts_know_of_debug(debug):
    for block in blocks(converted("qwen3_moe", debug=debug)).values():
        assert (block.moe_config.debug, block.packed_experts.options.debug) == (debug, debug)


def test_eager_undoes_the_one_line_form():
    model = one_line("qwen3_moe")
    assert is_converted(model)
    assert {layer.kind for layer in moe_layers(model)} == {"experts"}
    output("qwen3_moe", model)
    assert {layer.kind for layer in moe_layers(model)} == {"experts"}
    model.set_experts_implementation("eager")
    layers = moe_layers(model)
    assert not is_converted(model)
    assert {layer.kind for layer in layers} == {"none"}
    assert len(layers) == len(stock("qwen3_moe").experts_modules)
    assert output("qwen3_moe", model).equal(output("qwen3_moe", stock("qwen3_moe").model))


def test_an_unknown_implementation_is_transformers_error():
    model = stock_copy("qwen3_moe")
    with pytest.raises(ValueError, match="mixtrua"):
        model.set_experts_implementation("mixtrua")


def test_arguments_are_checked_before_anything_changes():
    model = stock_copy("qwen3_moe")
    before = classes(model)
    for options in (
        {"kernel": "nonsense"},
        {"gate": "fp31"},
        {"max_rows_per_pass": 0},
    ):
        with pytest.raises(ConfigError):
            convert(model, **options)
    assert classes(model) == before


def test_a_configuration_that_is_impossible_is_an_error_and_changes_nothing():
    model = stock_copy("qwen3_moe")
    before = classes(model)
    model.config.num_experts_per_tok = 99
    with pytest.raises(ConfigError, match=r"top_k \(99\) must be at most"):
        convert(model)
    assert classes(model) == before


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_deterministic_blocks_give_a_row_alone_what_it_gets_in_a_batch(family):
    model = converted(family, deterministic=True)
    blocks = [module for module in model.modules() if isinstance(module, FusedMoE)]
    block = next(block for block in blocks if block.moe_config.shared is not None)
    rows = torch.randn(1, 37, block.moe_config.hidden_size)
    with torch.no_grad():
        together = block(rows)
        for token in (0, 17, 36):
            assert block(rows[:, token : token + 1])[0, 0].equal(together[0, token])


def test_a_kernel_that_cannot_run_is_refused_before_anything_changes():
    model = stock_copy("qwen3_moe")
    before = classes(model)
    with pytest.raises(NoKernelFits, match="deterministic"):
        convert(model, kernel="torch", deterministic=True)
    assert classes(model) == before


def test_jetmoe_keeps_its_mixture_of_attention_and_says_so():
    model = stock_copy("jetmoe")
    with pytest.warns(UnconvertedLayerWarning, match=r"self_attention\.experts: .*attention"):
        convert(model)
    kinds = {layer.name: layer.kind for layer in moe_layers(model)}
    assert kinds == {
        **{f"model.layers.{i}.mlp": "block" for i in range(3)},
        **{f"model.layers.{i}.self_attention.experts": "none" for i in range(3)},
    }
    assert not is_converted(model)


def test_strict_refuses_jetmoe_and_leaves_it_as_it_was():
    model = stock_copy("jetmoe")
    before = classes(model)
    with pytest.raises(UnsupportedModel, match=r"strict(.|\n)*self_attention\.experts"):
        convert(model, strict=True)
    assert classes(model) == before


def test_a_model_without_moe_layer_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*got none"):
        convert(model)
    assert moe_layers(model) == []
    assert not is_converted(model)


def test_under_expert_parallelism_of_transformers_only_the_experts_are_ours():
    model = stock_copy("qwen3_moe")
    for name in stock("qwen3_moe").experts_modules:
        model.get_submodule(name)._is_expert_parallel = True
    with pytest.raises(UnsupportedModel, match="expert parallelism"):
        convert(model, strict=True)
    with pytest.warns(UnconvertedLayerWarning, match="expert parallelism"):
        convert(model)
    assert {layer.kind for layer in moe_layers(model)} == {"experts"}
    found = output("qwen3_moe", model)
    assert relative_error(found, output("qwen3_moe", stock("qwen3_moe").model)) <= TOLERANCE


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def with_cubes(family: str, *, layers: slice = slice(None)) -> PreTrainedModel:
    """A model whose experts have an activation that no family has."""
    model = stock_copy(family)
    for name in stock(family).experts_modules[layers]:
        model.get_submodule(name).act_fn = Cube()
    return model


@pytest.mark.parametrize(
    ("family", "culprit"), [("qwen3_moe", "Qwen3MoeExperts"), ("longcat_flash", "LongcatFlash")]
)
def test_an_unknown_activation_is_named_and_the_model_stays_usable(family, culprit):
    model = with_cubes(family)
    expected = output(family, model)
    before = classes(model)
    with pytest.raises(UnsupportedModel, match=f"activation of {culprit}"):
        convert(model)
    assert classes(model) == before
    assert output(family, model).equal(expected)


def test_an_unknown_activation_in_the_one_line_form():
    model = with_cubes("qwen3_moe")
    expected = output("qwen3_moe", model)
    model.set_experts_implementation("mixtura")
    with pytest.raises(UnsupportedModel, match="activation of Qwen3MoeExperts"):
        output("qwen3_moe", model)
    model.set_experts_implementation("eager")
    assert output("qwen3_moe", model).equal(expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "granitemoe"])
def test_a_layer_that_cannot_be_ours_stays_beside_the_others(family):
    case = stock(family)
    model = with_cubes(family, layers=slice(0, 1))
    expected = output(family, model)
    with pytest.warns(UnconvertedLayerWarning, match="activation of"):
        convert(model)
    kinds = [layer.kind for layer in moe_layers(model)]
    assert kinds[0] == "none"
    assert "none" not in kinds[1:]
    assert len(kinds) == len(case.experts_modules)
    assert relative_error(output(family, model), expected) <= TOLERANCE


def with_long_gate(family: str) -> tuple[PreTrainedModel, nn.Module]:
    """A model whose last router has a row too many."""
    model = stock_copy(family)
    case = stock(family)
    block = model.get_submodule(case.block_modules[-1])
    gate = block.gate if hasattr(block, "gate") else block.router.layer
    gate.weight = nn.Parameter(torch.cat([gate.weight, gate.weight[:1]]).detach())
    return model, block


@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx"])
def test_a_gate_of_the_wrong_shape_is_found_before_anything_changes(family):
    model, block = with_long_gate(family)
    before = classes(model)
    with pytest.raises(UnsupportedModel, match=rf"gate of {type(block).__name__} \(\(9, 64\)\)"):
        convert(model, strict=True)
    assert classes(model) == before


@pytest.mark.parametrize(("family", "kind"), [("qwen3_moe", "experts"), ("dbrx", "none")])
def test_a_block_that_cannot_be_read_stays_with_its_experts_or_alone(family, kind):
    model, block = with_long_gate(family)
    before = type(block)
    with pytest.warns(UnconvertedLayerWarning, match="gate of"):
        convert(model)
    assert type(block) is before
    assert moe_layers(model)[-1].kind == kind
    assert {layer.kind for layer in moe_layers(model)[:-1]} == {"block"}


# --------------------------------------------------------------------------------- wrong input


def experts_and_inputs() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = one_line("qwen3_moe")
    experts = model.get_submodule(stock("qwen3_moe").experts_modules[0])
    ids = torch.tensor([[0, 1], [2, 7]])
    return experts, torch.randn(2, 64), ids, torch.full((2, 2), 0.5)


@pytest.mark.parametrize("wrong", [8, 1000, -2])
def test_ids_out_of_range_are_refused(wrong):
    experts, hidden_states, ids, weights = experts_and_inputs()
    experts(hidden_states, ids, weights)
    ids[1, 1] = wrong
    with pytest.raises(InputError, match=r"expert ids must be in \[-1, 8\)"):
        experts(hidden_states, ids, weights)


def test_hidden_states_of_another_dtype_are_refused():
    experts, hidden_states, ids, weights = experts_and_inputs()
    with pytest.raises(InputError, match=r"hidden_states \(torch\.bfloat16\) must have the dtype"):
        experts(hidden_states.bfloat16(), ids, weights)


def test_hidden_states_of_another_width_are_refused():
    experts, _, ids, weights = experts_and_inputs()
    with pytest.raises(InputError, match=r"must be \(rows, 64\)"):
        experts(torch.randn(2, 63), ids, weights)
    block = next(iter(blocks(converted("qwen3_moe")).values()))
    with pytest.raises(InputError, match="64 columns"):
        block(torch.randn(1, 2, 63))


def test_an_unknown_argument_is_refused():
    experts, hidden_states, ids, weights = experts_and_inputs()
    with pytest.raises(InputError, match="process_group"):
        experts(hidden_states, ids, weights, process_group=None)


def test_autocast_is_not_a_wrong_dtype():
    model, expected = converted("qwen3_moe"), stock_copy("qwen3_moe")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = output("qwen3_moe", model), output("qwen3_moe", expected)
    truth = output("qwen3_moe", stock("qwen3_moe").model)
    assert usual_error(found, truth) <= NOISE_FACTOR * usual_error(wanted, truth)


# --------------------------------------------------------------- other libraries' ways with modules


class Doubled(nn.Module):
    """What LoRA does to a weight, simplified."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        Doubled.calls += 1
        return weight * 2.0


def parametrized(model: PreTrainedModel, family: str) -> PreTrainedModel:
    for name in stock(family).experts_modules:
        experts = model.get_submodule(name)
        parametrize.register_parametrization(experts, "gate_up_proj", Doubled())
    return model


def without_parametrization(model: PreTrainedModel, family: str) -> PreTrainedModel:
    for name in stock(family).experts_modules:
        experts = model.get_submodule(name)
        parametrize.remove_parametrizations(experts, "gate_up_proj", leave_parametrized=False)
    return model


@pytest.mark.parametrize("form", [one_line, converted])
@pytest.mark.parametrize("ran_before", [True, False])
def test_a_parametrized_weight_is_honoured_and_can_be_taken_off(form, ran_before):
    family = "qwen3_moe"
    plain = output(family, stock(family).model)
    expected = output(family, parametrized(stock_copy(family), family))
    assert relative_error(plain, expected) > 0.01
    model = form(family)
    if ran_before:
        output(family, model)
    parametrized(model, family)
    assert relative_error(output(family, model), expected) <= TOLERANCE
    Doubled.calls = 0
    output(family, model)
    assert Doubled.calls == len(stock(family).experts_modules)  # once for each layer
    without_parametrization(model, family)
    assert relative_error(output(family, model), plain) <= TOLERANCE
    assert all("Parametrized" not in cls.__name__ for cls in classes(model))


def test_a_model_that_is_parametrized_already_can_be_converted():
    family = "qwen3_moe"
    model = parametrized(stock_copy(family), family)
    expected = output(family, model)
    convert(model)
    assert relative_error(output(family, model), expected) <= TOLERANCE
    without_parametrization(model, family)
    found = output(family, model)
    assert relative_error(found, output(family, stock(family).model)) <= TOLERANCE
    assert {layer.kind for layer in moe_layers(model)} == {"block"}


def test_gradients_flow_through_a_parametrized_weight():
    family = "qwen3_moe"
    expected = gradients(family, parametrized(stock_copy(family), family))
    found = gradients(family, parametrized(one_line(family), family))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= GRADIENT_TOLERANCE, name


def test_a_model_with_accelerates_hooks_is_really_taken_over():
    hooks = pytest.importorskip("accelerate.hooks")
    family = "qwen3_moe"
    model = stock_copy(family)
    passed: list[nn.Module] = []

    class Passing(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            passed.append(module)
            return args, kwargs

    case = stock(family)
    for name in [*case.block_modules, *case.experts_modules]:
        hooks.add_hook_to_module(model.get_submodule(name), Passing())
    convert(model)
    with capture_layers(blocks(model)) as capture:
        found = output(family, model)
    assert all(len(layer.ids) for layer in capture.trace().layers.values())
    assert len(passed) == len(case.block_modules) + len(case.experts_modules)
    assert relative_error(found, output(family, case.model)) <= TOLERANCE
