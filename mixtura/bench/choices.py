"""Contenders by name."""

from __future__ import annotations

from mixtura.bench.cases import Case
from mixtura.bench.contenders import OURS, PREFERRED, Contender, KernelContender
from mixtura.bench.peers.onnxruntime_moe import NAME as ONNX
from mixtura.bench.peers.onnxruntime_moe import OnnxContender
from mixtura.bench.peers.transformers_experts import (
    COMPILED,
    HUB_KERNELS,
    IMPLEMENTATIONS,
    TransformersContender,
)
from mixtura.errors import ConfigError
from mixtura.kernels import get_kernel, kernel_names

PEERS: dict[str, Contender] = {
    **{name: TransformersContender(name) for name in (*IMPLEMENTATIONS, *HUB_KERNELS, COMPILED)},
    ONNX: OnnxContender(),
}
"""What ours are measured against."""

DEFAULT = (PREFERRED, "eager", "grouped_mm", COMPILED, ONNX)
"""Who runs on a CPU where nobody is named; plain batched_mm is slower than eager wherever it was
timed."""


def default_on_gpu(case: Case) -> list[str]:
    """Who runs a case on a GPU where nobody is named: every kernel of ours that is written for it.

    Where none of them runs the case, the one that is chosen, too; and what Transformers has.
    """
    written = [name for name in kernel_names() if "cuda" in (get_kernel(name).devices or ())]
    ours = [OURS + name if name in PEERS else name for name in written]
    if all(contender.refusal(case) is not None for contender in find_contenders(ours)):
        ours.append(PREFERRED)
    return [*ours, "grouped_mm", "batched_mm", "eager", *HUB_KERNELS]


def find_contenders(names: list[str]) -> list[Contender]:
    """Contenders by name, in the order given; the error lists the names.

    A name that a peer and a kernel of ours have is the peer's; "mixtura:" before it makes it ours.
    """
    found: list[Contender] = []
    for name in dict.fromkeys(names):
        if name in PEERS:
            found.append(PEERS[name])
        elif name.removeprefix(OURS) in (PREFERRED, *kernel_names()):
            found.append(KernelContender(name))
        else:
            kernels = (OURS + kernel if kernel in PEERS else kernel for kernel in kernel_names())
            choices = ", ".join((PREFERRED, *kernels, *PEERS))
            raise ConfigError(
                f"contender ({name!r}) must be one of {choices}; got an unknown name. "
                "Use one of these."
            )
    return found
