"""A newcomer can follow one token from the layer to the kernel: few files, functions, branches.

The path is not written down here: it is what runs. A forward pass is profiled, and what is called
between `FusedMoE.forward` and the kernel counts. The choice of experts is a path of its own; its
branches are the steps of the pipeline, one or two a function, so that it is allowed more of them.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

import mixtura
from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig

PACKAGE = Path(mixtura.__file__).parent
MAX_FILES, MAX_FUNCTIONS, MAX_LINES = 6, 15, 300
MAX_BRANCHES = {"layer to kernel": 15, "choice of experts": 24}
BRANCHES = (ast.If, ast.For, ast.While, ast.Match, ast.Try)
VALUES = ("types.py", "config", "quant", "dispatch/contract.py")
"""Rooms of values: properties and checks of nouns, which a reader takes as read."""

ACCESSORS = (
    "moe_config",
    "dispatcher",
    "tensors",
    "read",
    "check_rows",
    "check_capture",
    "is_capturing",
    "on_device",
    "shared_experts_order",
)
"""Functions that return an attribute or a few together, check an argument or where they are called,
or are one pure decision."""


def called_in_forward() -> dict[str, CodeType]:
    """Functions of the package that one forward pass calls, by file and name, in order."""
    config = MoEConfig(
        hidden_size=8,
        routing=RoutingConfig(num_experts=4, top_k=2),
        experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=6),
    )
    layer = FusedMoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found: dict[str, CodeType] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if event == "call" and path.is_relative_to(PACKAGE) and "<" not in name:
            found.setdefault(f"{path.relative_to(PACKAGE).as_posix()}:{name}", frame.f_code)

    with torch.no_grad():
        layer(torch.randn(5, 8))  # the first pass chooses a kernel
        sys.setprofile(note)
        try:
            layer(torch.randn(5, 8))
        finally:
            sys.setprofile(None)
    return found


def measure(path: dict[str, CodeType]) -> tuple[int, int, int, int]:
    """(files, functions, lines, branches)."""
    sources = [textwrap.dedent(inspect.getsource(code)) for code in path.values()]
    branches = sum(
        isinstance(node, BRANCHES) and not is_guard(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
    )
    files = {name.partition(":")[0] for name in path}
    return len(files), len(path), sum(source.count("\n") for source in sources), branches


def is_guard(node: ast.AST) -> bool:
    """Whether a branch only ends in an error: a reader who follows a good token does not enter
    it."""
    return isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and not node.orelse


def function_of(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]


def is_routing(name: str) -> bool:
    return name.startswith("routing/") or name.endswith((".route", ".finish_routing"))


@pytest.mark.parametrize("which", MAX_BRANCHES)
def test_the_path_of_a_token_is_short(which: str) -> None:
    path = {
        name: code
        for name, code in called_in_forward().items()
        if is_routing(name) == (which == "choice of experts")
        and not name.startswith((*VALUES, "kernels/"))
        and not function_of(name).startswith("_")
        and function_of(name) not in ACCESSORS
    }
    files, functions, lines, branches = measure(path)
    assert len(path) > 4
    listing = "\n".join(path)
    assert files <= MAX_FILES, listing
    assert functions <= MAX_FUNCTIONS, listing
    assert lines <= MAX_LINES, listing
    assert branches <= MAX_BRANCHES[which], listing
