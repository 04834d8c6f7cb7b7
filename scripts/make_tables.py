"""Write the tables of the documentation that follow from the code. `--check` only compares."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tables are those of no GPU in particular

import torch  # noqa: E402
from families import OUTSIDE, FamilySource, discover, tiny_model  # noqa: E402
from packed_files import format_like, golden_index  # noqa: E402

from mixtura.config import ExpertsConfig, RoutingConfig  # noqa: E402
from mixtura.hf.blocks import BLOCKS, block_spec  # noqa: E402
from mixtura.hf.convert import NOT_TAKEN_OVER  # noqa: E402
from mixtura.kernels import get_kernel, kernel_names  # noqa: E402
from mixtura.kernels.cpu.conversions import conversion_of  # noqa: E402
from mixtura.quant.codecs.gguf import Gguf, GgufBlocks, is_weight_type  # noqa: E402
from mixtura.quant.codecs.output_formats import OutputFormat  # noqa: E402
from mixtura.quant.codecs.registry import codec_class, method_names  # noqa: E402
from mixtura.quant.formats import WeightFormat  # noqa: E402
from mixtura.quant.ggml_types import GgmlType  # noqa: E402
from mixtura.quant.scheme import QuantScheme, ZeroPoint  # noqa: E402
from mixtura.routing import NOT_COVERED  # noqa: E402
from mixtura.types import ExpertsProblem  # noqa: E402

FAMILIES = ROOT / "docs" / "families.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- formats: scripts/make_tables.py -->\n", "<!-- end of formats -->"
CHECKPOINTS = ROOT / "docs" / "formats.md"
BEGIN_CHECKPOINTS = "<!-- checkpoints: scripts/make_tables.py -->\n"
END_CHECKPOINTS = "<!-- end of checkpoints -->"
WARNED_OF = "gptq_v1_zero0_ambiguity"
"""A golden file that is read with a warning; its scheme is another's."""
HEAD = """# Families

Every MoE family of Transformers 5.23, found in the installed package. **block**: gate, router,
experts and shared experts run in mixtura; **experts**: the experts do, the rest stays as it was;
**no**: it stays with Transformers, with the reason. **rule**: `RoutingConfig.from_hf` reads the
family's routing. All that are taken over give the family's own eager output within 1e-5 in fp32
(`tests/test_hf_families.py`). This table is written by `scripts/make_tables.py`.

| family | taken over | rule | remarks |
|---|---|---|---|
"""
HEAD_OUTSIDE = """
## Families that Transformers does not ship

mixtura brings them (`mixtura/hf/families/`). After `import mixtura` they load through
`AutoConfig` and `AutoModelForCausalLM` as through `mixtura.from_pretrained`, from their own
files: names and keys are those of the published checkpoints, on reading and on writing. A
`config.json` with an `auto_map` goes to these classes, and remote code is not run, whatever
`trust_remote_code` says. Their logits are those of a second implementation in float64
(`tests/oracles`) within 1e-4 in fp32 (`tests/test_outside_families.py`).

| `model_type` | class | taken over | rule | attention |
|---|---|---|---|---|
"""
TAIL = """
- The selection bias of Param2MoE and Sarvam (`gate.expert_bias`, `gate.e_score_correction_bias`)
  is made zero-mean in fp32 when it is loaded. A bias that is zero-mean but for rounding stays as
  it is, so that writing and loading again changes nothing.
- `moe_shared_expert_intermediate_size` is the width of all shared experts together in Param2MoE,
  and of one in Sarvam. Experts are chosen in groups where `n_group` and `topk_group` are both
  there.
- `query_key_value` stays one matrix: a packed one is read as it is stored.
- Keys of rotary positions are written as Transformers writes them, in `rope_parameters`.
- Grouped-query attention can be batched continuously; latent attention cannot, as in
  Transformers' own families. Step3.5's heads differ by layer, and Transformers' estimate of
  memory asks for one number: set `model.config.allow_global_per_layer_attribute_access = True`
  first.
- Step3.5's files hold stacks of experts: `mixtura quantize` cannot write them expert by expert,
  and `weights=` quantizes them while they load.
- LongCat-Flash files without weights for zero experts load in Transformers' own class, too: the
  rows that it keeps for them are zeros, which nothing reads.
"""
ATTENTION = {
    "param2moe": "grouped-query",
    "sarvam_mla": "latent",
    "sarvam_moe": "grouped-query",
    "step3p5": "grouped-query, sliding windows",
}


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


def outside_row(name: str) -> str:
    """One line of the table of families that we bring."""
    case = tiny_model(name)
    specs = {block_spec(case.model.get_submodule(block)) for block in case.block_modules}
    kind = "experts" if None in specs else "block"
    rule = "yes" if name in RoutingConfig.HF_RULES else "no"
    return f"| {name} | `{type(case.model).__name__}` | {kind} | {rule} | {ATTENTION[name]} |"


def families_table() -> str:
    """The whole of docs/families.md."""
    rows = "\n".join(row(name, source) for name, source in discover().items())
    outside = "\n".join(outside_row(name) for name in OUTSIDE)
    return f"{HEAD}{rows}\n{HEAD_OUTSIDE}{outside}\n{TAIL}"


def kernels_for(scheme: QuantScheme, device: str) -> str:
    """The kernels that run experts of a scheme unasked, in order of preference."""
    problem = ExpertsProblem(
        experts=ExpertsConfig(num_experts=8, hidden_size=256, intermediate_size=128),
        schemes=(scheme,),
        row_dtype=torch.bfloat16 if scheme.is_quantized else scheme.values_dtype,
        device=device,
    )
    found = {name: get_kernel(name) for name in kernel_names()}
    names = [
        name
        for name, kernel in found.items()
        if kernel.is_automatic(device) and kernel.unsupported(problem) is None
    ]
    return ", ".join(names) or "none"


def formats_table() -> str:
    """Weight format x device -> kernels."""
    lines = ["| weights | CPU | CUDA |", "|---|---|---|"]
    for format in WeightFormat:
        kernels = (kernels_for(format.scheme, device) for device in ("cpu", "cuda"))
        cells = (format.value, *kernels)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stored_schemes() -> dict[tuple[str, QuantScheme], list[str]]:
    """Family and scheme -> ggml's types, for every way in which matrices are stored."""
    found: dict[tuple[str, QuantScheme], list[str]] = {}
    for name, entry in golden_index().items():
        is_file = "quantization_config" in entry and name != WARNED_OF
        if is_file and not name.startswith("gguf"):
            codec, _, scheme, _ = format_like(name)
            found.setdefault((codec.name, scheme), [])
    for type in GgmlType:
        if is_weight_type(type):
            found.setdefault((Gguf.name, GgufBlocks(type).scheme), []).append(type.name)
    return found


def bits_per_weight(scheme: QuantScheme) -> float:
    """Bits of all tensors of a matrix (256, 256), for a weight."""
    num_bytes = 0
    for name, spec in scheme.tensors_for((256, 256)).items():
        dtype = spec.dtypes[0]
        if name == "zero_points" and scheme.zero_point is ZeroPoint.MINIMUM:
            dtype = scheme.scale_dtype or dtype
        elif name == "zero_points" and scheme.bits == 8:
            dtype = torch.int16  # a zero point of 8 bits reaches 256
        num_bytes += torch.Size(spec.shape).numel() * dtype.itemsize
    return 8 * num_bytes / 256**2


def cpu_kernels_for(scheme: QuantScheme) -> str:
    """The kernels for a CPU, with what the C++ kernel makes of codes that it does not have."""
    kernels, conversion = kernels_for(scheme, "cpu"), conversion_of(scheme)
    if conversion is None:
        return kernels
    bits = bits_per_weight(conversion.read)
    return kernels.replace("cpu", f"cpu ({conversion}, {bits:.3g} bits)", 1)


def checkpoints_table() -> str:
    """Family x format -> what keeps it packed, runs and writes it."""
    outputs = [OutputFormat.of(format) for format in WeightFormat if format.scheme.is_quantized]
    written = {(out.codec.name, out.scheme): out.format.value for out in outputs}
    stored = stored_schemes()
    rows = dict.fromkeys([*stored, *written])
    methods = {codec_class(method).name: method for method in reversed(method_names())}
    lines = [
        "| family (`quant_method`) | stored as | keeps packed, in memory | CPU | GPU | writes |",
        "|---|---|---|---|---|---|",
    ]
    order = list(dict.fromkeys([*reversed(methods), *(family for family, _ in rows)]))
    for family, scheme in sorted(rows, key=lambda row: order.index(row[0])):
        types = ", ".join(stored.get((family, scheme), []))
        bits = f"{bits_per_weight(scheme):.3g} bits"
        cells = (
            f"{family} (`{methods[family]}`)",
            f"{types}: {scheme}" if types else str(scheme),
            f"yes, {bits}" if scheme.is_quantized else f"dense, {bits}",
            cpu_kernels_for(scheme),
            kernels_for(scheme, "cuda"),
            written.get((family, scheme), ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(path: Path, begin: str, table: str, end: str) -> str:
    """A file with the table between two lines replaced."""
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    return head + begin + table + end + rest.partition(end)[2]


def current_files() -> dict[Path, str]:
    """Every file with a generated table, as it should be."""
    return {
        FAMILIES: families_table(),
        README: with_table(README, BEGIN, formats_table(), END),
        CHECKPOINTS: with_table(
            CHECKPOINTS, BEGIN_CHECKPOINTS, checkpoints_table(), END_CHECKPOINTS
        ),
    }


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
