"""Packages that plug something in, made up for a test: a module and its metadata on the path."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtura.conformance import plug_ins_of
from mixtura.entry_points import Group

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"


def write_package(
    directory: Path,
    package: str,
    offers: dict[str, dict[str, str]],
    modules: dict[str, str],
    version: str = "1.0",
) -> None:
    """Modules by name, and the metadata that an installer writes: group -> name -> target."""
    for name, source in modules.items():
        (directory / f"{name}.py").write_text(source)
    info = directory / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = []
    for group, targets in offers.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in targets.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def write_example(directory: Path, name: str) -> None:
    """A sample package, as its pyproject.toml describes it."""
    project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["project"]
    modules = {path.stem: path.read_text() for path in (EXAMPLES / name).glob("*.py")}
    write_package(directory, name, project["entry-points"], modules, project["version"])


@pytest.fixture
def site(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A directory on the path; what it holds when a group is first looked up is plugged in."""
    directory = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(directory)
    for group in Group:
        held = plug_ins_of(group)
        monkeypatch.delitem(held.__dict__, "_offers", raising=False)
        monkeypatch.setattr(held, "_loaded", {})
        monkeypatch.setattr(held, "_faults", {})
    before = set(sys.modules)
    yield directory
    for group in Group:
        plug_ins_of(group).__dict__.pop("_offers", None)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(directory)):
            del sys.modules[name]
