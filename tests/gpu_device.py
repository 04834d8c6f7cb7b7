"""Where tests of Triton kernels run; a module that imports this is skipped without Triton.

Tests take `triton` and `tl` from here, so that this import comes before one that fails.

By default on the CPU, in Triton's interpreter; with `-m gpu` on the GPU, compiled. See
`tests/conftest.py`, which decides before Triton is imported.
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton", reason="needs Triton", exc_type=ImportError)
tl = pytest.importorskip("triton.language")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in the interpreter: no bf16 arithmetic, no assembly, a program at a time."""

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
"""The device of a kernel's tensors."""
