"""Meets Transformers: the versions we speak to, and what we offer it, without importing it.

After `import mixtura`, `from_pretrained(path, experts_implementation="mixtura")` of Transformers
finds our experts, `DistributedConfig(ep_implementation="mixtura")` our expert parallelism, and the
auto classes the families that Transformers does not ship.
Registering them needs Transformers, and importing that takes seconds, which `mixtura --help` and a
program that only wants `mixtura.config` would pay for nothing. So `offer` registers at once what
Transformers already has a table for, and otherwise waits for its import of the table's module. A
name stands for a function that fetches the true one at its first call, when everything has been
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
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

CONFIGS_MODULE = "transformers.models.auto.configuration_auto"
"""The module that holds the table of configurations by model type."""

LONGCAT_MODULE = "transformers.models.longcat_flash.modeling_longcat_flash"
"""The model whose checkpoints Transformers loads only with weights for experts that have none."""

FAMILIES = {
    "param2moe": "Param2MoEConfig",
    "sarvam_mla": "SarvamMLAConfig",
    "sarvam_moe": "SarvamMoEConfig",
    "step3p5": "Step3p5Config",
}
"""Configurations of families that we bring, by model type; they are in `mixtura.hf.families`."""


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


class _LateClass(type):
    """Stands for a class of `mixtura.hf.families`, which is imported when this one is used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_family_class(cls.__name__), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _family_class(cls.__name__)(*args, **kwargs)


def _family_class(name: str) -> Any:
    return getattr(import_module("mixtura.hf.families"), name)


def _register_configs(module: ModuleType) -> None:
    for model_type, name in FAMILIES.items():
        late = _LateClass(name, (), {"__module__": "mixtura.hf.families"})
        module.AutoConfig.register(model_type, late, exist_ok=True)


def _register_conversions(module: ModuleType) -> None:
    import_module("mixtura.hf.families")  # registers them


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    EXPERTS_MODULE: lambda module: module.ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward),
    PARALLEL_MODULE: lambda module: module.EPImplementationInterface.register(
        NAME, _expert_parallel
    ),
    CONFIGS_MODULE: _register_configs,
    LONGCAT_MODULE: _register_conversions,
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
