"""`import mixtura` is quick, and Transformers finds our experts all the same."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from outside_cases import stored, write_longcat

import mixtura
from mixtura import plugin

ROOT = Path(__file__).parent.parent


def run_python(program: str) -> None:
    """Run a program in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    run_python("""
import sys
import mixtura
assert set(mixtura.__all__) <= set(dir(mixtura))
mixtura.MoEConfig, mixtura.MixturaError
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
""")


def test_every_public_name_is_there() -> None:
    for name in mixtura.__all__:
        assert getattr(mixtura, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        mixtura.no_such_name  # noqa: B018 - looking is the test


def test_transformers_imported_later_finds_the_experts_function() -> None:
    run_python("""
import sys
import mixtura
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

config = Qwen3MoeConfig(
    vocab_size=16, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=16, num_experts=4,
    num_experts_per_tok=2, pad_token_id=0,
)
assert "mixtura.hf" not in sys.modules
outputs = []
for experts in ("eager", "mixtura"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    outputs.append(model(torch.arange(10)[None]).logits)
assert torch.allclose(*outputs, atol=1e-5)
assert "mixtura.hf" in sys.modules
""")


def test_a_late_class_does_what_the_true_one_does() -> None:
    families = importlib.import_module("mixtura.hf.families")
    assert {c.model_type: c.__name__ for c in families.MODELS} == plugin.FAMILIES
    for name in plugin.FAMILIES.values():
        late, true = plugin._LateClass(name, (), {}), getattr(families, name)
        assert type(late()) is type(late.from_dict({"hidden_size": 64})) is true
        assert late.model_type == true.model_type
        with pytest.raises(AttributeError):
            late.no_such_name  # noqa: B018 - looking is the test
    assert all(importlib.util.find_spec(module) is not None for module in plugin._REGISTER)


@pytest.mark.slow
def test_families_are_there_when_transformers_is_asked_for_them(tmp_path: Path) -> None:
    stored("param2moe").write(tmp_path / "param2moe")
    write_longcat(tmp_path / "longcat")
    run_python(f"""
import os, sys, traceback
import mixtura
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

def in_a_process_of_its_own(work):
    child = os.fork()
    if child == 0:
        try:
            assert "mixtura.hf" not in sys.modules
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def whole(found):
    return not any(found[1].values())

def by_path():
    assert AutoConfig.for_model("param2moe").num_shared_experts == 1
    arguments = dict(output_loading_info=True, experts_implementation="mixtura")
    found = AutoModelForCausalLM.from_pretrained(r"{tmp_path}/param2moe", **arguments)
    assert whole(found) and type(found[0]).__name__ == "Param2MoEForCausalLM"

def by_class():
    from transformers import LongcatFlashForCausalLM
    assert whole(
        LongcatFlashForCausalLM.from_pretrained(r"{tmp_path}/longcat", output_loading_info=True)
    )

for work in (by_path, by_class):
    in_a_process_of_its_own(work)
""")


@pytest.fixture
def table_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a module that has not been imported yet and stands for Transformers' table."""
    name = "table_of_experts_functions"
    (tmp_path / f"{name}.py").write_text(
        "class Table(dict):\n    register = dict.__setitem__\n\nALL_EXPERTS_FUNCTIONS = Table()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    register = plugin._REGISTER[plugin.EXPERTS_MODULE]
    monkeypatch.setattr(plugin, "_REGISTER", {name: register})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_the_finder_leaves_no_trace_but_the_registration(table_module: str) -> None:
    finders = list(sys.meta_path)
    plugin.offer()
    plugin.offer()
    assert len(sys.meta_path) == len(finders) + 1
    module = importlib.import_module(table_module)
    assert list(module.ALL_EXPERTS_FUNCTIONS) == [plugin.NAME]
    assert sys.meta_path == finders
    assert "register" in inspect.getsource(module)
    assert type(module.__spec__.loader) is type(importlib.import_module("json").__spec__.loader)


def test_out_of_the_window_nothing_is_registered(
    table_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "transformers_version", lambda: "5.24.0")
    plugin.offer()
    assert not importlib.import_module(table_module).ALL_EXPERTS_FUNCTIONS
    plugin.offer()  # now that it is loaded
    assert not sys.modules[table_module].ALL_EXPERTS_FUNCTIONS


def test_transformers_finds_the_expert_parallelism_whenever_it_is_imported() -> None:
    run_python("""
import mixtura
from transformers.distributed.expert_parallel import EPImplementationInterface
assert "mixtura" in EPImplementationInterface()
""")


@pytest.mark.parametrize(
    ("version", "is_in"),
    [
        ("5.23.0", True),
        ("5.23.1.dev0", True),
        ("5.22.9", False),
        ("5.24.0", False),
        ("4.57.1", False),
        ("five", False),
        ("5", False),
        (None, False),
    ],
)
def test_the_window(version: str | None, is_in: bool) -> None:
    assert plugin.is_supported(version) is is_in
    if not is_in:
        assert "pip install 'transformers" in str(plugin.missing_transformers(version))
