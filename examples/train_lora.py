"""Train a LoRA adapter for the model in the box with PEFT, and serve it with mixtura.

    python examples/train_lora.py --out build/lora_docs     # train, then measure
    python examples/train_lora.py --adapter examples/lora_docs  # measure alone

The model in the box has seen Python's source files. The adapter learns the prose of Python's
documentation: the texts that `help()` shows, of which every tenth is kept for measuring. It is
trained on the experts, as parameters, and on attention, and written in bf16.

What is measured is bits per byte of the kept texts: of the model alone, with the adapter in
mixtura beside the weights, and with PEFT, which rebuilds the experts' weights for every forward.
The adapter in `examples` took the default 100 steps. The texts are those of the running Python,
which has them under the PSF License Version 2.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import mixtura
from mixtura.bench.perplexity import evaluate

MODEL = Path(mixtura.__file__).with_name("demo")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 4, 16
WINDOW, BATCH = 256, 2
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
STEPS_BETWEEN_LINES = 20
KEPT = 10
"""Of so many texts one is kept for measuring."""


@dataclass(frozen=True, slots=True)
class Report:
    """Bits per byte of the kept texts."""

    num_texts: int
    num_bytes: int
    model_alone: float
    with_adapter: float
    with_adapter_by_peft: float


def split() -> tuple[list[str], list[str]]:
    """The texts to train on and those to measure with, in the order of their names."""
    names = sorted(topics)
    kept = set(names[::KEPT])
    return [topics[n] for n in names if n not in kept], [topics[n] for n in names if n in kept]


def load() -> nn.Module:
    """The model in the box, as Transformers has it."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def read_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(tokens,) of all texts, each after an end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def train(out: Path, num_steps: int, seed: int) -> None:
    """Train an adapter and write it as PEFT does."""
    torch.manual_seed(seed)
    tokens = read_tokens(AutoTokenizer.from_pretrained(MODEL), split()[0])
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION, target_parameters=EXPERTS
    )
    model = get_peft_model(load(), config)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / num_steps)
    )
    for step in range(num_steps):
        starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH,)).tolist()
        ids = torch.stack([tokens[start : start + WINDOW + 1] for start in starts])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % STEPS_BETWEEN_LINES == 0:
            print(f"step {step} of {num_steps}, loss {loss.item():.3f}", flush=True)
    for parameter in factors:
        parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = "mixtura/demo"
    model.save_pretrained(out)
    (out / "README.md").unlink()


def measure(adapter: Path) -> Report:
    """Bits per byte of the kept texts, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = split()[1]
    model = mixtura.from_pretrained(MODEL, dtype=torch.float32)
    alone = evaluate(model, tokenizer, texts)
    mixtura.load_adapter(model, adapter)
    ours = evaluate(model, tokenizer, texts)
    theirs = evaluate(PeftModel.from_pretrained(load(), adapter).eval(), tokenizer, texts)
    return Report(
        num_texts=len(texts),
        num_bytes=alone.num_bytes,
        model_alone=alone.bits_per_byte,
        with_adapter=ours.bits_per_byte,
        with_adapter_by_peft=theirs.bits_per_byte,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/lora_docs"), help="new adapter")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the factors and the data's order")
    parser.add_argument("--adapter", type=Path, help="measure this adapter; no step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.adapter is None:
        began = time.perf_counter()
        train(arguments.out, arguments.steps, arguments.seed)
        print(f"trained in {time.perf_counter() - began:.0f} s")
    report = measure(arguments.adapter or arguments.out)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return
    print(f"{report.num_texts} texts, {report.num_bytes} bytes")
    print(f"model alone               {report.model_alone:.3f} bits/byte")
    print(f"with the adapter          {report.with_adapter:.3f}")
    print(f"with the adapter, by PEFT {report.with_adapter_by_peft:.3f}")


if __name__ == "__main__":
    main()
