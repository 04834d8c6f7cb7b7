"""The compiled extension: that it is there, what happens without it, and what is in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

from mixtura.kernels.cpu.extension import emulated_paths, missing, runnable_paths

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")
WIDE = re.compile(r"%(ymm|zmm|tmm|k)\d")
"""Registers that a processor of the baseline lacks."""


def test_where_there_is_a_compiler_there_is_an_extension():
    """Else the suite would pass without having run a kernel."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    assert missing() is None, f"{compiler} is here: {missing()}. Install mixtura again."
    assert runnable_paths()[-1] == "portable"


def run_python(script: str) -> str:
    """What a fresh interpreter prints."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_without_it_torch_runs_everything_and_the_decision_says_why():
    run_python(
        """
        import sys
        sys.modules["mixtura.kernels.cpu._cpu"] = None  # as where it was not built
        import torch
        import mixtura
        from expert_cases import (
            build_layer, dequantized, moe_config, plain_experts, problem_of, quantized,
            random_batch, random_weights, rows_of, sizes,
        )
        from mixtura.errors import NoKernelFits
        from mixtura.experts import RoutedExperts
        from mixtura.kernels import select_kernel
        from mixtura.kernels.cpu.extension import missing
        from mixtura.quant.formats import WeightFormat
        from tolerances import relative_error

        reason = "its C++ extension is not built: install a C++17 compiler, then mixtura again"
        assert missing() == reason
        decision = select_kernel(problem_of(sizes()))
        assert decision.kernel.name == "torch" and decision.is_fallback
        assert (decision.rejections[0].kernel, decision.rejections[0].reason) == ("cpu", reason)
        for options in ({"kernel": "cpu"}, {"strict": True}):
            try:
                select_kernel(problem_of(sizes()), **options)
            except NoKernelFits as error:
                assert "\\n  cpu: " + reason in str(error)
            else:
                raise AssertionError(options)

        with torch.no_grad():
            for weight_format in (WeightFormat.INT4_G32, WeightFormat.MXFP4, WeightFormat.FP8):
                weights = quantized(random_weights(sizes()), weight_format)
                batch = random_batch(sizes(), 5)
                found = RoutedExperts(sizes(), weights=weights).run_batch(batch)
                expected = plain_experts(dequantized(weights), batch)
                assert relative_error(found, expected) < 3e-6
            layer, rows = build_layer(moe_config()), rows_of(5)
            expected = layer(rows)
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            assert relative_error(compiled(rows), expected) < 3e-6
        """
    )


# ------------------------------------------------------------------------------------ what is in it


@cache
def objects() -> dict[str, Path]:
    """The object files of the build that is kept: "isa/avx2", "csrc/team.cpp", ..."""
    found = {}
    for path in sorted(ROOT.glob("build/cp*/CMakeFiles/*.dir/csrc/*.o")):
        folder = path.parent.parent.name.removesuffix(".dir")
        is_isa = folder.startswith("kernels_")
        name = f"isa/{folder.removeprefix('kernels_')}" if is_isa else f"csrc/{path.stem}"
        found[name] = path
    return found


def tool(name: str, *arguments: str) -> str:
    """What one of the binary utilities prints; skips where it, or the build, is not here."""
    if shutil.which(name) is None or not objects():
        pytest.skip(f"needs {name} and a build folder")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def wide_registers(name: str) -> set[str]:
    """The kinds of wide registers that an object's instructions name."""
    code = tool("objdump", "--disassemble", "--no-show-raw-insn", str(objects()[name]))
    return set(WIDE.findall(code))


def test_code_for_all_processors_uses_no_wide_registers():
    """What is not compiled for one instruction set runs before CPUID has been asked."""
    tool("objdump", "--version")
    baseline = [name for name in objects() if name.startswith("csrc/")]
    assert {"csrc/module.cpp", "csrc/experts.cpp", "csrc/features.cpp"} <= set(baseline)
    for name in [*baseline, "isa/portable"]:
        assert wide_registers(name) == set(), name


def test_instruction_sets_use_their_own_registers():
    tool("objdump", "--version")
    if "isa/avx2" not in objects():
        pytest.skip("not built for x86-64")
    assert wide_registers("isa/avx2") == wide_registers("isa/avx2_vnni") == {"ymm"}
    assert {"zmm", "k"} <= wide_registers("isa/avx512")
    assert "tmm" not in wide_registers("isa/avx512_bf16")


def test_an_instruction_set_defines_its_table_and_nothing_else():
    """A second symbol could be what the linker keeps for all."""
    tool("nm", "--version")
    sets = [name for name in objects() if name.startswith("isa/")]
    assert {name.removeprefix("isa/") for name in sets} >= {*runnable_paths(), *emulated_paths()}
    for name in sets:
        lines = tool("nm", "--format=posix", "--demangle", str(objects()[name])).splitlines()
        matches = [re.fullmatch(r"(.+) ([A-Za-z]) [0-9a-f ]*", line) for line in lines]
        kinds = {match[1]: match[2] for match in matches if match is not None}
        assert None not in matches
        assert not {symbol for symbol, kind in kinds.items() if kind in "WwVvu"}, name
        table = f"mixtura::kernels_{name.removeprefix('isa/')}"
        defined = {symbol for symbol, kind in kinds.items() if kind.isupper() and kind != "U"}
        assert defined == {table}, name


@pytest.mark.parametrize("source", ["isa", "experts", "features", "routing", "team"])
def test_another_processor_can_be_compiled_for(source, tmp_path):
    """What is not x86-64 gets the portable kernels, and nothing that only x86-64 has."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for aarch64")
    flags = ["-std=c++17", "-O0", "-fPIC", "-DMIXTURA_ISA=portable"]
    path = ROOT / "csrc" / f"{source}.cpp"
    done = subprocess.run(
        [compiler, *flags, "-c", str(path), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
