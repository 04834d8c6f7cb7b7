"""The Triton kernel against the reference: on the CPU in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from expert_cases import ACTIVATIONS, CONFIGS, converted, random_weights, sizes
from gpu_device import DEVICE, IS_INTERPRETED
from tolerances import assert_close
from torch import Tensor

from mixtura import FusedMoE, MoEConfig, RoutingConfig
from mixtura.config import ExpertsConfig, WeightOn
from mixtura.errors import DeviceMemoryError, InputError
from mixtura.kernels import get_kernel, register_kernel, unregister_kernel
from mixtura.kernels.reference import ReferenceKernel
from mixtura.kernels.triton import TritonKernel, call, experts
from mixtura.kernels.triton import dense as stored
from mixtura.kernels.triton.align import order_slots
from mixtura.kernels.triton.bypass import add_identity
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.regimes import LARGE_TILING, Regime, regime_for, tiling_for
from mixtura.quant.matrix import dense
from mixtura.quant.scheme import QuantScheme
from mixtura.types import Bypass, ExpertBatch, ExpertsProblem, ExpertWeights, Tiling

KERNEL = TritonKernel()
REFERENCE = ReferenceKernel()

FINEST = torch.float32 if IS_INTERPRETED else torch.float16
DTYPES = [torch.float16, torch.bfloat16] + ([torch.float32] if IS_INTERPRETED else [])

ROWS = {Regime.DIRECT: 1, Regime.SMALL: 13, Regime.LARGE: 260}
"""Rows of 2 slots that bring 5 experts to each regime."""


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is NaN."""
    empty = call.Call.empty

    def poisoned(self: call.Call, name: str, *shape: int, dtype: Any = None) -> Tensor:
        return empty(self, name, *shape, dtype=dtype).fill_(float("nan"))

    monkeypatch.setattr(call.Call, "empty", poisoned)


def random_batch(
    config: ExpertsConfig, num_rows: int, top_k: int, dtype: torch.dtype, *, absent: float = 0.2
) -> ExpertBatch:
    """Distinct experts for every row; some slots have none."""
    generator = torch.Generator().manual_seed(num_rows * 31 + top_k)
    chosen = torch.rand(num_rows, config.num_experts, generator=generator).argsort(1)[:, :top_k]
    is_absent = torch.rand(num_rows, top_k, generator=generator) < absent
    ids = torch.where(is_absent, -1, chosen).int()
    weights = torch.rand(num_rows, top_k, generator=generator) * (ids >= 0)
    rows = torch.randn(num_rows, config.hidden_size, generator=generator).to(dtype)
    return ExpertBatch(rows, ids, weights)


def on_device(weights: ExpertWeights) -> ExpertWeights:
    return weights.mapped(lambda tensor: tensor.to(DEVICE))


def run(weights: ExpertWeights, batch: ExpertBatch, **options: Any) -> Tensor:
    """The kernel's result on the CPU."""
    there = ExpertBatch(
        batch.hidden_states.to(DEVICE), batch.local_ids.to(DEVICE), batch.topk_weights.to(DEVICE)
    )
    return KERNEL.run(on_device(weights), there, **options).cpu()


def truth(weights: ExpertWeights, batch: ExpertBatch, **options: Any) -> Tensor:
    """In fp32, with the weights rounded as they are; rows that are many by the torch kernel."""
    wide = converted(weights, torch.float32)
    rows = dataclasses.replace(batch, hidden_states=batch.hidden_states.float())
    kernel = REFERENCE if batch.local_ids.numel() < 100 else get_kernel("torch")
    return kernel.run(wide, rows, **options)


def check(
    config: ExpertsConfig,
    num_rows: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    absent: float = 0.2,
    ids: Tensor | None = None,
    **options: Any,
) -> None:
    weights = random_weights(config, dtype)
    batch = random_batch(config, num_rows, top_k, dtype, absent=absent)
    if ids is not None:
        batch = dataclasses.replace(batch, local_ids=ids.int())
    found, expected = run(weights, batch, **options), truth(weights, batch, **options)
    assert found.dtype == (dtype if options.get("reduce", True) else torch.float32)
    noise = get_kernel("torch").run(weights, batch, **options) if found.numel() else None
    assert_close(found, expected, dtype, noise=noise)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("regime", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_in_every_regime(name: str, regime: Regime) -> None:
    config = CONFIGS[name]
    assert regime_for(ROWS[regime], 2, config.num_experts) is regime
    check(config, ROWS[regime], 2, FINEST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["stacked", "gpt-oss", "rms-scale-first"])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    for num_rows in (1, 13):
        check(CONFIGS[name], num_rows, 2, dtype)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize(
    "name", ["gpt-oss", *(pytest.param(n, marks=SLOW) for n in ("bias", "ungated-bias", "rms"))]
)
def test_weights_on_either_side_and_terms(name: str, weight_on: WeightOn, reduce: bool) -> None:
    for num_rows in (1, 13):
        check(CONFIGS[name], num_rows, 2, FINEST, weight_on=weight_on, reduce=reduce)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    config = dataclasses.replace(sizes(), activation=ACTIVATIONS[name])
    for num_rows in (1, 9):
        check(config, num_rows, 2, FINEST)


BLOCKED = {
    "stacked": sizes(2, 128, 64),
    "interleaved": dataclasses.replace(CONFIGS["interleaved"], num_experts=2, hidden_size=128,
                                       intermediate_size=64),
    "separate": dataclasses.replace(CONFIGS["separate"], num_experts=2, hidden_size=128,
                                    intermediate_size=64),
    "gpt-oss": dataclasses.replace(CONFIGS["gpt-oss"], num_experts=2, hidden_size=128,
                                   intermediate_size=192),
    "transposed": dataclasses.replace(CONFIGS["transposed"], num_experts=3, hidden_size=64,
                                      intermediate_size=128),
}  # fmt: skip
"""Sizes that steps divide: weights are read by descriptor, from rows or from columns."""


@pytest.mark.parametrize("num_rows", [33, 110, *(pytest.param(n, marks=SLOW) for n in (9, 70))])
@pytest.mark.parametrize("name", BLOCKED)
def test_weights_read_by_descriptor(
    name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, way = [], stored.way_to_read
    monkeypatch.setattr(stored, "way_to_read", lambda *given: ways.append(way(*given)) or ways[-1])
    check(BLOCKED[name], num_rows, 2, FINEST)
    expected = "columns" if BLOCKED[name].is_transposed else "rows"
    has_them = device_of(torch.empty(0, device=DEVICE).device).has_wide_products
    assert set(ways) == {expected if has_them else "pointer"}


@pytest.mark.parametrize("num_rows", [1, 13])
def test_gate_and_up_stored_unlike(num_rows: int) -> None:
    weights = random_weights(CONFIGS["separate"], FINEST)
    assert weights.up_proj is not None
    turned = weights.up_proj.values.transpose(1, 2).contiguous().transpose(1, 2)
    unlike = dataclasses.replace(weights, up_proj=dense(turned))
    batch = random_batch(weights.config, num_rows, 2, FINEST)
    assert_close(run(unlike, batch), truth(weights, batch), FINEST)


@pytest.mark.parametrize("hidden_size, intermediate_size", [(1, 1), (7, 3), (130, 65), (257, 129)])
def test_sizes_that_no_block_divides(hidden_size: int, intermediate_size: int) -> None:
    for num_rows in (1, 13):
        check(sizes(5, hidden_size, intermediate_size), num_rows, 2, FINEST)


@pytest.mark.parametrize("num_experts, num_rows", [(1, 3), (1, 120), (3, 5), (3, 200)])
def test_every_row_visits_every_expert(num_experts: int, num_rows: int) -> None:
    check(sizes(num_experts), num_rows, num_experts, FINEST, absent=0.0)


@pytest.mark.parametrize("reduce", [True, False])
def test_no_rows(reduce: bool) -> None:
    check(sizes(), 0, 2, FINEST, reduce=reduce)


@pytest.mark.parametrize("num_rows", [1, 4, 13, 150])
def test_rows_without_experts_are_zero(num_rows: int) -> None:
    weights, batch = random_weights(sizes(), FINEST), random_batch(sizes(), num_rows, 2, FINEST)
    batch = dataclasses.replace(batch, local_ids=torch.full((num_rows, 2), -1).int())
    for reduce in (True, False):
        assert torch.equal(run(weights, batch, reduce=reduce), torch.zeros_like(
            truth(weights, batch, reduce=reduce)))  # fmt: skip


@pytest.mark.parametrize("num_rows", [2, 13, 260])
def test_ids_of_no_expert_reach_no_memory(num_rows: int) -> None:
    """Debug mode tells of them; without it they are no expert."""
    weights, batch = random_weights(sizes(), FINEST), random_batch(sizes(), num_rows, 2, FINEST)
    wrong = torch.where(batch.local_ids < 0, 2**30, batch.local_ids)
    wrong[0, 0] = sizes().num_experts
    right = torch.where(wrong < sizes().num_experts, wrong, -1)
    found = run(weights, dataclasses.replace(batch, local_ids=wrong))
    assert torch.equal(found, run(weights, dataclasses.replace(batch, local_ids=right)))


@pytest.mark.parametrize("num_rows", [3, 40, 150])
def test_one_expert_takes_all(num_rows: int) -> None:
    check(sizes(3), num_rows, 2, FINEST, ids=torch.full((num_rows, 2), 2))


def test_nan_stays_in_its_row() -> None:
    """A padding token's row may be anything; another's is its own affair."""
    for num_rows in (2, 13, 260):
        weights = random_weights(sizes(), FINEST)
        batch = random_batch(sizes(), num_rows, 2, FINEST, absent=0.0)
        clean = run(weights, batch)
        rows, ids = batch.hidden_states.clone(), batch.local_ids.clone()
        rows[0], rows[1], ids[0] = float("nan"), float("inf"), -1
        found = run(weights, dataclasses.replace(batch, hidden_states=rows, local_ids=ids))
        assert torch.equal(found[0], torch.zeros_like(found[0]))
        assert not found[1].isfinite().all()
        # A processor's BLAS, which the interpreter calls, may add in another order beside NaN.
        torch.testing.assert_close(found[2:], clean[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_rows", [3, 40])
def test_rows_apart_from_each_other(num_rows: int) -> None:
    """Rows of a wider tensor, of a transposed one, of one row seen often; ids and weights alike."""
    config = sizes(5, 16, 8)
    weights = random_weights(config, FINEST)
    plain = random_batch(config, num_rows, 2, FINEST)
    wide = torch.zeros(num_rows, 40, dtype=FINEST)
    wide[:, 8:24] = plain.hidden_states
    expected = truth(weights, plain)
    for rows in (wide[:, 8:24], plain.hidden_states.T.contiguous().T):
        batch = ExpertBatch(
            rows.to(DEVICE),
            plain.local_ids.T.contiguous().T.to(DEVICE),
            plain.topk_weights.T.contiguous().T.to(DEVICE),
        )
        assert_close(KERNEL.run(on_device(weights), batch).cpu(), expected, FINEST)
    same = dataclasses.replace(plain, hidden_states=plain.hidden_states[:1].expand(num_rows, -1))
    there = dataclasses.replace(same, hidden_states=same.hidden_states.to(DEVICE))
    there = ExpertBatch(
        there.hidden_states, same.local_ids.to(DEVICE), same.topk_weights.to(DEVICE)
    )
    assert_close(KERNEL.run(on_device(weights), there).cpu(), truth(weights, same), FINEST)


@pytest.mark.parametrize("num_rows", [1, 13])
def test_experts_farther_apart_than_32_bits_count(num_rows: int) -> None:
    config = sizes(2, 16, 8)
    weights = random_weights(config, torch.bfloat16)

    def far(stack: Tensor) -> Tensor:
        """The same stack, its second matrix 2**31 elements after the first; pages stay unused."""
        _, rows, columns = stack.shape
        memory = torch.empty(2**31 + rows * columns, dtype=stack.dtype, device=DEVICE)
        view = memory.as_strided((2, rows, columns), (2**31, columns, 1))
        return view.copy_(stack)

    there = on_device(weights)
    there = dataclasses.replace(
        there,
        gate_up_proj=dataclasses.replace(
            there.gate_up_proj, values=far(weights.gate_up_proj.values)
        ),
        down_proj=dataclasses.replace(there.down_proj, values=far(weights.down_proj.values)),
    )
    batch = random_batch(config, num_rows, 2, torch.bfloat16, absent=0.0)
    moved = ExpertBatch(*(tensor.to(DEVICE) for tensor in
                          (batch.hidden_states, batch.local_ids, batch.topk_weights)))  # fmt: skip
    assert_close(KERNEL.run(there, moved).cpu(), truth(weights, batch), torch.bfloat16)


def test_an_order_is_used_only_for_the_ids_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tiling] = []

    def counted(ids: Tensor, num_experts: int, tiling: Tiling) -> Any:
        calls.append(tiling)
        return order_slots(ids, num_experts, tiling)

    monkeypatch.setattr(experts, "order_slots", counted)
    config = sizes()
    weights, batch = on_device(random_weights(config, FINEST)), random_batch(config, 13, 2, FINEST)
    batch = ExpertBatch(*(tensor.to(DEVICE) for tensor in
                          (batch.hidden_states, batch.local_ids, batch.topk_weights)))  # fmt: skip
    tiling = tiling_for(13, 2, config.num_experts)
    assert tiling is not None
    order = order_slots(batch.local_ids, config.num_experts, tiling)
    expected = KERNEL.run(weights, batch)
    assert calls == [tiling]
    found = KERNEL.run(weights, dataclasses.replace(batch, order=order))
    assert calls == [tiling]
    assert torch.equal(found, expected)
    others = {
        "another choice": dataclasses.replace(order, ids=batch.local_ids.clone()),
        "another way of cutting": order_slots(batch.local_ids, config.num_experts, LARGE_TILING),
    }
    for other in others.values():
        assert torch.equal(KERNEL.run(weights, dataclasses.replace(batch, order=other)), expected)
    assert len(calls) == 1 + len(others)


def test_a_compiled_graph_has_the_experts_as_one_node() -> None:
    config = CONFIGS["gpt-oss"]
    weights = on_device(random_weights(config, torch.float16))

    def layer(rows: Tensor, ids: Tensor, topk_weights: Tensor, reduce: bool) -> Tensor:
        batch = ExpertBatch(rows * 1.0, ids, topk_weights)
        return KERNEL.run(KERNEL.pack(weights), batch, reduce=reduce) + 1.0

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_rows in (1, 13):
        batch = random_batch(config, num_rows, 2, torch.float16)
        given = [t.to(DEVICE) for t in (batch.hidden_states, batch.local_ids, batch.topk_weights)]
        for reduce in (True, False):
            with torch.no_grad():
                found, expected = compiled(*given, reduce), layer(*given, reduce)
            assert torch.equal(found, expected)


def test_a_layer_runs_with_it() -> None:
    class AnyDevice(TritonKernel):
        name = "triton-anywhere"
        devices = None

        def cannot_run(self, problem: ExpertsProblem) -> str | None:
            return None

    register_kernel(AnyDevice.name, AnyDevice)
    try:
        config = MoEConfig(
            hidden_size=16,
            routing=RoutingConfig(num_experts=4, top_k=2),
            experts=sizes(4, 16, 8),
        )
        layer = FusedMoE(config, kernel=AnyDevice.name, dtype=torch.float16, device=DEVICE)
        plain = FusedMoE(config, kernel="torch", dtype=torch.float16, device=DEVICE)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plain.load_state_dict(layer.state_dict())
        for num_rows in (0, 1, 9):
            rows = torch.randn(num_rows, 16, device=DEVICE).half()
            with torch.no_grad():
                assert_close(layer(rows).cpu(), plain(rows).cpu(), torch.float16)
    finally:
        unregister_kernel(AnyDevice.name)


def problem(**changes: Any) -> ExpertsProblem:
    given = ExpertsProblem(
        experts=sizes(),
        schemes=(QuantScheme.dense(torch.bfloat16),),
        row_dtype=torch.bfloat16,
        device="cuda",
    )
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"device": "cpu"}, "is for cuda"),
        ({"row_dtype": torch.float32}, "computes rows of bf16 and fp16, not torch.float32"),
        ({"row_dtype": torch.float16}, "reads weights of the rows' dtype"),
        (
            {"schemes": tuple(map(QuantScheme.dense, (torch.bfloat16, torch.float16)))},
            "reads weights of the rows' dtype, and some are torch.float16",
        ),
        ({"experts": sizes(4096)}, "sorts by up to 2048 experts, not 4096"),
        ({"needs_grad": True}, "has no backward"),
        ({"is_deterministic": True}, "deterministic=True was asked for"),
        (
            {"experts": dataclasses.replace(CONFIGS["rms"], hidden_size=20000)},
            "norms rows of up to 16384 columns, not 20000",
        ),
    ],
)
def test_what_it_cannot_run(changes: dict[str, Any], reason: str | None) -> None:
    found = KERNEL.unsupported(problem(**changes))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    "shape, name",
    [((26, 6), "hidden rows"), ((26, 8), "experts' outputs"), ((26,), "sorted slots")],
)
def test_running_out_of_memory_names_the_buffer(
    shape: tuple[int, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    weights, batch = random_weights(sizes(), FINEST), random_batch(sizes(), 13, 2, FINEST)
    real = Tensor.new_empty

    def full(self: Tensor, *size: Any, **options: Any) -> Tensor:
        if size == (shape,):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *size, **options)

    monkeypatch.setattr(Tensor, "new_empty", full)
    asked = re.escape(f"buffer of {name} ({shape}, 0.00 GiB)")
    with pytest.raises(DeviceMemoryError, match=f"{asked}.*max_rows_per_pass"):
        run(weights, batch)


def test_everything_is_on_one_device() -> None:
    weights, batch = random_weights(sizes(), FINEST), random_batch(sizes(), 3, 2, FINEST)
    elsewhere = dataclasses.replace(batch, hidden_states=batch.hidden_states.to("meta"))
    with pytest.raises(InputError, match=r"rows, ids and routing weights \(meta, cpu, cpu\) must"):
        KERNEL.run(weights, elsewhere)


@pytest.mark.parametrize("role", ["gate_up_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("num_rows", [1, 20])
def test_weights_that_begin_anywhere(num_rows: int, role: str) -> None:
    """A descriptor wants 16 bytes of alignment; what has none is read by pointer."""
    weights = random_weights(BLOCKED["separate"], FINEST)
    there = on_device(weights)
    stack = getattr(there, role).values
    memory = torch.empty(stack.numel() + 1, dtype=stack.dtype, device=stack.device)
    shifted = memory[1:].view(stack.shape).copy_(stack)
    there = dataclasses.replace(there, **{role: dense(shifted)})
    batch = random_batch(weights.config, num_rows, 2, FINEST)
    moved = ExpertBatch(
        batch.hidden_states.to(DEVICE), batch.local_ids.to(DEVICE), batch.topk_weights.to(DEVICE)
    )
    assert_close(KERNEL.run(there, moved).cpu(), truth(weights, batch), FINEST)


@pytest.mark.parametrize("name", ["silu", "relu", "relu2", "gelu", "swiglu-oai", "limit-activated"])
def test_nan_goes_through_every_function(name: str) -> None:
    config = dataclasses.replace(sizes(), activation=ACTIVATIONS[name])
    weights, batch = random_weights(config, FINEST), random_batch(config, 2, 2, FINEST, absent=0.0)
    batch.hidden_states[0] = float("nan")
    found = run(weights, batch)
    assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("num_rows", [2, 13, 260])
def test_a_slot_without_expert_weighs_nothing(num_rows: int, reduce: bool) -> None:
    weights, batch = random_weights(sizes(), FINEST), random_batch(sizes(), num_rows, 2, FINEST)
    absent = batch.local_ids < 0
    assert absent.any()
    odd = dataclasses.replace(
        batch, topk_weights=batch.topk_weights.masked_fill(absent, float("nan"))
    )
    assert torch.equal(run(weights, odd, reduce=reduce), run(weights, batch, reduce=reduce))


def test_an_id_behind_the_last_expert_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even unsorted, where ids index the weights: what is behind them comes to nothing."""
    buffers: dict[str, Tensor] = {}
    empty = experts.Call.empty

    def kept(self: experts.Call, name: str, *shape: int, dtype: Any = None) -> Tensor:
        buffers[name] = empty(self, name, *shape, dtype=dtype)
        return buffers[name]

    monkeypatch.setattr(call.Call, "empty", kept)
    weights = on_device(random_weights(sizes(), FINEST))

    def followed(stack: Tensor, behind: float) -> Tensor:
        count = stack.shape[0]
        memory = stack.new_full((count + 1, *stack.shape[1:]), behind)
        memory[:count] = stack
        return memory[:count]

    there = dataclasses.replace(
        weights,
        gate_up_proj=dense(followed(weights.gate_up_proj.values, 1.0)),
        down_proj=dense(followed(weights.down_proj.values, float("nan"))),
    )
    batch = random_batch(sizes(), 1, 2, FINEST, absent=0.0)
    ids = torch.tensor([[sizes().num_experts, 1]], dtype=torch.int32, device=DEVICE)
    moved = ExpertBatch(batch.hidden_states.to(DEVICE), ids, batch.topk_weights.to(DEVICE))
    assert KERNEL.run(there, moved).isfinite().all()
    without, with_one = buffers["hidden rows"].isnan().all(1).tolist()
    assert without and not with_one  # buffers are NaN where nobody wrote


def test_regimes_look_at_the_experts_that_are_here() -> None:
    """One rank of eight has every token, and an eighth of the slots."""
    assert regime_for(256, 8, 16) is Regime.LARGE
    assert tiling_for(256, 8, 16, 1 / 8) == tiling_for(256, 8, 128) == Tiling(32)
    assert regime_for(8, 8, 16, 1 / 8) is regime_for(8, 8, 128) is Regime.DIRECT


@pytest.mark.parametrize("num_rows, width", [(0, 8), (1, 1), (5, 40), (3, 2050)])
def test_identity_experts_add_their_rows(num_rows: int, width: int) -> None:
    for dtype in DTYPES:
        wide = torch.randn(num_rows, 2 * width).to(dtype)
        routed, rows = torch.randn(num_rows, width).to(dtype), wide[:, :width]
        weight = torch.rand(num_rows)
        expected = Bypass(identity_weight=weight).apply(routed.float(), rows.float())
        found = add_identity(routed.to(DEVICE), rows.to(DEVICE), weight.to(DEVICE)).cpu()
        assert found.dtype == dtype
        assert_close(found, expected, dtype)
