"""Runners: *when* the parts of a layer run. What they compute is the layer's."""

from mixtura.runner.runners import (
    ChunkingMoERunner,
    DefaultMoERunner,
    MoERunner,
    OverlappedMoERunner,
    create_runner,
    in_parts,
)
from mixtura.runner.schedule import LayerOutput, LayerParts, one_batch, run_in_turn, run_to_end

__all__ = [
    "ChunkingMoERunner",
    "DefaultMoERunner",
    "LayerOutput",
    "LayerParts",
    "MoERunner",
    "OverlappedMoERunner",
    "create_runner",
    "in_parts",
    "one_batch",
    "run_in_turn",
    "run_to_end",
]
