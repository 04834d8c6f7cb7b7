"""Adoption: a module keeps its parameters, names, hooks and identity, and gets our behaviour.

An adopted module's class becomes a subclass of ours and of its own, so that isinstance tests,
output recorders, `state_dict` and device hooks of the family go on working.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import attrgetter
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def adopt_class(module: nn.Module, ours: type[nn.Module]) -> None:
    """Give `module` the behaviour of `ours`, before that of its family's class."""
    if isinstance(module, ours):
        return
    anything: Any = module
    cls: Any = type(module)
    if parametrize.is_parametrized(module):
        # torch made this class for the module alone and takes it off again: ours goes below it.
        cls.__bases__ = (_adopted_class(ours, _family_class(cls.__bases__[0])),)
    else:
        anything.__class__ = _adopted_class(ours, _family_class(cls))
    if "_old_forward" in module.__dict__:  # Accelerate's hooks keep the forward they go around
        anything._old_forward = MethodType(type(module).forward, module)


def _family_class(cls: Any) -> Any:
    """The class that a module had before it was adopted, if it was."""
    return getattr(cls, "family_class", cls)


def _create_class(ours: Any, theirs: Any) -> Any:
    def reduce(module: Any, protocol: int) -> tuple[Any, ...]:
        return _new_adopted, (ours, theirs), module.__getstate__()

    namespace = {
        "__module__": theirs.__module__,
        "__doc__": theirs.__doc__,
        "__reduce_ex__": reduce,
        "family_class": theirs,
    }
    if ours.forward is nn.Module.forward:
        # A call that is being traced may adopt its module, and finds its forward where it was.
        namespace["forward"] = theirs.forward
    return type(f"Mixtura{theirs.__name__}", (ours, theirs), namespace)


_adopted_class: Callable[[Any, Any], Any] = cache(_create_class)


def _new_adopted(ours: Any, theirs: Any) -> Any:
    """An empty adopted module, to be filled by `pickle` or `copy`."""
    cls = _adopted_class(ours, theirs)
    return cls.__new__(cls)


def get_attribute(module: nn.Module, path: str) -> Any:
    """What stands at a path of attributes, such as "layer.weight"."""
    return attrgetter(path)(module)


def offloads(module: nn.Module) -> bool:
    """Whether Accelerate holds the module's weights elsewhere and brings them for each call."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def layer_index(module_name: str) -> int:
    """The first number in a module's path: "model.layers.3.mlp" -> 3; 0 where there is none."""
    return next((int(part) for part in module_name.split(".") if part.isdigit()), 0)
