"""Where kernels in Triton run in tests: in its interpreter on a CPU, or on a GPU that is there."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set before Triton was imported."""

DEVICE = "cuda" if not IS_INTERPRETED and torch.cuda.is_available() else "cpu"

if not IS_INTERPRETED and DEVICE == "cpu":
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)
