"""`from_pretrained`: a checkpoint becomes a Transformers model whose MoE layers are ours."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixtura.config import GatePrecision
from mixtura.errors import CheckpointError, ConfigError, InputError, UnsupportedModel
from mixtura.hf.blocks import block_spec
from mixtura.hf.checkpoint import read_json
from mixtura.hf.convert import convert, is_decorated
from mixtura.hf.gguf import load_gguf_tokenizer, read_gguf
from mixtura.hf.gguf_checkpoint import GgufCheckpoint, is_gguf
from mixtura.hf.headers import stored_dtype
from mixtura.hf.ledger import CheckpointWarning, WeightLedger
from mixtura.hf.load_checks import (
    check_arguments,
    check_complete,
    check_no_formats,
    check_spread,
)
from mixtura.hf.loader import LoadFormats, LoadStopped, Stream, StreamConfig, plan_load
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.parallel import checkpoint_values, create_ranks
from mixtura.hf.stored import (
    DenseCheckpoint,
    SafetensorsCheckpoint,
    StoredCheckpoint,
    quantization_config,
)
from mixtura.parallel import ExpertParallel, agree
from mixtura.quant.formats import WeightFormat


def from_pretrained(
    model: str | Path,
    *,
    weights: WeightFormat | str | None = None,
    linears: WeightFormat | str | None = None,
    kernel: str | None = None,
    strict: bool = False,
    gate: GatePrecision | str = GatePrecision.FP32,
    deterministic: bool = False,
    debug: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a checkpoint and convert it.

    With `weights` the routed experts are quantized while they are read, by rounding to nearest:
    memory never holds more of them than in that format, and one layer's dense. Experts and linear
    layers in a packed format have no gradients and no `state_dict`: the model runs, and cannot be
    saved or trained.

    Args:
        model: a directory, or a hub id, which Transformers downloads.
        weights: the experts' weight format: "int4", "int8", "mxfp4", or any other name that
            `WeightFormat.parse` knows. A dense one ("bf16", "fp16", "fp32") is the dtype of their
            parameters, whatever that of the model. None leaves them in the model's dtype.
        linears: the same for attention projections and the output head. Where the head is tied to
            the embedding, the embedding stays dense and the head gets a copy in this format.
        kernel, strict, gate, deterministic, debug: as for `convert`.
        arguments: `activation_dtype`, `router`, `max_rows_per_pass`, `overlap_min_tokens` and
            `parallel` are as for `convert`; with `parallel` a rank reads its own experts' bytes and
            no others'. All other arguments go to Transformers' own `from_pretrained`. `dtype` is
            "auto" unless given.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: a format or another argument is none of its choices.
        CheckpointError: files are missing, truncated, pickles, or quantized.
        InputError: a weight that is to be quantized is not finite; the message names the tensor.
        UnsupportedModel: there is no MoE layer; with `strict`, one that is not ours.
        ParallelError: ranks differ, or another one has failed; the message names it.
    """
    others = {name: arguments.pop(name) for name in CONVERTS_WITH if name in arguments}
    formats, parallel = LoadFormats.parse(weights, linears), others.pop("parallel", None)
    if parallel is None:
        loaded = load_stock(model, formats, **arguments)
    else:
        ranks = create_ranks(parallel, others.get("overlap_min_tokens"))
        loaded = load_spread(model, ranks, formats, **arguments)
    return convert(
        loaded,
        kernel=kernel,
        strict=strict,
        gate=gate,
        deterministic=deterministic,
        debug=debug,
        **others,
    )


CONVERTS_WITH = (
    "activation_dtype",
    "max_rows_per_pass",
    "overlap_min_tokens",
    "parallel",
    "router",
)
"""Arguments of `from_pretrained` that are `convert`'s."""


def load_stock(
    model: str | Path, formats: LoadFormats | None = None, **transformers_arguments: Any
) -> PreTrainedModel:
    """Load a checkpoint that has MoE layers, whole and checked, and convert nothing.

    Args:
        model: a directory, or a hub id.
        formats: what experts and linear layers are kept in. Such experts run after `convert`.
        transformers_arguments: go to Transformers' own `from_pretrained`.

    Returns:
        Transformers' own model, in eval mode.

    Raises:
        CheckpointError: files are missing, truncated, pickles, or quantized in a way that is not
            read.
        InputError: a weight is not finite, or an argument does not go with `formats`.
        UnsupportedModel: there is no MoE layer.
    """
    packed = find_packed(model, **_config_arguments(transformers_arguments))
    if packed is not None:
        return load_packed(*packed, formats, **transformers_arguments)
    config = load_config(model, **_config_arguments(transformers_arguments))
    empty = check_moe(config)
    if Path(model).is_dir() and not transformers_arguments.get("key_mapping"):
        warn_of(PackedLoad(empty, DenseCheckpoint(Path(model))).ledger)
    arguments = {"dtype": "auto", **transformers_arguments, "config": config}
    arguments["use_safetensors"] = True
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    build = model_class(config)
    if not formats:
        loaded, found = build.from_pretrained(model, **arguments)
        check_complete(model, found["missing_keys"], found["mismatched_keys"])
        return loaded.eval()
    check_arguments(transformers_arguments)
    stream = Stream(plan_load(empty, formats))
    try:
        loaded, found = build.from_pretrained(
            model, quantization_config=StreamConfig(stream), **arguments
        )
    except LoadStopped as stopped:
        raise stopped.error from None
    check_complete(model, found["missing_keys"], found["mismatched_keys"])
    stream.finish(loaded)
    return loaded.eval()


def load_spread(
    model: str | Path,
    ranks: ExpertParallel,
    formats: LoadFormats | None = None,
    **transformers_arguments: Any,
) -> PreTrainedModel:
    """Load this rank's experts of a checkpoint, and all that is no expert; convert nothing.

    The files' headers are checked whole, as ever. Such experts run after `convert`.

    Args:
        ranks: that share the experts; all of them call this.
        model, formats, transformers_arguments: as of `load_stock`.

    Raises:
        ParallelError: another rank has another checkpoint, or has failed; the message names it.
        ConfigError: the experts cannot be spread over the ranks.
        CheckpointError, InputError, UnsupportedModel: as of `load_stock`.
    """

    def find() -> tuple[dict[str, Any], tuple[Any, StoredCheckpoint]]:
        check_spread(transformers_arguments)
        config, checkpoint = find_checkpoint(model, **_config_arguments(transformers_arguments))
        told = {
            "weights": formats.weights.value if formats and formats.weights else None,
            "linears": formats.linears.value if formats and formats.linears else None,
            "dtype": str(transformers_arguments.get("dtype", "auto")),
        }
        return {**told, **checkpoint_values(checkpoint, config)}, (config, checkpoint)

    def load() -> tuple[dict[str, Any], PreTrainedModel]:
        return {}, load_packed(config, checkpoint, formats, ranks, **transformers_arguments)

    config, checkpoint = agree(ranks.transport, find)
    return agree(ranks.transport, load)


def find_packed(model: str | Path, **arguments: Any) -> tuple[Any, StoredCheckpoint] | None:
    """The configuration and the weights of a quantized checkpoint; None where it is not quantized.

    Args:
        model: a directory, a GGUF file, or a hub id.
        arguments: where the configuration is found, as Transformers has them.

    Raises:
        CheckpointError: files are missing or broken, or of a format that is not read.
    """
    if is_gguf(model):
        if not Path(model).is_file():
            raise CheckpointError(
                f"the model ({model}) must be a GGUF file; got no file. Check the path."
            )
        gguf = GgufCheckpoint(Path(model))
        return gguf.model.config, gguf
    directory = Path(model)
    if not directory.is_dir():
        config = load_config(model, **arguments)
        if getattr(config, "quantization_config", None) is None:
            return None
        directory = fetch(model, **arguments)
    settings = quantization_config(directory)
    if settings is None:
        return None
    config = load_config(directory, **arguments)
    for holder in (config, config.get_text_config()):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    return config, SafetensorsCheckpoint(directory, settings)


def fetch(model: str | Path, **arguments: Any) -> Path:
    """The directory of a hub model's files, which are downloaded where they are not here."""
    names = ("revision", "token", "cache_dir", "local_files_only")
    kept = {name: arguments[name] for name in names if name in arguments}
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    return Path(snapshot_download(str(model), allow_patterns=patterns, **kept))


def find_checkpoint(model: str | Path, **arguments: Any) -> tuple[Any, StoredCheckpoint]:
    """The configuration and the weights of a checkpoint, quantized or not. As `find_packed`."""
    found = find_packed(model, **arguments)
    if found is not None:
        return found
    directory = Path(model) if Path(model).is_dir() else fetch(model, **arguments)
    return load_config(model, **arguments), DenseCheckpoint(directory)


def warn_of(ledger: WeightLedger) -> None:
    """Tell what should be known of a load.

    Warns:
        CheckpointWarning: for each such thing.
    """
    for message in ledger.warnings():
        warnings.warn(message, CheckpointWarning, stacklevel=2)


def load_packed(
    config: Any,
    checkpoint: StoredCheckpoint,
    formats: LoadFormats | None = None,
    ranks: ExpertParallel | None = None,
    **transformers_arguments: Any,
) -> PreTrainedModel:
    """Load a quantized checkpoint: experts and linear layers stay packed. As `load_stock` else.

    With ranks any checkpoint, and of its experts this rank's.
    """
    if not isinstance(checkpoint, DenseCheckpoint):
        check_no_formats(checkpoint, formats)
    check_arguments(transformers_arguments)
    empty = check_moe(config)
    load = PackedLoad(
        empty,
        checkpoint,
        packs_linears=transformers_arguments.get("device_map") is None,
        ranks=ranks,
        formats=formats,
    )
    warn_of(load.ledger)
    arguments = {"dtype": "auto", **transformers_arguments}
    if arguments["dtype"] == "auto":
        arguments["dtype"] = configured_dtype(config) or torch.bfloat16
        if config.dtype is None and isinstance(checkpoint, DenseCheckpoint):
            arguments["dtype"] = stored_dtype(checkpoint.headers) or arguments["dtype"]
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "config": config}
    directory = checkpoint.files()[0].parent
    if (directory / "generation_config.json").is_file():
        arguments.setdefault("generation_config", GenerationConfig.from_pretrained(directory))
    try:
        loaded, found = type(empty).from_pretrained(
            None,
            state_dict=load.state_dict(),
            quantization_config=StreamConfig(load),
            **arguments,
        )
    except LoadStopped as stopped:
        raise stopped.error from None
    check_complete(directory, found["missing_keys"], found["mismatched_keys"])
    load.finish(loaded)
    return loaded.eval()


def configured_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a configuration gives its model; None where it gives none."""
    for holder in (config, config.get_text_config()):
        found = getattr(holder, "dtype", None)
        if isinstance(found, torch.dtype):
            return found
    return None


def load_config(model: str | Path, **arguments: Any) -> Any:
    """A checkpoint's configuration.

    Raises:
        CheckpointError: there is none, or it is broken.
        UnsupportedModel: Transformers does not know the model's type.
    """
    if is_gguf(model):
        return read_gguf(model).config
    if Path(model).is_dir():
        read_json(Path(model) / "config.json")
    elif Path(model).is_file() or str(model).startswith((".", "/", "~")):
        raise CheckpointError(
            f"the model ({model}) must be a directory with config.json, or a hub id; got no "
            f"directory. Check the path."
        )
    try:
        config = AutoConfig.from_pretrained(model, **arguments)
    except StrictDataclassFieldValidationError as error:
        raise CheckpointError(
            f"{model}/config.json must hold values of the right types; got: {_first_line(error)}. "
            f"Fetch the file again."
        ) from None
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"the model ({model}) must be of a type that transformers {transformers.__version__} "
            f"knows; got: {_first_line(error)}. Use a model of a known family."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"the configuration of {model} must be readable; got: {_first_line(error)}. Check the "
            f"name, the path and the network."
        ) from None
    return config


def load_tokenizer(model: str | Path, **arguments: Any) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    if is_gguf(model):
        return load_gguf_tokenizer(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **arguments)
    except Exception as error:  # the tokenizers library raises bare Exceptions on a broken file
        raise CheckpointError(
            f"the tokenizer of {model} must be readable; got {type(error).__name__}: "
            f"{_first_line(error)}. Fetch tokenizer.json and tokenizer_config.json again."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what Transformers makes of no file
        raise CheckpointError(
            f"the tokenizer of {model} must have a vocabulary; got none. Fetch tokenizer.json and "
            f"tokenizer_config.json."
        )
    return tokenizer


def parse_device(name: str | None) -> torch.device:
    """The device of that name; without a name, the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: the name means nothing. InputError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise ConfigError(
            f"device ({name!r}) must be cpu, cuda or cuda:N; got an unknown name. Use one of these."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device ({name}) must be on this machine; got none. Use --device cpu, or install the "
            f"torch that is built for it."
        ) from None
    return device


def empty_model(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model without memory for its weights.

    Args:
        config: a Transformers configuration; it is left as it is.
        dtype: of the weights; the configuration's unless given.

    Raises:
        CheckpointError: the configuration does not make a model.
    """
    build = model_class(config)
    create = build.from_config if build is AutoModelForCausalLM else build._from_config
    arguments = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = create(copy.deepcopy(config), **arguments)
    except Exception as error:  # whatever a family's constructor stumbles over
        raise CheckpointError(
            f"config.json must describe a model that transformers can build; got "
            f"{type(error).__name__}: {_first_line(error)}. Fetch config.json again."
        ) from error
    return model


def check_moe(config: Any) -> PreTrainedModel:
    """Build the model without memory for weights, and see that it has an MoE layer.

    Returns:
        The model, on the meta device.

    Raises:
        CheckpointError: it cannot be built.
        UnsupportedModel: it has none.
    """
    empty = empty_model(config)
    if not any(is_decorated(m) or block_spec(m) is not None for m in empty.modules()):
        raise UnsupportedModel(
            f"the model ({type(empty).__name__}) must have an MoE layer; got none. Run it with "
            f"Transformers alone."
        )
    return empty


def model_class(config: Any) -> Any:
    """The class that reads a checkpoint: the one for causal language models, else its own."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise UnsupportedModel(
        f"the model type ({config.model_type!r}) must have a model class in transformers; got none "
        f"for architectures {getattr(config, 'architectures', None)}. Use another checkpoint."
    )


def _config_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {name: arguments[name] for name in names if name in arguments}


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2]).strip().rstrip(".:")
