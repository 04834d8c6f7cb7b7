"""Checkpoints with stored activation scales: what is loaded, what is computed, what is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_cases import sizes
from packed_files import write_packed
from safetensors.torch import load_file, save_file
from static_activations import E4M3, FLIPS, INT8, Deaf, batch
from tolerances import frobenius_error
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig
from typer.testing import CliRunner

import mixtura
from mixtura.cli import app
from mixtura.errors import CheckpointError, NoKernelFits
from mixtura.experts import PackedExperts
from mixtura.hf.audit import read_ledger
from mixtura.hf.explain import explain
from mixtura.hf.ledger import CheckpointWarning
from mixtura.hf.linears import PackedLinear
from mixtura.hf.packed_matrices import MatrixReader, PackedModule
from mixtura.hf.slots import Slots
from mixtura.kernels import register_kernel
from mixtura.kernels.cpu.extension import missing
from mixtura.kernels.registry import unregister_kernel
from mixtura.quant.activations import ActivationGroup, ActivationScheme, round_activations
from mixtura.quant.matrix import dequantize
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch


@pytest.fixture
def deaf() -> Iterator[None]:
    register_kernel("deaf", Deaf)
    yield
    unregister_kernel("deaf")


CONFIG = MixtralConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    dtype="float32",
)
EXPERTS = "model.layers.0.mlp.experts"
PREFIX = "model.layers.0.block_sparse_moe.experts"
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "mixtral"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(directory)
    return directory


def is_packed(name: str) -> bool:
    return ".experts." in name or "self_attn" in name


def scale_of(name: str) -> float:
    """Of a matrix's input: of each another one, and gate's not up's."""
    where, _, letter = name.removesuffix(".weight").rpartition(".")
    number = int(where.rpartition(".")[2]) if ".experts." in name else 0
    each = {"w1": 0.01, "w3": 0.012, "w2": 0.0005, "q_proj": 0.02}.get(letter, 0.015)
    return each * (1 + number / 4)


Change = Callable[[dict[str, Tensor]], None]


def static_checkpoint(
    dense: Path, out: Path, name: str, activations: dict[str, Any], change: Change | None = None
) -> dict[str, Tensor]:
    """A compressed-tensors checkpoint with static activations; -> what its matrices stand for."""
    means = write_packed(dense, out, name, is_packed)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = activations
    (out / "config.json").write_text(json.dumps(config))
    stored = load_file(out / "model.safetensors")
    for matrix in filter(is_packed, means):
        scale = torch.tensor([scale_of(matrix)])
        stored[matrix.removesuffix("weight") + "input_scale"] = scale
    if change is not None:
        change(stored)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return means


def asked(scheme: ActivationScheme) -> dict[str, Any]:
    kind = "int" if scheme.code is Code.INT else "float"
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }


STATIC: dict[str, tuple[str, ActivationScheme]] = {
    "W8A8 int8": ("ct_int8_channel_w8a8", INT8),
    "W4A8 int8": ("ct_pack_int4_g32_sym", INT8),
    "W4A8 fp8": ("ct_pack_int4_g128_w4a8_fp8", E4M3),
    "FP8": ("ct_fp8_tensor", E4M3),
}
by_file = pytest.mark.parametrize(("file", "scheme"), STATIC.values(), ids=STATIC.keys())


def experts_of(model: Any) -> PackedExperts:
    return next(m for m in model.modules() if isinstance(m, PackedExperts))


def fake_quantized(
    means: dict[str, Tensor],
    given: ExpertBatch,
    scheme: ActivationScheme,
    unscaled: Iterable[int] = (),
) -> Tensor:
    """The experts of the checkpoint from its dense matrices and the scales above."""
    out = torch.zeros_like(given.hidden_states)
    for row, ids in enumerate(given.local_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert < 0:
                continue
            names = {letter: f"{PREFIX}.{expert}.{letter}.weight" for letter in ("w1", "w2", "w3")}
            first = max(scale_of(names["w1"]), scale_of(names["w3"]))
            second = scale_of(names["w2"])
            if expert in unscaled:
                first = second = 0.0
            x = round_activations(given.hidden_states[row], scheme, torch.tensor(first))
            hidden = F.silu(means[names["w1"]] @ x) * (means[names["w3"]] @ x)
            hidden = round_activations(hidden, scheme, torch.tensor(second))
            out[row] += given.topk_weights[row, slot] * (means[names["w2"]] @ hidden)
    return out


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@by_file
def test_a_checkpoint_computes_with_its_scales(
    file: str, scheme: ActivationScheme, kernel: str, dense: Path, tmp_path: Path
) -> None:
    if kernel == "cpu" and missing() is not None:
        pytest.skip(missing() or "")
    means = static_checkpoint(dense, tmp_path / "static", file, asked(scheme))
    given = batch(sizes(4, 64, 96), 12)
    expected = fake_quantized(means, given, scheme)
    model = mixtura.from_pretrained(tmp_path / "static", kernel=kernel, strict=kernel == "cpu")
    experts = experts_of(model)
    with torch.no_grad():
        for found in (experts, copy.deepcopy(experts), experts.to(torch.float32)):
            assert frobenius_error(found.run_batch(given), expected) < FLIPS
        # And weights alone are another result.
        mixtura.convert(model, kernel=kernel, activation_dtype="bf16")
        found = experts.run_batch(given)
        assert frobenius_error(found, expected) > 3 * FLIPS
        assert frobenius_error(found, fake_quantized(means, given, scheme, range(4))) < 5e-3


@by_file
def test_linear_layers_of_a_checkpoint_round_too(
    file: str, scheme: ActivationScheme, dense: Path, tmp_path: Path
) -> None:
    means = static_checkpoint(dense, tmp_path / "static", file, asked(scheme))
    model = mixtura.from_pretrained(tmp_path / "static")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(linears) == 4
    rows = torch.randn(3, 64)
    for path, linear in linears.items():
        scale = torch.tensor(scale_of(f"{path}.weight"))
        rounded = round_activations(rows, scheme, scale)
        expected = F.linear(rounded, means[f"{path}.weight"])
        for one in (linear, copy.deepcopy(linear)):
            assert frobenius_error(one(rows), expected) < 1e-5
        exact = F.linear(rounded.double(), means[f"{path}.weight"].double())
        assert frobenius_error(linear(rows.double()), exact) < 1e-6  # in torch
    mixtura.convert(model, activation_dtype="bf16")
    for path, linear in linears.items():
        plain = F.linear(rows, means[f"{path}.weight"])
        assert frobenius_error(linear(rows), plain) < 4e-3
        wide = dequantize(linear.matrix, torch.float64)
        assert torch.equal(linear(rows.double()), F.linear(rows.double(), wide))


def test_a_layer_that_the_kernel_cannot_read_rounds_too(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtura.hf.packed_load.cannot_pack", lambda scheme: "not in this test")
    file, scheme = STATIC["W8A8 int8"]
    means = static_checkpoint(dense, tmp_path / "static", file, asked(scheme))
    model = mixtura.from_pretrained(tmp_path / "static")
    name, rows = f"{ATTENTION}.q_proj", torch.randn(3, 64)
    rounded = round_activations(rows, scheme, torch.tensor(scale_of(f"{name}.weight")))
    found = model.get_submodule(name)(rows)
    assert frobenius_error(found, F.linear(rounded, means[f"{name}.weight"])) < 1e-5


def without_scales_of(expert: int) -> Change:
    def change(stored: dict[str, Tensor]) -> None:
        for letter in ("w1", "w2", "w3"):
            del stored[f"{PREFIX}.{expert}.{letter}.input_scale"]

    return change


def test_an_expert_that_no_token_reached_is_not_rounded(dense: Path, tmp_path: Path) -> None:
    file, scheme = STATIC["W8A8 int8"]
    out = tmp_path / "static"
    means = static_checkpoint(dense, out, file, asked(scheme), without_scales_of(2))
    given = batch(sizes(4, 64, 96), 12)
    model = mixtura.from_pretrained(out, kernel="torch")
    with torch.no_grad():
        found = experts_of(model).run_batch(given)
    assert frobenius_error(found, fake_quantized(means, given, scheme, unscaled=[2])) < FLIPS
    words = "int8 per tensor, static (1 of 4 matrices have no scale: not rounded)"
    assert read_ledger(out).asked(EXPERTS) == words


def test_a_gate_without_a_scale_has_that_of_up(dense: Path, tmp_path: Path) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        del stored[f"{PREFIX}.1.w3.input_scale"]

    file, scheme = STATIC["W8A8 int8"]
    static_checkpoint(dense, tmp_path / "static", file, asked(scheme), change)
    given = experts_of(mixtura.from_pretrained(tmp_path / "static")).expert_weights
    assert given.gate_up_inputs is not None
    w1, w3 = (torch.tensor([scale_of(f"{PREFIX}.{e}.{w}") for e in range(4)]) for w in ("w1", "w3"))
    expected = torch.where(torch.arange(4) == 1, w1, torch.maximum(w1, w3))
    assert torch.equal(given.gate_up_inputs.scales, expected)


class Scales:
    """As much of a checkpoint as says which scales it has."""

    def __init__(self, schemes: dict[str, ActivationScheme], scales: dict[str, float]) -> None:
        self.packed = {
            name: SimpleNamespace(format=SimpleNamespace(activations=scheme))
            for name, scheme in schemes.items()
        }
        self.scales = scales

    def has_input_scale(self, name: str) -> bool:
        return name in self.scales

    def input_scale(self, name: str) -> Tensor:
        return torch.tensor(self.scales[name])


def inputs_of(checkpoint: Scales, slots: dict[str, Slots], num_experts: int) -> Any:
    reader = MatrixReader(checkpoint, None, {})  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(config=SimpleNamespace(num_experts=num_experts))
    return reader.inputs(PackedModule("experts", plan, slots, {}))


def test_gate_and_up_that_are_modules_of_their_own_share_the_larger_scale() -> None:
    scales = {"g0": 1.0, "u0": 2.0, "g1": 4.0, "u1": 3.0}
    slots = {"gate_up_proj": Slots((("g0",), ("g1",))), "up_proj": Slots((("u0",), ("u1",)))}
    found = inputs_of(Scales(dict.fromkeys(scales, INT8), scales), slots, 2)
    assert found["gate_up_inputs"].scales.tolist() == [2.0, 4.0] and len(found) == 1


def test_a_scale_of_another_rounding_is_not_taken_for_it() -> None:
    nvfp4 = ActivationScheme(Code.E2M1, 4, ActivationGroup.GROUP, 16, is_static=True)
    slots = {"down_proj": Slots((("d0",), ("d1",)))}
    found = inputs_of(Scales({"d0": nvfp4, "d1": E4M3}, {"d0": 1e-4, "d1": 0.5}), slots, 2)
    assert found["down_inputs"].scheme == E4M3
    assert found["down_inputs"].scales.tolist() == [0.0, 0.5]
    assert inputs_of(Scales({"d0": nvfp4}, {"d0": 1e-4}), {"down_proj": Slots((("d0",),))}, 1) == {}


def test_no_scale_at_all_is_weights_alone(dense: Path, tmp_path: Path) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith("input_scale")]:
            del stored[name]

    file, scheme = STATIC["W8A8 int8"]
    static_checkpoint(dense, tmp_path / "static", file, asked(scheme), change)
    assert experts_of(mixtura.from_pretrained(tmp_path / "static")).expert_weights.inputs == ()
    (layer,) = explain(tmp_path / "static").layers
    assert layer.experts is not None and not layer.experts.rounds_as_asked


def test_several_roundings_of_one_input_are_told_and_left_out(dense: Path, tmp_path: Path) -> None:
    file, scheme = STATIC["W8A8 int8"]
    out = tmp_path / "static"
    static_checkpoint(dense, out, file, asked(scheme))
    config = json.loads((out / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    odd = {**groups["group_0"], "targets": ["re:.*experts.1.w2$"], "input_activations": asked(E4M3)}
    groups["group_1"] = odd
    (out / "config.json").write_text(json.dumps(config))
    with pytest.warns(CheckpointWarning, match="to int8 per tensor, static and to e4m3 per tensor"):
        weights = experts_of(mixtura.from_pretrained(out)).expert_weights
    assert weights.gate_up_inputs is not None and weights.down_inputs is None


def test_a_scale_that_cannot_be_meant_ends_the_load(dense: Path, tmp_path: Path) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        stored[f"{PREFIX}.1.w2.input_scale"] = torch.tensor([0.0])

    file, scheme = STATIC["FP8"]
    static_checkpoint(dense, tmp_path / "static", file, asked(scheme), change)
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight: input_scale .* above"):
        mixtura.from_pretrained(tmp_path / "static")


def test_explain_and_the_ledger_say_what_runs(dense: Path, tmp_path: Path) -> None:
    file, scheme = STATIC["W8A8 int8"]
    out = tmp_path / "static"
    static_checkpoint(dense, out, file, asked(scheme))
    (layer,) = explain(out).layers
    assert layer.experts is not None and layer.experts.rounds_as_asked
    assert layer.experts.kernel_path is not None
    assert layer.experts.kernel_path.endswith("activations rounded to int8 with the file's scales")
    text = CliRunner().invoke(app, ["explain", "--model", str(out)]).output
    assert "int8 per tensor, static activations; they run so" in text
    text = CliRunner().invoke(app, ["inspect", "--ledger", "--model", str(out)]).output
    assert "ask for int8 per tensor, static activations; stored scales of int8 and e4m3" in text


def test_explain_says_that_dynamic_scales_are_the_kernels_own(dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "dynamic", "ct_int8_channel_w8a8", is_packed)
    (layer,) = explain(tmp_path / "dynamic").layers
    assert layer.experts is not None and not layer.experts.rounds_as_asked
    text = CliRunner().invoke(app, ["explain", "--model", str(tmp_path / "dynamic")]).output
    assert "int8 per token activations; they run as the kernel says" in text


@pytest.mark.usefixtures("deaf")
def test_strict_refuses_what_would_ignore_the_scales(dense: Path, tmp_path: Path) -> None:
    file, scheme = STATIC["FP8"]
    static_checkpoint(dense, tmp_path / "static", file, asked(scheme))
    with pytest.raises(NoKernelFits, match="does not round activations to e4m3"):
        explain(tmp_path / "static", strict=True)
