"""Runners: *when* the parts of a layer run. What they compute is the layer's."""

from mixtura.runner.runners import ChunkingMoERunner, DefaultMoERunner, MoERunner, create_runner
from mixtura.runner.schedule import LayerOutput, LayerParts, one_batch, run_to_end

__all__ = [
    "ChunkingMoERunner",
    "DefaultMoERunner",
    "LayerOutput",
    "LayerParts",
    "MoERunner",
    "create_runner",
    "one_batch",
    "run_to_end",
]
