"""AutoRound configurations: whose tensors they mean, module by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import random_words
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant import decode
from mixtura.quant.codecs import Header, codec_for
from mixtura.quant.codecs.awq import AwqFormat
from mixtura.quant.codecs.gptq import GptqFormat

INT32 = torch.int32
WORDS = Header(INT32, (1, 1))
BF16 = torch.bfloat16


def config(packing: str | None = "auto_round:auto_gptq", **changes: Any) -> dict[str, Any]:
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True}
    return {**base, "data_type": "int", "packing_format": packing, **changes}


def gptq_parts() -> dict[str, Tensor]:
    return {
        "qweight": random_words(4, 16),
        "qzeros": random_words(2, 2),
        "scales": torch.randn(2, 16).half(),
    }


@pytest.mark.filterwarnings("ignore:qzeros")
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq:exllamav2", None])
def test_packing_of_gptq(packing: str | None, sym: bool) -> None:
    theirs = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": sym}
    parts = gptq_parts()
    assert torch.equal(decode(config(packing, sym=sym), parts), decode(theirs, parts))


@pytest.mark.parametrize("sym", [True, False])
def test_packing_of_awq(sym: bool) -> None:
    parts = {
        "qweight": random_words(32, 2),
        "qzeros": random_words(2, 2),
        "scales": torch.randn(2, 16).half(),
    }
    theirs = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True}
    assert torch.equal(decode(config("auto_round:auto_awq", sym=sym), parts), decode(theirs, parts))
    del parts["qzeros"]
    if not sym:
        with pytest.raises(CheckpointError, match="qzeros"):
            decode(config("auto_round:auto_awq", sym=sym), parts)


def test_packing_of_fp8_blocks() -> None:
    weight = torch.randn(8, 20).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    found = decode(
        config("auto_round:fp8", data_type="fp", bits=8, group_size=[4, 8]),
        {"weight": weight, "weight_scale_inv": scales},
    )
    spread = scales.repeat_interleave(4, 0).repeat_interleave(8, 1)[:, :20]
    assert torch.equal(found, weight.float() * spread)


def test_packing_of_llm_compressor() -> None:
    parts = {"weight_packed": random_words(8, 4), "weight_scale": torch.randn(8, 2).bfloat16()}
    parts["weight_shape"] = torch.tensor([8, 32])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    theirs = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights}}},
    }
    theirs["config_groups"]["group_0"]["weights"]["group_size"] = 16
    ours = config("auto_round:llm_compressor")
    assert torch.equal(decode(ours, parts), decode(theirs, parts))


@pytest.mark.parametrize(
    ("kind", "bits", "parts", "scale"),
    [
        ("mx_fp", 4, {"weight_packed": (torch.uint8, 32)}, (torch.uint8, 2)),
        ("mx_fp", 8, {"weight": (torch.float8_e4m3fn, 64)}, (torch.uint8, 2)),
        ("nv_fp4", 4, {"weight_packed": (torch.uint8, 32)}, (torch.float8_e4m3fn, 4)),
    ],
)
def test_floats_of_llm_compressor(kind: str, bits: int, parts: Any, scale: Any) -> None:
    ours = config("auto_round:llm_compressor", data_type=kind, bits=bits, group_size=16)
    tensors = {
        part: torch.zeros(8, width, dtype=torch.uint8).view(dtype)
        for part, (dtype, width) in {**parts, "weight_scale": scale}.items()
    }
    if kind == "nv_fp4":
        tensors["weight_global_scale"] = torch.ones(1)
    assert decode(ours, tensors).tolist() == torch.zeros(8, 64).tolist()


def test_settings_of_single_modules() -> None:
    extra = {
        "model.layers.0.mlp.gate": {"bits": 16},
        "model.layers.1.mlp.up_proj": {"bits": 8, "group_size": -1, "sym": False},
        r".*layers\.[23]\..*": {"group_size": 32},
        r".*layers\.2\..*": {"group_size": 64},
        "lm_head": {"bits": 4},
    }
    codec = codec_for(config(extra_config=extra, block_name_to_quantize="model.layers"))
    headers = {"qweight": WORDS}
    base = GptqFormat(4, 16, True, 1)

    assert codec.format_of("model.layers.0.mlp.up_proj.weight", headers) == base
    assert codec.format_of("model.layers.1.mlp.up_proj.weight", headers) == GptqFormat(
        8, None, False, 1
    )
    for layer in (2, 3):  # the first pattern that fits
        found = codec.format_of(f"model.layers.{layer}.mlp.up_proj.weight", headers)
        assert found == GptqFormat(4, 32, True, 1)
    assert codec.format_of("model.layers.0.mlp.gate.weight", headers) == base  # tensors decide
    dense = {"weight": Header(BF16, (4, 4))}
    assert codec.format_of("model.layers.0.mlp.gate.weight", dense) is None

    assert not codec.expects("model.layers.0.mlp.gate.weight")
    assert codec.expects("model.layers.0.mlp.up_proj.weight")
    assert not codec.expects("visual.blocks.0.up_proj.weight")
    assert codec.split("a.up_proj.qweight") == ("a.up_proj.weight", "qweight")


def test_blocks_may_be_lists() -> None:
    blocks = [["model.layers.0", "model.layers.1"], "visual"]
    codec = codec_for(config(block_name_to_quantize=blocks))
    assert codec.expects("visual.up_proj.weight")
    assert not codec.expects("model.layers.2.up_proj.weight")
    names = codec_for(config(block_name_to_quantize="model.layers, visual"))
    assert names.expects("visual.up_proj.weight")


def test_awq_modules_are_awq_modules() -> None:
    codec = codec_for(config("auto_round:auto_awq"))
    assert codec.format_of("up_proj.weight", {"qweight": WORDS}) == AwqFormat(16, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "auto_round:exllamav2"}, "packing_format .*llm_compressor, gptq, awq, fp8"),
        ({"bits": 5}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": None}, "group_size"),
        ({"sym": None}, "sym"),
        ({"data_type": "fp8"}, "data_type"),
        ({"packing": "auto_round:auto_awq", "bits": 8}, "bits"),
        ({"packing": "auto_round:fp8", "bits": 4}, "bits"),
        ({"packing": "auto_round:llm_compressor", "data_type": "nf"}, "data_type"),
        ({"extra_config": []}, None),
        ({"extra_config": ["x"]}, "extra_config"),
        ({"extra_config": {"x": 4}}, "extra_config .*settings"),
        ({"extra_config": {"(x": {}}}, "extra_config .*regular expression"),
        ({"extra_config": {"x": {"bits": 7}}}, "bits"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        codec_for(config(**changes))
        return
    with pytest.raises(CheckpointError, match=message):
        codec_for(config(**changes))


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round", "inc", "INC"])
def test_names_of_the_method(method: str) -> None:
    assert codec_for(config(quant_method=method)).name == "AutoRound"


def test_content_errors_name_the_matrix() -> None:
    parts = {**gptq_parts(), "scales": torch.full((2, 16), torch.nan).half()}
    with pytest.raises(CheckpointError, match=r"projection.weight: scales"):
        decode(config(), parts)
