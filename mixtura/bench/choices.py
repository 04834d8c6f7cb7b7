"""Contenders by name."""

from __future__ import annotations

from mixtura.bench.contenders import PREFERRED, Contender, KernelContender
from mixtura.bench.peers.onnxruntime_moe import NAME as ONNX
from mixtura.bench.peers.onnxruntime_moe import OnnxContender
from mixtura.bench.peers.transformers_experts import (
    COMPILED,
    IMPLEMENTATIONS,
    TransformersContender,
)
from mixtura.errors import ConfigError
from mixtura.kernels import kernel_names

PEERS: dict[str, Contender] = {
    **{name: TransformersContender(name) for name in (*IMPLEMENTATIONS, COMPILED)},
    ONNX: OnnxContender(),
}
"""What ours are measured against."""

DEFAULT = (PREFERRED, "eager", "grouped_mm", COMPILED, ONNX)
"""Who runs where nobody is named; plain batched_mm is slower than eager wherever it was timed."""


def find_contenders(names: list[str]) -> list[Contender]:
    """Contenders by name, in the order given; the error lists the names."""
    found: list[Contender] = []
    for name in dict.fromkeys(names):
        if name in PEERS:
            found.append(PEERS[name])
        elif name in (PREFERRED, *kernel_names()):
            found.append(KernelContender(name))
        else:
            choices = ", ".join((PREFERRED, *kernel_names(), *PEERS))
            raise ConfigError(
                f"contender ({name!r}) must be one of {choices}; got an unknown name. "
                "Use one of these."
            )
    return found
