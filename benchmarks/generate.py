"""Compare whole models end to end: one contender per process, taking turns.

python benchmarks/generate.py --model /tmp/olmoe --contender mixtura:int4 \
    --contender llama.cpp:/tmp/olmoe/model-q4_0.gguf --contender transformers:grouped_mm

Contenders are `mixtura`, `mixtura:WEIGHTS`, `mixtura:WEIGHTS:LINEARS`,
`transformers:IMPLEMENTATION` and `llama.cpp:FILE`. Each loads, warms up, probes the bandwidth, runs
and probes again. A line of JSON for each run of a contender goes to standard output, the table to
standard error; runs during which pages came from the disk do not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import mixtura
from mixtura.bench.generation import (
    GenerateOnce,
    TimedRuns,
    active_bytes,
    generate_once,
    random_prompt,
    time_runs,
)
from mixtura.bench.peers.whole_models import load_llama_cpp, load_transformers
from mixtura.errors import ConfigError, MixturaError
from mixtura.hf.generate import prepare_experts

KINDS = ("mixtura", "transformers", "llama.cpp")


def main(
    model: Annotated[str, typer.Option(help="Directory of the model, or its hub id.")],
    contender: Annotated[list[str], typer.Option(help="See above; repeatable.")],
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each contender.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each contender.")] = None,
    alone: Annotated[
        bool, typer.Option("--alone", hidden=True, help="Run one contender in this process.")
    ] = False,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        for name in contender:
            check_name(name)
        if alone:
            print(json.dumps(run_alone(model, contender[0], prompt_tokens, new_tokens)))
            return
    except MixturaError as error:
        raise SystemExit(f"error: {error}") from None
    options = ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    options += ["--threads", str(threads)] if threads is not None else []
    records: list[dict[str, Any]] = []
    try:
        for _ in range(rounds):
            for name in contender:
                found = run_apart(model, name, options)
                print(json.dumps(found), flush=True)
                records.append(found)
    except KeyboardInterrupt:
        pass  # what there is, is shown
    Console(stderr=True, width=140).print(table_of(records))


def check_name(contender: str) -> None:
    """Raise `ConfigError` for a contender of no known kind."""
    kind, _, rest = contender.partition(":")
    if kind not in KINDS or (kind != "mixtura" and not rest):
        raise ConfigError(
            f"contender ({contender}) must be mixtura[:WEIGHTS[:LINEARS]], "
            f"transformers:IMPLEMENTATION or llama.cpp:FILE; got another. Use one of these."
        )


def run_alone(model: str, contender: str, num_prompt: int, num_new: int) -> dict[str, Any]:
    """Load one contender, time it, and say what it read."""
    kind, _, rest = contender.partition(":")
    if kind == "mixtura":
        weights, _, linears = rest.partition(":")
        formats = {"weights": weights, "linears": linears}
        loaded = mixtura.from_pretrained(model, **{k: v for k, v in formats.items() if v})
        prepare_experts(loaded)
        timed = time_model(loaded, num_prompt, num_new)
        return record_of(contender, timed, active_bytes(loaded))
    load: tuple[GenerateOnce, int]
    if kind == "transformers":
        load = load_transformers(model, rest)
    else:
        load = load_llama_cpp(rest, num_prompt + num_new)
    generate, vocab_size = load
    return record_of(
        contender, time_runs(generate, random_prompt(vocab_size, num_prompt), num_new), None
    )


def time_model(model: Any, num_prompt: int, num_new: int) -> TimedRuns:
    """Our model, timed like the others: without hooks."""
    prompt = random_prompt(model.config.get_text_config().vocab_size, num_prompt)
    return time_runs(lambda ids, count: generate_once(model, ids, count), prompt, num_new)


def record_of(contender: str, timed: TimedRuns, num_bytes: int | None) -> dict[str, Any]:
    """One line of JSON."""
    fraction = None
    if num_bytes is not None:
        fraction = timed.decode_rate * num_bytes / timed.bandwidth
    return {
        "contender": contender,
        **timed.record(),
        "active_bytes": num_bytes,
        "fraction_of_bandwidth": fraction,
        "num_threads": torch.get_num_threads(),
    }


def run_apart(model: str, contender: str, options: Sequence[str]) -> dict[str, Any]:
    """One contender in a process of its own; a failure is a record with its last line."""
    command = [sys.executable, __file__, "--alone", "--model", model, "--contender", contender]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"contender": contender, "failure": last}
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """A line for each contender: medians over its valid processes, least and most."""
    table = Table(title="Tokens per second: median (minimum-maximum) over processes")
    for head in ("contender", "prompt", "decode", "probe GB/s", "of bandwidth", "left out"):
        table.add_column(head, justify="left" if head == "contender" else "right")
    for name in dict.fromkeys(record["contender"] for record in records):
        mine = [record for record in records if record["contender"] == name]
        valid = [record for record in mine if record.get("is_valid")]
        failures = {record["failure"] for record in mine if "failure" in record}
        paged = len(mine) - len(valid) - sum("failure" in record for record in mine)
        notes = [*failures, *([f"{paged} paged"] if paged else [])]
        probes = [
            (record["bandwidth_before"] + record["bandwidth_after"]) / 2e9 for record in valid
        ]
        fractions = [r["fraction_of_bandwidth"] for r in valid if r["fraction_of_bandwidth"]]
        table.add_row(
            name,
            spread([record["prompt_tokens_per_s"] for record in valid]),
            spread([record["decode_tokens_per_s"] for record in valid]),
            spread(probes),
            f"{statistics.median(fractions):.2f}" if fractions else "",
            "; ".join(notes),
        )
    return table


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    typer.run(main)
