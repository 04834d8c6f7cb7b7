"""Names for single experts' matrices, also where a checkpoint has all experts in one stack.

The names are those that Transformers' conversions of the family read: a stack is taken apart by the
conversion that would have merged it, run backwards, and each name is followed forwards again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from mixtura.errors import UnsupportedModel
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places
from mixtura.hf.slots import MATRICES, Slots, find_slots

Sources = Mapping[str, Mapping[str | None, list[str]]]


def expert_slots(
    plan: ExpertsPlan,
    path: str,
    sources: Sources,
    headers: Mapping[str, TensorHeader],
    places: Places,
) -> tuple[dict[str, Slots], dict[str, TensorHeader], dict[str, str]]:
    """The matrices of an experts module by role, each with a name of its own.

    Args:
        plan: of the module. path: of the module in the model.
        sources: what each of the model's tensors is made of, as `match_headers` finds it.
        headers: of the checkpoint. places: the conversions.

    Returns:
        Slots, none of which is a stack; headers, those of new names included; and the stack that
        each new name is in.

    Raises:
        UnsupportedModel: the family has no names for single experts.
        CheckpointError: a projection's rows are not rows of whole matrices.
    """
    found_sources, found_headers = dict(sources), dict(headers)
    stacks: dict[str, str] = {}
    for role, stored in plan.storage.items():
        if role not in MATRICES:
            continue
        target = f"{path}.{stored.path}"
        names = [name for group in sources[target].values() for name in group]
        if all(len(headers[name].shape) == 2 for name in names) and None not in sources[target]:
            continue
        single = _single_names(target, places)
        if len(names) > 1 or single is None:
            raise UnsupportedModel(
                f"the experts of {type(places.model).__name__} ({names[0]}) must have names for "
                f"single matrices in Transformers to be written one by one; got a family that has "
                f"stacks alone. Quantize it while it loads, with --weights."
            )
        merged: dict[str | None, list[str]] = {}
        for name, (pattern, header) in single.items():
            merged.setdefault(pattern, []).append(name)
            found_headers[name] = header
            stacks[name] = names[0]
        found_sources[target] = merged
    return find_slots(plan, path, found_sources, found_headers, places), found_headers, stacks


def _single_names(target: str, places: Places) -> dict[str, tuple[str, TensorHeader]] | None:
    """The matrices that a stack of the model is merged from, by name; None where there are none."""
    stack = places.state[target]
    try:
        taken_apart: dict[str, Tensor] = revert_weight_conversion(places.model, {target: stack})
    except Exception:  # whatever a family's operation stumbles over
        return None
    found = {}
    for name in sorted(taken_apart, key=dot_natural_key):
        shape = tuple(taken_apart[name].shape)
        place, pattern = places.find(name)
        if place != target or pattern is None or len(shape) != 2 or not name.endswith(".weight"):
            return None
        found[name] = (pattern, TensorHeader("BF16", shape))
    return found
