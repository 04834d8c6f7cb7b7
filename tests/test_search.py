"""Searched scales: what the docstring of `search` says, and never a larger error than rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import ConfigError, InputError
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.packing import expand_groups
from mixtura.quant.quantize import nearest_levels, quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint
from mixtura.quant.search import search

FORMATS = [format for format in WeightFormat if format.scheme.is_quantized]
SHAPES = [(8, 256), (130, 136), (3, 40), (1, 2)]


def group_errors(matrix: QuantizedMatrix, weight: Tensor, importance: Tensor | None) -> Tensor:
    """The weighted squared error of every group, by a double loop in float64."""
    errors = (dequantize(matrix).double() - weight.double()).square()
    if importance is not None:
        errors *= importance.double()
    group_rows, group_columns = matrix.scheme.group_size(matrix.shape)
    return torch.tensor(
        [
            [
                errors[row : row + group_rows, column : column + group_columns].sum()
                for column in range(0, weight.shape[1], group_columns)
            ]
            for row in range(0, weight.shape[0], group_rows)
        ]
    )


def heavy_tailed(*shape: int) -> Tensor:
    return torch.randn(shape) ** 3 * 0.02


@pytest.mark.parametrize("is_weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.value)
def test_no_group_has_a_larger_error_than_by_rounding(
    format: WeightFormat, is_weighted: bool
) -> None:
    for shape in SHAPES:
        weight = heavy_tailed(*shape)
        importance = torch.rand(shape[1]) ** 4 * 1e6 if is_weighted else None
        nearest, searched = quantize(weight, format), search(weight, format, importance)
        before = group_errors(nearest, weight, importance)
        after = group_errors(searched, weight, importance)
        assert (after <= before).all()
        assert (searched.scheme, searched.shape) == (nearest.scheme, nearest.shape)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.value)
def test_scales_are_numbers_above_zero(format: WeightFormat) -> None:
    weight = torch.stack(
        [
            torch.zeros(256),
            torch.full((256,), 1e-38),
            torch.full((256,), 3e38),
            torch.randn(256),
            torch.cat([torch.zeros(255), torch.ones(1)]),
        ]
    )
    for importance in (None, torch.zeros(256), torch.rand(256)):
        matrix = search(weight, format, importance)
        assert matrix.scales is not None
        scales = matrix.scales.float()
        assert torch.isfinite(scales).all()
        assert (scales > 0).all() or format is WeightFormat.MXFP4  # 2**-127 may be flushed to 0
        assert torch.isfinite(dequantize(matrix)[0]).all()


@pytest.mark.parametrize(
    ("format", "part"),
    [("int4-g32", 0.97), ("int4-g128", 0.95), ("mxfp4", 0.99), ("nvfp4", 0.93)],
)
def test_the_error_of_normal_weights_falls(format: str, part: float) -> None:
    weight = torch.randn(64, 512)
    found = WeightFormat.parse(format)
    nearest, searched = (
        (dequantize(matrix) - weight).norm()
        for matrix in (quantize(weight, found), search(weight, found))
    )
    assert searched < part * nearest


def test_columns_that_weigh_more_are_kept_better() -> None:
    weight, importance = torch.randn(64, 256), torch.ones(256)
    importance[::8] = 100
    alike, weighted = (
        search(weight, WeightFormat.INT4_G32),
        search(weight, WeightFormat.INT4_G32, importance),
    )
    errors = [(dequantize(m) - weight)[:, ::8].norm() for m in (alike, weighted)]
    assert errors[1] < errors[0]


def test_only_ratios_of_importance_matter() -> None:
    weight, importance = torch.randn(4, 64), torch.rand(64)
    first = search(weight, WeightFormat.INT4_G32, importance)
    for factor in (2.0**-60, 2.0**60):
        other = search(weight, WeightFormat.INT4_G32, importance * factor)
        assert torch.equal(first.values, other.values)
        assert torch.equal(first.scales, other.scales)


def test_a_stack_is_its_experts() -> None:
    weight, importance = torch.randn(3, 8, 64), torch.rand(3, 64)
    stack = search(weight, WeightFormat.NVFP4, importance)
    for expert in range(3):
        alone = search(weight[expert], WeightFormat.NVFP4, importance[expert])
        assert torch.equal(stack.values[expert], alone.values)
    shared = search(weight, WeightFormat.NVFP4, importance[0])
    assert torch.equal(shared.values[0], stack.values[0])


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.value)
def test_levels_are_those_of_the_codes(format: WeightFormat) -> None:
    scheme = format.scheme
    weight = torch.randn(16, 256) * torch.logspace(-3, 2, 16).unsqueeze(1)
    matrix = quantize(weight, scheme)
    assert matrix.scales is not None
    step = matrix.scales.float()
    if matrix.global_scale is not None:
        step = step * matrix.global_scale
    spread = expand_groups(step, scheme.group_size(matrix.shape), matrix.shape)
    levels = nearest_levels(weight / spread, scheme)
    torch.testing.assert_close(levels * spread, dequantize(matrix), rtol=1e-6, atol=0)


def test_what_cannot_be_searched_is_told() -> None:
    weight = torch.randn(4, 32)
    with pytest.raises(ConfigError, match="got a dense one"):
        search(weight, WeightFormat.BF16)
    scheme = QuantScheme(Code.INT, 4, (1, 32), torch.bfloat16, ZeroPoint.INTEGER)
    with pytest.raises(ConfigError, match="got integer zero points"):
        search(weight, scheme)
    with pytest.raises(InputError, match="got another shape"):
        search(weight, WeightFormat.INT4_G32, torch.ones(4))
    with pytest.raises(InputError, match="must be finite and not negative"):
        search(weight, WeightFormat.INT4_G32, -torch.ones(32))
    with pytest.raises(InputError, match="row 1, column 2"):
        weight[1, 2] = torch.nan
        search(weight, WeightFormat.INT4_G32)
    with pytest.raises(InputError, match="got 1 dims"):
        search(weight[0], WeightFormat.INT4_G32)
