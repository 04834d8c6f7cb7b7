"""`generate_text`: a prompt becomes text, piece by piece, with the figures of how it went."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mixtura.config import require_finite, require_positive
from mixtura.errors import ConfigError, InputError
from mixtura.experts import PackedExperts
from mixtura.hf.cache import growing_cache

UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character whose last ones have not come yet."""

MIN_TEMPERATURE = 1e-6
"""Below this, logits divided by the temperature leave the range of fp32."""

CONTEXT = 6
"""Prompt tokens decoded along with the first new ones, so that their spaces come out right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What to generate.

    Attributes:
        max_new_tokens: bound on the new tokens.
        temperature: 0 takes the likeliest token every time; above 0 tokens are drawn.
        top_p: draw from the likeliest tokens whose probabilities reach this sum.
        seed: of the draw; None draws anew every time.
        is_chat: the prompt is a user's message, put into the tokenizer's chat template.

    Raises:
        ConfigError: a value is out of range, or `top_p` comes without a temperature.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    is_chat: bool = False

    def __post_init__(self) -> None:
        require_positive("max_new_tokens", self.max_new_tokens)
        require_finite("temperature", self.temperature)
        if self.temperature != 0 and self.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"temperature ({self.temperature}) must be 0, or at least {MIN_TEMPERATURE}. Use 0 "
                f"for the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p ({self.top_p}) must be in (0, 1]. Use 1 to draw from all.")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError(
                f"top_p ({self.top_p}) must come with a temperature above 0; got temperature 0, "
                f"which draws nothing. Set a temperature, or leave top_p at 1."
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed ({self.seed}) must be in [0, 2**63). Choose another.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Text and figures of one generation, or of as much of it as there is.

    Attributes:
        text: the new text alone.
        num_prompt_tokens, num_new_tokens: tokens read and written.
        first_token_seconds: from the call to the first new token, the whole prompt included.
        decode_seconds: from the first new token to the last.
        peak_bytes: most memory used so far: the process's on a CPU, torch's on a GPU.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    first_token_seconds: float
    decode_seconds: float
    peak_bytes: int

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens per second, or None where there is no new token."""
        return _rate(self.num_prompt_tokens, self.first_token_seconds)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first, or None where there are fewer than two."""
        return _rate(self.num_new_tokens - 1, self.decode_seconds)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


class TextMeter(BaseStreamer):  # type: ignore[misc]
    """Turns tokens into text as they come, and keeps time; `result` can be asked for at any moment.

    Args:
        tokenizer: the model's tokenizer.
        on_text: called with every new piece of text; pieces never split a character.
        device: whose memory is measured.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.device = torch.device(device)
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.num_prompt_tokens = 0
        self.start = self.first = self.last = perf_counter()
        self._told = self._context = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt at the first call, then one token (1,) at a time."""
        if not self.ids:
            self.ids = value.flatten().tolist()
            self.num_prompt_tokens = self._told = len(self.ids)
            self._context = max(0, self._told - CONTEXT)
            return
        self.last = perf_counter()
        if len(self.ids) == self.num_prompt_tokens:
            self.first = self.last
        self.ids.extend(value.flatten().tolist())
        self._tell(is_last=False)

    def end(self) -> None:
        """Give out what was held back for the rest of a character."""
        self._tell(is_last=True)

    def _tell(self, *, is_last: bool) -> None:
        # Decoding a few told tokens along keeps the cost constant and the spaces between pieces.
        before = self._decode(self.ids[self._context : self._told])
        now = self._decode(self.ids[self._context :])
        piece = now[len(before) :]
        if not piece or (piece.endswith(UNFINISHED) and not is_last):
            return
        self._context, self._told = self._told, len(self.ids)
        self.pieces.append(piece)
        if self.on_text is not None:
            self.on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def result(self) -> Generation:
        """What there is by now."""
        num_new_tokens = len(self.ids) - self.num_prompt_tokens
        return Generation(
            text="".join(self.pieces),
            num_prompt_tokens=self.num_prompt_tokens,
            num_new_tokens=num_new_tokens,
            first_token_seconds=self.first - self.start if num_new_tokens else 0.0,
            decode_seconds=self.last - self.first,
            peak_bytes=peak_bytes(self.device),
        )


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    meter: TextMeter | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: any causal language model, ours or not.
        tokenizer: the model's.
        prompt: a text, or with `options.is_chat` a message.
        options: how much and how; greedy by default.
        on_text: called with every new piece of text.
        meter: takes the place of `on_text`; its `result` outlives an interruption.

    Returns:
        The new text and the figures.

    Raises:
        InputError: the prompt is empty, does not fit the model, or needs a chat template.
    """
    options = options or GenerateOptions()
    inputs = encode_prompt(model, tokenizer, prompt, options)
    meter = meter or TextMeter(tokenizer, on_text, model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda, enabled=options.seed is not None):
        if options.seed is not None:
            torch.manual_seed(options.seed)
        meter.start = perf_counter()
        model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=options.max_new_tokens,
            streamer=meter,
            past_key_values=growing_cache(model),
            **_drawing(options),
        )
    return meter.result()


def _drawing(options: GenerateOptions) -> dict[str, Any]:
    """The arguments of `generate` that say how tokens are drawn, whatever the checkpoint says."""
    if options.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": 0,
    }


def encode_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions,
) -> dict[str, Tensor]:
    """The prompt's `input_ids` and `attention_mask`, each (1, T), checked against the model.

    Raises:
        InputError: see `generate_text`.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            "the prompt must be valid UTF-8 text; got other bytes. Convert it."
        ) from None
    if options.is_chat:
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer must have a chat template for chat; got none, as it is no chat "
                "model. Give the prompt as plain text, without --chat."
            )
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    ids = inputs["input_ids"]
    if ids.shape[1] == 0:
        raise InputError("the prompt must have at least one token; got none. Write a longer one.")
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + options.max_new_tokens > positions:
        raise InputError(
            f"the prompt ({ids.shape[1]} tokens) and max_new_tokens ({options.max_new_tokens}) "
            f"must fit the model's positions; got {positions}. Shorten the prompt or ask for fewer "
            f"tokens."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"token ids ({int(ids.max())}) must be below the model's vocabulary; got {vocabulary}. "
            f"Use the tokenizer that the model was trained with."
        )
    return inputs


@torch.no_grad()
def prepare_experts(model: PreTrainedModel) -> dict[str, int]:
    """Choose kernels and pack weights now, not in the first forward. -> layers by kernel name.

    Raises:
        NoKernelFits: some layer has no kernel.
    """
    layers: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, PackedExperts):
            kernel = module.decide(module.problem(model.dtype, needs_grad=False)).kernel
            module.pack(kernel)
            layers[kernel.name] = layers.get(kernel.name, 0) + 1
    return layers


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: torch's on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
