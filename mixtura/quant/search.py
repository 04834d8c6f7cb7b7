"""Error-minimising quantization of weights: the scale of every group is searched."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.errors import ConfigError, InputError
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, stack_experts
from mixtura.quant.packing import expand_groups
from mixtura.quant.quantize import (
    Grids,
    check_finite,
    check_scheme,
    check_weight,
    nearest_grids,
    nearest_levels,
    reduce_groups,
    round_scales,
    round_to,
)
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

__all__ = ["search"]

_SHRUNKEN = tuple(1 - step / 50 for step in range(1, 21))
"""0.98 down to 0.6 of the scale that reaches the largest weight. Of int4 groups of 128 normal
weights, the best scales lie in 0.7..1; 40 steps instead of 20 lower the error by less than 1%."""

_GROWN = tuple(1 + step / 20 for step in range(1, 11))
"""1.05 up to 1.5, for e2m1 alone: its levels 4 and 6 are far apart, and 1.5 puts the largest weight
on 4."""

_E8M0_STEPS = (1, -1)
"""Powers of two beside the nearest scale; two steps are never better than one."""

_MARGIN = 1e-5
"""By what part the error must fall for another scale: sums in fp32 of up to 2**14 squares are not
closer than that, and an error must not grow by rounding."""


def search(
    weight: Tensor, format: WeightFormat | QuantScheme, importance: Tensor | None = None
) -> QuantizedMatrix:
    """Quantize a weight with the scale, of a few for each group, that loses least.

    With s0 the scale that `quantize` gives a group, and `code(w, s)` its rounding under a scale s:

        error(s) = sum over n, k of the group
                   importance[k] * (w[n, k] - level[code(w[n, k], s)] * s) ** 2
        scale    = the s with the smallest error(s) among s0 and
                   r * s0, r = 0.98, 0.96, ... 0.6; for e2m1 also r = 1.05, 1.1, ... 1.5
                   (e8m0: 2 * s0 and s0 / 2), rounded to the scale dtype

    A scale is never zero, and s0 stays where no other is better, so that the error of no group is
    larger than that of `quantize`. A global scale stays what it was.

    With `importance` the mean of x[k] ** 2 over the inputs x of the layer, error(s) is the expected
    squared error of its outputs for inputs whose columns are uncorrelated. One expert at a time is
    in fp32, in about five copies.

    Args:
        weight: `(N, K)` or `(L, N, K)`, as for `quantize`.
        format: what to make of it; symmetric.
        importance: `(K,)`, for a stack also `(L, K)`: finite, not negative. None: all alike.

    Raises:
        InputError: as for `quantize`; or the importance is not of that form.
        ConfigError: the scheme is not one that `quantize` writes, is dense, or has zero points.

    >>> weight = torch.tensor([[1.0, 1.0, 1.0, 8.0]])
    >>> search(weight, WeightFormat.INT4_G32, torch.tensor([1.0, 1.0, 1.0, 0.0])).scales.tolist()
    [[1.0]]
    """
    scheme = format.scheme if isinstance(format, WeightFormat) else format
    check_weight(weight)
    _check_searchable(scheme)
    if importance is not None:
        _check_importance(importance, weight)
    if weight.dim() == 2:
        return _search_matrix(weight, scheme, importance, where="")
    experts = (
        _search_matrix(
            expert,
            scheme,
            importance if importance is None or importance.dim() == 1 else importance[index],
            where=f"expert {index}, ",
        )
        for index, expert in enumerate(weight)
    )
    return stack_experts(experts, len(weight))


def _check_searchable(scheme: QuantScheme) -> None:
    if scheme.is_quantized and scheme.zero_point is not ZeroPoint.INTEGER:
        check_scheme(scheme)
        return
    reason = "integer zero points" if scheme.is_quantized else "a dense one"
    raise ConfigError(
        f"scheme ({scheme}) must be quantized and symmetric for its scales to be searched; got "
        f"{reason}. Use quantize."
    )


def _check_importance(importance: Tensor, weight: Tensor) -> None:
    shapes = [tuple(weight.shape[-1:])]
    if weight.dim() == 3:
        shapes.append((weight.shape[0], weight.shape[-1]))
    if tuple(importance.shape) not in shapes:
        raise InputError(
            f"importance (shape {tuple(importance.shape)}) must be "
            f"{' or '.join(map(str, shapes))}, one value a column; got another shape. Pass the "
            f"mean square of each input."
        )
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise InputError(
            f"importance ({importance.min().item():g} to {importance.max().item():g}) must be "
            f"finite and not negative; got another value. Pass the mean square of each input."
        )


def _search_matrix(
    weight: Tensor, scheme: QuantScheme, importance: Tensor | None, where: str
) -> QuantizedMatrix:
    weight = weight.detach().float()
    check_finite(weight, where)
    if importance is not None:
        largest = importance.max().float()
        # Only ratios matter; large and tiny squares would leave fp32.
        importance = importance.float() / largest if largest > 0 else None
    nearest = nearest_grids(weight, scheme)
    best = nearest.scales
    least = _group_errors(weight, scheme, nearest, importance)
    for scales in _candidates(nearest.scales, scheme):
        errors = _group_errors(weight, scheme, nearest._replace(scales=scales), importance)
        is_better = errors < least * (1 - _MARGIN)
        best = _where(is_better, scales, best)
        least = torch.where(is_better, errors, least)
    return round_to(weight, scheme, nearest._replace(scales=best))


def _candidates(nearest: Tensor, scheme: QuantScheme) -> list[Tensor]:
    dtype = nearest.dtype
    if dtype is torch.float8_e8m0fnu:
        codes = nearest.view(torch.uint8).to(torch.int16)
        # 255 is no number.
        return [(codes + step).clamp(0, 254).to(torch.uint8).view(dtype) for step in _E8M0_STEPS]
    ratios = _SHRUNKEN + (_GROWN if scheme.code is Code.E2M1 else ())
    largest = torch.finfo(dtype).max
    return [round_scales((nearest.float() * ratio).clamp(max=largest), dtype) for ratio in ratios]


def _group_errors(
    weight: Tensor, scheme: QuantScheme, grids: Grids, importance: Tensor | None
) -> Tensor:
    """The weighted squared error of every group, in the arithmetic of `dequantize`. -> (GN, GK)."""
    shape = tuple(weight.shape)
    group_size = scheme.group_size(shape)
    scales, global_scale = grids.scales.float(), grids.global_scale
    step = scales if global_scale is None else scales * global_scale
    levels = nearest_levels(weight / expand_groups(step, group_size, shape), scheme)
    meant = levels.mul_(expand_groups(scales, group_size, shape))
    if global_scale is not None:
        meant *= global_scale
    errors = meant.sub_(weight).square_()
    if importance is not None:
        errors *= importance
    return reduce_groups(errors, scheme, torch.sum)


def _where(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for any dtype of scales."""
    if chosen.dtype.itemsize > 1:
        return torch.where(condition, chosen, other)
    picked = torch.where(condition, chosen.view(torch.uint8), other.view(torch.uint8))
    return picked.view(chosen.dtype)
