"""Rows, ids and weights that are views: transposed, with gaps, or one row for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expert_cases import CONFIGS, build_layer, moe_config, random_batch, random_weights, rows_of
from test_layer import SHARED, layer_of
from tolerances import assert_close
from torch import Tensor

from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels.cpu.extension import missing
from mixtura.types import TokenInputs

KERNELS = [
    "reference",
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(missing() is not None, reason="not built")),
]

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "part of a wider row": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "one row for all": lambda x: x[:1].expand_as(x),
    "one column for all": lambda x: x[:, :1].expand_as(x),
}
"""Values of (T, C) that no kernel may take for contiguous ones."""

by_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
by_kernel = pytest.mark.parametrize("kernel", KERNELS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@by_view
@by_dtype
@by_kernel
def test_rows_of_a_layer(kernel, dtype, view):
    layer = build_layer(moe_config(shared=SHARED), kernel=kernel).to(dtype)
    rows = view(rows_of(6).to(dtype))
    assert not rows.is_contiguous()
    with torch.no_grad():
        assert_close(layer(rows), layer(rows.contiguous()), dtype)


@by_kernel
def test_leading_dimensions_of_a_layer_in_another_order(kernel):
    layer = build_layer(moe_config(), kernel=kernel)
    rows = rows_of(6).view(2, 3, 8).transpose(0, 1)
    with torch.no_grad():
        out = layer(rows)
        assert out.shape == (3, 2, 8)
        assert_close(out, layer(rows.contiguous()), torch.float32)


@by_view
@by_kernel
def test_ids_that_tokens_bring_along(kernel, view):
    layer, rows = build_layer(moe_config(), kernel=kernel), rows_of(6)
    ids = view(torch.tensor([[0, 5], [3, 1], [2, 4], [1, 0], [5, 3], [4, 2]], dtype=torch.int32))
    mask = torch.tensor([True, False]).repeat(6)[::2]
    plain = TokenInputs(replayed_ids=ids.contiguous(), padding_mask=mask.contiguous())
    with torch.no_grad():
        found = layer(rows, TokenInputs(replayed_ids=ids, padding_mask=mask))
        assert_close(found, layer(rows, plain), torch.float32)


@by_kernel
def test_token_ids_of_a_hash_router(kernel):
    layer = layer_of(moe_config(routing={"hash_routing": True}), kernel=kernel)
    ids = torch.tensor([3, 0, 7, 1, 9, 2]).repeat_interleave(2)[::2]
    with torch.no_grad():
        found = layer(rows_of(6), TokenInputs(input_ids=ids))
        expected = layer(rows_of(6), TokenInputs(input_ids=ids.contiguous()))
    assert_close(found, expected, torch.float32)


@by_view
@by_dtype
@by_kernel
@pytest.mark.parametrize("config", [CONFIGS["stacked"], CONFIGS["gpt-oss"]], ids=["plain", "oss"])
def test_a_batch_of_experts(config, kernel, dtype, view):
    options = ExpertsOptions(kernel=kernel)
    experts = RoutedExperts(config, weights=random_weights(config, dtype), options=options)
    batch = random_batch(config, 6, dtype=dtype)
    views = replace(
        batch,
        hidden_states=view(batch.hidden_states),
        local_ids=view(batch.local_ids),
        topk_weights=view(batch.topk_weights),
    )
    plain = replace(
        views,
        hidden_states=views.hidden_states.contiguous(),
        local_ids=views.local_ids.contiguous(),
        topk_weights=views.topk_weights.contiguous(),
    )
    with torch.no_grad():
        assert_close(experts.run_batch(views), experts.run_batch(plain), dtype)
        terms = experts.run_batch(views, reduce=False)
        assert_close(terms, experts.run_batch(plain, reduce=False), dtype)
