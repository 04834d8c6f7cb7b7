"""Functions that choose and weigh instead of the pipeline: a caller's, or a plug-in's by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from mixtura.config import RoutingConfig
from mixtura.entry_points import Group, PlugIns, wrong_offer
from mixtura.errors import ConfigError

CustomRouting = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""`custom(router_logits (T,E) fp32, top_k) -> (topk_weights (T,K), topk_ids (T,K))`, a row's result
being its own: the same in any batch."""


def _accept(name: str, offered: object) -> CustomRouting:
    """A routing function from what a package offers."""
    if not callable(offered) or isinstance(offered, type):
        raise wrong_offer(name, "be a function (router_logits, top_k)", repr(offered))
    return cast(CustomRouting, offered)


PLUG_INS: PlugIns[CustomRouting] = PlugIns(Group.ROUTERS, _accept)
"""Routing functions of other packages."""


def find_custom(custom: CustomRouting | str) -> CustomRouting:
    """The function itself, or the plug-in of that name.

    Raises:
        ConfigError: there is no plug-in of that name; the message lists the names.
        PlugInError: it cannot be used.
    """
    if not isinstance(custom, str):
        return custom
    if custom not in PLUG_INS.names():
        names = ", ".join(PLUG_INS.names()) or "no name, as no router is plugged in"
        raise ConfigError(
            f"router ({custom!r}) must be one of {names}; got another. Install the package that "
            f"brings it, or pass a function."
        )
    return PLUG_INS.load(custom)


def without_choice(config: RoutingConfig) -> RoutingConfig:
    """What a function leaves of a rule: its sizes, and what is done to the weights after it."""
    return RoutingConfig(
        num_experts=config.num_experts,
        top_k=config.top_k,
        scale=config.scale,
        scale_on=config.scale_on,
        weight_on=config.weight_on,
        no_compute=config.no_compute,
        native=config.native,
    )
