"""`quantize_checkpoint`: a dense checkpoint becomes a quantized one, a matrix at a time.

Files are read and written by the tensor: memory holds the matrices that are quantized together
(one, or an expert's gate and up) in fp32 and a few copies, or one tensor that stays as it is,
whatever the size of the model. What every output file will hold is known before the first is
written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from mixtura.errors import CheckpointError, InputError
from mixtura.hf.activation_moments import Calibration, Moments, find_moments
from mixtura.hf.checkpoint import INDEX, SINGLE, checkpoint_files, read_json
from mixtura.hf.gguf_checkpoint import is_gguf
from mixtura.hf.load import check_moe, load_config
from mixtura.hf.quantize_plan import (
    CopiedTensor,
    Input,
    Matrix,
    MatrixGroup,
    QuantizePlan,
    Step,
    plan_quantization,
)
from mixtura.hf.quantize_report import LayerReport, Progress
from mixtura.hf.quantize_work import (
    MOMENTS,
    WorkDirectory,
    check_disk,
    check_output,
    work_path,
)
from mixtura.hf.stored import QUANT_CONFIGS, num_bytes, quantization_config
from mixtura.hf.tensor_io import ShardWriter, TensorReader
from mixtura.quant.codecs.output_formats import OutputFormat
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.quantize import quantize
from mixtura.quant.rows import take_rows
from mixtura.quant.search import search

COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""Ends of names of files that go along: configurations, tokenizer, templates, code."""

SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 1 << 20
"""For headers, the index and the journal."""


class Method(Enum):
    """How the scale of a group is found."""

    NEAREST = "nearest"
    SEARCH = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What is made of a checkpoint.

    Attributes:
        format: of the quantized matrices. method: how scales are found.
        packs_linears: whether attention projections are quantized too.
        shard_bytes: of a file at most, apart from its header and a tensor that is larger.
        calibration: a text whose activations weigh the errors of a search.
    """

    format: WeightFormat
    method: Method = Method.NEAREST
    packs_linears: bool = False
    shard_bytes: int = SHARD_BYTES
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.method is not Method.SEARCH:
            raise InputError(
                "--calibration must come with --method search; got nearest, which does not look at "
                "activations. Add --method search, or drop it."
            )
        if self.calibration is not None and not self.calibration.text.strip():
            raise InputError("the calibration text must have a token; got none. Give some text.")
        if self.shard_bytes < 1:
            raise InputError(
                f"shard_bytes ({self.shard_bytes}) must be at least 1; got less. Use {SHARD_BYTES}."
            )


def quantize_checkpoint(
    model: str | Path, out: Path, options: QuantizeOptions, progress: Progress | None = None
) -> list[LayerReport]:
    """Quantize a dense checkpoint into a new directory, which appears when it is whole.

    Until then everything is in `OUT.partial`; after an interruption the same call goes on from the
    last finished file.

    Args:
        model: a directory, or a hub id. out: a directory that is new or empty.
        options: what to make of it. progress: is told what happens.

    Returns:
        A report for every module with quantized matrices.

    Raises:
        CheckpointError: the checkpoint is broken or not one of safetensors.
        InputError: it is quantized already, has a weight that is not finite, or `out` cannot be
            written.
        ConfigError: the format is dense, or does not fit a matrix.
        UnsupportedModel: there are no experts that can be written.
    """
    progress = progress or Progress()
    output = OutputFormat.of(options.format)
    check_output(out)
    directory = dense_directory(model)
    empty = check_moe(load_config(directory))
    files = checkpoint_files(directory)
    reader = TensorReader(files)
    plan = plan_quantization(empty, reader.headers, output, packs_linears=options.packs_linears)
    shards = _shards(plan, options.shard_bytes)
    is_new = not work_path(out).exists()
    if is_new:
        check_disk(out, SPARE_BYTES + sum(_num_bytes(plan, steps) for steps in shards.values()))
    work = WorkDirectory(out, _settings(directory, files, options))
    try:
        left = [steps for name, steps in shards.items() if name not in work.kept]
        check_disk(out, SPARE_BYTES + sum(_num_bytes(plan, steps) for steps in left))
        progress.planned(plan, len(shards), len(shards) - len(left))
        run = _Run(plan, options, reader, work, progress)
        run.calibrate(directory)
        for name, steps in shards.items():
            run.make_file(name, steps)
        _write_rest(directory, work.files, plan, shards)
        work.finish()
    finally:
        work.close()
    return list(run.reports.values())


def dense_directory(model: str | Path) -> Path:
    """The directory of a dense safetensors checkpoint; a hub id is downloaded.

    Raises:
        InputError: it is quantized. CheckpointError: there is none.
    """
    if is_gguf(model):
        raise InputError(
            f"the model ({model}) must be a directory of safetensors files to be quantized; got a "
            f"GGUF file. Use the original weights."
        )
    directory = Path(model)
    if not directory.is_dir():
        load_config(model)  # says what is wrong with the name
        patterns = ["*.safetensors", *(f"*{suffix}" for suffix in COPIED_SUFFIXES)]
        try:
            directory = Path(snapshot_download(str(model), allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the files of {model} must be there or on the hub; got "
                f"{str(error).splitlines()[0]}. Check the name, the path and the network."
            ) from None
    settings = quantization_config(directory)
    if settings is not None:
        inner = settings.get("quantization_config", settings)
        method = inner.get("quant_method", "none") if isinstance(inner, dict) else "none"
        raise InputError(
            f"the model ({model}) must be dense to be quantized; got one that is quantized "
            f"already (quant_method {method}). Use the original weights."
        )
    return directory


def _settings(directory: Path, files: list[Path], options: QuantizeOptions) -> dict[str, Any]:
    """What makes two runs the same."""
    config = directory / "config.json"
    stats = [(file.name, file.stat()) for file in (config, *files)]
    return {
        "model": str(directory.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "scheme": options.format.value,
        "method": options.method.value,
        "linears": options.packs_linears,
        "shard_bytes": options.shard_bytes,
        "calibration": options.calibration.digest if options.calibration else None,
    }


def _num_bytes(plan: QuantizePlan, steps: list[Step]) -> int:
    return sum(num_bytes(h) for step in steps for h in plan.tensors(step).values())


def _shards(plan: QuantizePlan, limit: int) -> dict[str, list[Step]]:
    """The files, by name, and what goes into each."""
    groups: list[list[Step]] = [[]]
    filled = 0
    for step in plan.steps:
        size = _num_bytes(plan, [step])
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(step)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": steps
        for number, steps in enumerate(groups, 1)
    }


@dataclass(slots=True)
class _Run:
    """One run of `quantize_checkpoint` once everything is settled."""

    plan: QuantizePlan
    options: QuantizeOptions
    reader: TensorReader
    work: WorkDirectory
    progress: Progress
    moments: Moments | None = None
    reports: dict[str, LayerReport] = field(default_factory=dict)

    def calibrate(self, directory: Path) -> None:
        """Find the moments, unless an earlier run has; make an empty report for every module."""
        calibration, path = self.options.calibration, self.work.path / MOMENTS
        groups = [step for step in self.plan.steps if isinstance(step, MatrixGroup)]
        if calibration is not None:
            if not path.is_file():
                linears = [group.source for group in groups if group.input is Input.LINEAR]
                find_moments(directory, calibration, linears, self.progress.calibrated).save(path)
            self.moments = Moments.load(path)
        for group in groups:
            report = self.reports.setdefault(group.module, LayerReport(group.module))
            report.num_matrices += len(group.matrices)
        for name, report in self.reports.items():
            if self.moments is not None and name in self.moments.experts:
                found = self.moments.experts[name]
                report.tokens_per_expert = tuple(found.num_tokens.tolist())
                report.starved = found.starved()

    def make_file(self, name: str, steps: list[Step]) -> None:
        """Write a file, or take over what the journal says of it."""
        if name not in self.work.kept:
            self._write_file(name, steps)
        for module, facts in self.work.kept[name]["modules"].items():
            report = self.reports[module]
            report.add(*facts)
            if report.num_done == report.num_matrices:
                self.progress.layer(report)

    def _write_file(self, name: str, steps: list[Step]) -> None:
        headers = {tensor: h for step in steps for tensor, h in self.plan.tensors(step).items()}
        writer = ShardWriter(self.work.unfinished(name), headers)
        found: dict[str, LayerReport] = {}
        try:
            for step in steps:
                if isinstance(step, CopiedTensor):
                    writer.write(step.name, self.reader.read(step.name))
                    continue
                report = found.setdefault(step.module, LayerReport(step.module))
                for tensor, value in self._quantized(step, report):
                    writer.write(tensor, value)
            digest = writer.close()
        except BaseException:
            writer.abandon()
            raise
        modules = {
            module: [report.num_done, report.squared_error, report.squared_norm, report.worst]
            for module, report in found.items()
        }
        self.work.finish_file(name, digest, {"bytes": writer.num_bytes, "modules": modules})

    def _quantized(self, group: MatrixGroup, report: LayerReport) -> Iterator[tuple[str, Tensor]]:
        """The tensors of matrices that are quantized together."""
        output = self.plan.output
        dense = [self._read(matrix) for matrix in group.matrices]
        whole = self._packed(group, dense[0] if len(dense) == 1 else torch.cat(dense))
        start = 0
        for matrix, weight in zip(group.matrices, dense, strict=True):
            stop = start + matrix.shape[0]
            part = whole if len(dense) == 1 else take_rows(whole, torch.arange(start, stop))
            start = stop
            tensors, read = output.encode(matrix.name, part)
            report.measure(weight, read)
            for name in output.headers(matrix.shape):
                tensor = output.tensor_name(matrix.name, name)
                yield tensor, tensors[tensor]

    def _read(self, matrix: Matrix) -> Tensor:
        weight = matrix.read(self.reader)
        is_finite = torch.isfinite(weight)
        if not is_finite.all():
            row, column = (~is_finite).nonzero()[0].tolist()
            raise InputError(
                f"{matrix.name} (row {row}, column {column}) must be finite; got "
                f"{weight[row, column].item()}. Repair the weight, or fetch the weights again."
            )
        return weight

    def _packed(self, group: MatrixGroup, weight: Tensor) -> QuantizedMatrix:
        scheme = self.plan.output.scheme
        try:
            if self.options.method is Method.NEAREST:
                return quantize(weight, scheme)
            return search(weight, scheme, self._importance(group))
        except InputError as error:
            raise InputError(str(error).replace("weight", group.name, 1)) from None

    def _importance(self, group: MatrixGroup) -> Tensor | None:
        """What the columns' errors weigh; None, all alike, where calibration does not say."""
        if self.moments is None:
            return None
        if group.expert is None:
            return self.moments.linears.get(group.source)
        found = self.moments.experts.get(group.source)
        if found is None or group.expert in self.reports[group.module].starved:
            return None
        return (found.down if group.input is Input.DOWN else found.gate_up)[group.expert]


def _write_rest(
    directory: Path, files: Path, plan: QuantizePlan, shards: dict[str, list[Step]]
) -> None:
    """The index, everything that is no weight, and config.json last."""
    for path in files.iterdir():
        if path.name not in shards:
            path.unlink()  # of an interrupted run
    if len(shards) > 1:
        weight_map = {
            tensor: name
            for name, steps in shards.items()
            for step in steps
            for tensor in plan.tensors(step)
        }
        total = sum(_num_bytes(plan, steps) for steps in shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(files / INDEX, index)
    for path in sorted(directory.iterdir()):
        is_left = path.name in ("config.json", *QUANT_CONFIGS) or path.name.endswith("index.json")
        if path.is_file() and path.name.endswith(COPIED_SUFFIXES) and not is_left:
            shutil.copyfile(path, files / path.name)
    config = read_json(directory / "config.json")
    config["quantization_config"] = plan.output.config(plan.ignored)
    _write_json(files / "config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
