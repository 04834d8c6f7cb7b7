"""A rank reads its own experts: what it gets is its part of what one process gets, and no more."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from packed_files import write_packed
from test_family_fixtures import INDEX, checkpoint
from test_packed_load import CONFIGS, is_expert
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mixtura.config import ParallelConfig, PlacementStrategy
from mixtura.errors import ConfigError
from mixtura.experts import PackedExperts
from mixtura.hf.experts import AdoptedExperts
from mixtura.hf.load import find_checkpoint, load_packed, load_stock
from mixtura.hf.loader import LoadFormats
from mixtura.hf.mapped import MappedFiles
from mixtura.hf.stored import DenseCheckpoint
from mixtura.parallel import ExpertParallel, LoneTransport
from mixtura.parallel.shard import shard_weights


class OneRank(LoneTransport):
    """A rank of several, of which the others are never heard: what loading needs of a group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def ranks_of(rank: int, parallel: ParallelConfig) -> ExpertParallel:
    return ExpertParallel.over(parallel, OneRank(rank, parallel.num_ranks))


def load_part(model: Path, ranks: ExpertParallel, formats: LoadFormats | None = None) -> Any:
    return load_packed(*find_checkpoint(model), formats, ranks)


def experts_of(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PackedExperts, AdoptedExperts))
    }


def assert_is_part(
    model: Path, parallel: ParallelConfig, formats: LoadFormats | None = None
) -> None:
    """Compare every rank's experts with their part of all, and the rest with all, bit for bit."""
    whole = load_part(model, ranks_of(0, ParallelConfig()), formats)
    everything = experts_of(whole)
    assert everything
    for rank in range(parallel.num_ranks):
        ranks = ranks_of(rank, parallel)
        part = load_part(model, ranks, formats)
        for name, module in experts_of(part).items():
            assert module.spread.ranks is ranks
            expected = shard_weights(everything[name].expert_weights, module.spread)
            assert module.expert_weights.config == expected.config
            assert module.expert_weights.activations == expected.activations
            for found, wanted in zip(
                module.expert_weights.tensors(), expected.tensors(), strict=True
            ):
                assert found.dtype == wanted.dtype
                assert torch.equal(as_bytes(found), as_bytes(wanted))
        rest, others = part.named_parameters(), dict(whole.named_parameters())
        assert all(torch.equal(value, others[name]) for name, value in rest)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def some(names: list[str], others: list[str]) -> list[Any]:
    """Cases, of which the others are slow."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint, one tensor to an expert."""
    directory = tmp_path_factory.mktemp("dense") / request.param
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("placement", list(PlacementStrategy))
def test_dense_experts(placement, dense):
    assert_is_part(dense, ParallelConfig(ep_size=2, placement=placement))


def test_one_rank_of_the_new_way_is_the_old_way(dense):
    old = load_stock(dense)
    new = load_part(dense, ranks_of(0, ParallelConfig()))
    for name, module in experts_of(new).items():
        stock: Any = old.get_submodule(name)
        assert torch.equal(module.expert_weights.gate_up_proj.values, stock.gate_up_proj)
        assert torch.equal(module.expert_weights.down_proj.values, stock.down_proj)


@pytest.mark.parametrize("weights", some(["int4", "fp8"], ["mxfp4", "bf16"]))
def test_dense_experts_are_quantized_as_they_come(weights, dense):
    formats = LoadFormats.parse(weights, "int8")
    assert_is_part(dense, ParallelConfig(ep_size=2), formats)
    old = experts_of(load_stock(dense, formats))
    new = experts_of(load_part(dense, ranks_of(0, ParallelConfig()), formats))
    for name, module in new.items():
        weights, expected = module.expert_weights, old[name].expert_weights
        assert weights.activations == expected.activations
        pairs = zip(weights.tensors(), expected.tensors(), strict=True)
        assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs)


def test_experts_are_cut_too(dense):
    assert_is_part(dense, ParallelConfig(ep_size=1, tp_size=2))


@pytest.mark.parametrize(
    "family",
    some(["longcat_flash"], ["gpt_oss", "dbrx", "jetmoe", "llama4", "qwen3_vl_moe", "nemotron_h"]),
)
def test_families_that_store_experts_in_other_ways(family, tmp_path):
    tiny_model(family).model.save_pretrained(tmp_path)
    assert_is_part(tmp_path, ParallelConfig(ep_size=3))


@pytest.mark.parametrize("name", ["gptq_v1_w4_g32_asym", "ct_nvfp4", "fp8_block128_exact"])
def test_packed_experts(name, dense, tmp_path):
    write_packed(dense, tmp_path / "packed", name, is_expert)
    assert_is_part(tmp_path / "packed", ParallelConfig(ep_size=2))


IN_SEVERAL = ["gguf-q4_0-qwen3_moe", "gptq-int4-act-order-mixtral"]


@pytest.mark.parametrize("name", some(IN_SEVERAL, [n for n in INDEX if n not in IN_SEVERAL]))
def test_files_of_other_packages(name, tmp_path):
    assert_is_part(checkpoint(name, tmp_path), ParallelConfig(ep_size=2))


def test_experts_stored_in_several_ways_are_dense_on_every_rank(dense, tmp_path):
    """Also on a rank whose own are all alike."""
    write_packed(
        dense,
        tmp_path / "mixed",
        "gptq_v1_w4_g32_asym",
        lambda name: is_expert(name) and ".experts.0." not in name,
    )
    for rank in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part = load_part(tmp_path / "mixed", ranks_of(rank, ParallelConfig(ep_size=2)))
        assert any("experts 0 of model.layers.0" in str(one.message) for one in caught)
        schemes = {
            module.expert_weights.gate_up_proj.is_quantized for module in experts_of(part).values()
        }
        assert schemes == {False}


def test_more_ranks_than_experts_are_refused_before_reading(dense):
    with pytest.raises(ConfigError, match="must be at most the number of experts"):
        load_part(dense, ranks_of(0, ParallelConfig(ep_size=64)))


def mapped_bytes(directory: Path) -> int:
    """Bytes of a directory's files that this process has mapped and brought into its memory."""
    total, is_one = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            is_one = str(directory.resolve()) in line
        elif is_one and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.parametrize("is_fused", [False, True], ids=["by expert", "stacks"])
def test_only_its_own_experts_bytes_are_read(is_fused, tmp_path, monkeypatch):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=1024,
        moe_intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    if is_fused:
        model.save_pretrained(tmp_path, save_original_format=False)
    else:
        model.save_pretrained(tmp_path)
    expert_bytes = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    rest_bytes = sum(p.nbytes for p in model.parameters()) - expert_bytes
    before = mapped_bytes(tmp_path)
    views = []  # a view keeps its mapping, and with it the count
    plain = DenseCheckpoint.plain

    def plain_and_kept(self: DenseCheckpoint, name: str) -> Tensor:
        views.append(plain(self, name))
        return views[-1]

    monkeypatch.setattr(DenseCheckpoint, "plain", plain_and_kept)
    monkeypatch.setattr(MappedFiles, "release", lambda self: None)
    part = load_part(tmp_path, ranks_of(1, ParallelConfig(ep_size=4)))
    touched = mapped_bytes(tmp_path) - before
    own = sum(module.expert_weights.num_bytes for module in experts_of(part).values())
    assert own == expert_bytes // 4
    # The system may bring in whole huge pages, of 2 MiB, at both ends of what is read.
    most = own + rest_bytes + len(views) * 2**22
    assert own <= touched <= most
    assert most < expert_bytes * (1 if is_fused else len(views))


def test_no_parameter_holds_all_experts(dense):
    part = load_part(dense, ranks_of(1, ParallelConfig(ep_size=3)))
    assert not [name for name, _ in part.named_parameters() if ".experts" in name]
    for module in experts_of(part).values():
        count = module.spread.num_local_experts
        assert all(tensor.shape[0] == count for tensor in module.given.tensors())
