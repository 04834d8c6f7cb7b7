"""The model in the box: its size, shape and tokenizer, what it writes, and how well it predicts."""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura
from mixtura.bench.perplexity import evaluate, expert_shares

ROOT = Path(__file__).parent.parent
DEMO = Path(mixtura.__file__).with_name("demo")
MAX_WEIGHT_BYTES = 24_000_000
SAMPLE = ("json/decoder.py", "wsgiref/headers.py")
LEAST_SHARE_OF_SAMPLE = 0.02
"""Every expert's least part of the sample's slots, times E; over all held-out files it is 0.1."""

PYTHON_TEXT = '''\
@dataclass(frozen=True)
class Point:
\t"""A tab, "quotes", \\escapes\\n, ünïcödé, 点 and an emoji: \U0001f40d."""

    x: float = -1.5e-3  # trailing spaces:   \n
    def scaled(self, by: int=0x1F) -> "Point":\r
        return Point(self.x * by ** 2) if by != 0 else None
'''


@pytest.fixture(scope="module")
def demo_corpus() -> ModuleType:
    path = ROOT / "examples" / "demo_corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_corpus"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manifest(demo_corpus: ModuleType) -> dict[str, Any]:
    return demo_corpus.read_manifest()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, experts_implementation="mixtura"
    )


@pytest.fixture(scope="module")
def sample(demo_corpus: ModuleType, manifest: dict[str, Any]) -> list[Any]:
    """Some held-out files of the running Python, if they are the manifest's."""
    files = []
    for path in SAMPLE:
        file = demo_corpus.stdlib_root() / path
        source = demo_corpus.SourceFile(path, file.read_bytes() if file.is_file() else b"")
        if source.sha256 != manifest["held_out"][path]:
            pytest.skip(f"{path} of this Python is not that of Python {manifest['python']}")
        files.append(source)
    return files


def test_weights_fit_in_the_package() -> None:
    weights = list(DEMO.glob("*.safetensors"))
    assert weights
    assert sum(file.stat().st_size for file in weights) <= MAX_WEIGHT_BYTES


def test_architecture_is_qwen3_moe() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config.get("num_experts", config.get("num_local_experts")) >= 16
    assert config["num_experts_per_tok"] >= 2
    assert config["dtype"] == "bfloat16"


def test_weights_are_the_whole_model() -> None:
    _, loading = AutoModelForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.mark.parametrize("text", [PYTHON_TEXT, "", " ", "\n\n\t x", "def f(a,b):return a+b"])
def test_tokenizer_gives_the_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_and_model_agree(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_greedy_generation_repeats(tokenizer: Any, model: Any) -> None:
    prompt = tokenizer("import os\n\n\ndef read_json(path):\n", return_tensors="pt")
    texts = [
        tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("import os\n\n\ndef read_json(path):\n")
    assert len(texts[0]) > 60


def test_predicts_held_out_files_better_than_xz(
    tokenizer: Any, model: Any, sample: list[Any]
) -> None:
    stream = b"".join(file.data for file in sample)
    xz = 8 * len(lzma.compress(stream, preset=9)) / len(stream)
    result = evaluate(model, tokenizer, [file.text for file in sample])
    assert result.num_bytes == len(stream)
    assert result.bits_per_byte < xz


def test_predicts_as_stock_transformers_does_in_bf16(tokenizer: Any, sample: list[Any]) -> None:
    texts = [source.text for source in sample]
    stock = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    ours = mixtura.from_pretrained(DEMO, dtype=torch.bfloat16)
    expected = evaluate(stock, tokenizer, texts).bits_per_byte
    assert evaluate(ours, tokenizer, texts).bits_per_byte == pytest.approx(expected, rel=1e-3)


def test_every_expert_is_used(tokenizer: Any, model: Any, sample: list[Any]) -> None:
    shares = expert_shares(model, tokenizer, [file.text for file in sample])
    assert shares.shape == (model.config.num_hidden_layers, model.config.num_experts)
    assert (shares * model.config.num_experts).min() >= LEAST_SHARE_OF_SAMPLE


def test_manifest_keeps_held_out_packages_apart(
    demo_corpus: ModuleType, manifest: dict[str, Any]
) -> None:
    train, held_out = manifest["train"], manifest["held_out"]
    assert tuple(manifest["held_out_packages"]) == demo_corpus.HELD_OUT_PACKAGES
    assert not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert not [path for path in train if demo_corpus.is_of_held_out_package(path)]
    assert all(demo_corpus.is_of_held_out_package(path) for path in held_out)
    held_out_packages = {demo_corpus.package_of(path) for path in held_out}
    assert held_out_packages == set(demo_corpus.HELD_OUT_PACKAGES)
    assert not held_out_packages & {demo_corpus.package_of(path) for path in train}


def test_manifest_paths_and_hashes_are_well_formed(manifest: dict[str, Any]) -> None:
    for part in ("train", "held_out"):
        assert list(manifest[part])
        for path, sha256 in manifest[part].items():
            assert path.endswith(".py") and not path.startswith("/") and ".." not in path
            assert len(bytes.fromhex(sha256)) == 32


def test_corpus_names_the_first_file_that_differs(
    demo_corpus: ModuleType, manifest: dict[str, Any], tmp_path: Path
) -> None:
    first = next(iter(manifest["train"]))
    (tmp_path / first).write_bytes(b"# not the file of the manifest\n")
    with pytest.raises(mixtura.MixturaError, match=f"^{first} .* must have sha256 .*; got "):
        demo_corpus.load(tmp_path)


def test_near_duplicates_and_held_out_tests_are_not_chosen(
    demo_corpus: ModuleType, tmp_path: Path
) -> None:
    lines = [f"value_{number} = compute({number})" for number in range(40)]
    body = "\n".join(lines)
    written = {
        "json/decoder.py": body,
        "copy_of_json.py": f"# another head\n{body}\n",
        "test/test_json/test_decode.py": "x = 'tests of a held-out package'\n" * 20,
        "asyncio/base.py": "\n".join(line.replace("value", "other") for line in lines),
        "asyncio/same.py": "\n".join(line.replace("value", "other") for line in lines),
        "encodings/table.py": body.replace("value", "table"),
    }
    for path, text in written.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    corpus = demo_corpus.select(tmp_path)
    assert [file.path for file in corpus.held_out] == ["json/decoder.py"]
    assert [file.path for file in corpus.train] == ["asyncio/base.py"]
