"""Ranks as axes of a `DeviceMesh`: which of them share experts."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from mixtura.errors import ConfigError
from mixtura.parallel.transport import TorchTransport


def transport_over(mesh: DeviceMesh, *axes: str) -> TorchTransport:
    """The group of ranks that differ along some axes of a mesh, as one row of ranks.

    With a mesh of data-parallel times tensor-parallel ranks, `transport_over(mesh, "dp", "tp")` is
    expert parallelism over all of them, and `transport_over(mesh, "tp")` one of each data-parallel
    rank by itself. All ranks of the mesh call this together. The last axis runs fastest: it is the
    one for the cuts of an expert (`tp_size`).

    Args:
        mesh: of all ranks, its axes named.
        axes: names, in the order of the mesh.

    Raises:
        ConfigError: an axis is not one of the mesh's, or they are in another order.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "ep"))  # doctest: +SKIP
        >>> transport_over(mesh, "ep").size  # doctest: +SKIP
        4
    """
    names = mesh.mesh_dim_names or ()
    if not axes or [name for name in names if name in axes] != list(axes):
        raise ConfigError(
            f"axes ({', '.join(axes)}) must be axes of the mesh, in its order; got a mesh of "
            f"({', '.join(names)}). Name them as the mesh does."
        )
    part = mesh[axes] if len(axes) < len(names) else mesh
    row = part if len(axes) == 1 else part._flatten("_".join(axes))
    return TorchTransport(row.get_group())
