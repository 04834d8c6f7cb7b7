"""Experts that are quantized while a checkpoint streams in: `weights=`."""

from __future__ import annotations

import copy
import gc
import json
import mmap
import pickle
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXCEPTIONS, LOADED_AS, TinyCase, discover, tiny_model
from safetensors.torch import load_file, save_file
from tolerances import relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from mixtura import convert, from_pretrained
from mixtura.cli import app
from mixtura.config import GateUp
from mixtura.errors import (
    CheckpointError,
    ConfigError,
    GradientUnsupported,
    InputError,
    UnsupportedModel,
)
from mixtura.experts import PackedExperts
from mixtura.hf import loader, moe_layers
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.explain import explain
from mixtura.hf.load import load_stock
from mixtura.hf.loader import MATRICES, LoadFormats, Stream
from mixtura.hf.mapped import MappedFiles
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize

FAMILIES = [LOADED_AS.get(name, name) for name in sorted(discover().keys() - EXCEPTIONS.keys())]
PACKED = [format for format in WeightFormat if format.scheme.is_quantized]
TOLERANCE = 1e-5


def saved(case: TinyCase, directory: Path) -> Path:
    case.model.save_pretrained(directory)
    return directory


def load(directory: Path, **arguments: Any) -> PreTrainedModel:
    """Loaded, with the kernel whose arithmetic is that of the rows."""
    arguments.setdefault("kernel", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)  # JetMoE's attention
        return from_pretrained(directory, attn_implementation="eager", **arguments)


def experts_of(model: nn.Module) -> dict[str, PackedExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}


@torch.no_grad()
def rounded(model: PreTrainedModel, format: WeightFormat) -> PreTrainedModel:
    """The model with dense experts of the values that the format can hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)
        made = convert(copy.deepcopy(model), kernel="torch")
    for module in experts_of(made).values():
        for role, stored in module.storage.items():
            if role in MATRICES:
                weight = stored.logical(stored.read(module).data)
                weight.copy_(dequantize(quantize(weight, format)))
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE whose checkpoint has a tensor for each expert."""
    return saved(tiny_model("qwen3_moe"), tmp_path_factory.mktemp("tiny"))


# -------------------------------------------------------------------------------------- families


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams_into_a_format(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []
    fill_late = Stream._fill_late

    def noted(self: Stream, model: Any, slot: Any, **kwargs: Any) -> None:
        if slot.matrix is None:
            late.append(slot.name)
        fill_late(self, model, slot, **kwargs)

    monkeypatch.setattr(Stream, "_fill_late", noted)
    format = PACKED[FAMILIES.index(family) % len(PACKED)]
    case = tiny_model(family)
    loaded = load(saved(case, tmp_path), weights=format)
    assert late == []
    # Not `case.model`: a ZAYA that is saved and loaded computes something else.
    expected = rounded(load_stock(tmp_path, attn_implementation="eager"), format)
    assert experts_of(loaded).keys() == experts_of(expected).keys()
    for name, module in experts_of(loaded).items():
        assert module.given is not None and module.given.schemes == (format.scheme,)
        assert not {f"{name}.{s.path}" for s in experts_of(expected)[name].storage.values()} & {
            parameter for parameter, _ in loaded.named_parameters()
        }
    assert [(x.name, x.kind) for x in moe_layers(loaded)] == [
        (x.name, x.kind) for x in moe_layers(expected)
    ]
    assert relative_error(case.output(loaded), case.output(expected)) <= TOLERANCE


def test_the_families_cover_every_way_to_store_experts() -> None:
    found = set()
    for family in ("qwen3_moe", "gpt_oss", "dbrx", "nemotron_h", "llama4", "muse_spark"):
        for module in experts_of(
            rounded(tiny_model(family).model, WeightFormat.INT8_CHANNEL)
        ).values():
            c = module.experts_config
            found |= {c.gate_up, ("transposed", c.is_transposed), ("bias", c.has_bias)}
            found |= {("norm", c.post_norm is not None)}
    assert found >= {*GateUp, *((n, b) for n in ("transposed", "bias", "norm") for b in (True,))}


@torch.no_grad()
@pytest.mark.parametrize("format", PACKED, ids=lambda format: format.value)
def test_every_format(format: WeightFormat, tiny: Path) -> None:
    case = tiny_model("qwen3_moe")
    loaded = load(tiny, weights=format.value)
    expected = rounded(case.model, format)
    assert relative_error(case.output(loaded), case.output(expected)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("shard_size", ["10MB", "20kB"])
def test_stacks_and_single_experts_on_disk_load_alike(
    shard_size: str, tiny: Path, tmp_path: Path
) -> None:
    case = tiny_model("qwen3_moe")
    names = load_file(tiny / "model.safetensors")
    assert any(".experts.3.gate_proj.weight" in name for name in names)
    stacked = tmp_path / "stacked"
    case.model.save_pretrained(stacked, save_original_format=False, max_shard_size=shard_size)
    files = list(stacked.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "20kB")
    assert any(name.endswith(".experts.gate_up_proj") for f in files for name in load_file(f))
    outputs = [case.output(load(d, weights="int4-g32")) for d in (tiny, stacked)]
    assert torch.equal(*outputs)


def test_short_names(tiny: Path) -> None:
    for name, format in (("int4", WeightFormat.INT4_G128), ("int8", WeightFormat.INT8_G128)):
        for module in experts_of(load(tiny, weights=name)).values():
            assert module.given is not None and module.given.schemes == (format.scheme,)


# ---------------------------------------------------------------------------------------- memory


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors alive at a time, of those that operations make meanwhile.

    Views do not count, and so neither do tensors that are views of a file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before = {t.untyped_storage()._cdata for t in self._tensors((args, kwargs))}
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in before or key in self.sizes or tensor.device.type != "cpu":
                continue
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    @property
    def current(self) -> int:
        return sum(self.sizes.values())


NUM_LAYERS = 12


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers, nearly all of whose bytes are experts."""
    config = Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=2,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=32,
    )
    directory = tmp_path_factory.mktemp("deep")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("weights", ["int4", "int8", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 is a cast: no views
def test_memory_holds_the_result_and_one_dense_layer(
    weights: str, dtype: torch.dtype, deep: Path
) -> None:
    layer = 3 * 16 * 64 * 64 * dtype.itemsize  # gate, up and down of 16 experts
    with PeakBytes() as memory:
        model = load_stock(deep, LoadFormats.parse(weights, None), dtype=dtype)
        memory_at_end = memory.current
    packed = sum(m.given.num_bytes for m in experts_of(model).values() if m.given is not None)
    beside = sum(p.nbytes for p in model.parameters())
    assert packed <= memory_at_end <= packed + beside + layer / 4
    assert memory.peak <= packed + beside + 2 * layer
    assert memory.peak < 0.7 * NUM_LAYERS * layer  # far from dense


def test_the_meter_sees_a_dense_load(deep: Path) -> None:
    with PeakBytes() as memory:
        model = load_stock(deep, dtype=torch.float32)
        assert memory.peak >= memory.current >= 0.95 * sum(p.nbytes for p in model.parameters())


def test_nothing_keeps_what_was_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[weakref.ref[Stream]] = []
    begin = Stream.begin

    def noted(self: Stream, *args: Any) -> None:
        streams.append(weakref.ref(self))
        begin(self, *args)

    monkeypatch.setattr(Stream, "begin", noted)
    model = load(tiny, weights="int4")
    gc.collect()
    assert [stream() for stream in streams] == [None]
    assert not hasattr(model, "hf_quantizer")
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert "quantization" not in model.config.to_json_string()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident_bytes(path: Path) -> int:
    """Pages of a file that are mapped and in this process's memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(str(path.resolve()))
        elif is_ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some file"
    path.write_bytes(b"x" * (64 * mmap.PAGESIZE))
    return path


def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE)


@linux
def test_pages_that_were_read_are_given_back(file: Path) -> None:
    files = MappedFiles([file])
    view = mapped(file)
    assert view[:] == file.read_bytes()
    assert resident_bytes(file) == len(view)
    files.release()
    assert resident_bytes(file) == 0
    assert view[:] == file.read_bytes()


@linux
def test_pages_are_given_back_now_and_then(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MappedFiles([file])
    view = mapped(file)
    assert view[:] == file.read_bytes()
    monkeypatch.setattr("mixtura.hf.mapped.RELEASE_BYTES", 100)
    for num_bytes, is_left in ((60, True), (39, True), (1, False), (99, True), (1, False)):
        assert view[0] == ord("x")
        files.count(num_bytes)
        assert (resident_bytes(file) > 0) is is_left


@linux
def test_pages_that_were_changed_are_not_lost(file: Path) -> None:
    files = MappedFiles([file])
    view = mapped(file)
    view[5:6] = b"y"
    files.release()
    assert view[:8] == b"xxxxxyxx"


@linux
def test_mappings_of_others_are_left_alone(file: Path) -> None:
    view = mapped(file)
    assert len(view[:]) == resident_bytes(file)
    MappedFiles([file]).release()
    MappedFiles([file.with_name("another")]).release()
    assert resident_bytes(file) == len(view)


@linux
def test_loading_leaves_the_experts_pages_on_disk(deep: Path) -> None:
    model = load_stock(deep, LoadFormats.parse("int4", None))
    size = (deep / "model.safetensors").stat().st_size
    assert resident_bytes(deep / "model.safetensors") < size / 4
    assert torch.isfinite(model.get_input_embeddings().weight).all()  # still a view of the file


# ------------------------------------------------------------------- what becomes of the modules


def test_gradients_raise(tiny: Path) -> None:
    case, model = tiny_model("qwen3_moe"), load(tiny, weights="int4")
    with pytest.raises(GradientUnsupported, match="must be dense to have gradients"):
        case.output(model)
    with torch.no_grad():
        case.output(model)


def test_a_state_dict_raises_instead_of_leaving_experts_out(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny, weights="int4")
    for call in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(InputError, match=r"int4.* must be dense to be written to a state_dict"):
            call()
    state = tiny_model("qwen3_moe").model.state_dict()
    with pytest.raises(InputError, match=r"must be dense to be loaded from a state_dict"):
        model.load_state_dict(state)


@torch.no_grad()
def test_copies_pickles_and_dtypes(tiny: Path) -> None:
    case, model = tiny_model("qwen3_moe"), load(tiny, weights="int8")
    expected = case.output(model)
    assert torch.equal(case.output(copy.deepcopy(model)), expected)
    assert torch.equal(case.output(pickle.loads(pickle.dumps(model))), expected)
    half = case.output(model.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert relative_error(half.float(), expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "jetmoe", "granitemoe"])
def test_such_a_model_can_be_converted_again(family: str, tmp_path: Path) -> None:
    case = tiny_model(family)
    model = load(saved(case, tmp_path), weights="int8")
    expected = case.output(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)
        convert(model, kernel="reference")
    for module in experts_of(model).values():
        assert module.options.kernel == "reference"
        assert module.given is not None
    assert relative_error(case.output(model), expected) <= TOLERANCE


def test_another_experts_implementation_finds_no_weights(tmp_path: Path) -> None:
    case = tiny_model("granitemoe")  # only its experts are ours
    model = load(saved(case, tmp_path), weights="int8")
    model.set_experts_implementation("eager")
    with torch.no_grad(), pytest.raises(InputError, match="another experts implementation"):
        case.output(model)


# ---------------------------------------------------------------------------------- dense formats


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_dense_format_is_the_experts_dtype(
    family: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = tiny_model(family)
    loaded = load(saved(case, tmp_path), weights=name)
    for module in experts_of(loaded).values():
        assert module.given is None
        matrices = [module.storage[role].read(module) for role in ("gate_up_proj", "down_proj")]
        assert {matrix.dtype for matrix in matrices} == {dtype}
    assert loaded.dtype is torch.float32
    expected = rounded(case.model, WeightFormat.parse(name))
    assert relative_error(case.output(loaded), case.output(expected)) <= TOLERANCE
    assert loaded.state_dict().keys() == case.model.state_dict().keys()


def test_a_dense_format_has_gradients(tiny: Path) -> None:
    case, model = tiny_model("qwen3_moe"), load(tiny, weights="bf16")
    case.output(model).square().sum().backward()
    for module in experts_of(model).values():
        down = module.storage["down_proj"].read(module)
        assert down.grad is not None and down.grad.abs().sum() > 0


def test_a_wider_format_than_the_model_keeps_the_stored_bits(tiny: Path) -> None:
    model = load(tiny, weights="fp32", dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    exact = dict(tiny_model("qwen3_moe").model.named_parameters())
    for name, module in experts_of(model).items():
        stored = module.storage["down_proj"]
        assert torch.equal(stored.read(module), exact[f"{name}.{stored.path}"])


# ----------------------------------------------------------------------------------------- errors


def changed(tiny: Path, directory: Path, **tensors: Tensor) -> Path:
    directory.mkdir()
    (directory / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(
        {**load_file(tiny / "model.safetensors"), **tensors},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float, tiny: Path, tmp_path: Path) -> None:
    weight = load_file(tiny / "model.safetensors")[EXPERT].clone()
    weight[2, 5] = bad
    broken = changed(tiny, tmp_path / "broken", **{EXPERT: weight})
    place = (
        r"model\.layers\.1\.mlp\.experts\.down_proj \(expert 3, row 2, column 5\) must be finite"
    )
    for format in ("int4", "mxfp4", "bf16"):
        with pytest.raises(InputError, match=place):
            load(broken, weights=format)
    load(tiny, weights="int4")  # the error has left nothing behind


def test_weights_of_another_shape_than_configured(tiny: Path, tmp_path: Path) -> None:
    names = load_file(tiny / "model.safetensors")
    narrow = {n: t[..., :-1].contiguous() for n, t in names.items() if "down_proj" in n}
    broken = changed(tiny, tmp_path / "narrow", **narrow)
    with pytest.raises(CheckpointError, match=r"down_proj\S* \(\(.*\)\) must have the shape"):
        load(broken, weights="int4")


def test_a_missing_projection(tiny: Path, tmp_path: Path) -> None:
    directory = changed(tiny, tmp_path / "missing")
    names = load_file(directory / "model.safetensors")
    kept = {n: t for n, t in names.items() if "layers.2.mlp.experts" not in n}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"got none for model\.layers\.2\.mlp\.experts"):
        load(directory, weights="int4")


def test_an_unknown_format_is_told_before_a_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(q4_k\) must be one of fp32, .*, int4, int8;"):
        from_pretrained(tmp_path / "nothing", weights="q4_k")


def test_a_quantized_checkpoint(tiny: Path, tmp_path: Path) -> None:
    directory = changed(tiny, tmp_path / "quantized")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="must be left out for a quantized checkpoint"):
        load(directory, weights="int4")


def test_a_second_quantizer(tiny: Path) -> None:
    with pytest.raises(InputError, match="quantization_config must not be given along with"):
        load(tiny, weights="int4", quantization_config={"quant_method": "fp8"})


def test_offloaded_experts(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"model.layers.1": "disk", "model": "cpu", "lm_head": "cpu"}
    with pytest.raises(InputError, match="device_map must keep weights in memory"):
        load(tiny, weights="int4", device_map=places, offload_folder=str(tmp_path / "offload"))
    monkeypatch.setattr(loader, "offloads", lambda module: True)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.experts .*offloaded"):
        load(tiny, weights="int4")


def test_a_model_without_experts_of_ours(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "plan_layers", lambda *_: ({}, {}, {}))
    with pytest.raises(UnsupportedModel, match="must have experts that mixtura runs"):
        load(tiny, weights="int4")


# ------------------------------------------------------------------------- explain, command line


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe", "longcat_flash"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "bf16"])
def test_explain_says_what_loading_gives(family: str, weights: str, tmp_path: Path) -> None:
    loaded = load(saved(tiny_model(family), tmp_path), weights=weights)
    found = explain(tmp_path, weights=weights)
    experts = experts_of(loaded).values()
    held = [
        module.given.num_bytes
        if module.given is not None
        else sum(stored.read(module).nbytes for stored in module.storage.values())
        for module in experts
    ]
    assert found.expert_bytes == sum(held)
    own = {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}
    persistent = sum(t.nbytes for n, t in loaded.named_buffers() if "inv_freq" not in n)
    beside = sum(p.nbytes for p in loaded.parameters()) + persistent
    given = sum(held) if WeightFormat.parse(weights).scheme.is_quantized else 0
    assert own and found.num_bytes == beside + given
    for layer in found.layers:
        assert layer.experts is not None and layer.experts.stored_dtype == "float32"
        assert layer.experts.dtype == WeightFormat.parse(weights).value


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


DEMO_PROMPT = ("generate", "Once upon a time", "--max-new-tokens", "8", "--kernel", "torch")


def test_generate_with_formats() -> None:
    dense = run(*DEMO_PROMPT)
    packed = run(*DEMO_PROMPT, "--weights", "int8", "--linears", "int8")
    assert packed.exit_code == dense.exit_code == 0, packed.stderr
    assert "experts in int8-g128, linear layers in int8-g128" in packed.stderr
    assert "experts in" not in dense.stderr
    assert packed.stdout.split()[:2] == dense.stdout.split()[:2]


def test_inspect_and_explain_with_formats() -> None:
    found = run("inspect", "--weights", "int4", "--max-tokens", "32", "--kernel", "torch")
    assert found.exit_code == 0, found.stderr
    explained = run("explain", "--weights", "int4", "--json", "--kernel", "torch")
    assert explained.exit_code == 0, explained.stderr
    layers = json.loads(explained.stdout)["layers"]
    assert {layer["experts"]["dtype"] for layer in layers} == {"int4-g128"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "--weights", "q5"),
        ("generate", "x", "--linears", "q5"),
        ("inspect", "--weights", "q5"),
        ("explain", "--weights", "q5"),
    ],
)
def test_an_unknown_format_on_the_command_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: weight format (q5) must be one of fp32, ")
