"""`WeightLedger`: what becomes of every tensor of a checkpoint, settled before a weight is read.

Every stored tensor is used in one way, or excluded by a rule that has a name; an expert's tensor,
or a packed one, that is neither ends the load. That each slot (layer, expert, projection, row) is
filled once is proven beside it: by `match_headers` from the headers, by `find_slots` on tracers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from mixtura.errors import CheckpointError
from mixtura.hf.contents import check_contents, zero_scales
from mixtura.hf.exclusions import EXPERT, GGUF_RULE
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import StoredModel
from mixtura.hf.stored import StoredCheckpoint, StoredTensor
from mixtura.quant.activations import ActivationScheme

MATRICES = ("gate_up_proj", "up_proj", "down_proj")

OF_ACTIVATIONS = ("input", "activation")
"""Parts whose names hold one of these are scales of activations: an expert may lack its own."""


IDLE_RULE = "expert that computes nothing"
"""Why the weight of a zero expert is left out, which LongCat-Flash's files may hold."""


class Use(StrEnum):
    """What becomes of a stored tensor."""

    PACKED_EXPERT = "packed expert"
    PACKED_LINEAR = "packed linear"
    MADE_DENSE = "packed, made dense"
    DENSE = "dense"
    EXCLUDED = "excluded"
    UNPLACED = "without a place"


class CheckpointWarning(UserWarning):
    """A checkpoint is loaded whole, and something about it should be known."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One stored tensor.

    Attributes:
        tensor: its name in the file. num_bytes: there. use: what becomes of it.
        rule: by which it is excluded, else None.
    """

    tensor: str
    num_bytes: int
    use: Use
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class ProjectionLedger:
    """One projection of all experts of a layer.

    Attributes:
        name: as the checkpoint calls it.
        formats: each way in which experts are stored, in words, and the experts stored so.
        num_bytes: in the files. packed_bytes: of these, of packed matrices.
        activations: what the file asks activations to be rounded to, in words; None: nothing.
        zero_scales: groups whose scale is 0; None where the contents have not been read.
    """

    name: str
    formats: Mapping[str, tuple[int, ...]]
    num_bytes: int
    packed_bytes: int
    activations: str | None
    zero_scales: int | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether experts are stored in several ways, so that all of them are made dense."""
        return len(self.formats) > 1


@dataclass(frozen=True, slots=True)
class LayerLedger:
    """The experts of one layer.

    Attributes:
        name: the experts module's path. num_experts: of it. projections: in order.
    """

    name: str
    num_experts: int
    projections: tuple[ProjectionLedger, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts' matrices in the files."""
        return sum(projection.num_bytes for projection in self.projections)

    @property
    def packed_share(self) -> float:
        """The part of these bytes that is of packed matrices."""
        return sum(p.packed_bytes for p in self.projections) / max(self.num_bytes, 1)


@dataclass(frozen=True, slots=True)
class WeightLedger:
    """Every tensor of a checkpoint.

    Attributes:
        family: what the checkpoint's format is called.
        entries: the stored tensors, in the order of the files. layers: the experts.
        disagreements: packed matrices that the configuration says are not.
        not_packed: matrices that the configuration says are packed and are not.
        has_contents: whether the contents of packed matrices have been read and checked.
    """

    family: str
    entries: tuple[LedgerEntry, ...]
    layers: tuple[LayerLedger, ...]
    disagreements: tuple[str, ...]
    not_packed: tuple[str, ...]
    has_contents: bool = False

    def num_bytes(self, *uses: Use) -> int:
        """Bytes of the tensors with one of these uses."""
        return sum(entry.num_bytes for entry in self.entries if entry.use in uses)

    def of(self, use: Use) -> list[LedgerEntry]:
        """The tensors with a use."""
        return [entry for entry in self.entries if entry.use is use]

    def asked(self, name: str) -> str | None:
        """What the files ask the activations of a layer's experts to be rounded to."""
        layer = next((layer for layer in self.layers if layer.name == name), None)
        words = [p.activations for p in layer.projections if p.activations] if layer else []
        return "; ".join(dict.fromkeys(words)) or None

    @property
    def packed_share(self) -> float:
        """The part of the experts' bytes that is of packed matrices."""
        total = sum(layer.num_bytes for layer in self.layers)
        packed = sum(p.packed_bytes for layer in self.layers for p in layer.projections)
        return packed / max(total, 1)

    def warnings(self) -> list[str]:
        """What should be known of a load, a line each."""
        found = []
        unplaced = [entry.tensor for entry in self.of(Use.UNPLACED)]
        if unplaced:
            found.append(
                f"{_some(unplaced)} of the checkpoint have no place in the model and are left out"
            )
        if self.disagreements:
            found.append(f"{self.disagreements[0]}{_others(self.disagreements)}; read by the files")
        experts = [name for name in self.not_packed if EXPERT in name]
        if experts:
            found.append(
                f"{experts[0]} is not quantized, and the configuration says that it is"
                f"{_others(experts)}; read by the files"
            )
        return found


@dataclass(frozen=True, slots=True)
class Content:
    """What the contents of a packed matrix are: its scheme in words, and its scales that are 0."""

    scheme: str
    zero_scales: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What a load keeps packed.

    Attributes:
        plans: of the experts modules, by path.
        experts, linears: dense names of the packed matrices of experts, and of linear layers.
        linear_weights: every dense name that is the weight of a linear layer.
        idle: dense names of experts that compute nothing, stored along with packed ones.
    """

    plans: Mapping[str, ExpertsPlan]
    experts: Collection[str]
    linears: Collection[str]
    linear_weights: Collection[str]
    idle: Collection[str] = ()


def build_ledger(
    checkpoint: StoredCheckpoint,
    stored: StoredModel,
    kept: Kept,
    contents: Mapping[str, Content] | None = None,
) -> WeightLedger:
    """The ledger of a checkpoint.

    Args:
        checkpoint: the files. stored: where their tensors go in the model.
        kept: what stays packed.
        contents: of packed matrices by dense name, where they have been read.

    Raises:
        CheckpointError: an expert's tensor, or a packed one, has no use; or an expert lacks a part
            that the others of its projection have. The message names it.
    """
    entries = tuple(
        _entry(name, tensor, checkpoint, stored, kept)
        for name, tensor in checkpoint.tensors.items()
    )
    layers = []
    of_experts: set[str] = set()
    for path, plan in kept.plans.items():
        projections = []
        for found in _projections(path, plan, stored):
            names = tuple(name for name in found if name not in kept.idle)
            _check_parts(path, names, checkpoint)
            projections.append(_projection(names, checkpoint, contents))
            of_experts.update(names)
        layers.append(LayerLedger(path, plan.config.num_experts, tuple(projections)))
    dense = {*kept.linear_weights, *of_experts} - checkpoint.packed.keys()
    return WeightLedger(
        family=checkpoint.family,
        entries=entries,
        layers=tuple(layers),
        disagreements=tuple(checkpoint.disagreements()),
        not_packed=tuple(name for name in sorted(dense) if checkpoint.expects(name)),
        has_contents=contents is not None,
    )


def _entry(
    tensor: str,
    found: StoredTensor,
    checkpoint: StoredCheckpoint,
    stored: StoredModel,
    kept: Kept,
) -> LedgerEntry:
    """The use of one stored tensor: that of the dense tensors it is part of."""
    names = found.names
    if not names:
        return LedgerEntry(tensor, found.num_bytes, Use.EXCLUDED, GGUF_RULE)
    unused = [name for name in names if name in stored.unused]
    if unused and (found.part is not None or EXPERT in unused[0]):
        raise CheckpointError(
            f"{tensor} must have a place in the model that config.json describes; got none. Fetch "
            f"config.json and the weights again, both of one model."
        )
    if unused:
        return LedgerEntry(tensor, found.num_bytes, Use.UNPLACED)
    if all(name in stored.excluded for name in names):
        return LedgerEntry(tensor, found.num_bytes, Use.EXCLUDED, stored.excluded[names[0]])
    if names[0] in kept.idle:
        return LedgerEntry(tensor, found.num_bytes, Use.EXCLUDED, IDLE_RULE)
    if names[0] in kept.experts and names[0] in checkpoint.packed:
        use = Use.PACKED_EXPERT
    elif names[0] in kept.linears:
        use = Use.PACKED_LINEAR
    else:
        use = Use.MADE_DENSE if found.part is not None else Use.DENSE
    return LedgerEntry(tensor, found.num_bytes, use)


def _projections(path: str, plan: ExpertsPlan, stored: StoredModel) -> list[tuple[str, ...]]:
    """The dense names of every projection, by expert, or one name where it is a stack."""
    found = []
    for role, place in plan.storage.items():
        if role in MATRICES:
            found += [tuple(n) for n in stored.sources.get(f"{path}.{place.path}", {}).values()]
    return found


def _check_parts(path: str, names: tuple[str, ...], checkpoint: StoredCheckpoint) -> None:
    """Raise `CheckpointError` for an expert without a part that most others in its format have."""
    packed = {name: checkpoint.packed[name] for name in names if name in checkpoint.packed}
    parts = {
        name: frozenset(p for p in one.parts if not any(word in p for word in OF_ACTIVATIONS))
        for name, one in packed.items()
    }
    for label in {one.label for one in packed.values()}:
        alike = [name for name, one in packed.items() if one.label == label]
        usual = Counter(parts[name] for name in alike).most_common(1)[0][0]
        odd = next((name for name in alike if parts[name] != usual), None)
        if odd is not None:
            raise CheckpointError(
                f"{odd} ({', '.join(sorted(parts[odd]))}) must have the parts that the other "
                f"experts of {path} have; got {', '.join(sorted(usual))} there. Fetch the weights "
                f"again."
            )


def _projection(
    names: tuple[str, ...],
    checkpoint: StoredCheckpoint,
    contents: Mapping[str, Content] | None,
) -> ProjectionLedger:
    formats: dict[str, list[int]] = {}
    num_bytes = packed_bytes = 0
    for number, name in enumerate(names):
        packed = checkpoint.packed.get(name)
        if packed is None:
            label = checkpoint.headers[name].dtype
            size = sum(t.num_bytes for t in _tensors_of(name, checkpoint))
        else:
            label = packed.label if contents is None else contents[name].scheme
            size = packed.num_bytes
            packed_bytes += size
        formats.setdefault(label, []).append(number)
        num_bytes += size
    return ProjectionLedger(
        name=names[0].removesuffix(".weight").rpartition(".")[2],
        formats={label: tuple(found) for label, found in formats.items()},
        num_bytes=num_bytes,
        packed_bytes=packed_bytes,
        activations=_asked(names, checkpoint),
        zero_scales=None
        if contents is None
        else sum(contents[name].zero_scales for name in names if name in contents),
    )


def _tensors_of(name: str, checkpoint: StoredCheckpoint) -> list[StoredTensor]:
    """What a dense name that is not packed is stored in; a share, where it is one of a stack."""
    own = checkpoint.tensors.get(name)
    if own is not None:
        return [own]
    return [
        replace(tensor, num_bytes=tensor.num_bytes // len(tensor.names))
        for tensor in checkpoint.tensors.values()
        if name in tensor.names
    ]


def _asked(names: tuple[str, ...], checkpoint: StoredCheckpoint) -> str | None:
    """What the files ask the inputs of a projection to be rounded to, in words."""
    asked: dict[ActivationScheme, int] = {}  # -> how many experts lack the scale
    for name in names:
        packed = checkpoint.packed.get(name)
        if packed is not None and packed.format.activations is not None:
            scheme = packed.format.activations
            is_missing = scheme.has_one_scale and not checkpoint.has_input_scale(name)
            asked[scheme] = asked.get(scheme, 0) + is_missing
    words = [
        f"{scheme} ({missing} of {len(names)} matrices have no scale: not rounded)"
        if missing
        else str(scheme)
        for scheme, missing in asked.items()
    ]
    return ", ".join(words) or None


def read_contents(
    checkpoint: StoredCheckpoint, on_bytes: Callable[[int], object] = lambda num_bytes: None
) -> dict[str, Content]:
    """Read every packed matrix once, in the order of the files, and check what it holds.

    One matrix is in memory at a time, or one stack where a safetensors file has stacks.

    Args:
        checkpoint: the files.
        on_bytes: told how many more bytes have been read.

    Returns:
        Contents by dense name.

    Raises:
        CheckpointError: contents that cannot be meant; the message names the matrix.
    """
    names: dict[str, dict[int | None, list[str]]] = {}
    for name, packed in checkpoint.packed.items():
        names.setdefault(packed.stored, {}).setdefault(packed.expert, []).append(name)
    found: dict[str, Content] = {}
    for stored, by_expert in names.items():
        for number, matrix in enumerate(checkpoint.matrices(stored)):
            owners = by_expert.get(number, by_expert.get(None, []))
            check_contents(owners[0] if owners else stored, matrix)
            content = Content(str(matrix.scheme), zero_scales(matrix))
            found |= dict.fromkeys(owners, content)
            size = sum(checkpoint.packed[name].num_bytes for name in owners)
            on_bytes(size)
            checkpoint.mapped.count(size)
    checkpoint.mapped.release()
    return found


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


def _others(names: Collection[str]) -> str:
    return f", and {len(names) - 1} others so" if len(names) > 1 else ""
