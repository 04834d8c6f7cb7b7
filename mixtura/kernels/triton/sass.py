"""What a GPU's machine code says of a product: instructions of its loop, for every weight. Pure.

A GPU issues so many instructions in the time that it takes to read a weight: a loop that has more
of them is not limited by memory. See docs/gpu.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARP_SIZE = 32
WARP_GROUP = 4
"""Warps that issue a wide product together."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of a product multiplies.

    Attributes:
        weights: rows of weights. rows: rows. depth: columns of both.
    """

    weights: int
    rows: int
    depth: int

    @property
    def num_terms(self) -> int:
        """Products of two numbers."""
        return self.weights * self.rows * self.depth


class Instruction(NamedTuple):
    """An instruction of machine code: its address, and its words but for a predicate."""

    address: int
    text: str


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA\b.*?\b0x([0-9a-f]+)")
_WIDE = re.compile(r"^[HQI]GMMA\.(\d+)x(\d+)x(\d+)\b")
_NARROW = re.compile(r"^[HQI]MMA\.(16)(8)(\d+)\b")


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a disassembly by cuobjdump, one kernel's."""
    return [Instruction(int(address, 16), text) for address, text in _LINE.findall(sass)]


def lane_instructions(sass: str, step: Step, num_warps: int) -> float | None:
    """Instructions of a lane in the innermost loop of products, for every weight of a step.

    The loop with most products is the one; where the compiler has unrolled it, it holds several
    steps, and where it has unrolled all, those from the first step's first product to the last
    step's are counted. None where products do not say how large they are (Blackwell's, of a memory
    of their own).
    """
    code = instructions(sass)
    terms = [_terms(one.text, num_warps) for one in code]
    loops = [span for span in _loops(code) if any(terms[span])]
    innermost = [span for span in loops if not any(_is_inside(one, span) for one in loops)]
    if innermost:
        spans = [(span, sum(terms[span]) / step.num_terms) for span in innermost]
    else:
        spans = _unrolled(terms, step)
    if not spans:
        return None
    span, num_steps = max(spans, key=lambda one: sum(terms[one[0]]))
    lane_weights = step.weights * step.depth / (WARP_SIZE * num_warps)
    return len(code[span]) / (num_steps * lane_weights)


def _unrolled(terms: Sequence[int], step: Step) -> list[tuple[slice, float]]:
    """What lies between the first products of the first and of the last step, and how many steps.

    A single step is all that it has: its products, and nothing around them.
    """
    products = [index for index, count in enumerate(terms) if count]
    if not products:
        return []
    per_step = step.num_terms // terms[products[0]]
    num_steps = max(1, len(products) // per_step)
    last = products[-per_step] if num_steps > 1 else products[-1] + 1
    return [(slice(products[0], last), max(1, num_steps - 1))]


def _terms(text: str, num_warps: int) -> int:
    """Terms that an instruction of all warps adds to sums."""
    found = _WIDE.match(text)
    issuers = num_warps // WARP_GROUP
    if found is None:
        found, issuers = _NARROW.match(text), num_warps
    if found is None:
        return 0
    rows, columns, depth = map(int, found.groups())
    return issuers * rows * columns * depth


def _loops(code: Sequence[Instruction]) -> list[slice]:
    """From where a branch goes back to, up to the branch."""
    index = {one.address: number for number, one in enumerate(code)}
    found = []
    for number, one in enumerate(code):
        branch = _BRANCH.match(one.text)
        if branch is not None and int(branch[1], 16) < one.address:
            found.append(slice(index[int(branch[1], 16)], number + 1))
    return found


def _is_inside(one: slice, other: slice) -> bool:
    return one != other and other.start <= one.start and one.stop <= other.stop
