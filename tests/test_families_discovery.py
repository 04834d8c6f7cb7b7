"""The families in the installed Transformers are the known ones, and each has a tiny model."""

import pytest
import torch
from families import EXCEPTIONS, discover, tiny_model

UNDECORATED = {
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
    "vitpose_backbone",
}
TRIED = ("deepseek_v3", "gpt_oss", "qwen3_moe")


def test_undecorated_families_are_the_known_ones():
    found = {name for name, source in discover().items() if not source.is_decorated}
    assert found == UNDECORATED


def test_transformers_has_at_least_64_decorated_families():
    assert sum(source.is_decorated for source in discover().values()) >= 64


def test_only_undecorated_families_are_excepted():
    assert set(EXCEPTIONS) < UNDECORATED


def test_an_excepted_family_is_refused_with_its_reason():
    with pytest.raises(KeyError, match="product keys"):
        tiny_model("doge")


@pytest.mark.parametrize("family", sorted(discover().keys() - EXCEPTIONS.keys()))
def test_every_family_is_built_with_experts(family):
    case = tiny_model(family)
    assert case.experts_modules
    assert case.block_modules


@pytest.mark.parametrize("family", TRIED)
def test_output_is_finite_and_the_same_for_the_same_seed(family):
    first, again, other = (tiny_model(family, seed=seed) for seed in (3, 3, 4))
    with torch.no_grad():
        output = first.output(first.model)
        assert output.isfinite().all()
        assert output.equal(again.output(again.model))
        assert not output.equal(other.output(other.model))


@pytest.mark.parametrize("family", TRIED)
def test_a_rounded_model_holds_the_same_weights(family):
    exact, rounded = tiny_model(family), tiny_model(family, dtype=torch.bfloat16)
    wide = exact.model.state_dict()
    for name, tensor in rounded.model.state_dict().items():
        assert tensor.equal(wide[name].to(tensor.dtype)), name


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    tiny_model("qwen3_moe")
    assert torch.get_rng_state().equal(before)
