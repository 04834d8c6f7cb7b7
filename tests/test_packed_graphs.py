"""Quantized experts of the Triton kernel in graphs of torch.compile."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from expert_cases import ACTIVATIONS
from packed_experts import (
    FP16,
    KERNEL,
    SCHEMES,
    experts_in,
    on_device,
    packed_as,
    random_rows,
    sized,
    with_stored_scales,
)
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch


def test_a_compiled_graph_has_packed_experts_as_one_node() -> None:
    """Layers that are alike share what the graph knows of them; one that is not has its own."""
    config = sized("gpt-oss", 5, 24, 8)
    static = experts_in(config, SCHEMES["int8-channel"])
    layers = [
        packed_as(experts_in(config, SCHEMES["int4-g32"])),
        packed_as(experts_in(config, SCHEMES["int4-g32"], seed=1)),
        packed_as(with_stored_scales(static, Code.INT, [3.0] * 5, [4.0] * 5)),
    ]
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [str(node.target) for node in module.graph.nodes]
        graphs.append([target for target in targets if "triton_packed" in target])
        return lookup_backend("aot_eager")(module, inputs)

    def model(rows: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        for packed in layers:
            rows = KERNEL.run(packed, ExpertBatch(rows * 1.0, ids, topk_weights)) + 1.0
        return rows

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batch = on_device(random_rows(config, 1, 2, FP16, absent=0.0))
    given = (batch.hidden_states, batch.local_ids, batch.topk_weights)
    with torch.no_grad():
        assert torch.equal(compiled(*given), model(*given))
    assert [len(nodes) for nodes in graphs] == [len(layers)]


def test_a_compiled_function_takes_experts_of_another_form() -> None:
    """What differs in no tensor's shape, too: the activation."""

    def function(packed: Any, batch: ExpertBatch) -> Tensor:
        return KERNEL.run(packed, batch, reduce=False) + 1.0

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    config = sized("stacked", 3, 24, 8)
    batch = on_device(random_rows(config, 1, 2, FP16, absent=0.0))
    for name in ("silu", "gelu", "silu"):
        packed = packed_as(
            experts_in(
                dataclasses.replace(config, activation=ACTIVATIONS[name]), SCHEMES["int4-g32"]
            )
        )
        with torch.no_grad():
            assert torch.equal(compiled(packed, batch), function(packed, batch))
