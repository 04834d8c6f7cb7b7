"""Train the demo model: a small Qwen3-MoE on the Python standard library's source files.

    python examples/train_demo.py                        # train; run again to resume
    python examples/train_demo.py --export mixtura/demo  # the checkpoint, as a model directory

The checkpoint in `--out` is written every five minutes, on Ctrl-C, and at the end. The experts run
through mixtura, in bf16 autocast over fp32 weights. Matrices are trained with Muon, the rest with
AdamW. The order of the data depends on `--seed`, `--batch` and the step alone.

The router is trained with the load-balancing loss of the Switch Transformer (Fedus et al. 2021,
arXiv:2101.03961, equations 4 to 6), the mean over the layers of E * sum_e f_e * p_e; an even router
gives 1. The shipped weights took 810 steps of 8192 tokens, the learning rate falling from step 650
on, with a coefficient of 0.01 in the first 470 steps, under which some experts all but died, and of
0.2 in the rest, which brought them back; the default lies between.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import demo_corpus
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.plugin import NAME as MIXTURA

WINDOW = 1024
"""Tokens of one training sequence."""
CONTEXT = 2048
"""Positions that the configuration declares; `WINDOW` of them are trained."""
END_OF_TEXT = 0
ADAMW_LEARNING_RATE = 3e-3
MUON_MOMENTUM = 0.95
MUON_WEIGHT_DECAY = 0.05
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WARMUP_STEPS = 40
DECAY_PART = 0.45
"""Over this last part of the steps the learning rate falls to `FINAL_LEARNING_RATE` of its peak."""
FINAL_LEARNING_RATE = 0.02
SECONDS_BETWEEN_CHECKPOINTS = 300
STEPS_BETWEEN_LOG_LINES = 10
SECONDS_FOR_ESTIMATE = 300
"""The remaining time is estimated from the steps of this long."""
DEFAULT_STEPS = 1400
CHECKPOINT, TOKENIZER = "ck.pt", "tokenizer.json"
"""Files in the run's directory."""


def create_model(balance: float) -> Qwen3MoeForCausalLM:
    """11.7 million parameters, 16 experts of which a token visits 4, in 6 layers."""
    top_k = 4
    config = Qwen3MoeConfig(
        vocab_size=demo_corpus.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=top_k,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        # Transformers' balancing loss is top_k times ours.
        router_aux_loss_coef=balance / top_k,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.set_experts_implementation(MIXTURA)
    return model


def is_for_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a hidden matrix: not an embedding, a router or a norm."""
    return parameter.ndim >= 2 and "embed" not in name and "mlp.gate.weight" not in name


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz steps in bf16.

    Args:
        matrices: (..., rows, columns).

    Returns:
        fp32 of the same shape; singular values between about 0.7 and 1.2.

    Source: Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).float()


class Muon:
    """Muon with Nesterov momentum over stacks of matrices; gate and up of an expert count as two.

    momentum = 0.95 * momentum + gradient
    update = orthogonalize(gradient + 0.95 * momentum) * sqrt(max(1, rows / columns))
    """

    def __init__(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for _, parameter in parameters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply the gradients and drop them."""
        for (name, parameter), momentum in zip(self.parameters, self.momenta, strict=True):
            assert parameter.grad is not None
            momentum.mul_(MUON_MOMENTUM).add_(parameter.grad)
            direction = parameter.grad.add(momentum, alpha=MUON_MOMENTUM)
            parts = direction.chunk(2 if "gate_up" in name else 1, dim=-2)
            update = torch.cat([orthogonalize(part) for part in parts], dim=-2)
            rows, columns = parts[0].shape[-2:]
            parameter.mul_(1.0 - learning_rate * MUON_WEIGHT_DECAY)
            parameter.add_(update, alpha=-learning_rate * max(1.0, rows / columns) ** 0.5)
            parameter.grad = None


@dataclass(slots=True)
class Run:
    """A training run's state: what a checkpoint holds."""

    model: Qwen3MoeForCausalLM
    muon: Muon
    adamw: torch.optim.AdamW
    num_steps: int
    step: int = 0

    @classmethod
    def create(cls, balance: float, num_steps: int) -> Run:
        """A run that has not started, its weights drawn from torch's generator."""
        model = create_model(balance)
        named = list(model.named_parameters())
        muon = Muon(
            [(name, parameter) for name, parameter in named if is_for_muon(name, parameter)]
        )
        rest = [parameter for name, parameter in named if not is_for_muon(name, parameter)]
        adamw = torch.optim.AdamW(rest, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        return cls(model, muon, adamw, num_steps)

    def load(self, checkpoint: Path, *, num_steps: int | None) -> None:
        """Continue from a checkpoint; `num_steps` replaces the number that it was to run."""
        state = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state["m"])
        self.adamw.load_state_dict(state["a"])
        self.muon.momenta = state["mom"]
        self.step, self.num_steps = state["step"], num_steps or state["steps"]

    def save(self, checkpoint: Path) -> None:
        """Write a checkpoint; an interruption leaves the one before."""
        state = {
            "m": self.model.state_dict(),
            "a": self.adamw.state_dict(),
            "mom": self.muon.momenta,
            "step": self.step,
            "steps": self.num_steps,
        }
        unfinished = checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, checkpoint)


def learning_rate_at(step: int, num_steps: int) -> float:
    """The part of the peak learning rate: linear up, level, linear down."""
    up = (step + 1) / WARMUP_STEPS
    down = max(FINAL_LEARNING_RATE, (num_steps - step) / (DECAY_PART * num_steps))
    return min(1.0, up) * min(1.0, down)


def batch_at(tokens: Tensor, step: int, batch: int, seed: int) -> Tensor:
    """The windows of one step: each pass over the data has its own offset and order.

    Returns:
        (batch, WINDOW) token ids.
    """
    steps_per_pass = (len(tokens) - 1) // WINDOW // batch
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + step // steps_per_pass)
    offset = int(torch.randint(0, WINDOW, (1,), generator=generator))
    order = torch.randperm((len(tokens) - 1 - offset) // WINDOW, generator=generator)
    first = step % steps_per_pass * batch
    starts = [offset + window * WINDOW for window in order[first : first + batch].tolist()]
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


def balance_loss(router_logits: Tensor, top_k: int) -> Tensor:
    """E * sum_e f_e * p_e: the part of the slots, times the mean probability, of every expert.

    Args:
        router_logits: (T,E).
    """
    num_experts = router_logits.shape[-1]
    probabilities = router_logits.float().softmax(dim=-1)
    chosen = router_logits.topk(top_k, dim=-1).indices.reshape(-1)
    slots = torch.bincount(chosen, minlength=num_experts) / chosen.numel()
    return num_experts * (slots * probabilities.mean(dim=0)).sum()


def losses(model: Qwen3MoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next tokens, in nats, and the balancing loss, for (B, window) ids."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state[:, :-1].flatten(0, 1))
    top_k = model.config.num_experts_per_tok
    balance = torch.stack([balance_loss(layer, top_k) for layer in output.router_logits]).mean()
    return F.cross_entropy(logits.float(), ids[:, 1:].flatten()), balance


def train_step(run: Run, ids: Tensor, *, learning_rate: float, balance: float) -> dict[str, float]:
    """One step of both optimizers; returns the losses before it."""
    cross_entropy, balance_value = losses(run.model, ids)
    (cross_entropy + balance * balance_value).backward()
    rest = run.adamw.param_groups[0]
    torch.nn.utils.clip_grad_norm_(rest["params"], 1.0)
    factor = learning_rate_at(run.step, run.num_steps)
    run.muon.step(learning_rate * factor)
    rest["lr"] = ADAMW_LEARNING_RATE * factor
    run.adamw.step()
    run.adamw.zero_grad()
    run.step += 1
    return {"loss": cross_entropy.item(), "balance": balance_value.item()}


@contextmanager
def interruption() -> Iterator[list[bool]]:
    """A list that is no longer empty after the first Ctrl-C; a second one interrupts at once."""
    asked: list[bool] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(run: Run, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Run to the last step or to Ctrl-C, with a progress bar, a log and checkpoints."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    run.model.train()
    last_saved = time.monotonic()
    with (
        interruption() as asked,
        Progress(*columns, speed_estimate_period=SECONDS_FOR_ESTIMATE) as progress,
        (arguments.out / "log.jsonl").open("a", encoding="utf-8", buffering=1) as log,
    ):
        task = progress.add_task("train", total=run.num_steps, completed=run.step, figures="")
        while run.step < run.num_steps and not asked:
            began = time.monotonic()
            ids = batch_at(tokens, run.step, arguments.batch, arguments.seed)
            figures = train_step(run, ids, learning_rate=arguments.lr, balance=arguments.balance)
            figures["tokens_per_second"] = ids.numel() / (time.monotonic() - began)
            if run.step % STEPS_BETWEEN_LOG_LINES == 0:
                log.write(json.dumps({"step": run.step, **figures}) + "\n")
            progress.update(task, completed=run.step, figures=describe(figures))
            if time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
                run.save(arguments.out / CHECKPOINT)
                last_saved = time.monotonic()
        run.save(arguments.out / CHECKPOINT)


def describe(figures: dict[str, float]) -> str:
    """What the progress bar says of a step."""
    return (
        f"loss {figures['loss']:.3f}  balance {figures['balance']:.3f}  "
        f"{figures['tokens_per_second']:.0f} tokens/s"
    )


def read_tokens(out: Path) -> Tensor:
    """The training files' tokens, each file after an end-of-text token.

    The tokenizer and the tokens are kept in `out`; delete them when the manifest changes.
    """
    tokenizer_file, token_file = out / TOKENIZER, out / "train.npy"
    if not (tokenizer_file.exists() and token_file.exists()):
        texts = [file.text for file in demo_corpus.load().train]
        tokenizer = demo_corpus.train_tokenizer(texts)
        tokenizer.save(str(tokenizer_file))
        ids: list[int] = []
        for text in track(texts, description="tokenize"):
            ids.append(END_OF_TEXT)
            ids.extend(tokenizer.encode(text).ids)
        unfinished = out / "unfinished.npy"
        np.save(unfinished, np.array(ids, dtype=np.uint16))
        os.replace(unfinished, token_file)
    return torch.from_numpy(np.load(token_file).astype(np.int64))


def export(out: Path, directory: Path, balance: float) -> None:
    """Write the checkpoint as a model directory: bf16 weights, configuration, tokenizer."""
    model = create_model(balance)
    model.load_state_dict(torch.load(out / CHECKPOINT, weights_only=True)["m"])
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(out / TOKENIZER),
        bos_token=demo_corpus.END_OF_TEXT,
        eos_token=demo_corpus.END_OF_TEXT,
        pad_token=demo_corpus.END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as unfinished:
        model.bfloat16().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for file in Path(unfinished).iterdir():
            file.chmod(0o644)
            os.replace(file, directory / file.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps",
        type=int,
        help=f"steps in all; by default {DEFAULT_STEPS}, or what the checkpoint was to run",
    )
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens per step")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data's order")
    parser.add_argument(
        "--balance", type=float, default=0.1, help="coefficient of the load-balancing loss"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="checkpoint, tokenizer, tokens and log"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice otherwise")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write the checkpoint as a model directory; no step",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.out, arguments.export, arguments.balance)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        tokens = read_tokens(arguments.out)
    except demo_corpus.CorpusMismatchError as error:
        raise SystemExit(str(error)) from None
    torch.manual_seed(arguments.seed)
    run = Run.create(arguments.balance, arguments.steps or DEFAULT_STEPS)
    if (arguments.out / CHECKPOINT).exists():
        run.load(arguments.out / CHECKPOINT, num_steps=arguments.steps)
    train(run, tokens, arguments)


if __name__ == "__main__":
    main()
