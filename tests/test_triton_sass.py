"""Instructions of a product's loop, counted in machine code that is written here."""

from __future__ import annotations

import pytest

from mixtura.kernels.triton.sass import Step, instructions, lane_instructions

WIDE = "HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24"
FP8 = "QGMMA.64x32x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24"
NARROW = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
OTHER = "FADD R0, R1, R2"
STEP = Step(weights=64, rows=32, depth=16)
"""One wide product of four warps: 1024 weights, 8 of a lane."""


def sass(*lines: str) -> str:
    """Code as cuobjdump writes it: an instruction every 16 bytes, and its encoding."""
    return "".join(
        f"        /*{16 * number:04x}*/                   {line} ;   /* 0x000fe20000000f00 */\n"
        "                                                   /* 0x000fe20000000f00 */\n"
        for number, line in enumerate(lines)
    )


def back_to(number: int) -> str:
    return f"@!P0 BRA 0x{16 * number:x}"


def test_instructions_come_without_predicates() -> None:
    found = instructions(sass("@P1 FADD R0, R1, R2", "@!UP0 UIADD3 UR4, UR4, 0x1, URZ"))
    assert found == [(0, "FADD R0, R1, R2"), (16, "UIADD3 UR4, UR4, 0x1, URZ")]


def test_a_loop_is_from_the_target_of_a_branch_back_to_it() -> None:
    code = sass(OTHER, OTHER, *[OTHER] * 6, WIDE, back_to(2), OTHER)
    assert lane_instructions(code, STEP, 4) == 8 / 8


def test_a_loop_of_several_steps_is_divided_by_them() -> None:
    code = sass(OTHER, *[OTHER] * 13, WIDE, back_to(0), OTHER)
    once = lane_instructions(code, STEP, 4)
    code = sass(*[OTHER] * 13, WIDE, *[OTHER] * 15, WIDE, OTHER, back_to(0))
    twice = lane_instructions(code, STEP, 4)
    assert (once, twice) == (16 / 8, 32 / 2 / 8)


def test_the_innermost_loop_with_most_products_is_the_one() -> None:
    small = [WIDE.replace("64x32", "64x16"), OTHER, back_to(1)]
    large = [WIDE, WIDE, OTHER, back_to(4)]
    waiting = [OTHER, back_to(8)]
    code = sass(OTHER, *small, *large, *waiting, back_to(0))
    assert lane_instructions(code, Step(128, 32, 16), 4) == 4 / 16


def test_a_loop_within_a_loop_counts_and_the_outer_does_not() -> None:
    inner = [OTHER, WIDE, back_to(10)]
    code = sass(*[OTHER] * 10, *inner, *[OTHER] * 10, back_to(0))
    assert lane_instructions(code, STEP, 4) == 3 / 8


def test_unrolled_steps_are_counted_from_product_to_product() -> None:
    code = sass(*[OTHER] * 50, WIDE, *[OTHER] * 9, WIDE, *[OTHER] * 13, WIDE, *[OTHER] * 50)
    assert lane_instructions(code, STEP, 4) == (10 + 14) / 2 / 8
    alone = sass(*[OTHER] * 50, FP8, OTHER, FP8, OTHER)
    assert lane_instructions(alone, Step(64, 32, 64), 4) == 3 / 32


@pytest.mark.parametrize("num_warps", [4, 8])
def test_products_of_warps_are_counted_for_all_of_them(num_warps: int) -> None:
    code = sass(OTHER, NARROW, NARROW, back_to(0))
    step = Step(weights=16 * num_warps, rows=16, depth=16)
    assert lane_instructions(code, step, num_warps) == 4 / 8


def test_code_without_products_says_nothing() -> None:
    assert lane_instructions(sass(OTHER, back_to(0)), STEP, 4) is None
