"""Our experts under what Transformers does around a model: caches, compilers, files, kernels."""

from __future__ import annotations

import copy
import functools
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TinyCase, tiny_model
from tolerances import relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations import moe

from mixtura import convert, plugin
from mixtura.config import ExpertsConfig
from mixtura.errors import MissingDependency, NoKernelFits, UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf import moe_layers
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.experts import experts_forward
from mixtura.kernels import register_kernel, unregister_kernel
from mixtura.kernels.torch import TorchKernel
from mixtura.types import ExpertsProblem, ExpertWeights

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
NUM_NEW_TOKENS = 5
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS}


@functools.cache
def stock(family: str = "qwen3_moe") -> TinyCase:
    """A family's tiny model; it must not be changed."""
    return tiny_model(family)


def stock_copy(family: str = "qwen3_moe") -> PreTrainedModel:
    return copy.deepcopy(stock(family).model)


def converted(family: str = "qwen3_moe", **options: object) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)  # JetMoE's attention
        return convert(stock_copy(family), **options)


def one_line(family: str = "qwen3_moe") -> PreTrainedModel:
    model = stock_copy(family)
    model.set_experts_implementation("mixtura")
    return model


@torch.no_grad()
def output(model: PreTrainedModel, family: str = "qwen3_moe") -> Tensor:
    return stock(family).output(model)


FORMS = pytest.mark.parametrize("form", [converted, one_line])


# -------------------------------------------------------------------------------------- generation


@FORMS
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(form):
    expected = stock_copy().generate(**stock().inputs, **GREEDY)
    tokens = form().generate(**stock().inputs, **GREEDY, cache_implementation="static")
    assert tokens.equal(expected)


@FORMS
def test_continuous_batching_gives_the_tokens_of_generate(form):
    prompts = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24, 25, 26]]
    model = stock_copy()
    expected = [
        model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    model = form()
    model.set_attn_implementation("sdpa")
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64
        ),
    )
    assert [result.error for result in results.values()] == [None] * len(prompts)
    assert [result.generated_tokens for result in results.values()] == expected


@functools.cache
def shallow() -> PreTrainedModel:
    """One layer, which is an MoE layer: as many graphs as a deep model has, in less time."""
    config = copy.deepcopy(stock().model.config)
    config.update({"num_hidden_layers": 1, "mlp_only_layers": []})
    model = type(stock().model)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def shallow_converted() -> PreTrainedModel:
    return convert(copy.deepcopy(shallow()))


def shallow_one_line() -> PreTrainedModel:
    model = copy.deepcopy(shallow())
    model.set_experts_implementation("mixtura")
    return model


SHALLOW_FORMS = pytest.mark.parametrize(
    "form", [shallow_converted, shallow_one_line], ids=["converted", "one_line"]
)
PROMPT = torch.tensor([[5, 6, 7], [50, 51, 52]])


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, step: Any) -> Tensor:
    """Greedy tokens, prompt and answer token by token, as a compiled decode step takes them."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    token, tokens = PROMPT[:, :1], []
    for position in range(PROMPT.shape[1] + NUM_NEW_TOKENS - 1):
        logits = step(token, past_key_values=cache).logits
        if position + 1 < PROMPT.shape[1]:
            token = PROMPT[:, position + 1 : position + 2]
        else:
            token = logits.argmax(-1)
            tokens.append(token)
    return torch.cat(tokens, 1)


def assert_compiles(model: PreTrainedModel, backend: str = "eager") -> None:
    expected = copy.deepcopy(shallow()).generate(PROMPT, **GREEDY)[:, PROMPT.shape[1] :]
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    try:
        assert greedy_tokens(model, step).equal(expected)
        assert greedy_tokens(model, step).equal(expected)
    finally:
        torch._dynamo.reset()


@SHALLOW_FORMS
def test_a_decode_step_is_one_graph_from_its_first_call(form):
    assert_compiles(form())


@SHALLOW_FORMS
@pytest.mark.usefixtures("packing")
def test_a_decode_step_with_packed_experts_is_one_graph(form):
    model = form()
    before = model(PROMPT).logits.detach()
    with torch.no_grad():
        model(PROMPT)
    assert dense_bytes(model) == 0
    assert_compiles(model)
    assert relative_error(model(PROMPT).logits, before) <= TOLERANCE


@SHALLOW_FORMS
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_decode_step_can_be_compiled(form, backend):
    assert_compiles(form(), backend)


BLOCK_FAMILIES = (
    "afmoe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "minimax_m2",
    "mixtral",
    "param2moe",
    "qwen2_moe",
    "qwen3_next",
    "sarvam_mla",
    "sarvam_moe",
    "step3p5",
    "step3p7",
)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_a_converted_model_is_one_graph(family):
    model, expected = converted(family), output(stock(family).model, family)
    torch._dynamo.reset()
    try:
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        result = step(**stock(family).inputs, use_cache=False)
    finally:
        torch._dynamo.reset()
    found = result.logits if "logits" in result else result.last_hidden_state
    assert relative_error(found, expected) <= TOLERANCE


# ------------------------------------------------------------------------------ memory and threads


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
@SHALLOW_FORMS
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_thousand_calls_keep_no_memory(form):
    model = form()
    tokens = torch.randint(3, 90, (1, 64))
    one_hidden_state = 64 * 64 * 4

    def run(count: int) -> None:
        for _ in range(count):
            model(tokens, use_cache=False)
        gc.collect()

    run(100)
    before, objects = resident_bytes(), len(gc.get_objects())
    run(1000)
    # The allocator keeps some megabytes; one hidden state a call would be 1,000 of them.
    assert resident_bytes() - before < 700 * one_hidden_state
    assert len(gc.get_objects()) - objects < 100


@FORMS
@pytest.mark.parametrize("kernel", ["torch", "packing"])
def test_threads_that_share_a_model_agree_with_one_after_the_other(form, kernel, packing):
    if kernel == "torch":
        unregister_kernel("packing")
    inputs = [
        torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    expected = [stock_copy()(tokens).logits for tokens in inputs]
    model = form()  # the first calls, which pack the weights, are under way together
    start = threading.Barrier(len(inputs))
    worst = [1.0, 1.0]

    def work(index: int) -> None:
        with torch.no_grad():
            start.wait()
            found = [model(inputs[index]).logits for _ in range(20)]
        worst[index] = max(relative_error(logits, expected[index]) for logits in found)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) <= TOLERANCE


# --------------------------------------------------------------- a kernel with a layout of its own


class PackingKernel(TorchKernel):
    """The portable kernel over a copy of the weights, upside down, without gradients."""

    name = "packing"
    has_backward = False

    def shares_memory(self, is_quantized: bool) -> bool:
        return False

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return super().cannot_run(problem)

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> Any:
        return weights.mapped(lambda t: t.flip(0))

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        return packed.mapped(lambda t: t.flip(0))

    def run(self, packed: Any, batch: Any, **options: Any) -> Tensor:
        return super().run(self.unpack(packed, packed.config), batch, **options)


@pytest.fixture
def packing() -> Iterator[None]:
    register_kernel("packing", PackingKernel)
    yield
    unregister_kernel("packing")


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the experts' parameters."""
    stored = [s.read(m) for m in experts_of(model) for s in m.storage.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)


PACKED_FAMILIES = ("qwen3_moe", "gpt_oss", "longcat_flash", "dbrx", "jetmoe", "llama4", "afmoe")


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_experts_are_the_only_copy_and_come_back_unchanged(family):
    model = converted(family)
    assert dense_bytes(model) > 0
    found = output(model, family)
    assert dense_bytes(model) == 0
    assert relative_error(found, output(stock(family).model, family)) <= TOLERANCE
    state = model.state_dict()
    assert dense_bytes(model) > 0
    for name, tensor in stock(family).model.state_dict().items():
        assert state[name].equal(tensor), name
    assert output(model, family).equal(found)
    assert dense_bytes(model) == 0


@pytest.mark.usefixtures("packing")
def test_the_one_line_form_frees_the_dense_weights_and_brings_them_back():
    model = one_line()
    found = output(model)
    assert dense_bytes(model) == 0
    assert relative_error(found, output(stock().model)) <= TOLERANCE
    for name, tensor in model.state_dict().items():
        assert tensor.equal(stock().model.state_dict()[name]), name


@FORMS
@pytest.mark.usefixtures("packing")
def test_packed_experts_are_saved_whole(form, tmp_path):
    model = form()
    found = output(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    assert relative_error(output(loaded), found) <= TOLERANCE
    assert output(model).equal(found)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_other_implementations_find_their_weights_after_packing(implementation):
    model = one_line()
    output(model)
    assert dense_bytes(model) == 0
    model.set_experts_implementation(implementation)
    assert relative_error(output(model), output(stock().model)) <= TOLERANCE
    assert dense_bytes(model) > 0
    model.set_experts_implementation("mixtura")
    output(model)
    assert dense_bytes(model) == 0


@FORMS
@pytest.mark.usefixtures("packing")
def test_packed_experts_can_be_copied_moved_and_loaded(form):
    model = form()
    found = output(model)
    assert output(copy.deepcopy(model)).equal(found)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert dense_bytes(half) > 0
    assert output(half).dtype == torch.bfloat16
    other = tiny_model("qwen3_moe", seed=1).model
    model.load_state_dict(other.state_dict())
    assert relative_error(output(model), output(other)) <= TOLERANCE


@FORMS
@pytest.mark.usefixtures("packing")
def test_training_takes_a_kernel_with_gradients(form):
    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        stock().output(model).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(stock_copy())
    model = form()
    output(model)  # packed, and unpacked again for the gradients
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= GRADIENT_TOLERANCE, name


@pytest.mark.usefixtures("packing")
def test_training_with_a_kernel_without_gradients_is_refused():
    model = converted(kernel="packing")
    output(model)
    with pytest.raises(NoKernelFits, match="packing: has no backward"):
        stock().output(model)


@pytest.mark.parametrize("kernel", ["torch", "packing"])
def test_ids_of_other_ranks_are_skipped(kernel, packing):
    if kernel == "torch":
        unregister_kernel("packing")
    experts = one_line().get_submodule(stock().experts_modules[0])
    experts._is_expert_parallel = True
    rows = torch.randn(3, 64)
    ids = torch.tensor([[0, 8], [8, 8], [7, 9]])  # 8 and above: not here
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    with torch.no_grad():
        found = experts(rows, ids, weights)
        alone = experts(rows, ids[:, :1].clamp(max=7), weights[:, :1])
    assert found[1].eq(0).all()
    assert relative_error(found[[0, 2]], alone[[0, 2]]) <= TOLERANCE


# ------------------------------------------------------------------------------ files and offload


def offloaded(directory: Path, family: str, **arguments: object) -> PreTrainedModel:
    """The family's tiny model with its last two layers on disk."""
    stock(family).model.save_pretrained(directory)
    near = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(near, "cpu") | {
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        device_map=device_map,
        offload_folder=directory / "offload",
        attn_implementation="eager",
        **{"experts_implementation": "eager", **arguments},
    )
    assert model.model.layers[1].mlp.experts.gate_up_proj.is_meta
    return model.eval()


def assert_offloaded_model_runs(model: PreTrainedModel, family: str) -> None:
    for _ in range(2):
        found = output(model, family)
        assert relative_error(found, output(stock(family).model, family)) <= TOLERANCE
    away = [experts for experts in experts_of(model) if experts.gate_up_proj.is_meta]
    assert len(away) == 2
    assert all(experts.state.held is None for experts in away)  # nothing keeps what was taken away


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_offloaded_blocks_are_brought_for_each_call(family, tmp_path):
    pytest.importorskip("accelerate")
    model = convert(offloaded(tmp_path, family), strict=True)
    assert_offloaded_model_runs(model, family)


def test_offloaded_experts_are_brought_for_each_call(tmp_path):
    pytest.importorskip("accelerate")
    model = offloaded(tmp_path, "qwen3_moe", experts_implementation="mixtura")
    assert_offloaded_model_runs(model, "qwen3_moe")


@pytest.mark.parametrize("family", ["qwen2_moe", "afmoe"])
def test_a_block_that_reads_offloaded_weights_itself_keeps_only_its_experts(family, tmp_path):
    pytest.importorskip("accelerate")
    model = offloaded(tmp_path, family)
    with pytest.raises(UnsupportedModel, match="must be in memory"):
        convert(model, strict=True)
    with pytest.warns(UnconvertedLayerWarning, match="must be in memory"):
        convert(model)
    assert {layer.kind for layer in moe_layers(model)} == {"experts"}
    assert_offloaded_model_runs(model, family)


# ----------------------------------------------------------------------------------- the package


def run_python(script: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_the_package_is_light_and_adds_one_name():
    run_python("""
        import sys
        import mixtura

        heavy = {"accelerate", "matplotlib", "typer", "rich"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

        def modeling():
            names = [n for n in sys.modules if n.startswith("transformers.models.")]
            return [n for n in names if ".modeling_" in n and not n.endswith("_auto")]

        assert not modeling()
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
        assert "mixtura" in ALL_EXPERTS_FUNCTIONS.valid_keys()
        assert not modeling()
        import mixtura.hf
        assert not modeling()
        assert not {"matplotlib", "typer"} & sys.modules.keys()
    """)


def test_the_table_of_transformers_gets_one_name_more(monkeypatch):
    table = moe.ExpertsInterface._global_mapping
    expected = {
        "batched_mm": moe.batched_mm_experts_forward,
        "deepgemm": moe.deepgemm_bf16_experts_forward,
        "grouped_mm": moe.grouped_mm_experts_forward,
        "sonicmoe": moe.sonicmoe_experts_forward,
    }
    assert table == {**expected, "mixtura": experts_forward}
    monkeypatch.delitem(table, "mixtura")
    assert table == expected
    plugin.offer()  # what `import mixtura` does where Transformers is there already
    assert table.keys() == {*expected, "mixtura"}
    assert output(one_line()).equal(output(one_line()))
    assert relative_error(output(one_line()), output(stock().model)) <= TOLERANCE


def test_outside_the_window_nothing_is_registered(monkeypatch):
    table = moe.ExpertsInterface._global_mapping
    monkeypatch.delitem(table, "mixtura")
    monkeypatch.setattr(metadata, "version", lambda name: "5.22.1")
    plugin.offer()
    assert "mixtura" not in table
    with pytest.raises(ValueError, match="mixtura"):
        one_line()


@pytest.mark.slow
def test_the_first_call_can_be_traced_where_only_the_package_was_imported():
    run_python("""
        import torch
        import mixtura
        import sys
        from families import tiny_model
        case = tiny_model("qwen3_moe")
        config = case.model.config
        config.update({"num_hidden_layers": 1, "mlp_only_layers": []})
        model = type(case.model)._from_config(config, experts_implementation="eager").eval()
        inputs = {**case.inputs, "use_cache": False}
        with torch.no_grad():
            expected = model(**inputs).logits
            model.set_experts_implementation("mixtura")
            assert "mixtura.hf" not in sys.modules
            step = torch.compile(model.forward, fullgraph=True, backend="eager")
            for _ in range(2):
                found = step(**inputs).logits
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    """)


WITHOUT = """
    import sys
    from importlib import metadata

    version, is_blocked = {version!r}, {is_blocked!r}
    true_version = metadata.version

    def pretended(name):
        if name != "transformers":
            return true_version(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    metadata.version = pretended

    class Blocker:
        def find_spec(self, fullname, path, target=None):
            if fullname.partition(".")[0] == "transformers":
                raise ModuleNotFoundError(fullname)

    if is_blocked:
        sys.meta_path.insert(0, Blocker())

    import torch
    import mixtura
    from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig
    from mixtura.errors import MissingDependency

    layer = FusedMoE(
        MoEConfig(
            hidden_size=8,
            routing=RoutingConfig(num_experts=4, top_k=2),
            experts=ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=16),
        )
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert layer(torch.randn(3, 8)).isfinite().all()
    for call in (mixtura.from_pretrained, mixtura.convert):
        try:
            call("a-model")
        except MissingDependency as error:
            assert ">=5.23,<5.24" in str(error), error
            assert (version or "not installed") in str(error), error
        else:
            raise AssertionError("no error")
    assert "transformers" not in sys.modules
"""


@pytest.mark.parametrize(
    ("version", "is_blocked"), [(None, True), ("5.22.1", False)], ids=["without", "older"]
)
def test_outside_the_window_layers_work_and_models_name_the_version(version, is_blocked):
    run_python(textwrap.dedent(WITHOUT).format(version=version, is_blocked=is_blocked))


@pytest.mark.parametrize(
    ("version", "is_in_window"),
    [
        ("5.23.0", True),
        ("5.23.7", True),
        ("5.23.0.dev0", True),
        ("5.22.9", False),
        ("5.24.0", False),
        ("6.0.0", False),
        ("4.57.1", False),
        ("5", False),
        ("unknown", False),
        (None, False),
    ],
)
def test_the_window_of_versions(version, is_in_window):
    assert plugin.is_supported(version) is is_in_window


def test_the_installed_version_is_in_the_window(monkeypatch):
    assert plugin.is_supported(plugin.transformers_version())

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert plugin.transformers_version() is None
    with pytest.raises(MissingDependency, match="not installed"):
        raise plugin.missing_transformers(None)


PEAK = """
    import sys, threading
    from pathlib import Path

    import torch
    from transformers.models.qwen3_moe import modeling_qwen3_moe
    import mixtura.hf

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    peak, done = 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    torch.set_num_threads(1)
    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = mixtura.hf.from_pretrained(sys.argv[1])
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = model.model.layers[0]
    print(peak - before, size, sum(p.numel() * p.element_size() for p in layer.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_needs_no_more_than_the_model_and_one_layer(tmp_path):
    case = stock()
    config = copy.deepcopy(case.model.config)
    config.update(
        {
            "hidden_size": 512,
            "moe_intermediate_size": 512,
            "num_experts": 8,
            "num_hidden_layers": 8,
            "mlp_only_layers": [],
        }
    )
    with torch.device("meta"):
        model = type(case.model)(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    del model
    peak, size, layer = map(int, run_python(PEAK, str(tmp_path)).split())
    assert size > 200e6
    allocator = 32e6  # the arenas of Transformers' loader threads
    assert size * 0.9 < peak <= size + layer + allocator
