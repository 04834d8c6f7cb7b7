"""What a measurement of one product of quantized experts reads, writes and compares."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.packed.call import PackedCall
from mixtura.kernels.triton.packed.layout import ROW_GROUP
from mixtura.kernels.triton.packed.rounding import Rows
from mixtura.kernels.triton.table import Product
from mixtura.types import ExpertOrder


def read_by(call: PackedCall, product: Product) -> Rows:
    """What a product multiplies: a call's rows or random hidden ones, rounded where they are to be.

    With stored scales, codes are of the call's own ids.
    """
    if product is Product.GATE_UP:
        rows, launch = call.rounded_rows()
    else:
        layout, size = call.layout(product), call.config.intermediate_size
        dtype = torch.float32 if layout.is_rounded else call.rows.dtype
        hidden = call.empty("hidden rows", call.num_slots, size, dtype=dtype).normal_()
        if not layout.is_rounded:
            return Rows(hidden, None)
        inputs = call.weights.down_inputs
        rows, launch = call.rounded(
            "hidden codes", hidden, call.num_slots, layout, inputs, call.ids
        )
    if launch is not None:
        launch.run()
    return rows


def written_by(call: PackedCall, product: Product) -> Rows:
    """Room for what a product writes."""
    if product is Product.GATE_UP:
        return call.hidden_rows()
    return Rows(call.empty("outputs", call.num_slots, call.config.hidden_size), None)


def launch_of(
    call: PackedCall, product: Product, order: ExpertOrder | None, read: Rows, written: Rows
) -> Launch:
    """A product alone."""
    if product is Product.GATE_UP:
        return call.gate_up(order, read, written)
    return call.down(order, read, written.data)


def values(rows: Rows) -> Tensor:
    """Rows as numbers: codes times their scales, of groups of columns, in fp32."""
    if rows.scales is None:
        return rows.data
    num_columns = rows.data.shape[1]
    scales = rows.scales.repeat_interleave(ROW_GROUP, 1)[:, :num_columns]
    return rows.data[:, : scales.shape[1]].float() * scales


def forget_(rows: Rows) -> None:
    """Put NaN where something is to be written: what is not shows."""
    (rows.data if rows.scales is None else rows.scales).fill_(torch.nan)
