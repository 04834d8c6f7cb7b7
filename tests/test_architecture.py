"""What `docs/structure.md` promises, read from the source: rooms, imports, signatures, names."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mixtura

PACKAGE = Path(mixtura.__file__).parent
MAX_PARAMETERS = 8
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"bench", "conformance"},
    {"hf"},
    {"layer"},
    {"runner"},
    {"routing", "dispatch", "experts", "eplb", "observe"},
    {"kernels", "parallel"},
    {"quant"},
    {"types", "plugin", "entry_points"},
    {"config", "env", "cuda", "lora"},
    {"errors"},
]
"""A room may import any room on a floor below; rooms on one floor leave each other alone."""

NARROWER: dict[str, set[str]] = {
    "plugin": {"errors"},
    "entry_points": {"config", "errors"},
    "quant": {"entry_points", "config", "errors", "env"},
    "eplb": {"parallel", "entry_points", "types", "config", "errors", "env"},
    "parallel": {"quant", "types", "lora", "config", "errors", "env", "cuda"},
    "__main__": {"cli"},
}
"""Rooms that may import less than their floor allows."""

MEANINGS = {"mixtura.quant.scheme", "mixtura.quant.matrix", "mixtura.quant.activations"}
"""What stored weights and roundings of activations mean."""

EXTRA_EDGES: dict[str, set[str]] = {
    "types": MEANINGS,
    "cli": {"mixtura"},
    "eplb": {"mixtura.kernels.cpu.replicas"},
}
"""Modules that a room may import although they are not below it."""

REFERENCE_MAY_IMPORT = {
    "mixtura.config",
    "mixtura.types",
    "mixtura.lora",
    "mixtura.kernels.contract",
    "mixtura.kernels.reference",
    *MEANINGS,
}

IMPORTS_INSIDE: dict[str, str] = {
    "mixtura.kernels.registry": "a kernel is imported when it is first asked for",
    "mixtura.cli": "verbs load lazily, so that --help is quick",
    "mixtura.plugin": "Transformers is met, not imported",
    "mixtura.observe.picture": "matplotlib is an optional extra",
    "mixtura.kernels.triton": "Triton is an optional extra",
    "mixtura.kernels.bypass": "Triton is an optional extra",
    "mixtura.dispatch.deep_ep": "deep_ep is an optional extra",
    "mixtura.parallel.placement": "layers need only torch; safetensors is for files",
    "mixtura.quant.block_codes": "layers need only torch; safetensors is for files",
}
"""Modules and packages whose functions may import, and why."""


class Import(NamedTuple):
    """One imported module: by whom, what, on which line, and whether inside a function."""

    importer: str
    imported: str
    line: int
    is_inside: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = ("mixtura", *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES: dict[str, ast.Module] = {
    module_name(path): ast.parse(path.read_text(), str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room_of(module: str) -> str:
    """`mixtura.hf.read` -> hf; the package itself is its own room."""
    return module.split(".")[1] if "." in module else "mixtura"


def imports_of(module: str, tree: ast.Module, modules: set[str]) -> Iterator[Import]:
    """Every import statement of a module, `from package import module` resolved to the module."""

    def visit(node: ast.AST, is_inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, is_inside)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno} has a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    name = whole if whole in modules else str(child.module)
                    yield Import(module, name, child.lineno, is_inside)
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, is_inside or is_function)

    return visit(tree, False)


IMPORTS: list[Import] = [
    found for module, tree in SOURCES.items() for found in imports_of(module, tree, set(SOURCES))
]


def floor_of(room: str) -> int:
    floors = [index for index, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"room {room} is new: say in FLOORS what it may import"
    return floors[0]


def is_allowed(found: Import) -> bool:
    """Whether the room of the importer may know the room of the imported module."""
    importer, imported = room_of(found.importer), room_of(found.imported)
    if importer in ("mixtura", imported) or found.imported in EXTRA_EDGES.get(importer, ()):
        return True
    if importer in NARROWER:
        return imported in NARROWER[importer]
    return imported != "mixtura" and floor_of(imported) > floor_of(importer)


def is_at_or_in(module: str, owners: set[str] | dict[str, str]) -> bool:
    return any(module == owner or module.startswith(f"{owner}.") for owner in owners)


def test_rooms_import_only_rooms_below_them():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported.split(".")[0] == "mixtura"
        and not is_allowed(found)
        and not (found.is_inside and is_at_or_in(found.importer, IMPORTS_INSIDE))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "importer, imported, expected",
    [
        ("mixtura.layer", "mixtura.runner.schedule", True),
        ("mixtura.runner.schedule", "mixtura.layer", False),
        ("mixtura.routing.gate", "mixtura.experts", False),
        ("mixtura.experts.packed", "mixtura.kernels", True),
        ("mixtura.kernels.registry", "mixtura.experts", False),
        ("mixtura.types", "mixtura.quant.scheme", True),
        ("mixtura.types", "mixtura.quant.quantize", False),
        ("mixtura.quant.scheme", "mixtura.types", False),
        ("mixtura.config.routing", "mixtura.errors", True),
        ("mixtura.errors", "mixtura.config", False),
        ("mixtura.hf.convert", "mixtura.layer", True),
        ("mixtura.hf.convert", "mixtura.cli", False),
        ("mixtura.experts.packed", "mixtura", False),
        ("mixtura.eplb.metrics", "mixtura.parallel.placement", True),
        ("mixtura.eplb.metrics", "mixtura.kernels", False),
        ("mixtura.eplb.metrics", "mixtura.routing", False),
        ("mixtura.parallel.placement", "mixtura.eplb", False),
        ("mixtura.parallel.placement", "mixtura.kernels", False),
        ("mixtura.dispatch.local", "mixtura.parallel", True),
        ("mixtura.dispatch.local", "mixtura.eplb", False),
        ("mixtura.runner.schedule", "mixtura.eplb", True),
    ],
)
def test_the_order_of_rooms(importer, imported, expected):
    assert is_allowed(Import(importer, imported, 1, False)) is expected


def test_imports_are_found_wherever_they_stand():
    source = "import a\nif x:\n    from mixtura.quant import scheme\ndef f():\n    import b.c\n"
    found = imports_of("mixtura.m", ast.parse(source), {"mixtura.quant.scheme"})
    assert [(i.imported, i.line, i.is_inside) for i in found] == [
        ("a", 1, False),
        ("mixtura.quant.scheme", 3, False),
        ("b.c", 5, True),
    ]


def test_the_reference_knows_next_to_nothing():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.importer.startswith("mixtura.kernels.reference")
        and found.imported.startswith("mixtura")
        and not is_at_or_in(found.imported, REFERENCE_MAY_IMPORT)
    ]
    assert wrong == []


def test_triton_is_imported_by_its_kernels_alone():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported.split(".")[0] == "triton"
        and not is_at_or_in(found.importer, {"mixtura.kernels.triton"})
    ]
    assert wrong == []


def test_no_import_inside_a_function():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.is_inside and not is_at_or_in(found.importer, IMPORTS_INSIDE)
    ]
    assert wrong == []


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        is_os = isinstance(node.value, ast.Name) and node.value.id == "os"
        return is_os and node.attr in ("environ", "getenv", "putenv", "environb")
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any("env" in alias.name for alias in node.names)
    return False


def test_the_environment_is_read_in_one_place():
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in SOURCES.items()
        if module != "mixtura.env"
        for node in ast.walk(tree)
        if reads_environment(node)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source", ["os.environ['A']", "os.getenv('A')", "from os import environ", "x(os.environ)"]
)
def test_reads_of_the_environment_are_recognised(source):
    assert any(reads_environment(node) for node in ast.walk(ast.parse(source)))


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names, without self and cls, and without *args and **kwargs."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_no_signature_is_wide():
    wrong = [
        f"{module}:{function.lineno} {function.name} has {len(parameters_of(function))} parameters"
        for module, tree in SOURCES.items()
        if room_of(module) not in ("kernels", "cli")
        for function in functions_of(tree)
        if len(parameters_of(function)) > MAX_PARAMETERS
    ]
    assert wrong == []


def test_parameters_are_counted_without_self():
    (function,) = functions_of(ast.parse("def f(self, a, /, b, *rest, c=1, **more): ..."))
    assert parameters_of(function) == ["a", "b", "c"]


def test_files_have_names_that_say_something():
    vague = [name for name in SOURCES if VAGUE_NAMES & set(re.split(r"[._]", name))]
    assert vague == []


def test_import_leaves_optional_packages_alone():
    code = (
        "import sys, mixtura\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} "
        "& {'matplotlib', 'typer', 'rich', 'click', 'gguf', 'accelerate'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert result.stdout.split() == []


LISTING = sorted(
    module
    for module, tree in SOURCES.items()
    if room_of(module) not in ("hf", "cli", "bench", "observe", "__main__")
    and any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for node in tree.body
    )
)


@pytest.mark.parametrize("module", LISTING)
def test_every_public_name_exists_once(module):
    imported = importlib.import_module(module)
    names = imported.__all__
    assert [name for name in names if not hasattr(imported, name)] == []
    assert len(names) == len(set(names))
