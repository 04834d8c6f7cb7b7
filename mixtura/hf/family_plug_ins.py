"""MoE blocks of others' model code: families that packages plug in, by the block's class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from mixtura.entry_points import Group, PlugIns, wrong_offer

if TYPE_CHECKING:
    from mixtura.hf.blocks import BlockSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A block that Transformers does not have, and how it is taken over whole.

    The entry point has the name of the block's class.

    Attributes:
        module: where the class is defined: a name in the dotted path of its module, such as
            "modeling_acme", which is the same in a package and in code from the hub.
        spec: how the block is put together; `routing` in it is the rule.
        tiny_model: makes a small model with such blocks and random weights, for
            `mixtura conformance`.
    """

    module: str
    spec: BlockSpec
    tiny_model: Callable[[], PreTrainedModel]


def _accept(name: str, offered: object) -> Family:
    """A family from what a package offers."""
    if not isinstance(offered, Family):
        raise wrong_offer(name, "be a Family", repr(offered))
    if offered.spec.routing is None:
        raise wrong_offer(name, "have a rule in spec.routing", "none")
    return offered


PLUG_INS: PlugIns[Family] = PlugIns(Group.FAMILIES, _accept)
"""Families of other packages; Transformers' own classes are never looked up among them."""


def family_of(cls: type) -> Family | None:
    """The family that takes over blocks of a class, or None.

    Raises:
        PlugInError: one is for a class of that name, and cannot be used.
    """
    if cls.__name__ not in PLUG_INS.names():
        return None
    family = PLUG_INS.load(cls.__name__)
    return family if family.module in cls.__module__.split(".") else None
