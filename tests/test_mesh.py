"""Expert parallelism over axes of a `DeviceMesh`, on four processes."""

from __future__ import annotations

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from rank_processes import RankProcesses, Seat
from spread_layers import rank_layer
from tolerances import assert_close
from torch.distributed.device_mesh import init_device_mesh

from mixtura.config import DispatcherName, ParallelConfig, TokensHeld
from mixtura.errors import ConfigError
from mixtura.parallel import transport_over

AXES = ("dp", "ep", "tp")


def layers_over_axes(seat: Seat) -> list[list[int]]:
    """Check a layer over every row of axes -> (rank, size) in each."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=AXES)
    whole = build_layer(moe_config(), kernel="reference")
    rows, found = rows_of(5, seed=seat.transport.rank), []
    for axes in (("tp",), ("dp",), ("dp", "tp"), AXES):
        transport = transport_over(mesh, *axes)
        parallel = ParallelConfig(
            ep_size=transport.size, dispatcher=DispatcherName.ALL_TO_ALL, tokens=TokensHeld.OWN
        )
        layer = rank_layer(whole, parallel, transport)
        assert_close(layer(rows), whole(rows), torch.float32)
        found.append([transport.rank, transport.size])
    for axes in ((), ("tp", "dp"), ("pp",)):
        with pytest.raises(ConfigError, match="must be axes of the mesh, in its order"):
            transport_over(mesh, *axes)
    return found


def test_experts_over_axes_of_a_mesh():
    with RankProcesses(4) as ranks:
        found = ranks.run("test_mesh:layers_over_axes", seconds=60.0)
    for rank, rows in enumerate(found):
        dp, tp = divmod(rank, 2)
        assert rows == [[tp, 2], [dp, 2], [rank, 4], [rank, 4]]
