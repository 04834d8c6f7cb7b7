"""Shared by all tests: one thread a worker, and no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("mixtura", deadline=None)
settings.load_profile("mixtura")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
