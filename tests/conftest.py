"""Shared by all tests: one thread a worker, no network, and where Triton's kernels run.

In a run that asks for GPU tests (`-m gpu`) only the modules of `GPU_MODULES` are collected, which
need nothing but torch, Triton, numpy and pytest; so does this file.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

GPU_MODULES = ("test_gpu_*.py", "test_triton_*.py")
"""Test modules of which `-m gpu` runs something: the tests marked gpu, and all of Triton's."""


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether the expression after `-m` names gpu, and not to leave it out."""
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device of Triton's kernels before anything imports Triton.

    The user's cache is out of reach: blocks that were tuned on this machine must not count.
    """
    cache = tempfile.TemporaryDirectory(prefix="mixtura-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    if asks_for_gpu(config):
        os.environ.pop("TRITON_INTERPRET", None)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from hypothesis import settings

    # A busy machine is slow, not wrong.
    settings.register_profile("mixtura", deadline=None)
    settings.load_profile("mixtura")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules whose imports a machine with a GPU may not have."""
    is_other = collection_path.name.startswith("test_") and not any(
        collection_path.match(pattern) for pattern in GPU_MODULES
    )
    return True if asks_for_gpu(config) and is_other else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a GPU run Triton's tests are GPU tests."""
    for item in items if asks_for_gpu(config) else ():
        if item.path.match("test_triton_*.py"):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU, and where Triton's kernels are interpreted."""
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device; torch {torch.__version__} sees none")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("run with -m gpu")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
