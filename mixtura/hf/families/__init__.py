"""Families that Transformers does not ship, or not whole: importing this registers them with it.

`mixtura/plugin.py` imports it as soon as Transformers is asked for one of them.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from mixtura.hf.families import conversions
from mixtura.hf.families.param2moe import Param2MoEConfig, Param2MoEForCausalLM
from mixtura.hf.families.sarvam_mla import SarvamMLAConfig, SarvamMLAForCausalLM
from mixtura.hf.families.sarvam_moe import SarvamMoEConfig, SarvamMoEForCausalLM
from mixtura.hf.families.step3p5 import Step3p5Config, Step3p5ForCausalLM

__all__ = [
    "Param2MoEConfig",
    "Param2MoEForCausalLM",
    "SarvamMLAConfig",
    "SarvamMLAForCausalLM",
    "SarvamMoEConfig",
    "SarvamMoEForCausalLM",
    "Step3p5Config",
    "Step3p5ForCausalLM",
]

MODELS: dict[Any, Any] = {
    Param2MoEConfig: Param2MoEForCausalLM,
    SarvamMoEConfig: SarvamMoEForCausalLM,
    SarvamMLAConfig: SarvamMLAForCausalLM,
    Step3p5Config: Step3p5ForCausalLM,
}
"""Each family's model by its configuration."""

CONVERSIONS = {
    "param2moe": conversions.bailing_moe,
    "sarvam_moe": conversions.bailing_moe,
    "sarvam_mla": conversions.sarvam_mla,
    # By class: the text model inside of Step3.7 is of the same type, and has its own conversion.
    "Step3p5ForCausalLM": conversions.step3p5,
    "longcat_flash": conversions.longcat_flash,
}
"""How checkpoints become models, by model type or class."""

for config_class, model_class in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class)
for name, mapping in CONVERSIONS.items():
    register_checkpoint_conversion_mapping(name, mapping(), overwrite=True)
