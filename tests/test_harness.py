"""`python -m pytest -m gpu` on a machine that has nothing but torch, Triton, numpy and pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import GPU_MODULES, asks_for_gpu, pytest_runtest_setup

from mixtura.env import cache_directory

TESTS = Path(__file__).parent
ABSENT = (
    "accelerate",
    "compressed_tensors",
    "gguf",
    "huggingface_hub",
    "hypothesis",
    "llama_cpp",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "xdist",
    "mixtura.kernels.cpu._cpu",
)
"""What a machine with a GPU may not have: packages, and the compiled extension."""

WITHOUT = f"""
import sys


class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {ABSENT} or name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent)
"""

PYTEST = """
import pytest

sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""

LAYER = """
import torch
from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig

experts = ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=16)
routing = RoutingConfig(num_experts=4, top_k=2)
layer = FusedMoE(MoEConfig(hidden_size=8, routing=routing, experts=experts))
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter)
print(*layer(torch.randn(3, 8)).shape)
"""


def run_without(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code from the source tree without the packages that are `ABSENT`."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *arguments],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_layer_needs_torch_and_numpy_alone():
    result = run_without(LAYER)
    assert (result.stdout, result.returncode) == ("3 8\n", 0), result.stderr


def test_gpu_tests_need_little_and_are_skipped_where_there_is_no_gpu():
    result = run_without(PYTEST, "-m", "gpu", "-v", "-rs", "--color=no")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"needs a CUDA device; torch {torch.__version__} sees none" in result.stdout
    line = r"^tests/(\S+\.py)::.*? (SKIPPED|PASSED|FAILED|ERROR)\b"
    outcomes = dict(re.findall(line, result.stdout, re.MULTILINE))
    assert {"test_gpu_shared_experts.py", "test_gpu_capture.py"} <= outcomes.keys()
    assert outcomes.keys() <= {path.name for name in GPU_MODULES for path in TESTS.glob(name)}
    assert set(outcomes.values()) == {"SKIPPED"}


@pytest.mark.parametrize(
    "expression, is_gpu_run",
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("not slow and gpu", True),
        ("not gpu and not slow", False),
        ("not gpu", False),
        ("slow", False),
        ("", False),
    ],
)
def test_which_runs_ask_for_gpu_tests(expression, is_gpu_run):
    class Config:
        option = type("Option", (), {"markexpr": expression})

    assert asks_for_gpu(Config) is is_gpu_run  # type: ignore[arg-type]


@pytest.mark.parametrize("is_interpreted", [True, False])
def test_gpu_tests_do_not_run_interpreted(is_interpreted, monkeypatch):
    class Item:
        @staticmethod
        def get_closest_marker(name):
            return pytest.mark.gpu if name == "gpu" else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET")
    if not is_interpreted:
        pytest_runtest_setup(Item)  # type: ignore[arg-type]
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(pytest.skip.Exception, match="run with -m gpu"):
        pytest_runtest_setup(Item)  # type: ignore[arg-type]


def test_no_test_reads_the_cache_of_the_user():
    directory = cache_directory()
    assert directory.parent.parent == Path(tempfile.gettempdir())
    assert directory.parent.name.startswith("mixtura-tests-") and directory.parent.is_dir()
