"""Attention of one query in C++, and what goes with it: the cache that grows in place."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_model
from tolerances import assert_close
from torch import Tensor

from mixtura.errors import InputError
from mixtura.kernels.cpu.attention import attention, takes_attention
from mixtura.kernels.cpu.extension import emulated_paths, forced_path, missing, runnable_paths

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PATHS = () if missing() is not None else runnable_paths() + emulated_paths()


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The formula in fp64, head by head."""
    batch, heads = query.shape[:2]
    sharing = heads // key.shape[1]
    out = torch.zeros(batch, 1, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k, v = key[b, h // sharing].double(), value[b, h // sharing].double()
            scores = scale * (k @ query[b, h, 0].double())
            if mask is not None:
                row = mask[b % len(mask), h % mask.shape[1], 0]
                scores = (
                    scores.masked_fill(~row, -torch.inf)
                    if row.dtype is torch.bool
                    else (scores + row.double())
                )
            out[b, 0, h] = scores.softmax(0) @ v
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "keys", "head_size", "value_size"),
    [(2, 2, 1, 16, 16), (4, 2, 37, 64, 64), (8, 1, 700, 192, 128), (3, 3, 513, 80, 240)],
)
def test_it_is_the_formula(
    path: str,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    keys: int,
    head_size: int,
    value_size: int,
) -> None:
    query = draw((2, heads, 1, head_size), dtype, 0)
    key = draw((2, key_heads, keys, head_size), dtype, 1)
    value = draw((2, key_heads, keys, value_size), dtype, 2)
    assert takes_attention(query, key, value, None)
    with forced_path(path):
        found = attention(query, key, value, None, 0.2)
    expected = plain(query, key, value, None, 0.2)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (3, 4)])
@pytest.mark.parametrize("is_bool", [True, False])
def test_masks_count_for_their_sequences_and_heads(shape: tuple[int, int], is_bool: bool) -> None:
    query, key = draw((3, 4, 1, 32), torch.float32, 0), draw((3, 2, 600, 32), torch.float32, 1)
    value = draw((3, 2, 600, 32), torch.float32, 2)
    mask = draw((*shape, 1, 600), torch.float32, 3)
    mask = mask > 0 if is_bool else mask
    found = attention(query, key, value, mask, 0.3)
    expected = plain(query, key, value, mask, 0.3)
    assert_close(found, expected, torch.float32)


def test_what_is_masked_counts_for_nothing_whatever_it_is() -> None:
    query, key = draw((1, 2, 1, 16), torch.float32, 0), draw((1, 2, 1100, 16), torch.float32, 1)
    value = draw((1, 2, 1100, 16), torch.float32, 2)
    mask = torch.zeros(1, 1, 1, 1100, dtype=torch.bool)
    mask[..., 1030:1040] = True  # whole chunks are masked
    value[:, :, :1030] = 1e30
    found = attention(query, key, value, mask, 1.0)
    alone = attention(query, key[:, :, 1030:1040], value[:, :, 1030:1040], None, 1.0)
    torch.testing.assert_close(found, alone)
    assert attention(query, key, value, mask & False, 1.0).abs().max() == 0


def test_not_a_number_is_not_hidden() -> None:
    query, key = draw((1, 1, 1, 16), torch.float32, 0), draw((1, 1, 40, 16), torch.float32, 1)
    key[0, 0, 17, 3] = torch.nan
    assert attention(query, key, key, None, 1.0).isnan().all()


def test_views_are_read_where_they_are() -> None:
    room = draw((2, 3, 900, 64), torch.bfloat16, 0)
    query = draw((2, 1, 6, 64), torch.bfloat16, 1).transpose(1, 2)
    seen, copied = room[:, :, :333], room[:, :, :333].clone()
    assert not seen.is_contiguous()
    found = attention(query, seen, seen, None, 0.125)
    assert torch.equal(found, attention(query, copied, copied, None, 0.125))


def test_the_number_of_threads_changes_nothing() -> None:
    query, key = draw((1, 4, 1, 64), torch.bfloat16, 0), draw((1, 2, 3000, 64), torch.bfloat16, 1)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attention(query, key, key, None, 0.1))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_graph_runs_it() -> None:
    query, key = draw((1, 4, 1, 64), torch.bfloat16, 0), draw((1, 2, 300, 64), torch.bfloat16, 1)

    def step(query: Tensor, key: Tensor) -> Tensor:
        return attention(query, key, key, None, 0.1) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), step(query, key))


def test_others_are_left_to_torch() -> None:
    query, key = draw((1, 2, 1, 64), torch.float32, 0), draw((1, 2, 9, 64), torch.float32, 1)
    assert takes_attention(query, key, key, None)
    assert not takes_attention(query.repeat(1, 1, 2, 1), key, key, None)
    assert not takes_attention(query.double(), key.double(), key.double(), None)
    assert not takes_attention(query[..., :60], key[..., :60], key, None)
    assert not takes_attention(query, key.mT.contiguous().mT, key, None)
    assert not takes_attention(query.requires_grad_(), key, key, None)
    with torch.no_grad():
        assert takes_attention(query, key, key, None)


def test_a_mask_of_other_heads_is_an_error() -> None:
    query, key = draw((2, 4, 1, 16), torch.float32, 0), draw((2, 4, 9, 16), torch.float32, 1)
    with pytest.raises(InputError, match="for 2 sequences and 4 heads"):
        attention(query, key, key, torch.zeros(3, 1, 1, 9), 1.0)


@pytest.fixture
def model() -> torch.nn.Module:
    found = tiny_model("qwen3_moe").model
    found.set_attn_implementation("sdpa")
    return found


def test_a_converted_model_writes_what_it_wrote_before(model: torch.nn.Module) -> None:
    import mixtura

    stock = copy.deepcopy(model)
    ours = mixtura.convert(model)
    assert ours.config._attn_implementation == "mixtura"
    prompt = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0  # one is shorter
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(prompt, **options), stock.generate(prompt, **options))


def test_a_growing_cache_is_the_stock_cache(model: torch.nn.Module) -> None:
    from mixtura.hf.cache import GrowingLayer, growing_cache

    cache = growing_cache(model)
    assert cache is not None and isinstance(cache.layers[0], GrowingLayer)
    prompt = torch.randint(0, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(prompt, **options))


def test_a_growing_layer_follows_what_is_done_to_it() -> None:
    from transformers.cache_utils import DynamicLayer

    from mixtura.hf.cache import ROOM, GrowingLayer

    ours, stock = GrowingLayer(), DynamicLayer()

    def both(act: str, *args: object) -> None:
        results = [getattr(layer, act)(*args) for layer in (ours, stock)]
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
        if act == "update":
            assert torch.equal(results[0][0], results[1][0])

    def states(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, count, 16), torch.randn(batch, 3, count, 8)

    both("update", *states(5))
    address = ours.keys.data_ptr()
    both("update", *states(1))
    assert ours.keys.data_ptr() == address  # in place
    both("crop", -2)
    both("update", *states(2))
    both("reorder_cache", torch.tensor([1, 0]))
    both("update", *states(1))
    both("batch_repeat_interleave", 2)
    both("update", *states(1, batch=4))
    both("batch_select_indices", torch.tensor([0, 3]))
    both("update", *states(ROOM))
    copied = copy.deepcopy(ours)
    copied.update(*states(1))
    both("update", *states(1))
    with torch.inference_mode():
        both("update", *states(1))
    for layer in (ours, stock):
        layer.reset()
    both("update", *states(3))
    assert ours.get_seq_length() == stock.get_seq_length()
