"""Plug-ins: found lazily, held to their contracts, and used as what is built in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_cases import build_layer, moe_config, problem_of, rows_of, sizes
from plugged import EXAMPLES, site, write_example, write_package
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GraniteMoeConfig, Qwen3MoeConfig
from typer.testing import CliRunner

import mixtura
from mixtura.cli import app, doctor
from mixtura.conformance import group_of, plug_ins_of, run_suite
from mixtura.entry_points import API_VERSIONS, Group
from mixtura.eplb import Policy, policy_for, policy_names, rebalance
from mixtura.errors import (
    CheckpointError,
    ConfigError,
    NoKernelFits,
    PlugInError,
    UnsupportedModel,
)
from mixtura.hf.linears import PackedLinear
from mixtura.kernels import get_kernel, kernel_names, select_kernel
from mixtura.kernels.reference import ReferenceKernel
from mixtura.quant.codecs import codec_for, method_names
from mixtura.quant.formats import WeightFormat
from mixtura.routing import create_router

__all__ = ["site"]

ROOT = Path(__file__).parent.parent
ROUTER = "def route(logits, top_k):\n    return logits.topk(top_k)\n"
KERNEL = """
from mixtura.kernels.reference import ReferenceKernel

class Kernel(ReferenceKernel):
    name = "acme"
"""


def offer(site: Path, group: str, target: str, source: str, name: str = "acme") -> None:
    """One entry point of a package `acme-NAME`, whose module is `acme_NAME`."""
    module = target.partition(":")[0]
    write_package(site, f"acme-{name}", {f"mixtura.{group}": {name: target}}, {module: source})


# ------------------------------------------------------------------------------------ entry points


def test_nothing_is_imported_before_it_is_asked_for(site: Path) -> None:
    offer(site, "routers", "acme_late:route", ROUTER)
    routers = plug_ins_of(Group.ROUTERS)
    assert routers.names() == ("acme",)
    assert "acme_late" not in sys.modules
    assert routers.load("acme").__name__ == "route"
    assert "acme_late" in sys.modules
    (report,) = routers.reports()
    assert (report.origin, report.problem) == ("acme-acme 1.0", None)


def test_importing_mixtura_reads_no_entry_points(site: Path) -> None:
    offer(site, "kernels", "acme_loud:Kernel", "print('imported')\n" + KERNEL)
    code = (
        "import importlib.metadata as m\n"
        "m.entry_points = lambda **_: print('read')\n"
        "import mixtura, mixtura.config\n"
    )
    environment = {"PYTHONPATH": f"{site}:{ROOT}", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize(
    "source, problem",
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'."),
        ("def route(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3."),
        ("other = 1", "AttributeError"),
        ("route = 1", "must be a function (router_logits, top_k); got 1."),
        ("route = dict", "must be a function (router_logits, top_k); got <class 'dict'>."),
        ("MIXTURA_API = 2\n" + ROUTER, "MIXTURA_API 2, and this mixtura has 1."),
    ],
)
def test_a_broken_plug_in_is_a_report_and_an_error_only_by_name(
    site: Path, source: str, problem: str
) -> None:
    offer(site, "routers", "acme_broken:route", source)
    offer(site, "routers", "acme_sound:route", ROUTER, name="sound")
    routers = plug_ins_of(Group.ROUTERS)
    reports = {report.name: report.problem for report in routers.reports()}
    assert reports["sound"] is None
    assert reports["acme"] is not None and problem in reports["acme"]
    assert "\n" not in reports["acme"]
    assert [*routers.usable()] == ["sound"]
    with pytest.raises(PlugInError, match=r"acme-acme 1\.0") as caught:
        create_router(moe_config().routing, custom="acme")
    assert problem in str(caught.value)


def test_a_version_that_is_kept_is_taken(site: Path) -> None:
    assert API_VERSIONS == (1,)
    offer(site, "routers", "acme_versioned:route", "MIXTURA_API = 1\n" + ROUTER)
    assert plug_ins_of(Group.ROUTERS).usable().keys() == {"acme"}


def test_names_are_new_or_not_used(site: Path) -> None:
    offer(site, "policies", "acme_static:POLICY", "POLICY = 1", name="static")
    offer(site, "routers", "acme_twice:route", ROUTER)
    write_package(
        site, "other", {"mixtura.routers": {"acme": "acme_twice:route"}}, {}, version="2.0"
    )
    assert policy_for("static").name == "static"
    assert policy_names().count("static") == 1
    (taken,) = plug_ins_of(Group.POLICIES).reports()
    assert taken.problem == "a name that mixtura has itself."
    twice = plug_ins_of(Group.ROUTERS).reports()
    assert {report.origin for report in twice} == {"acme-acme 1.0", "other 2.0"}
    assert {report.problem for report in twice} == {"two packages that offer the name."}
    with pytest.raises(PlugInError, match=r"\(.*other 2.0.*\) must load .* two packages"):
        create_router(moe_config().routing, custom="acme")


def test_an_object_of_this_process_is_plugged_in_and_out(site: Path) -> None:
    routers = plug_ins_of(Group.ROUTERS)
    routers.add("mine", torch.topk)
    assert create_router(moe_config().routing, custom="mine").custom is torch.topk
    with pytest.raises(ConfigError, match=r"'mine'.* must be new"):
        routers.add("mine", torch.topk)
    with pytest.raises(ConfigError, match="must be a function"):
        routers.add("other", 3)
    with pytest.raises(ConfigError, match="must be new"):
        plug_ins_of(Group.POLICIES).add("static", policy_for("static"))
    assert [report.origin for report in routers.reports()] == ["this process"]
    routers.remove("mine")
    assert routers.names() == ()


# ------------------------------------------------------------------------------------------ kernels


def test_a_kernel_stands_behind_the_built_in_ones(site: Path) -> None:
    offer(site, "kernels", "acme_kernel:Kernel", KERNEL)
    assert kernel_names()[-1] == "acme"
    assert select_kernel(problem_of(sizes())).kernel.name != "acme"
    asked = select_kernel(problem_of(sizes()), kernel="acme")
    assert asked.kernel is get_kernel("acme")
    assert not asked.is_fallback
    config = moe_config()
    mine, plain = build_layer(config, kernel="acme"), build_layer(config, kernel="reference")
    assert torch.equal(mine(rows_of(3)), plain(rows_of(3)))


def test_a_kernel_may_say_that_it_comes_first(site: Path) -> None:
    offer(site, "kernels", "acme_first:Kernel", KERNEL + "    comes_first = True\n")
    assert kernel_names()[0] == "acme"
    decision = select_kernel(problem_of(sizes()), strict=True)
    assert decision.kernel.name == "acme"
    assert {r.reason for r in decision.rejections if r.kernel == "torch"} == {"acme is preferred"}


def test_a_broken_kernel_is_one_that_was_not_taken(site: Path) -> None:
    offer(site, "kernels", "acme_gone:Kernel", "import not_there_at_all")
    raises = KERNEL + (
        "    comes_first = True\n"
        "    def unsupported(self, problem):\n        raise ValueError('odd')\n"
    )
    offer(site, "kernels", "acme_raises:Kernel", raises.replace("acme", "raises"), name="raises")
    decision = select_kernel(problem_of(sizes()))
    reasons = {r.kernel: r.reason for r in decision.rejections}
    assert reasons["raises"] == "raised ValueError: odd."
    assert reasons["acme"] == "ModuleNotFoundError: No module named 'not_there_at_all'."
    assert "acme" not in kernel_names()
    with pytest.raises(PlugInError, match="not_there_at_all"):
        select_kernel(problem_of(sizes()), kernel="acme")
    with pytest.raises(PlugInError, match="not_there_at_all"):
        mixtura.convert(torch.nn.Identity(), kernel="acme")  # type: ignore[arg-type]
    for asked in ({"kernel": "raises"}, {"strict": True}):
        with pytest.raises(NoKernelFits, match="raises: raised ValueError: odd"):
            select_kernel(problem_of(sizes()), **asked)


def test_what_a_built_in_kernel_raises_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, problem: Any) -> str | None:
        raise ValueError("ours")

    monkeypatch.setattr(ReferenceKernel, "cannot_run", broken)
    with pytest.raises(ValueError, match="ours"):
        select_kernel(problem_of(sizes()))


@pytest.mark.parametrize(
    "source, problem",
    [
        (KERNEL.replace('"acme"', '"other"'), "must have the name 'acme'; got 'other'."),
        ("class Kernel: pass", "must be an ExpertsKernel"),
        ("from mixtura.kernels import ExpertsKernel as Kernel", "abstract"),
    ],
)
def test_what_is_no_kernel_is_reported(site: Path, source: str, problem: str) -> None:
    offer(site, "kernels", "acme_none:Kernel", source)
    (report,) = plug_ins_of(Group.KERNELS).reports()
    assert report.problem is not None and problem in report.problem


def test_doctor_lists_plug_ins(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(site, "kernels", "acme_told:Kernel", KERNEL)
    offer(site, "codecs", "acme_bad:Codec", "Codec = 1", name="bad")
    monkeypatch.setattr(doctor, "find_probes", lambda: None)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)["plug_ins"]
    assert [entry["group"] for entry in found] == ["kernels", "codecs"]
    assert (found[0]["package"], found[0]["version"]) == ("acme-acme", "1.0")
    rows = [row for row in doctor.rows_of(doctor.diagnose()) if row[0] == "plug-in"]
    assert rows[0] == ("plug-in", "acme of kernels, acme-acme 1.0", "")
    assert rows[1][2].startswith("cannot be used: what 'bad' names must be a Codec")


# ------------------------------------------------------------------------------------------- codecs


def small_checkpoint(directory: Path) -> Path:
    """A tiny dense model."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_rowwise(dense: Path, out: Path) -> dict[str, Tensor]:
    """The checkpoint in the sample's format, written without its codec; what it means."""
    means: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, value in load_file(dense / "model.safetensors").items():
        means[name] = stored[name] = value
        if "_proj.weight" in name:
            stem = name.removesuffix(".weight")
            scale = (value.abs().amax(1, keepdim=True) / 127).half()
            codes = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
            del stored[name]
            stored |= {f"{stem}.qweight": codes, f"{stem}.row_scale": scale}
            means[name] = codes.float() * scale.float()
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rowwise_int8", "dense_modules": ["lm_head"]}
    (out / "config.json").write_text(json.dumps(config))
    return means


def test_a_codec_loads_a_model_end_to_end(site: Path, tmp_path: Path) -> None:
    dense, out, meant = (
        small_checkpoint(tmp_path / "dense"),
        tmp_path / "packed",
        tmp_path / "meant",
    )
    means = write_rowwise(dense, out)
    with pytest.raises(CheckpointError, match="quant_method \\('rowwise_int8'\\) must be one of"):
        mixtura.from_pretrained(out)
    del plug_ins_of(Group.CODECS).__dict__["_offers"]  # as in a new process
    write_example(site, "mixtura-rowwise-codec")
    assert "rowwise_int8" in method_names()
    model = mixtura.from_pretrained(out)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    AutoConfig.from_pretrained(dense).save_pretrained(meant)
    save_file(means, meant / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        found, wanted = model(ids).logits, AutoModelForCausalLM.from_pretrained(meant)(ids).logits
    # The kernels' own arithmetic for packed weights is int8: rounding, not another meaning.
    assert (found - wanted).norm() / wanted.norm() < 3e-2
    shown = CliRunner().invoke(app, ["inspect", "--ledger", "--model", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "row-wise int8" in shown.output


def test_a_broken_codec_is_named_by_the_checkpoint_that_needs_it(site: Path) -> None:
    offer(site, "codecs", "acme_codec:Codec", "import not_there_at_all", name="acme8")
    with pytest.raises(PlugInError, match=r"'acme8' of mixtura\.codecs .*not_there_at_all"):
        codec_for({"quant_method": "ACME8"})
    codec_for({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})


@pytest.mark.parametrize("name", ["acme8", "Rowwise_INT8"])
def test_a_codec_is_named_after_what_it_reads(site: Path, name: str) -> None:
    source = (EXAMPLES / "mixtura-rowwise-codec" / "mixtura_rowwise_codec.py").read_text()
    offer(site, "codecs", "acme_named:RowwiseInt8", source, name=name)
    (report,) = plug_ins_of(Group.CODECS).reports()
    assert report.problem is not None
    assert "the quant_method that it is named after" in report.problem


# ------------------------------------------------------------------------------------------ routers


def test_a_router_is_used_by_name(site: Path, tmp_path: Path) -> None:
    offer(site, "routers", "acme_routes:route", ROUTER)
    layer = build_layer(moe_config(), custom_routing="acme")
    other = build_layer(moe_config(), custom_routing=lambda logits, k: logits.topk(k))
    assert torch.equal(layer(rows_of(5)), other(rows_of(5)))
    assert not torch.allclose(layer(rows_of(5)), build_layer(moe_config())(rows_of(5)))
    with pytest.raises(ConfigError, match="router \\('nobody'\\) must be one of acme"):
        create_router(moe_config().routing, custom="nobody")


def test_a_router_replaces_the_rule_of_every_family(site: Path, tmp_path: Path) -> None:
    offer(site, "routers", "acme_routes:route", ROUTER)
    directory = small_checkpoint(tmp_path / "dense")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        mine = mixtura.from_pretrained(directory, router="acme")(ids).logits
        plain = mixtura.from_pretrained(directory)(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(directory)
        for layer in stock.model.layers:
            gate = layer.mlp.gate
            gate.forward = lambda x, gate=gate: (None, *(x @ gate.weight.T).topk(2))
        wanted = stock(ids).logits
    assert torch.allclose(mine, wanted, atol=1e-5)
    assert not torch.allclose(mine, plain, atol=1e-3)


def test_a_router_is_refused_where_a_rule_stays() -> None:
    config = GraniteMoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)  # its experts are ours, its router is not
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModel, match="taken over whole for router="):
        mixtura.convert(model, router=lambda logits, k: logits.topk(k))
    assert before == {name: type(module) for name, module in model.named_modules()}


# ----------------------------------------------------------------------------------------- policies


DEAL = """
from mixtura.eplb import Policy
from mixtura.parallel import ModelPlacement, Placement

def plan(loads, old, topology, budget):
    layer = Placement.round_robin(loads.shape[1], topology)
    return ModelPlacement.stack([layer] * len(loads))

POLICY = Policy("acme", plan)
"""


def test_a_policy_plans_by_name(site: Path) -> None:
    offer(site, "policies", "acme_deal:POLICY", DEAL)
    plan = rebalance(np.ones((1, 4)), num_physical_experts=4, num_ranks=2, policy="acme")
    assert plan.physical_to_logical.tolist() == [[0, 2, 1, 3]]
    result = CliRunner().invoke(
        app,
        [
            "eplb",
            "simulate",
            "--synthetic",
            "drift",
            "--steps",
            "20",
            "--experts",
            "16",
            "--policy",
            "acme",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    assert "acme" in result.stdout


def test_a_policy_must_be_one(site: Path) -> None:
    offer(site, "policies", "acme_deal:plan", DEAL)
    offer(site, "policies", "acme_other:POLICY", DEAL.replace('"acme"', '"b"'), name="other")
    problems = [report.problem for report in plug_ins_of(Group.POLICIES).reports()]
    assert "must be a Policy of the name 'acme'" in str(problems[0])
    assert "must be a Policy of the name 'other'" in str(problems[1])
    with pytest.raises(ConfigError, match=r"policy \('nobody'\) must be one of .*, acme"):
        policy_for("nobody")
    with pytest.raises(PlugInError):
        policy_for("acme")
    assert isinstance(policy_for("global"), Policy)


# ----------------------------------------------------------------------------- names of everything


def test_a_name_has_one_group_or_must_be_told(site: Path) -> None:
    offer(site, "routers", "acme_routes:route", ROUTER, name="random")
    assert group_of("local_search") is Group.POLICIES
    assert group_of("torch") is Group.KERNELS
    with pytest.raises(ConfigError, match=r"got routers, policies have it\. Say which"):
        group_of("random")
    with pytest.raises(ConfigError, match="no group has it"):
        group_of("nobody")
    with pytest.raises(ConfigError, match=r"'nobody'.* must be one of routers"):
        run_suite("nobody", "routers")


# ---------------------------------------------------------------------------------- sample packages


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir()))
def test_a_sample_is_small_and_whole(example: str) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (EXAMPLES / example).rglob("*.py"))
    assert 0 < lines <= 150
    assert (EXAMPLES / example / "README.md").is_file()
    assert (EXAMPLES / example / "pyproject.toml").is_file()


def test_the_sample_codec_keeps_its_contract(site: Path) -> None:
    write_example(site, "mixtura-rowwise-codec")
    report = run_suite("rowwise_int8", "codecs")
    assert report.origin == "mixtura-rowwise-codec 0.1.0"
    assert report.failed == ()


def test_the_sample_kernel_runs_a_layer(site: Path) -> None:
    write_example(site, "mixtura-gathered-kernel")
    config = moe_config()
    mine, plain = build_layer(config, kernel="gathered"), build_layer(config, kernel="reference")
    assert torch.allclose(mine(rows_of(9)), plain(rows_of(9)), atol=1e-6)
    packed = replace(problem_of(sizes()), schemes=(WeightFormat.INT8_CHANNEL.scheme,))
    with pytest.raises(NoKernelFits, match="gathered: multiplies dense weights"):
        select_kernel(packed, kernel="gathered")


@pytest.mark.slow
def test_sample_packages_are_installed_and_run(tmp_path: Path) -> None:
    """As a user does it, but for the network: `pip install`, `doctor`, `conformance`, a model."""
    target, sources = tmp_path / "site", tmp_path / "sources"
    shutil.copytree(EXAMPLES, sources)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *offline]
    packages = [str(path) for path in sorted(sources.iterdir())]
    subprocess.run([*pip, "--target", str(target), *packages], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{target}:{ROOT}", "OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "mixtura", *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    found = json.loads(command("doctor", "--json"))["plug_ins"]
    assert [(entry["name"], entry["problem"]) for entry in found] == [
        ("gathered", None),
        ("rowwise_int8", None),
    ]
    for name, group in (("gathered", "kernels"), ("rowwise_int8", "codecs")):
        assert "the contract is kept" in command("conformance", name, "--group", group)
    text = ("generate", "Once", "--max-new-tokens", "3", "--temperature", "0")
    assert command(*text, "--kernel", "gathered") == command(*text, "--kernel", "reference")
    out = tmp_path / "packed"
    write_rowwise(small_checkpoint(tmp_path / "dense"), out)
    explained = command("explain", "--model", str(out))
    assert "row-wise int8" in explained
    assert "not gathered: multiplies dense weights" in explained
