"""`SharedExperts`: the MLP that every token visits, and when it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.config import SharedExpertsConfig, SharedExpertsOrder
from mixtura.cuda import is_capturing
from mixtura.kernels.contract import sum_dtype
from mixtura.kernels.reference.activation import activate
from mixtura.kernels.reference.linear import linear_by_row
from mixtura.types import even_bounds


def shared_experts_order(
    config: SharedExpertsConfig | None,
    *,
    device_type: str,
    num_tokens: int,
    is_remote: bool,
    is_summed: bool,
    is_tracing: bool,
    is_recorded: bool,
) -> SharedExpertsOrder:
    """When shared experts run in this call. Pure, so that every caller decides alike.

    `is_remote`: the dispatcher waits on other ranks, which is time to use. `is_summed`: each of
    them can run a part. The auxiliary stream is not used under tracing; nor where autograd records,
    as a backward pass would free rows that the stream still reads.
    """
    if config is None:
        return SharedExpertsOrder.NONE
    if config.is_external:
        return SharedExpertsOrder.EXTERNAL
    if is_summed:
        return SharedExpertsOrder.SUMMED
    if is_remote:
        return SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
    if (
        config.uses_stream
        and not is_tracing
        and not is_recorded
        and device_type == "cuda"
        and num_tokens <= config.stream_max_tokens
    ):
        return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    return SharedExpertsOrder.NO_OVERLAP


@dataclass(frozen=True, slots=True)
class SharedTask:
    """Shared experts under way; `result` waits for them where their sum is needed.

    Attributes:
        output: (T,H), to be read by nobody before `result` has returned it.
        stream: that it is computed on, where that is not the calling one.
        rows: what is read there, kept until then.
    """

    output: Tensor
    stream: torch.cuda.Stream | None = None
    rows: Tensor | None = None

    def result(self) -> Tensor:
        """(T,H); the calling stream waits for the auxiliary one."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.output.device)
            current.wait_stream(self.stream)
            # In a graph it would keep the memory until the capture ends; see `_auxiliary_stream`.
            if not is_capturing(self.output.device):
                self.output.record_stream(current)
        return self.output


class SharedExperts(nn.Module):
    """`down(f(gate(x)) * up(x))`, times `sigmoid(x @ w.T)` where there is a sigmoid gate.

    Args:
        config: width, activation, order.
        hidden_size: H.
        is_row_invariant: compute each row by itself in fp32, so that it is bitwise the same in any
            batch and with any number of threads; a loop over rows.
        device, dtype: of new, uninitialised parameters.
    """

    shared_config: SharedExpertsConfig
    is_row_invariant: bool = False

    def __init__(
        self,
        config: SharedExpertsConfig,
        hidden_size: int,
        *,
        is_row_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shared_config = config
        self.is_row_invariant = is_row_invariant
        width = config.intermediate_size

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.gate_proj = linear(hidden_size, width, config.has_bias) if config.is_gated else None
        self.up_proj = linear(hidden_size, width, config.has_bias)
        self.down_proj = linear(width, hidden_size, config.has_bias)

    def forward(self, hidden_states: Tensor, gate_weight: Tensor | None = None) -> Tensor:
        """Run on (T,H) rows -> (T,H).

        `gate_weight` (1,H) is the sigmoid gate's, which the layer owns.
        """
        if self.is_row_invariant:
            return self._run_by_row(hidden_states, gate_weight)
        up = self.up_proj(hidden_states)
        if self.gate_proj is None:
            hidden = activate(up, None, self.shared_config.activation)
        else:
            hidden = activate(self.gate_proj(hidden_states), up, self.shared_config.activation)
        out: Tensor = self.down_proj(hidden)
        if gate_weight is not None:
            out = F.linear(hidden_states, gate_weight).sigmoid() * out
        return out

    def _run_by_row(self, hidden_states: Tensor, gate_weight: Tensor | None) -> Tensor:
        if hidden_states.shape[0] == 0:
            return torch.zeros_like(hidden_states)
        rows = torch.split(hidden_states.to(sum_dtype(hidden_states.dtype)), 1)
        # An activation rounds differently in a vector loop and in its remainder, so it too goes by
        # row.
        return torch.cat([self._run_row(row, gate_weight) for row in rows]).to(hidden_states.dtype)

    def _run_row(self, row: Tensor, gate_weight: Tensor | None) -> Tensor:
        """(1,H) -> (1,H)."""

        def project(linear: nn.Linear, x: Tensor) -> Tensor:
            return linear_by_row(x, linear.weight, linear.bias)

        up = project(self.up_proj, row)
        if self.gate_proj is None:
            hidden = activate(up, None, self.shared_config.activation)
        else:
            hidden = activate(project(self.gate_proj, row), up, self.shared_config.activation)
        out = project(self.down_proj, hidden)
        return out if gate_weight is None else linear_by_row(row, gate_weight).sigmoid() * out

    @property
    def can_be_cut(self) -> bool:
        """Whether parts can be taken of the maps: plain ones, that nobody watches."""
        maps = [self.up_proj, self.down_proj, self.gate_proj]
        return not self.is_row_invariant and all(
            one is None
            or (type(one) is nn.Linear and not one._forward_hooks and not one._forward_pre_hooks)
            for one in maps
        )

    def run_part(
        self, hidden_states: Tensor, gate_weight: Tensor | None, part: int, parts: int
    ) -> Tensor:
        """What one of `parts` cuts of the width adds to the output: (T,H) -> (T,H)."""
        bounds = even_bounds(self.shared_config.intermediate_size, parts)
        cut = slice(bounds[part], bounds[part + 1])

        def cut_rows(linear: nn.Linear) -> Tensor:
            bias = None if linear.bias is None else linear.bias[cut]
            return F.linear(hidden_states, linear.weight[cut], bias)

        up = cut_rows(self.up_proj)
        if self.gate_proj is None:
            hidden = activate(up, None, self.shared_config.activation)
        else:
            hidden = activate(cut_rows(self.gate_proj), up, self.shared_config.activation)
        bias = self.down_proj.bias if part == 0 else None
        out = F.linear(hidden, self.down_proj.weight[:, cut], bias)
        return out if gate_weight is None else F.linear(hidden_states, gate_weight).sigmoid() * out

    def start(
        self,
        hidden_states: Tensor,
        gate_weight: Tensor | None,
        order: SharedExpertsOrder,
        part: tuple[int, int] | None = None,
    ) -> SharedTask:
        """Begin; on an auxiliary stream for MULTI_STREAM_OVERLAPPED, else at once.

        `part` is this rank's, as (number, of how many), for SUMMED.
        """
        if order is SharedExpertsOrder.SUMMED:
            assert part is not None
            return SharedTask(self.run_part(hidden_states, gate_weight, *part))
        if order is not SharedExpertsOrder.MULTI_STREAM_OVERLAPPED:
            return SharedTask(self(hidden_states, gate_weight))
        current = torch.cuda.current_stream(hidden_states.device)
        stream = _auxiliary_stream(current)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self(hidden_states, gate_weight)
        return SharedTask(output, stream, hidden_states)


_STREAMS: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def _auxiliary_stream(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside a stream, on its device; each has one of its own.

    Work on it starts behind all that was started on `current`, and on no other stream: in a graph
    that is what keeps memory which is free again from being written before `current` has read it.
    """
    key = (current.device, current.cuda_stream)
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(device=current.device)  # type: ignore[no-untyped-call]
    return _STREAMS[key]
