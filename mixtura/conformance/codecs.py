"""What every codec promises: a matrix's meaning, its bits back, and no for what is damaged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtura.conformance.closeness import relative_error
from mixtura.conformance.report import Cases, Promises, require
from mixtura.errors import CheckpointError, ConfigError, MixturaError
from mixtura.hf.stored import SafetensorsCheckpoint
from mixtura.quant.codecs import Codec, Header, MatrixFormat, Sample, codec_class
from mixtura.quant.codecs.output_formats import OutputFormat
from mixtura.quant.codecs.registry import PLUG_INS
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize

MODULE = "model.layers.0.mlp.experts.3.up_proj"
NAME = f"{MODULE}.weight"
TOLERANCE = 1e-5
"""Of the decoded weight, beside the sample's own."""

NONSENSE: tuple[Any, ...] = (None, -1, "nonsense", [], {})
"""What a setting is replaced with."""

WRITTEN: dict[str, WeightFormat] = {
    "compressed-tensors": WeightFormat.INT4_G32,
    "fp8": WeightFormat.FP8_BLOCK,
}
"""Built-in families with a sample, made by rounding: they are written here, too."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A family, and a matrix of its files."""

    codec: type[Codec]
    sample: Sample

    @property
    def configured(self) -> Codec:
        """The codec for the sample's configuration."""
        return self.codec.from_config(self.sample.config)

    def format_of(self, parts: Mapping[str, Tensor]) -> MatrixFormat:
        """How the parts lie in the file."""
        headers = {part: Header.of(tensor) for part, tensor in parts.items()}
        found = self.configured.format_of(NAME, headers)
        if found is None:
            raise CheckpointError(f"{NAME} must be read as a packed matrix; got a dense one.")
        return found


def names() -> tuple[str, ...]:
    """Built-in families that can be examined."""
    return tuple(WRITTEN)


def find(name: str) -> Subject:
    """A family by `quant_method`, with its sample.

    Raises:
        ConfigError: a plug-in brings no sample.
        PlugInError: it cannot be used.
    """
    if name not in PLUG_INS.names():
        return Subject(codec_class(name), _written(WRITTEN[name]))
    codec = PLUG_INS.load(name)
    sample = codec.sample()
    if sample is None:
        raise ConfigError(
            f"codec ({name!r}) must bring a sample to be examined; got none. Give it a classmethod "
            f"sample that returns a Sample."
        )
    return Subject(codec, sample)


def _written(weight_format: WeightFormat) -> Sample:
    """A random matrix, rounded, as we would write it."""
    value = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    output = OutputFormat.of(weight_format)
    stored, matrix = output.encode(NAME, quantize(value, output.scheme))
    parts = {tensor.removeprefix(f"{MODULE}."): part for tensor, part in stored.items()}
    return Sample(output.template, parts, dequantize(matrix))


def promises(subject: Subject, device: str = "cpu") -> Promises:
    """Everything that is tried of a family; files are read on the host whatever the device."""
    exam = Examination(subject)
    return {
        "configuration": exam.configurations,
        "names of tensors": exam.tensor_names,
        "meaning": lambda: [("the sample", exam.meaning)],
        "written back to the bit": lambda: [("the sample", exam.round_trip)],
        "damaged headers are refused": exam.headers,
        "another shape is refused": lambda: [("one row more", exam.shape)],
        "contents that are no numbers are refused": exam.contents,
        "dense matrices stay dense": lambda: [("a bf16 weight", exam.dense)],
        "the ledger names every tensor": lambda: [("a file", exam.ledger)],
    }


@dataclass(frozen=True)
class Examination:
    """A family and its sample, under examination."""

    subject: Subject

    def configurations(self) -> Cases:
        """A configuration is read, or refused as ours are; what is not known breaks nothing."""
        config = dict(self.subject.sample.config)
        yield "the sample's", partial(self._configure, config, is_sound=True)
        yield "an unknown key", partial(self._configure, {**config, "unheard_of": 1})
        for key in config:
            rest = {name: value for name, value in config.items() if name != key}
            yield f"without {key}", partial(self._configure, rest)
            for other in NONSENSE:
                yield f"{key}={other!r}", partial(self._configure, {**config, key: other})

    def _configure(self, config: Mapping[str, Any], *, is_sound: bool = False) -> None:
        try:
            found = self.subject.codec.from_config(config)
        except MixturaError as error:
            require(not is_sound, f"the sample's configuration must be read; got {error}")
            return
        require(isinstance(found, Codec), f"from_config must return a codec; got {found!r}")
        require(isinstance(found.expects(NAME), bool), "expects must return a bool")

    def tensor_names(self) -> Cases:
        """Every part has a name in files, and is found by it."""
        for part in self.subject.sample.parts:
            yield part, partial(self._split, part)

    def _split(self, part: str) -> None:
        stored = self._stored_name(part)
        found = self.subject.configured.split(stored)
        require(found == (NAME, part), f"{stored} must be ({NAME}, {part}); got {found}")

    def _stored_name(self, part: str) -> str:
        suffixes = [suffix for suffix, of in self.subject.codec.suffixes.items() if of == part]
        require(bool(suffixes), f"suffixes must name the part {part}; got none")
        return f"{MODULE}{suffixes[0]}"

    def meaning(self) -> None:
        """`dequantize(decode(parts))` is the weight of the sample."""
        sample = self.subject.sample
        decoded = self.subject.format_of(sample.parts).read(NAME, sample.parts, _shape(sample))
        found = dequantize(decoded.matrix)
        shape = tuple(found.shape)
        require(shape == _shape(sample), f"the matrix must be {_shape(sample)}; got {shape}")
        error = relative_error(found, sample.weight.float())
        require(error <= TOLERANCE, f"the weight must agree; got {error:.1e} off")

    def round_trip(self) -> None:
        """`encode(decode(parts))` are the parts, to the bit."""
        sample = self.subject.sample
        found = self.subject.format_of(sample.parts)
        back = found.encode(found.read(NAME, sample.parts, _shape(sample)))
        got = ", ".join(back)
        require(back.keys() == sample.parts.keys(), f"encode must give all parts; got {got}")
        for part, tensor in sample.parts.items():
            same = Header.of(back[part]) == Header.of(tensor)
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back[part], tensor)]
            require(same and torch.equal(*bits), f"{part} must come back to the bit; got others")

    def headers(self) -> Cases:
        """A part that is missing, one too many, of another dtype or shape."""
        parts = dict(self.subject.sample.parts)
        needed = self.subject.format_of(parts).parts(_shape(self.subject.sample))
        for part, tensor in parts.items():
            rest = {name: other for name, other in parts.items() if name != part}
            if not needed[part].is_optional:
                yield f"without {part}", partial(self._refuse, rest, may_mean_the_same=True)
            changed = {
                "in float64": tensor.double(),
                "cut short": tensor[:-1] if tensor.ndim else tensor.reshape(1, 1),
                "with a dimension more": tensor[None, None, None],
            }
            for words, value in changed.items():
                yield f"{part} {words}", partial(self._refuse, {**rest, part: value})
        yield "a part too many", partial(self._refuse, {**parts, "unheard_of": torch.zeros(2)})

    def _refuse(self, parts: Mapping[str, Tensor], *, may_mean_the_same: bool = False) -> None:
        sample = self.subject.sample
        try:
            found = self.subject.format_of(parts).read(NAME, parts, _shape(sample))
        except CheckpointError as error:
            require(bool(str(error).strip()), "a refusal must say why; got no words")
            return
        same = relative_error(dequantize(found.matrix), sample.weight.float()) <= TOLERANCE
        is_kept = may_mean_the_same and same
        require(is_kept, "it must be refused with a CheckpointError; got a matrix")

    def shape(self) -> None:
        """A shape that config.json gives and the parts do not have."""
        parts, (rows, columns) = self.subject.sample.parts, _shape(self.subject.sample)
        try:
            self.subject.format_of(parts).read(NAME, parts, (rows + 1, columns))
        except CheckpointError:
            return
        require(False, "it must be refused with a CheckpointError; got a matrix")

    def contents(self) -> Cases:
        """NaN and infinities in parts of floats."""
        parts = dict(self.subject.sample.parts)
        for part, tensor in parts.items():
            if not tensor.is_floating_point():
                continue
            for value in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.reshape(-1)[-1] = value
                if not bool(broken.reshape(-1)[-1].float().isfinite()):
                    yield f"{value} in {part}", partial(self._refuse, {**parts, part: broken})

    def dense(self) -> None:
        """A weight of a float dtype is no packed matrix."""
        found = self.subject.configured.format_of(
            NAME, {"weight": Header(torch.bfloat16, _shape(self.subject.sample))}
        )
        require(found is None, f"format_of must return None for a dense weight; got {found}")

    def ledger(self) -> None:
        """A file of two matrices, a norm and a bias: every tensor has its use."""
        sample = self.subject.sample
        stored = {self._stored_name(part): tensor for part, tensor in sample.parts.items()}
        other = {name.replace("experts.3", "experts.4"): part for name, part in stored.items()}
        dense = {"model.norm.weight": torch.ones(8), f"{MODULE}.bias": torch.zeros(8)}
        given = {name: tensor.clone() for name, tensor in (stored | other | dense).items()}
        with tempfile.TemporaryDirectory() as directory:
            save_file(given, Path(directory) / "model.safetensors")
            (Path(directory) / "config.json").write_text(json.dumps({}))
            found = SafetensorsCheckpoint(Path(directory), sample.config)
            missing = sorted(given.keys() - found.tensors.keys())
            require(not missing, f"every tensor must have a use; got none for {missing[:1]}")
            packed = sorted(found.packed)
            wanted = [NAME, NAME.replace("experts.3", "experts.4")]
            require(packed == wanted, f"the packed matrices must be {wanted}; got {packed}")
            weight = dequantize(found.decoded(NAME).matrix)
            error = relative_error(weight, sample.weight.float())
        require(error <= TOLERANCE, f"the weight must agree; got {error:.1e} off")


def _shape(sample: Sample) -> tuple[int, int]:
    rows, columns = sample.weight.shape
    return rows, columns
