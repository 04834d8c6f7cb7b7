"""Routing traces, expert usage, the picture and the page."""

from __future__ import annotations

import importlib
import json
import math
import re
import struct
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig, convert, create_router
from mixtura.config import Simulation, SimulationConfig
from mixtura.errors import InputError, MissingDependency, TraceError
from mixtura.hf.capture import observed_layers
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.observe import (
    ExpertUsage,
    LayerTrace,
    LayerUsage,
    PageText,
    RoutingTrace,
    capture_layers,
    render_page,
    save_picture,
)
from mixtura.observe.colour import MEAN_AT, ON_DARK, ColourScale, colour_at
from mixtura.observe.trace import ids_dtype
from mixtura.observe.usage import short_names
from mixtura.types import TokenInputs

HOSTILE = '<script src="https://evil.example/x.js"></script>&"\'`${1}</style>'


def layer_of(**routing: Any) -> FusedMoE:
    """A small layer with random weights."""
    rule = RoutingConfig(**{"num_experts": 6, "top_k": 2} | routing)
    num_experts = rule.num_experts + rule.num_fused_shared_experts
    experts = ExpertsConfig(num_experts=num_experts, hidden_size=8, intermediate_size=4)
    layer = FusedMoE(MoEConfig(hidden_size=8, routing=rule, experts=experts))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def trace_of(ids: list[list[int]], num_experts: int = 4, num_no_compute: int = 0) -> RoutingTrace:
    """A trace of one layer."""
    dtype = ids_dtype(num_experts + num_no_compute)
    return RoutingTrace(
        {"mlp": LayerTrace(torch.tensor(ids).to(dtype), num_experts, num_no_compute)}
    )


def big_trace(
    num_layers: int, num_experts: int, num_no_compute: int, num_tokens: int = 50
) -> RoutingTrace:
    """A trace of many layers, 4 choices a token."""
    choices = num_experts + num_no_compute
    draws = torch.rand(num_layers, num_tokens, choices).argsort(-1)[..., : min(4, choices)]
    return RoutingTrace(
        {
            f"model.layers.{i}.mlp": LayerTrace(
                ids.to(ids_dtype(choices)), num_experts, num_no_compute
            )
            for i, ids in enumerate(draws)
        }
    )


# --------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("family", ["qwen3_moe", "phimoe", "longcat_flash", "jetmoe", "gpt_oss"])
def test_a_trace_adds_up(family: str) -> None:
    case = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvertedLayerWarning)  # of JetMoE's attention
        model = convert(case.model)
    layers = observed_layers(model)
    with torch.no_grad(), capture_layers(layers) as capture:
        case.output(model)
        case.output(model)
    trace = capture.trace()
    num_tokens = 2 * case.inputs["input_ids"].numel()
    assert list(trace.layers) == list(layers)
    for layer in trace.layers.values():
        assert layer.num_tokens == num_tokens
        assert int(layer.counts.sum()) == num_tokens * layer.top_k
        assert layer.counts.shape == (layer.num_choices,)
    assert trace.num_slots == sum(n.ids.numel() for n in trace.layers.values())
    ExpertUsage.from_trace(trace)  # checks the sums again


def test_ids_are_those_of_the_router_no_compute_experts_included() -> None:
    case = tiny_model("longcat_flash")
    model = convert(case.model)
    layers = observed_layers(model)
    with torch.no_grad(), capture_layers(layers) as capture:
        case.output(model)
    for layer in capture.trace().layers.values():
        assert (layer.num_experts, layer.num_no_compute, layer.top_k) == (8, 4, 3)
        assert int(layer.topk_ids.max()) >= layer.num_experts
        assert all(len(set(row)) == 3 for row in layer.ids.tolist())


def test_a_trace_is_what_the_layer_chose() -> None:
    layer = layer_of()
    rows = torch.randn(5, 8)
    with capture_layers({"mlp": layer}) as capture:
        routed = layer.run(rows)
    traced = capture.trace().layers["mlp"]
    assert torch.equal(traced.topk_ids, routed.routing.topk_ids)
    assert traced.topk_ids.dtype is torch.int32
    assert traced.ids.dtype is torch.uint8


def test_fused_shared_experts_are_no_choice() -> None:
    layer = layer_of(num_fused_shared_experts=2)
    with capture_layers({"mlp": layer}) as capture:
        layer(torch.randn(5, 8))
    assert capture.trace().layers["mlp"].ids.shape == (5, 2)


def test_a_layer_that_saw_no_token_has_an_empty_trace() -> None:
    with capture_layers({"mlp": layer_of()}) as capture:
        pass
    assert capture.trace().layers["mlp"].ids.shape == (0, 2)
    assert capture.trace().num_slots == 0


def test_captures_nest_and_leave_other_observers_alone() -> None:
    layer = layer_of()
    seen: list[int] = []

    def mine(ids: Tensor, weights: Tensor) -> None:
        seen.append(len(ids))

    layer.observers = (mine,)
    with capture_layers({"a": layer}) as outer:
        layer(torch.randn(1, 8))
        with capture_layers({"b": layer}) as inner:
            layer(torch.randn(2, 8))
        layer(torch.randn(4, 8))
    layer(torch.randn(8, 8))
    assert outer.trace().layers["a"].num_tokens == 7
    assert inner.trace().layers["b"].num_tokens == 2
    assert seen == [1, 2, 4, 8]
    assert layer.observers == (mine,)


def test_observers_go_when_the_block_raises() -> None:
    first, second = layer_of(), layer_of()
    with (
        pytest.raises(ZeroDivisionError),
        capture_layers({"a": first, "b": second}) as capture,
    ):
        first(torch.randn(3, 8))
        raise ZeroDivisionError
    assert first.observers == second.observers == ()
    assert capture.trace().layers["a"].num_tokens == 3


def test_a_module_that_is_no_layer_is_refused_before_any_is_touched() -> None:
    layer = layer_of()
    message = r"a layer to capture \(Linear\) must be an MoE layer or its experts; got neither"
    with (
        pytest.raises(InputError, match=message),
        capture_layers({"a": layer, "b": nn.Linear(2, 2)}),
    ):
        pass
    assert layer.observers == ()


def test_ids_that_no_router_chooses_are_refused() -> None:
    layer = layer_of()
    with capture_layers({"a": layer}) as capture:
        layer.observers[0](torch.tensor([[-1, 0]]), torch.ones(1, 2))
    with pytest.raises(InputError, match=r"chosen ids must be in \[0, 6\); got -1 to 0"):
        capture.trace()
    assert layer.observers == ()


def test_ids_that_have_waited_long_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtura.observe.capture.FOLD_TOKENS", 4)
    layer, rows = layer_of(), torch.randn(11, 8)
    with capture_layers({"a": layer}) as capture:
        for part in rows.split([1, 2, 3, 5]):
            layer(part)
            num_tokens = capture.trace().layers["a"].num_tokens
    assert num_tokens == 11
    expected = layer.run(rows).routing.topk_ids
    assert torch.equal(capture.trace().layers["a"].topk_ids, expected)


@pytest.mark.parametrize(
    ("num_choices", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.uint16),
        (65_536, torch.uint16),
        (65_537, torch.int32),
    ],
)
def test_ids_are_kept_in_the_smallest_dtype(num_choices: int, dtype: torch.dtype) -> None:
    ids = torch.tensor([[num_choices - 1, 0]]).to(ids_dtype(num_choices))
    layer = LayerTrace(ids, num_choices)
    assert layer.ids.dtype is dtype
    assert layer.topk_ids.tolist() == [[num_choices - 1, 0]]
    assert layer.counts.sum() == 2


# -------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(("num_experts", "num_no_compute"), [(4, 0), (300, 0), (4, 3)])
def test_a_saved_trace_comes_back(tmp_path: Path, num_experts: int, num_no_compute: int) -> None:
    trace = RoutingTrace(
        {
            "model.layers.1.mlp": trace_of([[3, 1], [0, 2]], num_experts, num_no_compute).layers[
                "mlp"
            ],
            "a/b ü": trace_of([[0, 1, 2]], num_experts, num_no_compute).layers["mlp"],
        }
    )
    trace.save(tmp_path / "trace.safetensors")
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert list(loaded.layers) == list(trace.layers)
    for name, layer in trace.layers.items():
        found = loaded.layers[name]
        assert torch.equal(found.topk_ids, layer.topk_ids)
        assert found.ids.dtype is layer.ids.dtype
        assert (found.num_experts, found.num_no_compute) == (num_experts, num_no_compute)


@pytest.mark.parametrize("num_experts", [6, 300])
def test_a_trace_that_is_played_back_gives_the_ids_again(tmp_path: Path, num_experts: int) -> None:
    layer = layer_of(num_experts=num_experts)
    rows = torch.randn(9, 8)
    with capture_layers({"mlp": layer}) as capture:
        expected = layer(rows)
    capture.trace().save(tmp_path / "trace")
    loaded = RoutingTrace.load(tmp_path / "trace").layers["mlp"]

    simulated = RoutingConfig(
        num_experts=num_experts, top_k=2, simulation=SimulationConfig(kind=Simulation.REPLAY)
    )
    router = create_router(simulated, replayed_ids=loaded.topk_ids)
    assert torch.equal(router.route(torch.randn(9, num_experts)).topk_ids, loaded.topk_ids)

    other = torch.randn(9, 8)
    with capture_layers({"mlp": layer}) as again:
        layer(other, TokenInputs(replayed_ids=loaded.topk_ids))
        replayed = layer(rows, TokenInputs(replayed_ids=loaded.topk_ids))
    assert torch.equal(again.trace().layers["mlp"].topk_ids, loaded.topk_ids.repeat(2, 1))
    assert torch.equal(replayed, expected)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change tensors and metadata of a trace file."""
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def with_layers(metadata: dict[str, str], **changes: Any) -> None:
    entries = json.loads(metadata["layers"])
    entries[0] |= changes
    metadata["layers"] = json.dumps(entries)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "another format": (lambda t, m: m.update(format="x"), "must be a routing trace"),
    "no metadata": (lambda t, m: m.clear(), "must be a routing trace"),
    "another version": (lambda t, m: m.update(version="1"), r"must be of version 2; got '1'"),
    "wrong dtype": (
        lambda t, m: t.update({"ids.mlp": t["ids.mlp"].long()}),
        r"of torch.uint8 for 4 choices; got \(2, 2\) of torch.int64",
    ),
    "wrong dimensions": (
        lambda t, m: t.update({"ids.mlp": t["ids.mlp"].flatten()}),
        r"got \(4,\) of",
    ),
    "id out of range": (
        lambda t, m: t.update({"ids.mlp": torch.tensor([[0, 4]]).byte()}),
        r"chosen ids must be in \[0, 4\); got 0 to 4",
    ),
    "another top_k": (lambda t, m: with_layers(m, top_k=3), "got 2 for top_k 3"),
    "no experts": (lambda t, m: with_layers(m, num_experts=0), r"num_experts \(0\) must be"),
    "negative extra": (lambda t, m: with_layers(m, num_no_compute=-1), r"\(-1\) at least 0"),
    "a number as text": (lambda t, m: with_layers(m, num_experts="4"), "must list its layers"),
    "a truth for a number": (lambda t, m: with_layers(m, num_experts=True), "must list its layers"),
    "no list of layers": (lambda t, m: m.pop("layers"), "must list its layers"),
    "broken list": (lambda t, m: m.update(layers="["), "must list its layers"),
    "deep list": (lambda t, m: m.update(layers="[" * 100_000), "must list its layers"),
    "another layer": (lambda t, m: with_layers(m, name="x"), "must hold one tensor for each layer"),
    "one layer more": (
        lambda t, m: t.update(more=torch.zeros(1, 2).byte()),
        "must hold one tensor for each layer",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    trace_of([[0, 3], [1, 2]]).save(path)
    change, message = BAD_FILES[name]
    rewrite(path, change)
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    trace_of([[0, 3], [1, 2]]).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match="must be a whole safetensors file"):
            RoutingTrace.load(path)


def test_a_file_that_is_not_there_and_one_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="must exist; got no such file"):
        RoutingTrace.load(tmp_path / "none")
    with pytest.raises(TraceError, match="must be writable"):
        trace_of([[0]]).save(tmp_path / "none" / "trace")


# ----------------------------------------------------------------------------------------- usage


def test_usage_of_a_known_layer() -> None:
    layer = LayerUsage(name="mlp", counts=(4, 2, 0, 2), num_experts=3, num_tokens=4, top_k=2)
    assert layer.share == (0.5, 0.25, 0.0, 0.25)
    assert layer.entropy_bits == 1.5
    assert layer.normalized_entropy == 0.75
    assert layer.mean_load == 2.0
    assert layer.relative_load == (2.0, 1.0, 0.0, 1.0)
    assert layer.max_over_mean == 2.0
    assert layer.never_used == (2,)
    assert layer.top(3) == (0, 1, 3)


def test_a_balanced_layer_and_a_collapsed_one() -> None:
    balanced = LayerUsage(name="", counts=(3,) * 8, num_experts=8, num_tokens=12, top_k=2)
    assert (balanced.entropy_bits, balanced.normalized_entropy) == (3.0, 1.0)
    assert balanced.max_over_mean == 1.0
    collapsed = LayerUsage(name="", counts=(9, *[0] * 7), num_experts=8, num_tokens=9, top_k=1)
    assert (collapsed.entropy_bits, collapsed.max_over_mean) == (0.0, 8.0)
    assert len(collapsed.never_used) == 7


def test_a_layer_without_tokens_or_with_one_choice() -> None:
    empty = LayerUsage(name="", counts=(0, 0), num_experts=2, num_tokens=0, top_k=2)
    assert (empty.entropy_bits, empty.max_over_mean, empty.share) == (0.0, 0.0, (0.0, 0.0))
    single = LayerUsage(name="", counts=(3,), num_experts=1, num_tokens=3, top_k=1)
    assert single.normalized_entropy == 1.0


@pytest.mark.parametrize("counts", [(4, 3), (9, -1), ()])
def test_counts_that_do_not_add_up_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        LayerUsage(name="mlp", counts=counts, num_experts=2, num_tokens=4, top_k=2)


def test_usage_counts_a_trace() -> None:
    usage = ExpertUsage.from_trace(trace_of([[0, 4], [0, 1]], 4, 1))
    assert usage.layers[0].counts == (2, 1, 0, 0, 1)
    assert (usage.num_slots, usage.num_experts, usage.num_no_compute) == (4, 4, 1)


def test_short_names_stay_different() -> None:
    assert short_names(["model.layers.3.mlp", "model.layers.11.mlp"]) == ("3", "11")
    assert short_names(["a.1.text_moe", "a.1.vision_moe"]) == ("text_moe", "vision_moe")
    assert short_names(["a.1.moe", "a.mtp.moe"]) == ("1.moe", "mtp.moe")
    assert short_names(["mlp"]) == ("mlp",)
    assert short_names(["x.mlp", "x"]) == ("x.mlp", "x")


# --------------------------------------------------------------------------------------- picture


def lightness(colour: str) -> float:
    """CIE L* of a colour."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_the_colour_scale_is_even_and_puts_the_mean_in_its_place() -> None:
    for top in (0.0, 1.3, 2.0, 7.7, 300.0):
        scale = ColourScale.over(top)
        assert math.isclose(scale.position(1.0), MEAN_AT)
        assert scale.position(0.0) == 0.0
        assert scale.position(scale.top) == scale.position(1e9) == 1.0
        assert scale.marks[0] == 0 and scale.marks[-1] == scale.top
        assert list(scale.marks) == sorted(set(scale.marks)) and 1 in scale.marks
    light = [lightness(colour_at(i / 20)) for i in range(21)]
    dark = [lightness(colour_at(i / 20, on=ON_DARK)) for i in range(21)]
    for values, sign in ((light, -1), (dark, 1)):
        steps = [sign * (b - a) for a, b in pairwise(values)]
        assert min(steps) > 0
        assert max(steps) < 1.6 * min(steps)


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    return width, height


@pytest.mark.parametrize("sizes", [(6, 16, 0), (2, 8, 4), (28, 512, 256), (1, 1, 0)])
def test_a_picture_of_any_size_can_be_read(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    trace = big_trace(*sizes, num_tokens=5)
    path = tmp_path / "load.png"
    save_picture(ExpertUsage.from_trace(trace), path, title="a $x^ name\n<b>", subtitle="5 tokens")
    width, height = size_of_png(path)
    assert 600 <= width <= 3200
    assert 250 <= height <= 2000
    assert path.stat().st_size < 2**20


def test_without_matplotlib_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    usage = ExpertUsage.from_trace(trace_of([[0]]))
    with pytest.raises(MissingDependency, match=r"pip install 'mixtura\[plot\]'"):
        save_picture(usage, tmp_path / "x.png", title="x")
    assert not (tmp_path / "x.png").exists()


def test_a_picture_needs_a_layer_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a picture must have a layer to show"):
        save_picture(ExpertUsage(()), tmp_path / "x.png", title="x")
    usage = ExpertUsage.from_trace(trace_of([[0]]))
    with pytest.raises(InputError, match="must be writable"):
        save_picture(usage, tmp_path / "none" / "x.png", title="x")


# ------------------------------------------------------------------------------------------ page


class Page(HTMLParser):
    """Tags with attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.text[self._inside] = self.text.get(self._inside, "") + data


def test_a_page_loads_nothing_and_escapes_what_it_is_given() -> None:
    text = PageText(HOSTILE, (HOSTILE, "</div><img src=x onerror=alert(1)>", " end"), HOSTILE)
    trace = RoutingTrace({HOSTILE: trace_of([[0, 1], [2, 3], [0, 3]]).layers["mlp"]})
    html = render_page(trace, model=HOSTILE, text=text)
    assert "://" not in html.replace("https://evil.example", "")
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"img", "link", "iframe", "base", "object", "image", "use"} & set(tags)
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "data", "action", "onerror"} & attributes.keys()
    assert page.text["h1"].strip() == HOSTILE
    styles = page.text["style"]
    assert "url(" not in styles and "@import" not in styles
    policy = next(a for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_a_page_shows_the_numbers() -> None:
    trace = big_trace(3, 16, 8, num_tokens=40)
    pieces = tuple(f"t{i} " for i in range(40))
    html = render_page(trace, model="a model", text=PageText("a text", pieces))
    usage = ExpertUsage.from_trace(trace)
    data = data_of(html)
    assert [tuple(layer["counts"]) for layer in data["layers"]] == [u.counts for u in usage.layers]
    assert f"{usage.num_slots:,}" in html
    for layer in usage.layers:
        assert f"{layer.entropy_bits:.2f}" in html
    assert html.count("<span>t") == 40
    drawn = re.findall(r'<path class="[a-z0-9]+" d="([^"]*)"', html)
    assert sum(d.count("M") for d in drawn) == 3 * 24
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_a_page_without_pieces_or_with_too_many() -> None:
    trace = big_trace(2, 16, 0, num_tokens=5000)
    assert 'id="text"' not in render_page(trace, model="m", text=PageText("t"))
    html = render_page(trace, model="m", text=PageText("t", ("x",) * 5000))
    assert html.count("<span>x</span>") == 4096
    assert "first 4,096 of 5,000 tokens" in html


def test_a_page_of_layers_with_different_sizes() -> None:
    trace = RoutingTrace(
        {
            "a.0.mlp": trace_of([[0, 1]] * 3, 4).layers["mlp"],
            "a.1.mlp": trace_of([[0, 1, 5]] * 2, 4, 2).layers["mlp"],
        }
    )
    html = render_page(trace, model="m", text=PageText("t", ("a", "b", "c")))
    data = data_of(html)
    assert [bool(layer["ids"]) for layer in data["layers"]] == [True, False]
    assert "<th>tokens</th>" in html


def test_a_page_needs_a_layer() -> None:
    with pytest.raises(InputError, match="a page must have a layer to show"):
        render_page(RoutingTrace({}), model="m", text=PageText("t"))
