"""The benchmark of layers on a real device: events, graphs, limits, and what a run writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtura.bench.cases import SHAPES
from mixtura.bench.gpu.command import GpuOptions, bench_gpu
from mixtura.bench.gpu.device import CannotCapture, CudaDevice
from mixtura.bench.gpu.limits import find_peak, nominal_limits, probe_bandwidth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_a_graph_runs_again_what_was_captured() -> None:
    device = CudaDevice()
    source = torch.arange(4.0, device="cuda")
    graph = device.capture(lambda: source * 2)
    other = device.capture(lambda: source + 1)
    source.add_(10.0)
    graph.replay()
    assert graph.output.tolist() == [20.0, 22.0, 24.0, 26.0]
    other.replay()
    assert other.output.tolist() == [11.0, 12.0, 13.0, 14.0]
    assert device.seconds(graph.replay) > 0


def test_work_that_waits_for_the_host_is_refused_and_others_are_captured_after_it() -> None:
    device = CudaDevice()
    source = torch.arange(4.0, device="cuda")

    def waits() -> Tensor:
        return source * float(source.sum().item())

    with pytest.raises(CannotCapture, match="synchroniz"):
        device.capture(waits)
    assert waits().tolist() == [0.0, 6.0, 12.0, 18.0]  # waiting is allowed again
    graph = device.capture(lambda: source * 3)
    graph.replay()
    device.finish()
    assert graph.output.tolist() == [0.0, 3.0, 6.0, 9.0]
    device.release()
    device.capture(lambda: source * 3)


def test_limits_are_in_the_region_of_the_nominal_ones() -> None:
    """Not a timing: a probe that is off by a factor measures something else."""
    device = CudaDevice()
    nominal = nominal_limits(device.facts().name)
    if nominal is None:
        pytest.skip(f"nobody knows the limits of {device.facts().name}")
    assert nominal.bandwidth / 3 < probe_bandwidth(device).best < 3 * nominal.bandwidth
    assert nominal.peak / 3 < find_peak(device, torch.bfloat16).rate < 3 * nominal.peak
    for dtype in (torch.float8_e4m3fn, torch.int8):
        peak = find_peak(device, dtype)
        assert peak.note is None and nominal.fp8_peak / 3 < peak.rate < 3 * nominal.fp8_peak


@pytest.mark.parametrize("weights", ["fp8-block", "fp8", "int8", "int4", "mxfp4", "nvfp4"])
def test_quantized_layers_are_right_whoever_runs_them(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    qwen = SHAPES["qwen3-30b-a3b"]
    small = replace(qwen, name="small", experts=replace(qwen.experts, intermediate_size=256))
    monkeypatch.setitem(SHAPES, "small", small)
    asked = GpuOptions(shapes=["small"], weights=weights, tokens="1,37", seconds=0.2, out=out)
    bench_gpu(asked)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [line for line in lines if line["is_ours"] and line["relative_error"] is not None]
    assert {line["T"] for line in ours} == {1, 37}
    assert all(line["is_correct"] for line in ours), ours


def test_a_run_measures_layers_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    qwen = SHAPES["qwen3-30b-a3b"]
    small = replace(qwen, name="small", experts=replace(qwen.experts, intermediate_size=128))
    monkeypatch.setitem(SHAPES, "small", small)
    options = GpuOptions(shapes=["small"], tokens="1,37,600", seconds=0.2, out=out)
    assert bench_gpu(options) == 0, capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["T"] for line in lines} == {1, 37, 600}
    eager = [line for line in lines if line["is_ours"] and line["mode"] == "eager"]
    ours = [line for line in eager if line["refusal"] is None]  # of packages that are not here
    triton = {line["T"] for line in ours if line["contender"] == "triton"}
    assert triton == {1, 37, 600}
    assert all(line["us"] > 0 and line["is_correct"] for line in ours)
    assert bench_gpu(options) == 0
    assert len(out.read_text().splitlines()) == len(lines)
