"""What a checkpoint family is: a configuration and tensors by name -> matrices, and back.

A *dense name* is what the matrix would be called in an unquantized checkpoint
(`model.layers.0.mlp.experts.3.up_proj.weight`); in a quantized one several *parts* stand in its
place (`...up_proj.qweight`, `...up_proj.scales`). A `Codec` reads the configuration, tells parts
from other tensors, and gives every matrix its `MatrixFormat`; that reads and writes the matrix.

Names and dtypes in the files decide what a matrix is. Lists in the configuration only say what its
writer meant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.matrix import QuantizedMatrix


class Header(NamedTuple):
    """A stored tensor without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Header:
        """The header of a tensor that is at hand."""
        return cls(tensor.dtype, tuple(tensor.shape))


class Part(NamedTuple):
    """What the header of one part of a matrix must be.

    Attributes:
        dtypes: admissible dtypes. shape: the admissible shape.
        is_optional: whether it may be missing.
        other_shapes: shapes that are admissible too, as writers have changed their mind.
    """

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    is_optional: bool = False
    other_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Decoded:
    """One matrix of a file.

    Attributes:
        matrix: (N, K), or a stack (E, N, K) where the file has one.
        input_scale: fp32, what static int8 or fp8 activations are multiplied by to get their value,
            () or (E,); a second-level scale of NVFP4 activations in the same sense.
        kept: parts, verbatim, that add nothing to the matrix's meaning and are needed to write it
            back: an identity `g_idx`, zero points that symmetric codes ignore, a scale that the
            file has as its reciprocal. An empty tensor (0, *shape) says only what shape a part has.
    """

    matrix: QuantizedMatrix
    input_scale: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class MatrixFormat(ABC):
    """How a matrix lies in a file. Subclasses are frozen dataclasses: hashable, without tensors.

    Attributes:
        activations: how activations are to be quantized, or None: as they come.
    """

    activations: ActivationScheme | None

    @property
    def label(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @abstractmethod
    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """The logical shape (N, K) or (E, N, K) that the headers of the parts speak of.

        Args:
            headers: by part.
            shape: what the model's configuration says; needed where the file does not hold it.

        Raises:
            CheckpointError: no shape fits the headers, or none is known.
        """

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What the headers of a matrix of that shape must be, by part."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        """Read a matrix from parts whose headers have been checked (`check_headers`).

        Raises:
            CheckpointError: contents that cannot be meant: scales that are not finite, tensor-level
                scales that are not above zero, e8m0 code 255, NaN codes.
        """

    @abstractmethod
    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        """The parts that `decode` read, bit for bit.

        Raises:
            ConfigError: the matrix's scheme cannot be written in this format.
        """

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """The shape that the contents of a part state; None where the file holds none.

        For formats whose headers do not give the shape, as where codes are one flat row.
        """
        return None

    @property
    def input_part(self) -> str | None:
        """The part that `Decoded.input_scale` is read from; it may be missing."""
        return None

    def read_input_scale(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What `decode` makes of `input_part` in a matrix of that shape, by itself.

        Raises:
            CheckpointError: it is not finite and above zero.
        """
        raise NotImplementedError  # only where there is an `input_part`

    def contradiction(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What a part that means nothing says against the configuration, as an error would; or
        None.

        `decode` does not ask: a file is written back as it was.
        """
        return None

    def read(
        self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None
    ) -> Decoded:
        """Check the headers of a matrix's parts, then decode them; errors name the matrix.

        Args:
            name: the matrix's dense name.
            tensors: by part.
            shape: what the model's configuration says, where it is known.

        Raises:
            CheckpointError: headers or contents are not what they must be.
        """
        headers = {part: Header.of(tensor) for part, tensor in tensors.items()}
        try:
            stated = self.stored_shape(tensors) if shape is None else shape
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        found = self.check_headers(name, headers, stated)
        try:
            return self.decode(tensors, found)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def check_headers(
        self, name: str, headers: Mapping[str, Header], shape: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """Compare the headers of a matrix's parts with what they must be.

        Args:
            name: the matrix's dense name, for messages.
            headers: by part.
            shape: what the model's configuration says, where it is known.

        Returns:
            The logical shape.

        Raises:
            CheckpointError: a part is missing, superfluous, or of another dtype or shape.
        """
        try:
            found = self.shape_of(headers, shape)
            _check_shape(found, shape)
            parts = self.parts(found)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        for part, needed in parts.items():
            header = headers.get(part)
            if header is None:
                if needed.is_optional:
                    continue
                raise CheckpointError(
                    f"{name} ({self.label}) must have a part {part}; got only "
                    f"{', '.join(sorted(headers))}. Fetch the weights again."
                )
            shapes = (needed.shape, *needed.other_shapes)
            if header.dtype not in needed.dtypes or header.shape not in shapes:
                dtypes = " or ".join(str(d).removeprefix("torch.") for d in needed.dtypes)
                raise CheckpointError(
                    f"{part} of {name} ({header.shape} {header.dtype}) must be "
                    f"{' or '.join(map(str, shapes))} of {dtypes} for a matrix {found}; got "
                    f"another. Fetch config.json and the weights again, both of one model."
                )
        extra = sorted(headers.keys() - parts.keys())
        if extra:
            raise CheckpointError(
                f"{name} ({self.label}) must consist of {', '.join(parts)}; got "
                f"{extra[0]} besides. Fetch config.json and the weights again, both of one model."
            )
        return found


def _check_shape(found: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    if shape is not None and found != shape:
        raise CheckpointError(
            f"shape ({found}) must be what config.json gives; got {shape} from it. Fetch "
            f"config.json and the weights again, both of one model."
        )
    if len(found) not in (2, 3) or min(found) < 1:
        raise CheckpointError(
            f"shape ({found}) must be (N, K) or (E, N, K) with positive sizes; got another. Fetch "
            f"the weights again."
        )


class Sample(NamedTuple):
    """A small matrix in a family's files, and what it means: `decode(parts) = weight`.

    Attributes:
        config: the `quantization_config`. parts: as stored. weight: (N, K), computed apart from the
            codec.
    """

    config: Mapping[str, Any]
    parts: Mapping[str, Tensor]
    weight: Tensor


class Codec(ABC):
    """A checkpoint family, configured.

    Attributes:
        name: what docs and messages call it.
        methods: the values of `quant_method` that it reads.
        suffixes: ends of tensors' names and the part that each one is; the longest that fits
            counts. What is before the end, and `.weight` behind it, is the dense name; for ends
            that do not begin with a dot nothing is put behind.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[Mapping[str, str]]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `quantization_config`.

        Raises:
            CheckpointError: a value is missing, or means a format that is not read; the message
                names it.
        """

    @classmethod
    def sample(cls) -> Sample | None:
        """What `mixtura conformance` reads a plug-in with; None: it cannot be examined."""
        return None

    @abstractmethod
    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        """The format of a matrix by what is stored of it; None where it is dense.

        Args:
            name: its dense name.
            headers: by part. A dense matrix is the single part "weight" of a float dtype.

        Raises:
            CheckpointError: the parts are none that this family writes.
        """

    @abstractmethod
    def expects(self, name: str) -> bool:
        """Whether the configuration says that this matrix is quantized; for warnings only."""

    def split(self, tensor: str) -> tuple[str, str] | None:
        """Dense name and part of a stored tensor; None where it is no part of a matrix.

        >>> from mixtura.quant.codecs.gptq import Gptq
        >>> Gptq.from_config({"bits": 4, "group_size": 128}).split("layers.0.up_proj.qweight")
        ('layers.0.up_proj.weight', 'qweight')
        """
        for suffix in sorted(self.suffixes, key=len, reverse=True):
            if tensor.endswith(suffix):
                stem = tensor.removesuffix(suffix)
                return stem + ".weight" * suffix.startswith("."), self.suffixes[suffix]
        return None
