"""Memory of a load of packed experts: what the model keeps, and one layer's experts beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

MIB = 2**20
HIDDEN, INNER, NUM_EXPERTS, NUM_LAYERS = 512, 512, 16, 4
LAYER_BYTES = NUM_EXPERTS * 3 * HIDDEN * INNER
MARGIN_BYTES = 6 * MIB
"""What Python, the allocator and tensors beside the experts take meanwhile; half a layer here."""

CHILD = """
import gc, json, resource, sys, threading, time
import torch
import mixtura

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

torch.set_num_threads(1)
warm, path, mapped, allowed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mixtura.from_pretrained(warm)
gc.collect()
before, peak, is_done = status("RssAnon"), 0, False

def watch():
    global peak
    while not is_done:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
limit = status("VmData") + mapped + allowed
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    model = mixtura.from_pretrained(path)
finally:
    is_done = True
    watcher.join()
gc.collect()
print(json.dumps({"peak": peak - before, "final": status("RssAnon") - before}))
"""


def write_int8(directory: Path, num_layers: int, shard_bytes: int) -> Path:
    """A checkpoint of int8 experts in files that end within layers."""
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    tensors = {}
    for name, tensor in shapes.items():
        path, _, role = name.rpartition(".")
        if not path.endswith("experts"):
            tensors[name] = torch.rand(tensor.shape).to(torch.bfloat16)
            continue
        for expert in range(NUM_EXPERTS):
            for part in ("gate_proj", "up_proj") if role == "gate_up_proj" else ("down_proj",):
                stem = f"{path}.{expert}.{part}"
                codes = torch.randint(-127, 128, (INNER, HIDDEN), dtype=torch.int8)
                tensors[f"{stem}.weight"] = codes
                tensors[f"{stem}.weight_scale"] = torch.rand(INNER, 1) / 100
    directory.mkdir()
    quantization = {"quant_method": "w8a8_int8"}
    settings = {**config.to_dict(), "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(settings))
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in sorted(tensors):
        if sum(t.nbytes for t in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensors[name]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"part-{number}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_load_holds_the_result_and_one_layer(tmp_path: Path) -> None:
    warm = write_int8(tmp_path / "warm", 1, LAYER_BYTES)
    path = write_int8(tmp_path / "model", NUM_LAYERS, LAYER_BYTES * 3 // 2)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) >= 3
    # Files are mapped privately, so that the limit counts them although no page of them is copied.
    allowed = sum(sizes) + LAYER_BYTES + MARGIN_BYTES
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(warm), str(path), str(sum(sizes)), str(allowed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["final"] >= 0.9 * NUM_LAYERS * LAYER_BYTES
    assert found["peak"] <= found["final"] + LAYER_BYTES + MARGIN_BYTES
