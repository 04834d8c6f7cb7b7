"""An activation as a formula."""

from __future__ import annotations

from mixtura.config import Activation, ExpertsConfig, LimitOn


def activation_in_words(activation: Activation, experts: ExpertsConfig) -> str:
    """What an expert computes of its gate g and up u.

    Example:
        >>> from mixtura.config import SWIGLU_OAI
        >>> sizes = {"num_experts": 1, "hidden_size": 1, "intermediate_size": 1}
        >>> activation_in_words(SWIGLU_OAI, ExpertsConfig(activation=SWIGLU_OAI, **sizes))
        'silu(g, alpha 1.702) * (u + 1), limit 7'
    """
    alpha = f", alpha {activation.alpha:g}" if activation.alpha != 1.0 else ""
    gate = "g" if experts.is_gated else "u"
    words = f"{activation.function.value}({gate}{alpha})"
    if experts.is_gated:
        offset = activation.up_offset
        words += f" * (u + {offset:g})" if offset else " * u"
    if activation.limit is not None:
        on = " on the result" if activation.limit_on is LimitOn.ACTIVATED else ""
        words += f", limit {activation.limit:g}{on}"
    for cap, what in ((activation.gate_softcap, "gate"), (activation.up_softcap, "up")):
        if cap is not None:
            words += f", {what} soft-capped at {cap:g}"
    return words
