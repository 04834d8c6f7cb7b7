"""Packages that some kernels call where they are installed, and limits that such kernels share."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from mixtura.config import ExpertsConfig
from mixtura.types import ExpertsProblem


@dataclass(frozen=True, slots=True)
class OptionalPackage:
    """A package that is imported when a kernel that calls it is taken, and not before.

    Attributes:
        title: what it is called.
        module: what is imported.
        distributions: under which names it is installed.
    """

    title: str
    module: str
    distributions: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return None

    @property
    def label(self) -> str:
        """What it is called, with the version where that is known."""
        return f"{self.title} {self.version}" if self.version else self.title

    def missing(self) -> str | None:
        """Why it is not here, or None; imports nothing."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"{self.title} is not installed"
        return None

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)

    def unusable(self, *names: str) -> str | None:
        """Why it cannot be imported or lacks one of these names, or None."""
        try:
            module = self.load()
        except Exception as error:  # whatever it raises where it cannot be loaded
            return f"{self.label} cannot be imported: {error}"
        for name in names:
            if not hasattr(module, name):
                return f"{self.label} has no {name}"
        return None


DEEP_GEMM = OptionalPackage("DeepGEMM", "deep_gemm", ("deep_gemm", "sgl-deep-gemm"))
FLASHINFER = OptionalPackage("FlashInfer", "flashinfer.fused_moe", ("flashinfer-python",))


def capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU that torch uses; None where there is none here."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability()


def wrong_capability(majors: Sequence[int]) -> str | None:
    """Why the GPU here is none of those, or None; one that is not here passes."""
    here = capability()
    if here is None or here[0] in majors:
        return None
    wanted = " or ".join(f"{major}.x" for major in majors)
    return f"needs compute capability {wanted}, and the GPU here has {here[0]}.{here[1]}"


def wrong_dtypes(problem: ExpertsProblem, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why a kernel for dense weights and rows of one of these dtypes cannot run it, or None."""
    if not problem.is_dense:
        return f"multiplies dense weights, and these are {problem.scheme}"
    rows = problem.row_dtype
    if rows not in dtypes:
        return f"multiplies only {', '.join(map(str, dtypes))}, not {rows}"
    for scheme in problem.schemes:
        if scheme.values_dtype is not rows:
            return f"multiplies rows and weights of one dtype, not {rows} and {scheme.values_dtype}"
    return None


def wrong_sizes(experts: ExpertsConfig, multiple: int) -> str | None:
    """Why an expert's sizes do not suit a kernel that wants multiples, or None."""
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(experts, name)
        if size % multiple:
            return f"needs sizes that are multiples of {multiple}, and {name} is {size}"
    return None
