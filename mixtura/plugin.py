"""Meets Transformers: the versions we speak to, and what we offer it, without importing it.

After `import mixtura`, `from_pretrained(path, experts_implementation="mixtura")` of Transformers
finds our experts, and `DistributedConfig(ep_implementation="mixtura")` our expert parallelism.
Registering them needs Transformers, and importing that takes seconds, which `mixtura --help` and a
program that only wants `mixtura.config` would pay for nothing. So `offer` registers at once what
Transformers already has a table for, and otherwise waits for its import of the table's module. A
name stands for a function that fetches the true one at its first call, when everything has been
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mixtura.errors import MissingDependency

LOWEST, BELOW = (5, 23), (5, 24)
"""Supported: LOWEST <= version < BELOW. The experts interface and the EP hooks changed in the
releases before."""

NAME = "mixtura"
"""What the experts function is called in Transformers."""

EXPERTS_MODULE = "transformers.integrations.moe"
"""The module of Transformers that holds the table of experts functions."""

PARALLEL_MODULE = "transformers.distributed.expert_parallel"
"""The module that holds the table of implementations of expert parallelism."""


def transformers_version() -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def is_supported(version: str | None) -> bool:
    """Whether a version string lies in the window."""
    if version is None:
        return False
    parts = version.split(".")
    try:
        return LOWEST <= (int(parts[0]), int(parts[1])) < BELOW
    except (ValueError, IndexError):
        return False


def window() -> str:
    """The supported versions, as pip spells them."""
    return f">={LOWEST[0]}.{LOWEST[1]},<{BELOW[0]}.{BELOW[1]}"


def missing_transformers(version: str | None) -> MissingDependency:
    """The error of every Transformers call outside the window."""
    return MissingDependency(
        f"transformers ({version or 'not installed'}) must be {window()}; got another. "
        f"pip install 'transformers{window()}'."
    )


def offer() -> None:
    """Register what we have, now or when Transformers is imported; never out of the window."""
    for name in _REGISTER:
        loaded = sys.modules.get(name)
        if loaded is not None:
            _register(loaded)
        elif not any(isinstance(f, _TableFinder) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _TableFinder(name))


def _register(module: ModuleType) -> None:
    if is_supported(transformers_version()):
        _REGISTER[module.__name__](module)


def _experts_forward(*args: Any, **kwargs: Any) -> Any:
    from mixtura.hf.experts import experts_forward  # noqa: PLC0415 - it replaces this one

    return experts_forward(*args, **kwargs)


def _expert_parallel(*args: Any, **kwargs: Any) -> Any:
    from mixtura.hf.ep_implementation import MixturaEP  # noqa: PLC0415 - needs Transformers

    return MixturaEP(*args, **kwargs)


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    EXPERTS_MODULE: lambda module: module.ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward),
    PARALLEL_MODULE: lambda module: module.EPImplementationInterface.register(
        NAME, _expert_parallel
    ),
}
"""What is registered once a module is there."""


class _TableFinder(MetaPathFinder):
    """Sees the import of a module once; the other finders do it, and we register after."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing, but for one module the others' spec with a step added behind its loading."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """A module's own loader, and the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, give it its own loader back, and register."""
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self.loader
        self.loader.exec_module(module)
        _register(module)
