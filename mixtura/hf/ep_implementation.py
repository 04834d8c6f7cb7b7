"""Transformers' own expert parallelism with our exchange: `ep_implementation="mixtura"`.

Transformers cuts the stacks of experts evenly, rank after rank, and gives each rank the experts of
its part. What is left is how rows meet them: the dispatchers of `mixtura.dispatch`. Redundant
experts, balancing, other placements and packed weights need a checkpoint that is read by mixtura
itself: `mixtura.from_pretrained(model, parallel=...)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation

from mixtura.dispatch import AllReduceDispatcher, AllToAllDispatcher, Dispatcher
from mixtura.errors import GradientUnsupported, ParallelError
from mixtura.parallel import SlotTables, Topology, TorchTransport


class MixturaEP(EPImplementation):  # type: ignore[misc]
    """Rows to their experts and back.

    Where all ranks of the group hold one batch each runs its experts on it and results are summed;
    where every rank has its own, rows travel. Any experts implementation of Transformers may run
    them.

    Args:
        experts: the module, cut. ep_mesh, tp_mesh: its ranks, and those that hold one batch.

    Raises:
        ParallelError: some ranks hold one batch and some another, or the backend is unknown.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        group = ep_mesh.get_group()
        if not self.shares_batch and tp_mesh.size() > 1:
            raise ParallelError(
                f"ep_implementation 'mixtura' must have ranks that hold one batch (ep_size equal "
                f"to tp_size), or one each (tp_size 1); got tp_size {tp_mesh.size()} and ep_size "
                f"{ep_mesh.size()}. Use ep_implementation='all_to_all'."
            )
        transport = TorchTransport(group)
        num_experts = self.num_local_experts * transport.size
        topology = Topology.even(num_experts, transport.size)
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        slots = SlotTables.of(topology, transport.rank, device)
        self.dispatcher: Dispatcher = (
            AllReduceDispatcher(transport, slots)
            if self.shares_batch
            else AllToAllDispatcher(transport, slots)
        )

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T,H), (T,K) ids of all experts, (T,K) -> (T,H).

        Raises:
            GradientUnsupported: gradients would have to cross ranks.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise GradientUnsupported(
                "rows that cross ranks must not need gradients with ep_implementation 'mixtura'; "
                "got some that do. Use torch.no_grad(), or ep_implementation='auto' to train."
            )
        self.dispatcher.check_capture(hidden_states.device)
        ids = top_k_index.to(torch.int32)
        arrived = self.dispatcher.dispatch(hidden_states, ids, top_k_weights).wait()
        batch = arrived.batch
        is_elsewhere = batch.local_ids < 0
        # What Transformers' experts take for an expert of another rank.
        local_ids = batch.local_ids.masked_fill(is_elsewhere, self.num_local_experts).long()
        weights = batch.topk_weights.to(top_k_weights.dtype).masked_fill(is_elsewhere, 0.0)
        rows = batch.hidden_states
        if rows.shape[0]:
            rows = self.experts_forward(rows, local_ids, weights)
        return self.dispatcher.combine(rows, arrived.handle).wait().tensor
