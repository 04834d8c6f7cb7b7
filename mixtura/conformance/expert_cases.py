"""Random experts and batches that a few words make again, bit for bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    PostNorm,
    WeightOn,
)
from mixtura.config.choice import Choice
from mixtura.kernels.reference import ReferenceKernel
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

LAYOUTS: dict[str, dict[str, object]] = {
    "stacked": {},
    "interleaved": {"gate_up": GateUp.INTERLEAVED},
    "separate": {"gate_up": GateUp.SEPARATE},
    "ungated": {"gate_up": GateUp.UNGATED},
    "transposed": {"is_transposed": True},
    "bias": {"has_bias": True},
    "post_norm": {"post_norm": PostNorm.RMS, "post_norm_epsilon": 1e-3},
    "post_norm_scale_first": {"post_norm": PostNorm.RMS_SCALE_FIRST, "post_norm_epsilon": 1e-3},
}
"""Ways to store experts, and terms that they may have, as fields of `ExpertsConfig`."""

ACTIVATIONS: dict[str, Activation] = {
    **{function.value: Activation(function=function) for function in ActivationFunction},
    "silu_alpha": Activation(alpha=1.702),
    "swiglu_oai": SWIGLU_OAI,
    "limit_gate": Activation(limit=1.5),
    "limit_activated": Activation(limit=1.5, limit_on=LimitOn.ACTIVATED),
    "softcaps": Activation(gate_softcap=1.5, up_softcap=2.5),
    "up_offset": Activation(up_offset=1.0),
}


class Ids(Choice):
    """Which experts the rows of a batch visit."""

    DISTINCT = "distinct"  # K different ones for each row
    ONE = "one"  # every slot the last expert
    FEW = "few"  # the first K experts, so that the others get no row
    GAPS = "gaps"  # -1 in places, and everywhere in the first row; its weights are not 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Experts and a batch for them; equal cases are equal to the bit.

    Attributes:
        layout, activation: names in `LAYOUTS` and `ACTIVATIONS`. weights: in which they are packed;
            None are dense ones of the rows' dtype.
        dtype: of the rows. num_rows: M. top_k: K. ids: which experts the rows visit.
        seed: of all random numbers. device: where tensors are.
    """

    num_experts: int = 5
    hidden_size: int = 32
    intermediate_size: int = 24
    layout: str = "stacked"
    activation: str = "silu"
    weights: WeightFormat | None = None
    dtype: torch.dtype = torch.float32
    num_rows: int = 7
    top_k: int = 2
    ids: Ids = Ids.DISTINCT
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        """What makes it again, with what is not as usual."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        told = (f"{name}={_spelled(value)}" for name, value, usual in fields if value != usual)
        return f"Case({', '.join(told)})"

    @property
    def config(self) -> ExpertsConfig:
        """What the experts are."""
        plain = ExpertsConfig(
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            activation=ACTIVATIONS[self.activation],
        )
        return dataclasses.replace(plain, **LAYOUTS[self.layout])  # type: ignore[arg-type]

    def expert_weights(self) -> ExpertWeights:
        """The experts."""
        config, generator = self.config, torch.Generator().manual_seed(self.seed)
        count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def stack(rows: int, columns: int) -> QuantizedMatrix:
            value = (normal(count, rows, columns) * columns**-0.5).to(self.dtype)
            if self.weights is not None:
                return quantize(value, self.weights)
            is_transposed = config.is_transposed
            return dense(value.mT.contiguous().mT if is_transposed else value)

        weights = ExpertWeights(
            config,
            gate_up_proj=stack(config.up_size, hidden),
            up_proj=stack(config.up_size, hidden) if config.gate_up is GateUp.SEPARATE else None,
            down_proj=stack(hidden, inner),
            gate_up_bias=normal(count, config.up_size).to(self.dtype) if config.has_bias else None,
            down_bias=normal(count, hidden).to(self.dtype) if config.has_bias else None,
            post_norm=normal(hidden).to(self.dtype) if config.post_norm is not None else None,
        )
        return weights.mapped(lambda tensor: tensor.to(self.device))

    def batch(self) -> ExpertBatch:
        """The rows, their experts, and weights of which none is 0."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.num_rows, self.top_k)
        rows = torch.randn(
            self.num_rows, self.hidden_size, generator=generator, dtype=torch.float64
        )
        weights = torch.rand(shape, generator=generator) + 0.1
        order = torch.rand(self.num_rows, self.num_experts, generator=generator).argsort(1)
        ids = order[:, : self.top_k]
        match self.ids:
            case Ids.ONE:
                ids = torch.full(shape, self.num_experts - 1)
            case Ids.FEW:
                ids = torch.arange(self.top_k).expand(shape)
            case Ids.GAPS:
                is_gap = torch.rand(shape, generator=generator) < 0.4
                is_gap[:1] = True
                ids = ids.masked_fill(is_gap, -1)
        ids = ids.to(torch.int32).contiguous()
        on = self.device
        return ExpertBatch(rows.to(self.dtype).to(on), ids.to(on), weights.to(on))

    def problem(
        self, weight_on: WeightOn = WeightOn.OUTPUT, *, needs_grad: bool = False
    ) -> ExpertsProblem:
        """What a kernel is asked before it runs the case."""
        packed = self.weights
        return ExpertsProblem(
            experts=self.config,
            schemes=(QuantScheme.dense(self.dtype) if packed is None else packed.scheme,),
            row_dtype=self.dtype,
            device=torch.device(self.device).type,
            weight_on=weight_on,
            needs_grad=needs_grad,
        )


def _spelled(value: object) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def widened(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """What weights stand for, dense in a wider dtype."""

    def matrix(stored: QuantizedMatrix) -> QuantizedMatrix:
        return dense(dequantize(stored, dtype))

    def vector(stored: Tensor | None) -> Tensor | None:
        return None if stored is None else stored.to(dtype)

    return dataclasses.replace(
        weights,
        gate_up_proj=matrix(weights.gate_up_proj),
        up_proj=None if weights.up_proj is None else matrix(weights.up_proj),
        down_proj=matrix(weights.down_proj),
        gate_up_bias=vector(weights.gate_up_bias),
        down_bias=vector(weights.down_bias),
        post_norm=vector(weights.post_norm),
    )


def truth_of(case: Case, weight_on: WeightOn = WeightOn.OUTPUT, *, reduce: bool = True) -> Tensor:
    """What the reference makes of a case in fp32, or float64 for rows of float64."""
    wide = torch.promote_types(case.dtype, torch.float32)
    batch = case.batch()
    rows = dataclasses.replace(batch, hidden_states=batch.hidden_states.to(wide))
    weights = widened(case.expert_weights(), wide)
    with torch.no_grad():
        return ReferenceKernel().run(weights, rows, weight_on=weight_on, reduce=reduce)
