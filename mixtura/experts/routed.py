"""`RoutedExperts`: the experts' weights and the kernel chosen for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtura.config import ExpertsConfig
from mixtura.errors import ConfigError
from mixtura.experts.packed import ExpertsOptions, PackedExperts
from mixtura.experts.storage import default_storage, stored_shapes
from mixtura.types import ExpertBatch, ExpertWeights


class RoutedExperts(PackedExperts):
    """The routed experts of a layer, or of one rank of it.

    Dense weights are parameters under the names that Transformers uses: `gate_up_proj` (`up_proj`
    when ungated; `gate_proj` and `up_proj` when separate), `down_proj`, `gate_up_proj_bias`,
    `down_proj_bias`, `post_expert_norm.weight`. See `PackedExperts` for what a kernel may do with
    them.

    Args:
        config: sizes, activation, layout.
        weights: immutable quantized weights, instead of parameters.
        options: which kernel, and how.
        device, dtype: of new, uninitialised parameters.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        weights: ExpertWeights | None = None,
        options: ExpertsOptions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and weights.config != config:
            raise ConfigError(
                "weights.config must equal the experts' configuration; got another. Pass the same "
                "one."
            )
        storage = {} if weights is not None else default_storage(config)
        self.adopt(config, options or ExpertsOptions(), storage, weights)
        shapes = stored_shapes(config)
        for role, stored in storage.items():
            *parents, leaf = stored.path.split(".")
            owner: nn.Module = self
            for part in parents:
                owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            value = torch.empty(shapes[role], device=device, dtype=dtype)
            owner.register_parameter(leaf, nn.Parameter(value))

    def forward(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        """Run the experts on the rows of `batch`: (M,H), or the terms (M,K,H) in fp32."""
        return self.run_batch(batch, reduce=reduce)

    def extra_repr(self) -> str:
        c = self.experts_config
        return (
            f"{c.num_experts} experts, H={c.hidden_size}, I={c.intermediate_size}, "
            f"{c.activation.function.value}, {c.gate_up.value}"
        )
