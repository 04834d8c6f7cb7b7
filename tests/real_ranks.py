"""What two processes check together; `python -m torch.distributed.run` starts this file.

Every check loads a model over the ranks and compares it with the whole model in this process.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import tiny_model
from test_family_fixtures import checkpoint
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mixtura
from mixtura.cli.options import DEMO
from mixtura.config import DispatcherName, EplbConfig, ParallelConfig, TokensHeld
from mixtura.eplb import Activity
from mixtura.errors import GradientUnsupported, ParallelError
from mixtura.hf.balance import find_balancer
from mixtura.hf.load import load_tokenizer
from mixtura.hf.parallel import finish_requests
from mixtura.parallel import ExpertParallel, TorchTransport

PACKED = "ct-int4-g32-qwen3_moe"
PROMPT = "Once upon a time"
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def text_of(model: Any, prompt: str = PROMPT, count: int = 24) -> str:
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False)
    found: str = tokenizer.decode(out[0])
    return found


def the_model_in_the_box(directory: Path) -> None:
    expected = text_of(mixtura.from_pretrained(DEMO))
    for dispatcher in DispatcherName:
        if dispatcher is DispatcherName.DEEP_EP:
            continue  # a package for GPUs
        config = ParallelConfig(ep_size=2, dispatcher=dispatcher)
        assert text_of(mixtura.from_pretrained(DEMO, parallel=config)) == expected


def quantized_as_it_is_read(directory: Path) -> None:
    formats = {"weights": "int4", "linears": "int8"}
    expected = text_of(mixtura.from_pretrained(DEMO, **formats))
    found = mixtura.from_pretrained(DEMO, **formats, parallel=ParallelConfig(ep_size=2))
    assert text_of(found) == expected


def balanced_experts(directory: Path) -> None:
    """Experts move while the text is written, which stays what it was."""
    eplb = EplbConfig(interval=5, max_moved_fraction=0.5, min_gain=0.0)
    config = ParallelConfig(ep_size=2, eplb=eplb, num_redundant_experts=2)
    for formats in ({}, {"weights": "int4"}):
        expected = text_of(mixtura.from_pretrained(DEMO, **formats), count=96)
        model = mixtura.from_pretrained(DEMO, parallel=config, **formats)
        assert text_of(model, count=96) == expected
        balancer = find_balancer(model)
        assert balancer is not None
        report = balancer.report()
        assert report.num_moved > 0, report
        assert report.activity is not Activity.OFF, report
        model.to("cpu")  # what was moved is unpacked and packed again, elsewhere
        assert text_of(model, count=96) == expected


def cut_experts(directory: Path) -> None:
    expected = text_of(mixtura.from_pretrained(DEMO))
    found = mixtura.from_pretrained(DEMO, parallel=ParallelConfig(tp_size=2))
    assert text_of(found) == expected


def a_packed_checkpoint(directory: Path) -> None:
    path = directory / PACKED
    with torch.no_grad():
        expected = mixtura.from_pretrained(path)(IDS).logits
        model = mixtura.from_pretrained(path, parallel=ParallelConfig(ep_size=2))
        assert torch.allclose(model(IDS).logits, expected, atol=1e-2)
    assert model.generate(IDS, max_new_tokens=8, do_sample=False).shape[1] == 13


def requests_of_their_own(directory: Path) -> None:
    prompts, lengths = ["Once", "The king said"], [12, 5]
    rank = dist.get_rank()
    config = ParallelConfig(ep_size=2, tokens=TokensHeld.OWN)
    model = mixtura.from_pretrained(DEMO, parallel=config)
    found = text_of(model, prompts[rank], lengths[rank])
    finish_requests(model)
    assert found == text_of(mixtura.from_pretrained(DEMO), prompts[rank], lengths[rank])


def another_checkpoint_on_one_rank(directory: Path) -> None:
    path = directory / ("tiny", "other")[dist.get_rank()]
    try:
        mixtura.from_pretrained(path, parallel=ParallelConfig(ep_size=2))
    except ParallelError as error:
        assert "digest of config.json of rank 1" in str(error), error
    else:
        raise AssertionError("the ranks have different models")


def a_file_that_one_rank_cannot_read(directory: Path) -> None:
    path = directory / ("tiny", "broken")[dist.get_rank()]
    try:
        mixtura.from_pretrained(path, parallel=ParallelConfig(ep_size=2))
    except mixtura.MixturaError as error:
        assert "must hold model.safetensors" in str(error), error
        assert ("rank 1" in str(error)) == (dist.get_rank() == 0)
    else:
        raise AssertionError("one rank has no weights")


def transformers_own_parallelism(directory: Path) -> None:
    path = directory / "tiny"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(IDS).logits
        for experts in ("mixtura", "eager"):
            config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="mixtura")
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, distributed_config=config, experts_implementation=experts
            )
            assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        text = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 9)
    try:
        model.train()(IDS).logits.sum().backward()
    except GradientUnsupported as error:
        assert "ep_implementation='auto' to train" in str(error)
    else:
        raise AssertionError("gradients have crossed ranks")


def the_wrong_number_of_ranks(directory: Path) -> None:
    try:
        ExpertParallel.over(ParallelConfig(ep_size=3), TorchTransport())
    except ParallelError as error:
        assert "must equal the number of ranks in the group; got 2" in str(error)
    else:
        raise AssertionError("three ranks were made of two")


def prepare(directory: Path) -> None:
    """Write the checkpoints that the checks read."""
    checkpoint(PACKED, directory)
    model = tiny_model("qwen3_moe").model
    model.save_pretrained(directory / "tiny")
    shutil.copytree(directory / "tiny", directory / "broken")
    (directory / "broken" / "model.safetensors").unlink()
    model.config.norm_topk_prob = not model.config.norm_topk_prob
    model.save_pretrained(directory / "other")


CHECKS = {
    check.__name__: check
    for check in (
        the_model_in_the_box,
        quantized_as_it_is_read,
        balanced_experts,
        cut_experts,
        a_packed_checkpoint,
        requests_of_their_own,
        another_checkpoint_on_one_rank,
        a_file_that_one_rank_cannot_read,
        transformers_own_parallelism,
        the_wrong_number_of_ranks,
    )
}


def main(directory: Path, names: list[str]) -> None:
    """Run checks, and print the name of each that holds, from rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        CHECKS[name](directory)
        if dist.get_rank() == 0:
            print(f"holds {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
