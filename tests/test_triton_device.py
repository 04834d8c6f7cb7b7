"""A kernel of three lines runs where the harness says, with the values that torch computes."""

from __future__ import annotations

import torch
from gpu_device import DEVICE, IS_INTERPRETED, tl, triton


@triton.jit
def _add(x, y, out, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < size
    total = tl.load(x + places, mask=is_there) + tl.load(y + places, mask=is_there)
    tl.store(out + places, total, mask=is_there)


def test_a_kernel_runs_on_the_device_of_the_harness():
    x, y = torch.randn(2, 37, device=DEVICE)
    out = torch.full_like(x, float("nan"))
    _add[(3,)](x, y, out, 37, BLOCK=16)
    assert torch.equal(out, x + y)
    assert out.device.type == DEVICE


def test_the_interpreter_is_on_where_there_is_no_gpu():
    is_interpreted = type(_add).__name__ == "InterpretedFunction"
    assert is_interpreted is IS_INTERPRETED
