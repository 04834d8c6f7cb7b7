"""Shared experts on a stream of their own."""

from __future__ import annotations

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from test_shared_experts import VARIANTS, RowCounter, shared_formula, without_shared
from tolerances import assert_close
from torch import Tensor

from mixtura.config import SharedExpertsOrder
from mixtura.experts import SharedTask

pytestmark = pytest.mark.gpu


def test_shared_experts_on_a_stream_of_their_own():
    config = moe_config(shared=VARIANTS["sigmoid gate"])
    layer, rows = build_layer(config).cuda(), rows_of(64).cuda()
    counter = RowCounter(layer)
    orders: list[SharedExpertsOrder] = []
    start = layer.start_shared

    def noted(hidden_states: Tensor, order: SharedExpertsOrder) -> SharedTask:
        orders.append(order)
        return start(hidden_states, order)

    layer.start_shared = noted  # type: ignore[method-assign]
    with torch.no_grad():
        out = layer(rows)
        expected = without_shared(layer).cuda()(rows) + shared_formula(layer, rows)
    assert orders == [SharedExpertsOrder.MULTI_STREAM_OVERLAPPED]
    assert counter.rows == rows.tolist()
    assert_close(out, expected, torch.float32)
