"""Write the tables of the documentation that follow from the code. `--check` only compares."""

from __future__ import annotations

import argparse
import ast
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from families import FamilySource, discover  # noqa: E402

from mixtura.config import ExpertsConfig, RoutingConfig  # noqa: E402
from mixtura.hf.blocks import BLOCKS  # noqa: E402
from mixtura.hf.convert import NOT_TAKEN_OVER  # noqa: E402
from mixtura.kernels import get_kernel, kernel_names  # noqa: E402
from mixtura.quant.formats import WeightFormat  # noqa: E402
from mixtura.routing import NOT_COVERED  # noqa: E402
from mixtura.types import ExpertsProblem  # noqa: E402

FAMILIES = ROOT / "docs" / "families.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- formats: scripts/make_tables.py -->\n", "<!-- end of formats -->"
HEAD = """# Families

Every MoE family of Transformers 5.23, found in the installed package. **block**: gate, router,
experts and shared experts run in mixtura; **experts**: the experts do, the rest stays as it was;
**no**: it stays with Transformers, with the reason. **rule**: `RoutingConfig.from_hf` reads the
family's routing. All that are taken over give the family's own eager output within 1e-5 in fp32
(`tests/test_hf_families.py`). This table is written by `scripts/make_tables.py`.

| family | taken over | rule | remarks |
|---|---|---|---|
"""


def class_names(source: FamilySource) -> set[str]:
    """Every class that a family's modeling file defines."""
    spec = find_spec(source.module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def row(name: str, source: FamilySource) -> str:
    """One line of the table."""
    classes = class_names(source)
    stays = [f"`{c}`: {NOT_TAKEN_OVER[c]}" for c in sorted(classes & set(NOT_TAKEN_OVER))]
    kind = "block" if classes & set(BLOCKS) else "experts" if source.is_decorated else "no"
    rules = [t for t in RoutingConfig.HF_RULES if t == name or t.startswith(f"{name}_")]
    reason = NOT_COVERED.get(name) or NOT_COVERED.get(name.replace("_", "-"))
    is_covered = reason is None or bool(rules)
    remarks = stays + ([f"rule: {reason}"] if not is_covered and kind != "no" else [])
    return f"| {name} | {kind} | {'yes' if is_covered else 'no'} | {'; '.join(remarks)} |"


def families_table() -> str:
    """The whole of docs/families.md."""
    return HEAD + "\n".join(row(name, source) for name, source in discover().items()) + "\n"


def kernels_for(format: WeightFormat, device: str) -> str:
    """The kernels that run experts in a weight format, in order of preference."""
    scheme = format.scheme
    problem = ExpertsProblem(
        experts=ExpertsConfig(num_experts=8, hidden_size=256, intermediate_size=128),
        schemes=(scheme,),
        row_dtype=torch.bfloat16 if scheme.is_quantized else scheme.values_dtype,
        device=device,
    )
    names = [name for name in kernel_names() if get_kernel(name).unsupported(problem) is None]
    return ", ".join(names) or "none"


def formats_table() -> str:
    """Weight format x device -> kernels."""
    lines = ["| weights | CPU | CUDA |", "|---|---|---|"]
    for format in WeightFormat:
        cells = (format.value, kernels_for(format, "cpu"), kernels_for(format, "cuda"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def current_files() -> dict[Path, str]:
    """Every file with a generated table, as it should be."""
    readme = README.read_text(encoding="utf-8")
    head, _, rest = readme.partition(BEGIN)
    tail = rest.partition(END)[2]
    return {FAMILIES: families_table(), README: head + BEGIN + formats_table() + END + tail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a file is out of date")
    is_check = parser.parse_args().check
    for path, text in current_files().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if is_check:
            sys.exit(f"{path} is out of date. Run scripts/make_tables.py.")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
