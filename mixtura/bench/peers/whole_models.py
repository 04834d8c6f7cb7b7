"""Whole models in other programs: what `benchmarks/generate.py` compares ours with."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.generation import GenerateOnce, Run, generate_once, major_faults
from mixtura.bench.peers.transformers_experts import IMPLEMENTATIONS
from mixtura.errors import ConfigError, InputError, MissingDependency
from mixtura.hf.load import load_stock
from mixtura.kernels.cpu.extension import cpu_flags, missing

SPARE_POSITIONS = 8
"""Beyond the prompt and the new tokens."""


def load_transformers(model: str, implementation: str) -> tuple[GenerateOnce, int]:
    """Transformers' own model with one of its experts implementations, and its vocabulary's size.

    Raises:
        ConfigError: there is no such implementation.
        CheckpointError: see `mixtura.hf.load.load_stock`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"the experts implementation ({implementation!r}) must be one of "
            f"{', '.join(IMPLEMENTATIONS)}; got an unknown name. Use one of these."
        )
    loaded: Any = load_stock(model)
    loaded.set_experts_implementation(implementation)
    vocab_size: int = loaded.config.get_text_config().vocab_size
    return partial(generate_once, loaded), vocab_size


def load_llama_cpp(path: str, num_tokens: int) -> tuple[GenerateOnce, int]:
    """A GGUF file in llama-cpp-python, and its vocabulary's size.

    The file is read into memory instead of being mapped, so that no page of it comes from the disk
    later. Tokens are taken from the logits, greedily, without its sampler.

    Args:
        path: of the file.
        num_tokens: prompt and new tokens together.

    Raises:
        MissingDependency: llama-cpp-python is not installed.
        InputError: there is no such file.
    """
    try:
        library: Any = importlib.import_module("llama_cpp")
    except ImportError:
        raise MissingDependency(
            "llama-cpp-python (not installed) must be there to run a GGUF file; got none. pip "
            "install llama-cpp-python, or leave llama.cpp out."
        ) from None
    if not Path(path).is_file():
        raise InputError(
            f"the GGUF file ({path}) must exist; got none. Make it with benchmarks/make_model.py "
            f"--gguf."
        )
    threads = torch.get_num_threads()
    with _without_tiles(library):
        model = library.Llama(
            path,
            n_ctx=num_tokens + SPARE_POSITIONS,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=False,
            verbose=False,
        )
    return partial(_run_llama_cpp, library, model), int(model.n_vocab())


@contextmanager
def _without_tiles(library: Any) -> Iterator[None]:
    """Keep llama.cpp from its kernels for AMX, whose threads use tiles that they have not shaped.

    Seen with 0.3.36 on an Emerald Rapids: an illegal instruction (tilezero) at the first token.
    Its repacked weights go the same way and are left out with them.
    """
    stock = getattr(library, "llama_model_default_params", None)
    if stock is None or missing() is not None or "amx_tile" not in cpu_flags():
        yield
        return

    def plain() -> Any:
        params = stock()
        params.use_extra_bufts = False
        return params

    library.llama_cpp.llama_model_default_params = plain
    try:
        yield
    finally:
        library.llama_cpp.llama_model_default_params = stock


def _run_llama_cpp(library: Any, model: Any, prompt: Tensor, num_new_tokens: int) -> Run:
    arrays: Any = importlib.import_module("numpy.ctypeslib")

    def next_token() -> int:
        logits = arrays.as_array(library.llama_get_logits(model.ctx), shape=(model.n_vocab(),))
        return int(logits.argmax())

    faults = major_faults()
    model.reset()
    start = time.perf_counter()
    model.eval(prompt[0].tolist())
    token = next_token()
    first = time.perf_counter()
    for _ in range(num_new_tokens - 1):
        model.eval([token])
        token = next_token()
    return Run(
        prompt_seconds=first - start,
        decode_seconds=time.perf_counter() - first,
        major_faults=major_faults() - faults,
    )
