"""One measurement as a line of JSON: what it is of, what it shows, and where it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixtura.bench.gpu.arithmetic import ROUNDED_TO
from mixtura.bench.gpu.limits import Bandwidth
from mixtura.bench.measure import Timing
from mixtura.bench.results import Floor
from mixtura.kernels.optional import DEEP_GEMM, FLASHINFER
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.tuned import tuned_path

PACKAGE = Path(__file__).parents[2]
OPTIONAL = (FLASHINFER, DEEP_GEMM)
PACKAGES = ("triton", "transformers", "kernels", "mixtura")
"""Whose versions are told; without an installed mixtura the sources tell which one it is."""

DIGEST = 12
"""Digits of a digest."""

Key = tuple[str, ...]
"""Shape, tokens, weights, activations, routing, contender, measure, mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a measurement was made; those of one place may be compared.

    Attributes:
        device: name, capability and driver, bytes of cache and memory.
        versions: of Python and packages.
        sources: a digest of mixtura's. commit: where they are in a repository.
        tuned: a digest of the file of tuned blocks for the device, None without one.
    """

    device: dict[str, Any]
    versions: dict[str, str | None]
    sources: str
    commit: str | None
    tuned: str | None

    def is_like(self, other: Place) -> bool:
        """Whether results of both may be compared.

        A commit that changes no source is the same place; so is a driver that nvidia-smi did not
        tell.
        """
        device, others = dict(self.device), dict(other.device)
        if None in (device.get("driver"), others.get("driver")):
            device["driver"] = others["driver"] = None
        return (device, self.versions, self.sources, self.tuned) == (
            others, other.versions, other.sources, other.tuned,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One contender on one case, in one measure and mode. docs/benchmarks/gpu.md has the keys."""

    shape: str
    T: int
    dtype: str
    weights: str
    activations: str
    routing: str
    contender: str
    measure: str
    mode: str
    kernel: str
    is_ours: bool
    refusal: str | None = None
    relative_error: float | None = None
    rounded_error: float | None = None
    is_correct: bool | None = None
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    repetitions: int | None = None
    share_of_floor: float | None = None
    share_of_nominal: float | None = None
    gbytes_per_s: float | None = None
    tflops: float | None = None
    floor_us: float
    nominal_us: float | None
    limited_by: str
    experts_hit: float
    slots: float
    weight_bytes: int
    row_bytes: int
    flops: int
    copy_gbytes_per_s: float
    read_gbytes_per_s: float
    peak_tflops: float
    layers: int
    weight_sets: int
    batches: int
    note: str | None
    state: dict[str, float] | None
    place: Place

    @property
    def key(self) -> Key:
        """What it is of."""
        case = (self.shape, str(self.T), self.weights, self.activations, self.routing)
        return (*case, self.contender, self.measure, self.mode)

    @property
    def operands(self) -> str:
        """The weights, and what rows are rounded to where they are: "fp8-block x fp8"."""
        is_rounded = self.activations in ROUNDED_TO
        return f"{self.weights} x {self.activations}" if is_rounded else self.weights

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> LayerResult | None:
        """The result of a line; None of one that is torn, or that another version wrote."""
        try:
            found = json.loads(line)
            return cls(**{**found, "place": Place(**found["place"])})
        except (ValueError, TypeError, KeyError):
            return None


def time_keys(timing: Timing, floor: Floor, nominal: float | None) -> dict[str, Any]:
    """What a time of one layer says, beside the floor and the nominal one in seconds."""
    seconds = timing.median
    return {
        "us": seconds * 1e6,
        "us_p10": timing.percentile(10) * 1e6,
        "us_p90": timing.percentile(90) * 1e6,
        "repetitions": timing.repetitions,
        "share_of_floor": floor.seconds / seconds,
        "share_of_nominal": None if nominal is None else nominal / seconds,
        "gbytes_per_s": floor.weight_bytes / seconds / 1e9,
        "tflops": floor.flops / seconds / 1e12,
    }


def floor_keys(
    floor: Floor, nominal: float | None, before: Bandwidth, after: Bandwidth
) -> dict[str, Any]:
    """What a floor is made of; bandwidths are the means of the probes around the case."""
    return {
        "floor_us": floor.seconds * 1e6,
        "nominal_us": None if nominal is None else nominal * 1e6,
        "limited_by": floor.limited_by,
        "weight_bytes": floor.weight_bytes,
        "row_bytes": floor.row_bytes,
        "flops": floor.flops,
        "copy_gbytes_per_s": (before.copy + after.copy) / 2e9,
        "read_gbytes_per_s": (before.read + after.read) / 2e9,
        "peak_tflops": floor.peak / 1e12,
    }


def find_versions() -> dict[str, str | None]:
    """Of what takes part in a measurement; None where it is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {package.module.partition(".")[0]: package.version for package in OPTIONAL}


def find_sources() -> str:
    """A digest of the package's sources as they are."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST]


def find_commit() -> str | None:
    """The commit, where the package is in a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_tuned(device_type: str) -> str | None:
    """A digest of the file of tuned blocks for the current device of a type; None without one."""
    path = tuned_path(device_of(torch.device(device_type)))
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGEST]
    except OSError:
        return None
