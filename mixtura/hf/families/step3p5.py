"""Step3.5: the text model of Transformers' Step3.7 as a causal language model of its own."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel


@strict
class Step3p5Config(Step3p7TextConfig):  # type: ignore[misc]
    """Configuration of a `step3p5` checkpoint, which Transformers knows as a part of Step3.7's."""

    model_type = "step3p5"


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Step3.7's text model and an output head."""

    config_class = Step3p5Config
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["e_score_correction_bias"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Step3p5Config) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = DeepseekV3ForCausalLM.forward
