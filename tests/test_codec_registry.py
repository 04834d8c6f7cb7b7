"""Which family a configuration means, and what `decode` asks of its arguments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtura.quant
from mixtura.errors import CheckpointError
from mixtura.quant import codec_for, decode
from mixtura.quant.codecs import registry
from mixtura.quant.codecs.checks import matches_fragment
from mixtura.quant.codecs.contract import Codec

ROOT = Path(__file__).parent.parent
GPTQ = {"bits": 4, "group_size": 32, "sym": True}
PRESENT = [
    family
    for family in registry._FAMILIES
    if importlib.util.find_spec(f"mixtura.quant.codecs.{family.partition(':')[0]}")
]


@pytest.mark.parametrize("family", PRESENT)
def test_the_table_says_what_the_families_say(family: str) -> None:
    methods = registry._FAMILIES[family]
    found = {registry.codec_class(method) for method in methods}
    (codec,) = found
    assert issubclass(codec, Codec)
    assert codec.__name__ == family.partition(":")[2]
    assert set(codec.methods) == set(methods)


def test_no_method_has_two_families() -> None:
    names = registry.method_names()
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ({**GPTQ, "quant_method": "gptq"}, "GPTQ"),
        ({**GPTQ, "quant_method": "GPTQ"}, "GPTQ"),
        ({**GPTQ, "quant_method": "gptq_marlin"}, "GPTQ"),
        ({**GPTQ, "method": "gptq", "format": "gptq_v2"}, "GPTQ"),
        ({**GPTQ, "desc_act": False}, "GPTQ"),  # quantize_config.json
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "AWQ"),
        ({"quant_method": "auto_awq", "bits": 4, "group_size": 128}, "AWQ"),
        ({"method": "awq", "bits": 4, "group_size": 128}, "AWQ"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"b_dtype": "uint4", "weight_scale_group_size": 128}, "Humming"),
        ({"model_type": "x", "quantization_config": {**GPTQ, "quant_method": "gptq"}}, "GPTQ"),
        ({"text_config": {"quantization_config": {**GPTQ, "quant_method": "gptq"}}}, "GPTQ"),
    ],
    ids=str,
)
def test_families_are_recognised(document: dict[str, Any], name: str) -> None:
    assert codec_for(document).name == name


class Recorder:
    """Stands for a family and keeps the configuration that it was given."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        return config


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "codec_class", lambda method: Recorder)


@pytest.mark.usefixtures("seen")
def test_files_of_modelopt_lose_their_wrapper() -> None:
    inner = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    document = {"producer": {"name": "modelopt"}, "quantization": inner}
    assert registry.codec_for(document) == {
        "producer": {"name": "modelopt"},
        **inner,
        "quant_method": "modelopt",
    }


@pytest.mark.usefixtures("seen")
def test_the_dtype_of_experts_beside_the_configuration_is_passed_on() -> None:
    document = {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8"}}
    assert registry.codec_for(document) == {"quant_method": "fp8", "expert_dtype": "fp4"}


@pytest.mark.usefixtures("seen")
def test_gguf_is_told_by_its_container() -> None:
    document = {"container": "gguf", "ggml_type": "Q4_0"}
    assert registry.codec_for(document) == {**document, "quant_method": "gguf"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "quant_method .*got none"),
        ({"quant_method": "torchao"}, r"quant_method \('torchao'\) must be one of gptq"),
        ({"quant_method": 4}, "quant_method"),
        ({"quantization_config": None}, "quantization_config"),
        ({"quantization_config": "gptq"}, "quantization_config"),
        ({"quantization": [4]}, "quantization"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quant_method"),  # MLX
    ],
    ids=str,
)
def test_documents_of_no_family(document: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        codec_for(document)


def test_documents_are_left_as_they_are() -> None:
    document = {"producer": {}, "quantization": {**GPTQ, "quant_method": "gptq"}}
    before = repr(document)
    codec_for(document)
    assert repr(document) == before


def test_decode_wants_the_parts_of_one_matrix() -> None:
    config = {"quant_method": "gptq", **GPTQ}
    weight = torch.ones(2, 4)
    for tensors, message in [
        ({}, r"tensors \(none\)"),
        ({"qwight": weight}, r"tensor \(qwight\).*GPTQ"),
        ({"weight": weight, "up_proj.weight": weight}, r"tensor \(up_proj.weight\)"),
        ({"qweight": weight, "up_proj.scales": weight}, r"tensor \(up_proj.scales\)"),
        ({"bias": weight}, r"tensor \(bias\)"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            decode(config, tensors)
    assert torch.equal(decode(config, {"weight": weight.half()}, shape=[2, 4]), weight)


def test_importing_the_room_is_cheap() -> None:
    program = "import sys, mixtura.quant; dir(mixtura.quant); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_public_names() -> None:
    assert set(mixtura.quant.__all__) <= set(dir(mixtura.quant))
    assert mixtura.quant.decode is decode
    with pytest.raises(AttributeError, match="no_such_name"):
        mixtura.quant.no_such_name  # noqa: B018 - looking is the test


@pytest.mark.parametrize(
    ("fragment", "name", "expected"),
    [
        ("gate", "mlp.gate", True),
        ("gate", "mlp.gate_proj", False),
        ("mlp.gate", "layers.0.mlp.gate", True),
        ("mlp.gate", "layers.0.xmlp.gate", False),
        (".layers.0.", "model.layers.0.mlp", True),
        ("layers.1", "model.layers.10.mlp", False),
    ],
)
def test_fragments_are_whole_components(fragment: str, name: str, expected: bool) -> None:
    assert matches_fragment([fragment], name) is expected
