"""What `quantize` says of its work: errors of every module, and what happens meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.hf.quantize_plan import QuantizePlan
from mixtura.quant.matrix import QuantizedMatrix, dequantize


@dataclass(slots=True)
class LayerReport:
    """What became of one module's matrices.

    Attributes:
        module: path of the experts or attention module. num_matrices: planned ones.
        num_done: of these. squared_error, squared_norm: sums over all matrices.
        worst: the largest relative error of a matrix.
        tokens_per_expert: that calibration has shown; None without. starved: experts whose errors
            were not weighed, as too few tokens came to them.
    """

    module: str
    num_matrices: int = 0
    num_done: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    worst: float = 0.0
    tokens_per_expert: tuple[int, ...] | None = None
    starved: tuple[int, ...] = ()

    @property
    def error(self) -> float:
        """Relative Frobenius error: |W - W'| / |W| over all matrices."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def add(self, num: int, squared_error: float, squared_norm: float, worst: float) -> None:
        """Add what is known of more matrices."""
        self.num_done += num
        self.squared_error += squared_error
        self.squared_norm += squared_norm
        self.worst = max(self.worst, worst)

    def measure(self, weight: Tensor, stored: QuantizedMatrix) -> None:
        """Add a matrix (N, K) and what is stored in its place."""
        exact = weight.float()
        squared_error = float((dequantize(stored) - exact).square_().sum(dtype=torch.float64))
        squared_norm = float(exact.square().sum(dtype=torch.float64))
        worst = math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
        self.add(1, squared_error, squared_norm, worst)


@dataclass(frozen=True, slots=True)
class Progress:
    """What is told while it happens; each does nothing by default.

    Attributes:
        planned: the plan, and how many files there are and have been kept from an earlier run.
        calibrated: path of a module that the whole calibration text has gone through.
        layer: a module all of whose matrices are done.
    """

    planned: Callable[[QuantizePlan, int, int], None] = lambda plan, files, kept: None
    calibrated: Callable[[str], None] = lambda path: None
    layer: Callable[[LayerReport], None] = lambda report: None
