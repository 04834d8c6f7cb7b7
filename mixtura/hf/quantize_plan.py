"""What `quantize` does with every tensor of a dense checkpoint, settled from headers alone.

Each tensor falls under a rule with a name. Matrices of the routed experts are quantized, and
attention projections where that is asked for; all else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from mixtura.errors import CheckpointError, UnsupportedModel
from mixtura.experts import StoredTensor
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.expert_names import expert_slots
from mixtura.hf.headers import Places, StoredModel, match_headers
from mixtura.hf.quantize_rules import ModelLayers, Rule, find_layers, rule_of
from mixtura.hf.slots import Slots
from mixtura.hf.stored import num_bytes
from mixtura.hf.tensor_io import DTYPE_NAMES, TensorReader
from mixtura.quant.codecs.checks import module_of
from mixtura.quant.codecs.output_formats import OutputFormat

MERGED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Attention projections that engines merge, by the last part of their names."""


class Input(Enum):
    """Which rows a matrix is multiplied with."""

    GATE_UP = "gate_up"
    DOWN = "down"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix (N, K) that is quantized.

    Attributes:
        name: its dense name in the new checkpoint. shape: (N, K).
        stored: the tensor of the old one that it is in.
        expert: which of that stack; None where the matrix is the whole tensor.
        storage: how the stack is stored. rows: its rows in the expert's matrix; None for all.
    """

    name: str
    shape: tuple[int, int]
    stored: str
    expert: int | None = None
    storage: StoredTensor | None = None
    rows: Tensor | slice | None = None

    def read(self, reader: TensorReader) -> Tensor:
        """The dense matrix."""
        if self.expert is None:
            return reader.read(self.stored)
        assert self.storage is not None
        if self.storage.num_experts is None:
            whole = self.storage.logical(reader.read(self.stored, self.expert))[0]
        else:
            whole = self.storage.logical(reader.read(self.stored))[self.expert]
        return whole if self.rows is None else whole[self.rows]


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """Matrices that are quantized together: one, or several that share a global scale.

    Attributes:
        module: path of the experts or attention module. source: path of what gets the input.
        input: which rows they see. expert: whose they are; None for linear layers.
    """

    matrices: tuple[Matrix, ...]
    module: str
    source: str
    input: Input
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name of the first matrix, which says where the group is written."""
        return self.matrices[0].name

    @property
    def rule(self) -> Rule:
        """Why it is quantized."""
        return Rule.ATTENTION if self.expert is None else Rule.ROUTED_EXPERTS


@dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor that stays as it is, and the rule that says so."""

    name: str
    header: TensorHeader
    rule: Rule


Step = MatrixGroup | CopiedTensor


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What is done, in order.

    Attributes:
        output: how matrices are written. steps: in the order of the new files.
        ignored: modules that stay dense, as configurations list them.
        num_bytes: by rule, of the tensors before and after.
        num_tensors: by rule, tensors before.
        notes: what the user should know.
    """

    output: OutputFormat
    steps: tuple[Step, ...]
    ignored: tuple[str, ...]
    num_bytes: Mapping[Rule, tuple[int, int]]
    num_tensors: Mapping[Rule, int]
    notes: tuple[str, ...]

    @property
    def quantized(self) -> frozenset[Rule]:
        """The rules whose tensors are quantized."""
        return frozenset(step.rule for step in self.steps if isinstance(step, MatrixGroup))

    def tensors(self, step: Step) -> dict[str, TensorHeader]:
        """What a step writes."""
        if isinstance(step, CopiedTensor):
            return {step.name: step.header}
        return {
            self.output.tensor_name(matrix.name, part): TensorHeader(
                DTYPE_NAMES[header.dtype], header.shape
            )
            for matrix in step.matrices
            for part, header in self.output.headers(matrix.shape).items()
        }


def plan_quantization(
    empty: PreTrainedModel,
    headers: Mapping[str, TensorHeader],
    output: OutputFormat,
    *,
    packs_linears: bool,
) -> QuantizePlan:
    """Decide on every tensor of a dense checkpoint.

    Args:
        empty: the model on the meta device, as its configuration builds it.
        headers: of the checkpoint.
        output: how matrices are to be written.
        packs_linears: whether attention projections are quantized too.

    Raises:
        CheckpointError: the checkpoint is not that of the model.
        UnsupportedModel: it has no experts that mixtura runs, or experts without names of their
            own; or, with `packs_linears`, no attention projections.
        ConfigError: a matrix does not fit the format.
    """
    stored = match_headers(empty, headers)
    for name in stored.unused:
        if "expert" in name:
            raise CheckpointError(
                f"{name} must have a place in the model that config.json describes; got none. "
                f"Fetch config.json and the weights again, both of one model."
            )
    layers = find_layers(empty, packs_linears)
    groups = list(_expert_groups(layers, stored, headers, output))
    groups += _linear_groups(layers, stored, headers, output)
    if packs_linears and all(group.expert is not None for group in groups):
        raise UnsupportedModel(
            f"the model ({type(empty).__name__}) must have attention projections that are plain "
            f"linear layers for --linears; got none. Leave --linears out."
        )
    targets: dict[str, str] = {}
    for target, sources in stored.sources.items():
        for names in sources.values():
            targets |= dict.fromkeys(names, target)
    taken = {matrix.stored for group in groups for matrix in group.matrices}
    copied = [
        CopiedTensor(name, header, rule_of(targets.get(name), len(header.shape), layers))
        for name, header in headers.items()
        if name not in taken
    ]
    return _collect(groups, copied, headers, output, layers.head)


def _expert_groups(
    layers: ModelLayers,
    stored: StoredModel,
    headers: Mapping[str, TensorHeader],
    output: OutputFormat,
) -> Iterator[MatrixGroup]:
    places = Places(layers.empty)
    for path, plan in layers.experts.items():
        slots, all_headers, stacks = expert_slots(plan, path, stored.sources, headers, places)
        for role, found in slots.items():
            storage = plan.storage[role]
            for expert, names in enumerate(found.names):
                matrices = list(_matrices(expert, names, found, all_headers, storage, stacks))
                shared = [tuple(matrices)] if output.shares_global_scale else zip(matrices)
                source = Input.DOWN if role == "down_proj" else Input.GATE_UP
                for group in shared:
                    yield MatrixGroup(tuple(group), path, path, source, expert)


def _matrices(
    expert: int,
    names: Sequence[str],
    slots: Slots,
    headers: Mapping[str, TensorHeader],
    storage: StoredTensor,
    stacks: Mapping[str, str],
) -> Iterator[Matrix]:
    """The matrices that lie below each other in one expert's projection."""
    start = 0
    inverse = None if slots.order is None else slots.order.argsort()
    for name in names:
        num_rows, num_columns = headers[name].shape
        if name not in stacks:
            yield Matrix(name, (num_rows, num_columns), name)
            continue
        rows: Tensor | slice = slice(start, start + num_rows)
        if inverse is not None:
            rows = inverse[rows]
        start += num_rows
        yield Matrix(name, (num_rows, num_columns), stacks[name], expert, storage, rows)


def _linear_groups(
    layers: ModelLayers,
    stored: StoredModel,
    headers: Mapping[str, TensorHeader],
    output: OutputFormat,
) -> Iterator[MatrixGroup]:
    found: dict[tuple[str, str], list[tuple[str, Matrix]]] = {}
    for path in layers.linears:
        sources = stored.sources.get(f"{path}.weight", {})
        name = sources[None][0] if None in sources else None
        if name is None or not name.endswith(".weight"):
            continue
        num_rows, num_columns = headers[name].shape
        module, _, last = path.rpartition(".")
        merged = next((names[0] for names in MERGED_LINEARS if last in names), last)
        key = (module, merged if output.shares_global_scale else last)
        matrix = Matrix(name, (num_rows, num_columns), name)
        found.setdefault(key, []).append((path, matrix))
    for (module, _), members in found.items():
        matrices = tuple(matrix for _, matrix in members)
        yield MatrixGroup(matrices, module, members[0][0], Input.LINEAR)


def _collect(
    groups: list[MatrixGroup],
    copied: list[CopiedTensor],
    headers: Mapping[str, TensorHeader],
    output: OutputFormat,
    head: str | None,
) -> QuantizePlan:
    steps: list[Step] = sorted([*groups, *copied], key=lambda step: dot_natural_key(step.name))
    ignored = {
        module_of(tensor.name): None
        for tensor in copied
        if len(tensor.header.shape) > 1 and tensor.name.endswith(".weight")
    }
    if head is not None:
        ignored[head] = None  # a tied one is in no file, and engines ask for it all the same
    plan = QuantizePlan(output, tuple(steps), tuple(ignored), {}, {}, _notes(groups, output))
    before: dict[Rule, dict[str, int]] = {}
    after: dict[Rule, int] = {}
    shapes: set[tuple[int, int]] = set()
    for step in steps:
        if isinstance(step, CopiedTensor):
            names = [step.name]
        else:
            names = [matrix.stored for matrix in step.matrices]
            for matrix in step.matrices:
                if matrix.shape not in shapes:
                    output.matrix_format(matrix.name, matrix.shape)
                    shapes.add(matrix.shape)
        rule = step.rule
        for name in names:
            before.setdefault(rule, {})[name] = num_bytes(headers[name])
        written = sum(num_bytes(header) for header in plan.tensors(step).values())
        after[rule] = after.get(rule, 0) + written
    sizes = {rule: (sum(before[rule].values()), after[rule]) for rule in Rule if rule in before}
    num_tensors = {rule: len(before[rule]) for rule in sizes}
    return QuantizePlan(output, plan.steps, plan.ignored, sizes, num_tensors, plan.notes)


def _notes(groups: list[MatrixGroup], output: OutputFormat) -> tuple[str, ...]:
    columns = output.scheme.group_shape[1]
    widths = sorted({m.shape[1] for group in groups for m in group.matrices})
    odd = [width for width in widths if columns is not None and width % columns]
    return tuple(
        f"matrices of {width} columns end with a group of {width % columns}: mixtura reads them, "
        f"other engines may insist on whole groups of {columns}"
        for width in odd
        if columns is not None
    )
