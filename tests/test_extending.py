"""`docs/extending.md` runs, block after block; its family is held to the contract of families."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

import mixtura
from mixtura.conformance import plug_ins_of, run_suite
from mixtura.entry_points import Group
from mixtura.errors import UnsupportedModel
from mixtura.hf.blocks import FamilyMoE

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The namespace of the page, all of whose blocks have run."""
    module: Any = ModuleType("extending_page")
    sys.modules[module.__name__] = module
    try:
        for number, block in enumerate(BLOCKS, 1):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]
        for group in Group:
            held = plug_ins_of(group)
            for name in held.names():
                held.remove(name)


def test_every_group_is_shown_and_plugged_in(page: Any) -> None:
    assert len(BLOCKS) == 6
    assert {group for group in Group if plug_ins_of(group).names()} == set(Group)


def test_a_block_of_other_code_is_taken_over(page: Any) -> None:
    torch.manual_seed(0)
    model = page.AcmeModel(page.AcmeConfig()).eval()
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        wanted = model(ids)[0]
        assert mixtura.convert(model, strict=True) is model
        assert isinstance(model.moe, FamilyMoE)
        assert torch.allclose(model(ids)[0], wanted, atol=1e-5)


def test_a_registered_model_is_loaded(page: Any, tmp_path: Path) -> None:
    AutoConfig.register("acme", page.AcmeConfig)
    AutoModelForCausalLM.register(page.AcmeConfig, page.AcmeModel)
    try:
        model = page.AcmeModel(page.AcmeConfig()).eval()
        model.save_pretrained(tmp_path)
        loaded = mixtura.from_pretrained(tmp_path)
    finally:
        CONFIG_MAPPING._extra_content.pop("acme")
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(page.AcmeConfig)
    assert isinstance(loaded.moe, FamilyMoE)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(loaded(ids)[0], model(ids)[0], atol=1e-5)


@pytest.fixture
def family(page: Any) -> Iterator[Any]:
    """The family, with its name free for another one."""
    families = plug_ins_of(Group.FAMILIES)
    families.remove("AcmeMoE")
    yield page.ACME
    families.remove("AcmeMoE")
    families.add("AcmeMoE", page.ACME)


def test_a_class_of_another_module_is_not_taken_over(page: Any, family: Any) -> None:
    plug_ins_of(Group.FAMILIES).add("AcmeMoE", replace(family, module="modeling_other"))
    with pytest.raises(UnsupportedModel, match="must have an MoE layer"):
        mixtura.convert(page.AcmeModel(page.AcmeConfig()))


def test_another_rule_is_found_out(page: Any, family: Any) -> None:
    def routing(config: Any, layer_index: int) -> Any:
        return replace(family.spec.routing(config, layer_index), top_k=1)

    wrong = replace(family, spec=replace(family.spec, routing=routing))
    plug_ins_of(Group.FAMILIES).add("AcmeMoE", wrong)
    failed = {check.name for check in run_suite("AcmeMoE", "families").failed}
    assert failed == {"a block's output", "gradients of a block", "the whole model"}


def test_a_family_needs_its_rule(family: Any) -> None:
    families = plug_ins_of(Group.FAMILIES)
    for wrong in (replace(family, spec=replace(family.spec, routing=None)), family.spec):
        with pytest.raises(mixtura.MixturaError, match=r"must (have a rule|be a Family)"):
            families.add("AcmeMoE", wrong)
