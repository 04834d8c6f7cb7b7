"""Names of matrices: in the lists of a configuration (`ignore`, `targets`), and in errors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.checks import matches_fragment

REGEX_PREFIX = "re:"
_SETTING = "quantization_config"
_WILDCARDS = "*?["
_STACKS = {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a matrix in front of the `CheckpointError`s that the block raises."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def is_stack_of_experts(tensor: str) -> bool:
    """Whether a tensor is named as Transformers names the weights of all experts, in one stack.

    >>> is_stack_of_experts("layers.0.mlp.experts.down_proj")
    True
    >>> is_stack_of_experts("layers.0.mlp.experts.3.down_proj.weight")
    False
    """
    return tensor.rpartition(".")[2] in _STACKS


def is_listed(module: str, entries: Iterable[str]) -> bool:
    """Whether a list names a module or one that it is in.

    An entry is a regular expression after `re:`, which begins where the name does; a shell pattern
    if it has `*`, `?` or `[`; else whole components of the name, anywhere in it.

    >>> is_listed("model.layers.3.mlp.gate_proj", ["model.layers.*.mlp.gate"])
    False
    >>> is_listed("model.layers.3.mlp.gate", ["mlp.gate"])
    True
    """
    return any(_matches(module, entry) for entry in entries)


def matches_regex(module: str, entry: str) -> bool:
    """Whether a `re:` entry matches the beginning of a module's name.

    Raises:
        CheckpointError: it is no regular expression.
    """
    pattern = compiled_pattern(_SETTING, entry.removeprefix(REGEX_PREFIX))
    return pattern.match(module) is not None


def _matches(module: str, entry: str) -> bool:
    if entry.startswith(REGEX_PREFIX):
        return matches_regex(module, entry)
    if any(character in entry for character in _WILDCARDS):
        pattern = compiled_pattern(_SETTING, fnmatch.translate(entry))
        components = module.split(".")
        ancestors = (".".join(components[: end + 1]) for end in range(len(components)))
        return any(pattern.match(ancestor) for ancestor in ancestors)
    return matches_fragment([entry], module)


@lru_cache(maxsize=4096)
def compiled_pattern(setting: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of a configuration, whose setting is named in the error.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{setting} (pattern {pattern!r}) must be a regular expression; got {error}. Correct "
            f"it in config.json."
        ) from None
