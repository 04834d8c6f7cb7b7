"""What the command line promises, as plain data; `python tests/cli_interface.py` freezes it anew.

Names, types, defaults and help texts of every verb's parameters are read from the signatures, not
from rendered help, so that a release of typer does not look like a change of ours.
"""

from __future__ import annotations

import inspect
import json
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mixtura.cli import VERBS

GOLDEN = Path(__file__).parent / "golden" / "cli.json"


def describe_cli() -> dict[str, Any]:
    """Every verb with its help and its parameters."""
    return {name: describe_verb(name) for name in VERBS}


def describe_verb(name: str) -> dict[str, Any]:
    """One verb: the line in the list of verbs, its own help, its parameters in order."""
    function = getattr(import_module(VERBS[name].module), name)
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {
        "summary": VERBS[name].help,
        "help": inspect.getdoc(function),
        "parameters": [describe_parameter(p, hints[p.name]) for p in parameters],
    }


def describe_parameter(parameter: inspect.Parameter, hint: Any) -> dict[str, Any]:
    """One parameter: its name, spelling, type, bounds, default and help."""
    kind, info = get_args(hint)
    is_required = parameter.default is inspect.Parameter.empty
    default = None if is_required else parameter.default
    described = {
        "name": parameter.name,
        "kind": type(info).__name__.removesuffix("Info").lower(),
        # In Annotated, typer takes the first spelling for a default until the verb is called.
        "spelling": [s for s in (info.default, *(info.param_decls or ())) if isinstance(s, str)],
        "type": spell_type(kind),
        "min": info.min,
        "max": info.max,
        "is_required": is_required or None,
        "default": default.value if isinstance(default, Enum) else default,
        "help": info.help,
    }
    return {key: value for key, value in described.items() if value not in (None, [])}


def spell_type(kind: Any) -> str:
    """A type as a user thinks of it: "int", "str | None", "auto|bf16"."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return kind.__name__ if isinstance(kind, type) else str(kind)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(describe_cli(), indent=2) + "\n", encoding="utf-8")
