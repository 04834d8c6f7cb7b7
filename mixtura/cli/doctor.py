"""`mixtura doctor`: what this machine offers, and what each missing piece costs."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli.options import DEMO, Debug
from mixtura.entry_points import Group, PlugIn
from mixtura.errors import MixturaError, NoKernelFits
from mixtura.plugin import is_supported, transformers_version, window

if TYPE_CHECKING:
    from rich.table import Table

INSTRUCTIONS = {
    "AVX2": (("avx2",), "arithmetic runs at most 4 numbers at a time"),
    "AVX-512": (("avx512f",), "arithmetic runs 8 numbers at a time, not 16"),
    "VNNI": (("avx512_vnni", "avx_vnni"), "int8 products take three instructions, not one"),
    "BF16": (("avx512_bf16", "amx_bf16"), "bf16 products are widened to fp32 first"),
    "AMX": (("amx_tile",), "long prompts in bf16 or int8 run without matrix tiles"),
}
"""Instruction sets: flags of /proc/cpuinfo, of which any will do, and what the lack costs."""

NO_CPP_COST = "experts run through torch, which widens 8- and 4-bit weights at every call"
NO_FLAGS_COST = "the portable kernels run, as fast as the compiler made them"
POOL_COST = "no OpenMP of torch's was found: two sets of threads share the cores"
"""What it costs to have no C++ kernels, none for this processor, or threads beside torch's."""

PROBE_SECONDS = 1.0
PROBE_BYTES = 2**30
"""The bandwidth probe is left out where less memory than this is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """Something a machine has or not; `is_here` is None where that cannot be told."""

    name: str
    is_here: bool | None
    cost: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor: cores that this process may use, threads that torch does use."""

    name: str
    num_cores: int
    num_threads: int
    features: tuple[Feature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CppKernels:
    """The C++ kernels of experts on a CPU; `problem` is None where they are built.

    `path` is the instruction set whose kernels run, `paths` those that could, `flags` what the
    kernels see of the processor, `threads` whose threads they run on.
    """

    problem: str | None
    path: str | None = None
    paths: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    threads: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory in bytes, and bytes per second read; None where that cannot be told."""

    total: int | None
    free: int | None
    bandwidth: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package by its version, or None; `cost` says what is lost where it is not in order."""

    name: str
    version: str | None
    cost: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, its memory in bytes, its compute capability, and the tuned blocks for it in words."""

    name: str
    memory: int
    capability: str
    tuned: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The model in the box; `problem` is None where it is whole."""

    path: str
    num_parameters: int | None
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The kernel that runs unquantized experts on a device, and why not the others."""

    device: str
    dtypes: tuple[str, ...]
    kernel: str | None
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that `doctor` finds out."""

    mixtura: str
    python: str
    cpu: Cpu
    cpp_kernels: CppKernels
    memory: Memory
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    demo: Demo
    kernels: tuple[KernelChoice, ...]
    plug_ins: tuple[PlugIn, ...]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    debug: Debug = False,
) -> None:
    """Say what this machine offers, and what is missing."""
    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(diagnosis), indent=2))
        return
    from rich.console import Console

    Console().print(table_of(diagnosis))


def diagnose() -> Diagnosis:
    """Look at the machine; takes about `PROBE_SECONDS`."""
    import mixtura

    return Diagnosis(
        mixtura=mixtura.__version__,
        python=platform.python_version(),
        cpu=find_cpu(),
        cpp_kernels=find_cpp_kernels(),
        memory=find_memory(),
        gpus=find_gpus(),
        packages=find_packages(),
        demo=find_demo(),
        kernels=find_kernels(),
        plug_ins=find_plug_ins(),
    )


def find_probes() -> ModuleType | None:
    """The module that measures machines, or None: its room compares with Transformers' layers."""
    try:
        from mixtura.bench import machine
    except ImportError:
        return None
    return machine


def find_cpu() -> Cpu:
    """The processor and its instruction sets."""
    import torch

    probes = find_probes()
    flags = cpu_flags()
    features = tuple(
        Feature(
            name=name, is_here=None if flags is None else not flags.isdisjoint(any_of), cost=cost
        )
        for name, (any_of, cost) in INSTRUCTIONS.items()
    )
    return Cpu(
        name=probes.cpu_name() if probes else platform.processor() or platform.machine(),
        num_cores=num_usable_cores(),
        num_threads=torch.get_num_threads(),
        features=features,
    )


def find_cpp_kernels() -> CppKernels:
    """Whether the C++ kernels are built, and which of them run."""
    from mixtura.kernels.cpu.extension import (
        cpu_flags,
        current_path,
        extension,
        missing,
        runnable_paths,
    )

    problem = missing()
    if problem is not None:
        return CppKernels(problem=problem)
    return CppKernels(
        problem=None,
        path=current_path(),
        paths=runnable_paths(),
        flags=cpu_flags(),
        threads=extension().threads(),
    )


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str] | None:
    """What an x86 processor can do, as Linux calls it; None elsewhere."""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return set(value.split())
    return None


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_memory() -> Memory:
    """Main memory, bounded by the container's limit, and how fast it is read."""
    total, free = memory_sizes()
    probes = find_probes()
    bandwidth = None
    if probes is not None and (free is None or free >= PROBE_BYTES):
        bandwidth = probes.read_bandwidth(PROBE_SECONDS)
    return Memory(total=total, free=free, bandwidth=bandwidth)


def memory_sizes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and free bytes; None where the system does not say."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None, None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kilobytes = {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1}
    total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    limit, used = (root / "sys/fs/cgroup" / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        allowed = int(limit.read_text())
        total, free = min(total, allowed), min(free, max(0, allowed - int(used.read_text())))
    return total, free


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use."""
    import torch

    from mixtura.kernels.triton.device import device_of
    from mixtura.kernels.triton.tuned import read_tuned, tuned_path

    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        device = device_of(torch.device("cuda", number))
        found.append(
            Gpu(
                name=gpu.name,
                memory=gpu.total_memory,
                capability=f"{gpu.major}.{gpu.minor}",
                tuned=str(read_tuned(tuned_path(device), device)),
            )
        )
    return tuple(found)


def find_packages() -> tuple[Package, ...]:
    """torch and what works with it."""
    import torch

    from mixtura.kernels.optional import DEEP_GEMM, FLASHINFER

    optional = {"deep_gemm": DEEP_GEMM, "flashinfer": FLASHINFER}
    transformers = transformers_version()
    triton, matplotlib = version_of("triton"), version_of("matplotlib")
    is_for_gpu = torch.version.cuda is not None or torch.version.hip is not None
    in_window = is_supported(transformers)
    return (
        Package(
            name="torch",
            version=torch.__version__,
            cost=None if is_for_gpu else "built without GPU support: everything runs on the CPU",
        ),
        Package(
            name="transformers",
            version=transformers,
            cost=None if in_window else f"models cannot be loaded: it must be {window()}",
        ),
        Package(
            name="triton",
            version=triton,
            cost=None if triton else "no Triton kernels: a GPU runs experts through torch",
        ),
        *(
            Package(
                name=package.title,
                version=package.version,
                cost=None if package.version else f"optional: kernel={kernel!r} cannot run",
            )
            for kernel, package in optional.items()
        ),
        Package(
            name="matplotlib",
            version=matplotlib,
            cost=None if matplotlib else "inspect writes no PNG: pip install matplotlib",
        ),
    )


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_demo(path: Path = DEMO) -> Demo:
    """Whether the model in the box is whole; its weights are not read."""
    from mixtura.hf.checkpoint import checkpoint_files, read_headers, read_json

    try:
        read_json(path / "config.json")
        headers = read_headers(checkpoint_files(path))
    except MixturaError as error:
        return Demo(path=str(path), num_parameters=None, problem=str(error))
    num_parameters = sum(prod(header.shape) for header in headers.values())
    return Demo(path=str(path), num_parameters=num_parameters, problem=None)


def find_kernels() -> tuple[KernelChoice, ...]:
    """The kernel of unquantized experts on each device that is here; equal answers together."""
    import torch

    from mixtura.config import ExpertsConfig
    from mixtura.kernels import select_kernel
    from mixtura.quant.scheme import QuantScheme
    from mixtura.types import ExpertsProblem

    experts = ExpertsConfig(num_experts=8, hidden_size=256, intermediate_size=128)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    answers: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], list[str]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, dtype in dtypes.items():
            kernel: str | None
            try:
                decision = select_kernel(
                    ExpertsProblem(experts, (QuantScheme.dense(dtype),), dtype, device)
                )
                kernel = decision.kernel.name
                reasons = tuple((r.kernel, r.reason) for r in decision.rejections)
            except NoKernelFits as error:
                kernel, reasons = None, (("all", str(error)),)
            answers.setdefault((device, kernel, reasons), []).append(name)
    return tuple(
        KernelChoice(device=device, dtypes=tuple(names), kernel=kernel, reasons=dict(reasons))
        for (device, kernel, reasons), names in answers.items()
    )


def find_plug_ins() -> tuple[PlugIn, ...]:
    """What other packages plug in; families are left out where Transformers is not here."""
    from mixtura.conformance import plug_ins_of

    found: list[PlugIn] = []
    for group in Group:
        try:
            found += plug_ins_of(group).reports()
        except ImportError:
            continue
    return tuple(found)


def table_of(found: Diagnosis) -> Table:
    """The diagnosis as a table: what, what is here, what its lack costs."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("piece", style="bold", no_wrap=True)
    table.add_column("here", overflow="fold")
    table.add_column("what that costs", overflow="fold", style="yellow")
    for row in rows_of(found):
        table.add_row(*row)
    return table


def rows_of(found: Diagnosis) -> list[tuple[str, str, str]]:
    """The table's rows; the last column is empty where nothing is lost."""
    rows = [
        ("mixtura", f"{found.mixtura}, Python {found.python}", ""),
        ("processor", found.cpu.name, ""),
        ("cores", str(found.cpu.num_cores), _threads_cost(found.cpu)),
    ]
    for feature in found.cpu.features:
        here = {True: "yes", False: "no", None: "unknown"}[feature.is_here]
        rows.append((feature.name, here, feature.cost if feature.is_here is False else ""))
    rows += _cpp_rows(found.cpp_kernels)
    rows.append(("memory", _memory(found.memory), ""))
    bandwidth = found.memory.bandwidth
    rows.append(
        ("bandwidth", "not measured", "the probe needs Transformers and 1 GiB free")
        if bandwidth is None
        else ("bandwidth", f"{bandwidth / 1e9:.1f} GB/s read", "")
    )
    for gpu in found.gpus:
        rows.append(("GPU", f"{gpu.name}, {_gib(gpu.memory)}, {gpu.capability}", ""))
        rows.append(("tuned blocks", gpu.tuned, ""))
    if not found.gpus:
        rows.append(("GPU", "none", "everything runs on the CPU"))
    for package in found.packages:
        rows.append((package.name, package.version or "not installed", package.cost or ""))
    demo = found.demo
    rows.append(
        ("demo model", f"{(demo.num_parameters or 0) / 1e6:.1f} M parameters", "")
        if demo.problem is None
        else ("demo model", "broken", demo.problem)
    )
    for choice in found.kernels:
        here = f"{choice.kernel or 'none'} ({', '.join(choice.dtypes)})"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
        rows.append((f"{choice.device} kernel", here, reasons))
    for plug_in in found.plug_ins:
        here = f"{plug_in.name} of {plug_in.group.value}, {plug_in.origin}"
        cost = "" if plug_in.problem is None else f"cannot be used: {plug_in.problem}"
        rows.append(("plug-in", here, cost))
    return rows


def _cpp_rows(cpp: CppKernels) -> list[tuple[str, str, str]]:
    if cpp.problem is not None:
        return [("C++ kernels", "not built", f"{NO_CPP_COST}; {cpp.problem}")]
    others = ", ".join(path for path in cpp.paths if path != cpp.path)
    return [
        ("C++ kernels", f"{cpp.path} (could run: {others or 'no other'})", ""),
        ("C++ flags", ", ".join(cpp.flags) or "none", "" if cpp.flags else NO_FLAGS_COST),
        ("C++ threads", cpp.threads or "", "" if cpp.threads == "openmp" else POOL_COST),
    ]


def _threads_cost(cpu: Cpu) -> str:
    if cpu.num_threads >= cpu.num_cores:
        return ""
    return f"torch uses {cpu.num_threads} of them: see OMP_NUM_THREADS"


def _memory(memory: Memory) -> str:
    if memory.total is None or memory.free is None:
        return "unknown"
    return f"{_gib(memory.total)}, {_gib(memory.free)} free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
