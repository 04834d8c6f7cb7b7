"""Loads a model for a verb, and keeps the terminal quiet but for what matters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtura.cli.options import model_or_demo
from mixtura.cli.ranks import is_speaker
from mixtura.config import GatePrecision
from mixtura.plugin import is_supported, missing_transformers, transformers_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mixtura.parallel import ExpertParallel


class DtypeName(StrEnum):
    """What `--dtype` can be; `auto` is the checkpoint's own."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def for_torch(self) -> str:
        """The name that Transformers and torch know it by."""
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        return names.get(self.value, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What the command line says about the model and how its MoE layers run."""

    model: str | None = None
    device: str | None = None
    dtype: DtypeName = DtypeName.AUTO
    weights: str | None = None
    linears: str | None = None
    kernel: str | None = None
    strict: bool = False
    gate: GatePrecision = GatePrecision.FP32
    deterministic: bool = False
    debug: bool = False
    ranks: ExpertParallel | None = None
    lora: str | None = None


def load(options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer, and tell on stderr what the user should know.

    Raises:
        MixturaError: see `mixtura.from_pretrained`.
    """
    with quiet(options.debug):
        from mixtura.hf import convert, load_adapter
        from mixtura.hf.load import (
            load_config,
            load_spread,
            load_stock,
            load_tokenizer,
            parse_device,
        )
        from mixtura.hf.loader import LoadFormats
        from mixtura.kernels import get_kernel

        if options.kernel is not None:
            get_kernel(options.kernel)  # an unknown name is told before the weights are read
        formats = LoadFormats.parse(options.weights, options.linears)
        device = parse_device(options.device)
        name = model_or_demo(options.model)
        load_config(name)  # what is wrong with it is told before the tokenizer trips over it
        tokenizer = load_tokenizer(name)
        stock: Any
        if options.ranks is None:
            stock = load_stock(name, formats, dtype=options.dtype.for_torch)
        else:
            stock = load_spread(name, options.ranks, formats, dtype=options.dtype.for_torch)
        # Kernels are chosen for the device on which they will run.
        model = convert(
            stock.to(device),
            kernel=options.kernel,
            strict=options.strict,
            gate=options.gate,
            deterministic=options.deterministic,
            debug=options.debug,
        )
        if options.lora is not None:
            load_adapter(model, *adapter_argument(options.lora))
        return model, tokenizer


def adapter_argument(text: str) -> tuple[str, str | None]:
    """What `--lora` says: a directory, and what the adapter is to be called.

    A directory whose own name has "=" is meant as it is.

    >>> adapter_argument("adapters/sql=mine")
    ('adapters/sql', 'mine')
    """
    if Path(text).expanduser().is_dir():
        return text, None
    directory, _, name = text.rpartition("=")
    return (directory, name) if directory else (text, None)


@contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """Keep Transformers' log to errors and its bars to terminals; show our own warnings in a line.

    Args:
        debug: show everything.

    Raises:
        MissingDependency: there is no Transformers, or one that we do not speak to.
    """
    if not is_supported(transformers_version()):
        raise missing_transformers(transformers_version())
    if "transformers" not in sys.modules and sys.stderr.isatty() and is_speaker():
        print("starting torch and Transformers ...", file=sys.stderr)
    from transformers.utils import logging

    if debug:
        yield
        return
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty() or not is_speaker():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
    for warning in caught:
        if is_speaker() and type(warning.message).__module__.startswith("mixtura."):
            print(f"warning: {warning.message}", file=sys.stderr)
