"""The element types of ggml: numbers in the file, names, and the size of a block."""

from __future__ import annotations

from enum import Enum

from mixtura.errors import CheckpointError


class GgmlType(Enum):
    """How a tensor of a GGUF file is stored: (number in the file, columns and bytes of a block).

    Blocks lie along K, and a row is a whole number of them. Numbers that are missing here belong
    to layouts that exist only in memory, or to other programs.

    Source: `enum ggml_type` and the `block_*` structs of ggml.
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)
    NVFP4 = (40, 64, 36)
    Q1_0 = (41, 128, 18)
    Q2_0 = (42, 64, 18)

    @property
    def number(self) -> int:
        """What stands for the type in a file."""
        return self.value[0]

    @property
    def block_columns(self) -> int:
        """Elements of a block."""
        return self.value[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.value[2]

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of a row; `num_columns` must be a multiple of `block_columns`."""
        return num_columns // self.block_columns * self.block_bytes

    @classmethod
    def parse(cls, name: str) -> GgmlType:
        """The type of that name, as ggml spells it.

        Raises:
            CheckpointError: there is none.

        >>> GgmlType.parse("Q4_K").row_bytes(512)
        288
        """
        if name not in cls.__members__:
            raise CheckpointError(
                f"ggml_type ({name!r}) must be one of {', '.join(cls.__members__)}; got an unknown "
                f"name. Use another file."
            )
        return cls[name]
