"""What `adapter_config.json` of PEFT says: ranks, scalings, and nothing that we would do wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtura.errors import CheckpointError

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_RANK = 2**12
MAX_PATTERN = 512
"""Characters of a pattern in `rank_pattern` and `alpha_pattern`."""

CHANGES_THE_RESULT: dict[str, str] = {
    "alora_invocation_tokens": "an activated LoRA begins at tokens of its own",
    "arrow_config": "Arrow routes tokens to adapters",
    "bias": "biases were trained, too, and they belong to the base model",
    "ensure_weight_tying": "its parts are shared between layers",
    "fan_in_fan_out": "it is of layers that store weights as (in, out)",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it is of a model with other layers",
    "lora_bias": "its factors have biases",
    "megatron_config": "it is of Megatron's layers",
    "modules_to_save": "whole modules were trained, too; merge those into the base model",
    "monteclora_config": "MonteCLoRA draws its factors",
    "trainable_token_indices": "embeddings were trained, too",
    "use_bdlora": "BD-LoRA has factors of blocks",
    "use_dora": "DoRA scales whole weights, which are never rebuilt here",
    "use_qalora": "QALoRA pools its inputs",
    "velora_config": "VeLoRA has layers of its own",
}
"""Settings that mean another arithmetic, and which."""

CHANGES_NOTHING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("peft_type", "peft_version", "lora_dropout", "megatron_core", "qalora_group_size"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"),
        *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        "runtime_config",
    }
)
"""Settings that are read, or of training alone, or that the tensors themselves say."""

INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Beginnings of a training that leave the base weights as they are."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of a LoRA adapter.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: of those that one does, in order; the first one counts.
        is_rank_stabilized: the scaling is alpha / sqrt(rank) instead of alpha / rank.
        target_parameters: names of parameters, or their ends, that were trained as such.
        peft_version: of the PEFT that has written it; empty where it does not say.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilized: bool
    target_parameters: tuple[str, ...]
    peft_version: str

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Read an adapter's settings.

        Raises:
            CheckpointError: the file is missing or broken, or asks for what is not done here; the
                setting is named.
        """
        path = directory / CONFIG
        settings = _read_settings(path)
        if settings.get("peft_type") != "LORA":
            raise CheckpointError(
                f"peft_type ({settings.get('peft_type')!r}) of {path} must be 'LORA'; got another "
                f"method. Train a LoRA adapter, or merge this one into the model with PEFT."
            )
        _check_settings(path, settings)
        return cls(
            rank=_rank(path, "r", settings.get("r")),
            alpha=_alpha(path, "lora_alpha", settings.get("lora_alpha")),
            rank_pattern=_patterns(path, "rank_pattern", settings, _rank),
            alpha_pattern=_patterns(path, "alpha_pattern", settings, _alpha),
            is_rank_stabilized=_flag(path, "use_rslora", settings),
            target_parameters=_names(path, "target_parameters", settings),
            peft_version=str(settings.get("peft_version") or ""),
        )

    def rank_of(self, path: str) -> int:
        """The rank of a module or parameter, by its path in the model that was trained."""
        rank: int = _matching(self.rank_pattern, path, self.rank)
        return rank

    def scaling_of(self, path: str) -> float:
        """What its product is multiplied by: alpha / rank, or alpha / sqrt(rank).

        Source: PEFT, `LoraModel._create_and_replace` and `LoraLayer.update_layer`.
        """
        rank = self.rank_of(path)
        alpha: float = _matching(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is the path, or its end from a dot on; else `default`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) must be at most {MAX_CONFIG_BYTES} bytes "
                f"long; got more. Fetch the adapter again."
            )
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"the adapter ({path.parent}) must hold {CONFIG}; got none. Give a directory that "
            f"PEFT's save_pretrained has written."
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be readable JSON; got {type(error).__name__}: {error}. Fetch the adapter "
            f"again."
        ) from None
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object; got {type(settings).__name__}. Fetch the adapter "
            f"again."
        )
    return settings


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if not value or name in CHANGES_NOTHING or (name, value) == ("bias", "none"):
            continue
        reason = CHANGES_THE_RESULT.get(name, "it is a setting that mixtura does not know")
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must be off, as {reason}; got it set. Train without "
            f"it, or merge the adapter into the model with PEFT."
        )
    start = settings.get("init_lora_weights")
    if start not in INITIALIZATIONS:
        raise CheckpointError(
            f"init_lora_weights ({start!r:.80}) of {path} must leave the base weights as they are; "
            f"got one that changes them. Convert the adapter when it is saved, with PEFT's "
            f"path_initial_model_for_weight_conversion."
        )


def _rank(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must be a whole number from 1 to {MAX_RANK}; got "
            f"another. Fetch the adapter again."
        )
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must be a number; got another. Fetch the adapter "
            f"again."
        )
    return float(value)


def _flag(path: Path, name: str, settings: Mapping[str, Any]) -> bool:
    value = settings.get(name, False)
    if type(value) is not bool:
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must be true or false; got another. Fetch the "
            f"adapter again."
        )
    return value


def _names(path: Path, name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    value = settings.get(name) or []
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must be a list of names; got another. Fetch the "
            f"adapter again."
        )
    return tuple(value)


def _patterns(path: Path, name: str, settings: Mapping[str, Any], read: Any) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{name} ({value!r:.80}) of {path} must map patterns to numbers; got another. Fetch "
            f"the adapter again."
        )
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{name} ({pattern!r:.80}) of {path} must be a regular expression; got one with an "
                f"error: {error}. Correct it."
            ) from None
        if len(pattern) > MAX_PATTERN:
            raise CheckpointError(
                f"{name} ({pattern!r:.80}) of {path} must be at most {MAX_PATTERN} characters "
                f"long; got {len(pattern)}. Fetch the adapter again."
            )
    return {pattern: read(path, f"{name}[{pattern!r}]", part) for pattern, part in value.items()}
