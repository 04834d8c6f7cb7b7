"""`RoutedExperts` and `PackedExperts`: what a kernel with its own layout may do to the weights."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from expert_cases import (
    CONFIGS,
    cpu_products_bound,
    dequantized,
    plain_experts,
    quantized,
    random_batch,
    random_weights,
    sizes,
)
from tolerances import RTOL, assert_close, frobenius_error, relative_error
from torch import Tensor, nn

from mixtura.config import ExpertsConfig, GateUp, WeightOn
from mixtura.errors import ConfigError, GradientUnsupported, InputError, NoKernelFits
from mixtura.experts import (
    ExpertsOptions,
    PackedExperts,
    RoutedExperts,
    StoredTensor,
    default_storage,
)
from mixtura.kernels import ExpertsKernel, register_kernel, unregister_kernel
from mixtura.kernels.torch import TorchKernel
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@dataclasses.dataclass(frozen=True)
class Packed:
    """One buffer per expert: every tensor's expert, flattened backwards, one behind the other."""

    buffers: tuple[Tensor, ...]
    template: ExpertWeights


class PackingKernel(ExpertsKernel):
    """Keeps weights in a layout of its own, and counts how often it packs and unpacks."""

    name: ClassVar[str] = "packing"

    def __init__(self) -> None:
        self.num_packs = self.num_unpacks = self.num_runs = 0

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return None if problem.device == "cpu" else "runs on a CPU only"

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> Packed:
        self.num_packs += 1
        tensors = weights.tensors()
        buffers = tuple(
            t.detach().contiguous().view(torch.uint8).flatten().flip(0) for t in tensors
        )
        return Packed(buffers, weights.mapped(lambda t: t.new_empty(()).expand(t.shape)))

    def unpack(self, packed: Packed, config: ExpertsConfig) -> ExpertWeights:
        self.num_unpacks += 1
        return self.read(packed)

    def read(self, packed: Packed) -> ExpertWeights:
        buffers = iter(packed.buffers)
        order = {id(t): next(buffers) for t in packed.template.tensors()}

        def restored(template: Tensor) -> Tensor:
            return order[id(template)].flip(0).view(template.dtype).view(template.shape)

        return packed.template.mapped(restored)

    def run(
        self,
        packed: Packed,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        self.num_runs += 1
        weights = self.read(packed)
        return TorchKernel().run(weights, batch, weight_on=weight_on, reduce=reduce)


class DifferentiablePackingKernel(PackingKernel):
    """A layout of its own that gradients flow through."""

    name: ClassVar[str] = "packing"
    has_backward: ClassVar[bool] = True

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> Packed:
        self.num_packs += 1
        return Packed((), weights.mapped(lambda t: t * 2))

    def read(self, packed: Packed) -> ExpertWeights:
        return packed.template.mapped(lambda t: t / 2)


class CopyingKernel(DifferentiablePackingKernel):
    """Keeps a copy and computes with it as it is."""

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> Packed:
        return Packed((), weights.mapped(torch.clone))

    def read(self, packed: Packed) -> ExpertWeights:
        return packed.template


@pytest.fixture
def packing() -> Iterator[PackingKernel]:
    kernel = PackingKernel()
    register_kernel("packing", lambda: kernel)
    yield kernel
    unregister_kernel("packing")


def initialized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.5
            parameter.copy_(values)
    return module


def routed(config: ExpertsConfig | None = None, **options: Any) -> RoutedExperts:
    module = RoutedExperts(config or sizes(), options=ExpertsOptions(**options))
    initialized(module)
    return module


def is_freed(module: nn.Module) -> bool:
    """Whether all parameters are empty; fails where only some are."""
    empty = {parameter.numel() == 0 for parameter in module.parameters()}
    assert len(empty) == 1
    return empty.pop()


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor, right[name]), name


@torch.no_grad()
def run(module: PackedExperts, batch: ExpertBatch, **options: Any) -> Tensor:
    return module.run_batch(batch, **options)


# --------------------------------------------------------------------- a layout of the kernel's own


@by_config
def test_dense_storage_is_freed_and_comes_back_bit_for_bit(packing, config):
    module, batch = routed(config), random_batch(config, 5)
    before = copies(module)
    expected = run(module, batch)
    assert_close(expected, run(routed(config, kernel="torch"), batch), torch.float32)
    assert is_freed(module)
    assert torch.equal(run(module, batch), expected)
    assert (packing.num_packs, packing.num_runs) == (1, 2)
    assert_same_tensors(module.state_dict(), before)
    assert not is_freed(module)
    assert torch.equal(run(module, batch), expected)
    assert packing.num_packs == 2


def test_expert_weights_are_unpacked_on_demand(packing):
    module, batch = routed(CONFIGS["gpt-oss"]), random_batch(CONFIGS["gpt-oss"], 3)
    before = module.expert_weights
    kept = [tensor.clone() for tensor in before.tensors()]
    run(module, batch)
    assert is_freed(module)
    for left, right in zip(module.expert_weights.tensors(), kept, strict=True):
        assert torch.equal(left, right)
    assert is_freed(module)


def test_load_state_dict_while_packed_is_seen_by_the_next_call(packing):
    config = CONFIGS["bias"]
    module, other, batch = routed(config), routed(config), random_batch(config, 5)
    initialized(other, seed=1)
    run(module, batch)
    module.load_state_dict(copies(other))
    assert torch.equal(run(module, batch), run(other, batch))
    assert is_freed(module)


def test_load_state_dict_by_assignment_while_packed(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    other = copies(initialized(routed(), seed=1))
    run(module, batch)
    expected = plain_experts(weights_of(module, other), batch)
    module.load_state_dict(other, assign=True)
    assert_close(run(module, batch), expected, torch.float32)


def weights_of(module: RoutedExperts, tensors: dict[str, Tensor]) -> ExpertWeights:
    return ExpertWeights(
        module.experts_config,
        gate_up_proj=dense(tensors["gate_up_proj"]),
        down_proj=dense(tensors["down_proj"]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_dtype_while_packed(packing, dtype):
    config = CONFIGS["bias"]
    module, batch = routed(config), random_batch(config, 5)
    before = copies(module)
    run(module, batch)
    assert module.to(dtype) is module
    assert_same_tensors(copies(module), {name: t.to(dtype) for name, t in before.items()})
    converted_batch = dataclasses.replace(batch, hidden_states=batch.hidden_states.to(dtype))
    out = run(module, converted_batch)
    assert out.dtype == dtype
    assert is_freed(module)
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_half_while_packed(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    before = copies(module)
    run(module, batch)
    module.half()
    assert_same_tensors(copies(module), {name: t.half() for name, t in before.items()})


def test_to_meta_while_packed_leaves_nothing_behind(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    shapes = {name: t.shape for name, t in copies(module).items()}
    run(module, batch)
    module.to("meta")
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert module.state.held is None
    with pytest.raises(InputError, match="must be on the device of the weights; got meta there"):
        run(module, batch)


def test_deepcopy_while_packed_gives_an_independent_module(packing):
    config = CONFIGS["rms-scale-first"]
    module, batch = routed(config), random_batch(config, 5)
    before, expected = copies(module), run(module, batch)
    clone = copy.deepcopy(module)
    assert type(clone) is RoutedExperts
    assert_same_tensors(copies(clone), before)
    initialized(clone, seed=1)
    assert not torch.equal(run(clone, batch), expected)
    assert torch.equal(run(module, batch), expected)
    assert clone.experts_config == config


def test_a_pickle_while_packed_holds_the_dense_weights(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    before, expected = copies(module), run(module, batch)
    run(module, batch)
    clone = pickle.loads(pickle.dumps(module))
    assert_same_tensors(copies(clone), before)
    assert torch.equal(run(clone, batch), expected)
    run(module, batch)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), batch), expected)


def test_inside_another_module(packing):
    block = nn.Sequential(nn.Linear(8, 8), routed(CONFIGS["rms"]))
    batch = random_batch(CONFIGS["rms"], 3)
    before = copies(block)
    run(block[1], batch)
    assert is_freed(block[1])
    assert_same_tensors(copies(block), before)
    run(block[1], batch)
    block.double()
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    assert block[1].get_parameter("post_expert_norm.weight").shape == (8,)


def test_inference_mode(packing):
    """What is freed and restored there must still be a parameter outside."""
    module, batch = routed(), random_batch(sizes(), 5)
    before = copies(module)
    with torch.inference_mode():
        expected = module.run_batch(batch)
        assert is_freed(module)
        assert_same_tensors(module.state_dict(), before)
        module.run_batch(batch)
    assert torch.equal(run(module, batch), expected)
    module.run_batch(batch).sum().backward()  # on the torch kernel
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_weights_packed_in_inference_mode_serve_gradients_of_rows():
    register_kernel("packing", CopyingKernel)
    try:
        module, batch = routed(kernel="packing").requires_grad_(False), random_batch(sizes(), 5)
        with torch.inference_mode():
            module.run_batch(batch)
        rows = batch.hidden_states.clone().requires_grad_()
        module.run_batch(dataclasses.replace(batch, hidden_states=rows)).sum().backward()
        assert rows.grad is not None
    finally:
        unregister_kernel("packing")


@pytest.mark.parametrize("kernel", ["torch", "packing"])
def test_a_module_made_in_inference_mode_runs(packing, kernel):
    with torch.inference_mode():
        module, batch = routed(kernel=kernel), random_batch(sizes(), 5)
        first = module.run_batch(batch)
        assert torch.equal(module.run_batch(batch), first)
    assert torch.equal(run(module, batch), first)
    assert_same_tensors(copies(module), copies(routed()))


# ---------------------------------------------------------------------------------------- gradients


def test_gradients_while_packed_run_a_differentiable_kernel(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    run(module, batch)
    assert is_freed(module)
    module.run_batch(batch).square().sum().backward()
    other = routed(kernel="torch")
    other.run_batch(batch).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, other.get_parameter(name).grad), name
    assert packing.num_runs == 1


def test_gradients_on_a_kernel_without_backward_raise(packing):
    module, batch = routed(kernel="packing"), random_batch(sizes(), 5)
    run(module, batch)
    with pytest.raises(NoKernelFits, match="packing: has no backward, and gradients are needed"):
        module.run_batch(batch)
    module.requires_grad_(False)
    module.run_batch(batch)
    with pytest.raises(NoKernelFits, match="gradients are needed"):
        module.run_batch(
            dataclasses.replace(batch, hidden_states=batch.hidden_states.clone().requires_grad_())
        )


def test_gradients_through_a_layout_of_its_own():
    register_kernel("packing", DifferentiablePackingKernel)
    try:
        module, batch = routed(kernel="packing"), random_batch(sizes(), 5)
        run(module, batch)
        assert is_freed(module)
        for _ in range(2):
            module.zero_grad()
            module.run_batch(batch).square().sum().backward()
        other = routed(kernel="torch")
        other.run_batch(batch).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert_close(parameter.grad, other.get_parameter(name).grad, torch.float32)
    finally:
        unregister_kernel("packing")


@by_config
def test_gradients_after_a_call_without_them(config):
    """Views made under `no_grad` carry no gradient and must not be reused."""
    module, fresh, batch = routed(config), routed(config), random_batch(config, 5)
    run(module, batch)
    for candidate in (module, fresh):
        candidate.run_batch(batch).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, fresh.get_parameter(name).grad), name


def test_gradients_after_freezing_and_thawing():
    config = CONFIGS["transposed"]
    module, batch = routed(config).requires_grad_(False), random_batch(config, 5)
    module.run_batch(batch)
    module.requires_grad_(True)
    module.run_batch(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_parameters_with_gradients_stay_for_the_optimizer(packing):
    """backward, evaluation, step: the step must find them, and the next call its result."""
    module, other, batch = routed(), routed(kernel="torch"), random_batch(sizes(), 5)
    for candidate in (module, other):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1)
        candidate.run_batch(batch).square().sum().backward()
        run(candidate, batch)
        assert not is_freed(candidate)
        optimizer.step()
    assert_same_tensors(copies(module), copies(other))
    assert torch.equal(run(module, batch), run(other, batch))
    assert packing.num_packs == 2
    module.zero_grad()
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    run(module, batch)
    assert is_freed(module)


@pytest.mark.parametrize("kernel", ["torch", "reference", "packing"])
@pytest.mark.parametrize("name", ["stacked", "gpt-oss"])
def test_a_training_step_is_seen_by_the_next_call(packing, kernel, name):
    config = CONFIGS[name]
    module, batch = routed(config, kernel="torch"), random_batch(config, 5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    module.options = ExpertsOptions(kernel=None if kernel == "packing" else kernel)
    for _ in range(3):
        optimizer.zero_grad()
        module.run_batch(batch).square().sum().backward()
        before = run(module, batch)
        optimizer.step()
        after = run(module, batch)
        assert not torch.equal(before, after)
        assert_close(after, plain_experts(module.expert_weights, batch), torch.float32)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_a_change_in_place_is_seen_by_the_next_call(kernel):
    config = CONFIGS["transposed"]
    module, batch = routed(config, kernel=kernel), random_batch(config, 5)
    before = run(module, batch)
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    assert_close(run(module, batch), before * 2, torch.float32)
    module.down_proj = nn.Parameter(module.down_proj.detach() * 2)
    assert_close(run(module, batch), before * 4, torch.float32)
    module.down_proj.data = module.down_proj.data * 2
    assert_close(run(module, batch), before * 8, torch.float32)


def test_a_change_in_place_of_freed_weights_is_an_error(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    run(module, batch)
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    with pytest.raises(InputError, match=r"down_proj \(\(0,\)\) must not be changed in place"):
        run(module, batch)


def test_a_parameter_set_anew_while_packed_is_seen_by_the_next_call(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    before, kept = run(module, batch), copies(module)
    run(module, batch)
    module.down_proj = nn.Parameter(kept["down_proj"] * 2)
    assert_close(run(module, batch), before * 2, torch.float32)
    module.down_proj.data = kept["down_proj"] * 4
    assert_close(run(module, batch), before * 4, torch.float32)
    assert is_freed(module)
    assert torch.equal(module.state_dict()["gate_up_proj"], kept["gate_up_proj"])


def test_materialize_then_change(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    before = run(module, batch)
    module.materialize()
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    assert_close(run(module, batch), before * 2, torch.float32)
    module.materialize()
    module.materialize()  # nothing is held: nothing happens


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 2


def test_a_parametrized_weight_is_never_remembered(packing):
    """Where it is kept beside its packed form, a new one may have the address of the last."""
    module, batch = routed(), random_batch(sizes(), 5)
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", Doubled())
    module.run_batch(batch).sum().backward()
    before = run(module, batch)
    for factor in (2, 4, 8):
        with torch.no_grad():
            module.parametrizations.down_proj.original.mul_(2)
        assert_close(run(module, batch), before * factor, torch.float32)
        assert module.state.held is None


def test_a_parametrized_weight_is_computed_at_every_call(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    before = run(module, batch)
    module.materialize()
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", Doubled())
    assert_close(run(module, batch), before * 2, torch.float32)
    assert module.parametrizations.down_proj.original.numel() > 0
    with torch.no_grad():
        module.parametrizations.down_proj.original.mul_(2)
    assert_close(run(module, batch), before * 4, torch.float32)


# --------------------------------------------------------------------------- other kinds of storage


class FamilyExperts(PackedExperts):
    """Parameters as some model family names and shapes them."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


def test_spare_rows_come_back(packing):
    """LongCat-Flash stores rows of its zero experts behind the real ones."""
    generator = torch.Generator().manual_seed(0)
    stack, down = torch.randn(7, 12, 8, generator=generator), torch.randn(5, 8, 6)
    module = FamilyExperts(w=stack.clone(), down_proj=down.clone())
    storage = default_storage(sizes()) | {"gate_up_proj": StoredTensor("w", num_rows=5)}
    module.adopt(sizes(), ExpertsOptions(), storage)
    batch = random_batch(sizes(), 5)
    expected = plain_experts(ExpertWeights(sizes(), dense(stack[:5]), dense(down)), batch)
    assert_close(run(module, batch), expected, torch.float32)
    assert is_freed(module)
    assert torch.equal(module.state_dict()["w"], stack)
    assert_close(run(module, batch), expected, torch.float32)


@pytest.mark.parametrize("num_spare", [0, 2])
def test_flat_and_transposed_storage_comes_back(packing, num_spare):
    """DBRX stores (E * I, H); with spare rows behind, in units of experts."""
    config = dataclasses.replace(sizes(), gate_up=GateUp.SEPARATE)
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    flat = {
        name: torch.randn((count + num_spare) * inner, hidden, generator=generator)
        for name in ("w1", "v1", "w2")
    }
    module = FamilyExperts(**{name: value.clone() for name, value in flat.items()})
    rows = None if num_spare == 0 else count
    stored = {"num_experts": count + num_spare, "num_rows": rows}
    storage = {
        "gate_up_proj": StoredTensor("w1", **stored),
        "up_proj": StoredTensor("v1", **stored),
        "down_proj": StoredTensor("w2", is_transposed=True, **stored),
    }
    module.adopt(config, ExpertsOptions(), storage)
    split = {name: value.view(-1, inner, hidden)[:count] for name, value in flat.items()}
    weights = ExpertWeights(
        config,
        gate_up_proj=dense(split["w1"]),
        up_proj=dense(split["v1"]),
        down_proj=dense(split["w2"].transpose(1, 2)),
    )
    batch = random_batch(config, 5)
    expected = plain_experts(weights, batch)
    assert_close(run(module, batch), expected, torch.float32)
    assert is_freed(module)
    assert_same_tensors(copies(module), flat)
    assert_close(run(module, batch), expected, torch.float32)


def test_stored_tensor_views_and_its_inverse():
    stored = torch.arange(24.0).view(6, 4)
    flat = StoredTensor("w", is_transposed=True, num_experts=3, num_rows=2)
    logical = flat.logical(stored)
    assert logical.shape == (2, 4, 2)
    assert logical[1, 3, 0] == stored[2, 3]
    spare = flat.spare_rows(stored)
    assert spare is not None
    assert spare.tolist() == stored[4:].view(1, 2, 4).tolist()
    assert torch.equal(flat.restored(logical, spare), stored)
    assert StoredTensor("w", num_rows=6).spare_rows(stored) is None
    assert StoredTensor("w").spare_rows(stored) is None
    assert StoredTensor("w").logical(stored) is stored


def test_names_of_parameters_are_those_of_transformers():
    names = {
        "stacked": {"gate_up_proj", "down_proj"},
        "ungated": {"up_proj", "down_proj"},
        "separate": {"gate_proj", "up_proj", "down_proj"},
        "gpt-oss": {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"},
        "ungated-bias": {"up_proj", "down_proj", "up_proj_bias", "down_proj_bias"},
        "rms": {"gate_up_proj", "down_proj", "post_expert_norm.weight"},
    }
    for name, expected in names.items():
        assert set(RoutedExperts(CONFIGS[name]).state_dict()) == expected
    assert RoutedExperts(CONFIGS["gpt-oss"]).gate_up_proj.shape == (5, 8, 12)
    assert "5 experts, H=8, I=6, silu, interleaved" in repr(RoutedExperts(CONFIGS["gpt-oss"]))


# -------------------------------------------------------------------------------- quantized weights


def quantized_module(name: str = "bias", **options: Any) -> tuple[RoutedExperts, ExpertWeights]:
    weights = quantized(random_weights(CONFIGS[name]), WeightFormat.INT4_G32)
    options_ = ExpertsOptions(**options)
    return RoutedExperts(CONFIGS[name], weights=weights, options=options_), weights


def test_quantized_weights_have_no_gradients():
    module, _ = quantized_module()
    batch = random_batch(CONFIGS["bias"], 3)
    module.run_batch(batch)  # nothing asks for any
    rows = batch.hidden_states.clone().requires_grad_()
    with pytest.raises(GradientUnsupported, match="must be dense to have gradients; got quantized"):
        module.run_batch(dataclasses.replace(batch, hidden_states=rows))
    weighed = batch.topk_weights.clone().requires_grad_()
    with pytest.raises(GradientUnsupported, match="int4"):
        module.run_batch(dataclasses.replace(batch, topk_weights=weighed))
    run(module, dataclasses.replace(batch, hidden_states=rows))


def test_quantized_weights_run_in_any_float_dtype():
    module, weights = quantized_module()
    batch = random_batch(CONFIGS["bias"], 3)
    expected = plain_experts(dequantized(weights), batch)
    scheme = weights.gate_up_proj.scheme
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = dataclasses.replace(batch, hidden_states=batch.hidden_states.to(dtype))
        out = run(module, rounded)
        assert out.dtype == dtype
        bound = cpu_products_bound(scheme, dtype) + RTOL[dtype] / 4  # the rows are rounded too
        assert frobenius_error(out, expected) < bound
    assert module.state.held.kernel.name == "cpu"


def test_quantized_weights_are_kept_once(packing):
    """A kernel with a layout of its own holds the only copy; it comes back for another kernel."""
    module, weights = quantized_module()
    batch = random_batch(CONFIGS["bias"], 3)
    expected = run(quantized_module(kernel="torch")[0], batch)
    assert torch.equal(run(module, batch), expected)
    assert torch.equal(run(module, batch), expected)
    assert packing.num_packs == 1
    stored = sum(t.untyped_storage().nbytes() for t in module.given.tensors())
    assert stored < weights.num_bytes / 4
    for left, right in zip(module.expert_weights.tensors(), weights.tensors(), strict=True):
        assert torch.equal(left, right)
    clone = copy.deepcopy(module)
    for left, right in zip(clone.expert_weights.tensors(), weights.tensors(), strict=True):
        assert torch.equal(left, right)
    module.options = ExpertsOptions(kernel="torch")
    module.state.decisions.clear()
    module.state.choices.clear()
    assert torch.equal(run(module, batch), expected)


def test_quantized_weights_move_and_are_not_converted():
    module, weights = quantized_module()
    module.half()
    for left, right in zip(module.expert_weights.tensors(), weights.tensors(), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    module.to("meta")
    assert module.expert_weights.device.type == "meta"
    assert module.problem(torch.float32, needs_grad=False).device == "meta"


def test_given_dense_weights_are_dense():
    """Not every checkpoint that is given is quantized."""
    weights = random_weights(CONFIGS["bias"])
    module = RoutedExperts(CONFIGS["bias"], weights=weights)
    batch = random_batch(CONFIGS["bias"], 3)
    assert module.problem(torch.float32, needs_grad=True).scheme == "dense"
    rows = batch.hidden_states.clone().requires_grad_()
    module.run_batch(dataclasses.replace(batch, hidden_states=rows)).sum().backward()
    assert rows.grad is not None
    with pytest.raises(InputError, match="must have the dtype of the weights"):
        run(module, dataclasses.replace(batch, hidden_states=batch.hidden_states.bfloat16()))


def test_given_dense_weights_keep_their_gradients(packing):
    weights = random_weights(CONFIGS["stacked"])
    leaf = weights.down_proj.values.requires_grad_()
    module = RoutedExperts(CONFIGS["stacked"], weights=weights)
    batch = random_batch(CONFIGS["stacked"], 3)
    run(module, batch)
    module.run_batch(batch).sum().backward()
    assert leaf.grad is not None


def test_schemes_that_differ_are_both_named():
    weights = quantized(random_weights(CONFIGS["bias"]), WeightFormat.INT4_G32)
    mixed = dataclasses.replace(weights, down_proj=random_weights(CONFIGS["bias"]).down_proj)
    assert mixed.scheme == f"{WeightFormat.INT4_G32.scheme} and dense"
    assert weights.scheme == str(WeightFormat.INT4_G32.scheme)
    assert random_weights(CONFIGS["bias"]).scheme == "dense"


def test_given_weights_must_be_of_the_configuration():
    weights = random_weights(CONFIGS["bias"])
    with pytest.raises(ConfigError, match=r"weights\.config must equal the experts' configuration"):
        RoutedExperts(CONFIGS["stacked"], weights=weights)


def test_expert_weights_are_checked_against_the_configuration():
    weights = random_weights(sizes())
    with pytest.raises(ConfigError, match=r"down_proj \(\(4, 8, 6\)\) must have the shape"):
        dataclasses.replace(weights, down_proj=dense(weights.down_proj.values[:4]))
    with pytest.raises(ConfigError, match=r"gate_up_bias \(None\)"):
        dataclasses.replace(weights, config=CONFIGS["bias"])
    with pytest.raises(InputError, match=r"must be on one device; got \['cpu', 'meta'\]"):
        dataclasses.replace(weights, down_proj=dense(weights.down_proj.values.to("meta")))


def test_expert_weights_count_their_bytes():
    assert random_weights(sizes()).num_bytes == 4 * 5 * (12 * 8 + 8 * 6)
    packed = quantized(random_weights(sizes()), WeightFormat.INT4_G32)
    matrices: tuple[QuantizedMatrix, ...] = packed.projections()
    assert packed.num_bytes == sum(matrix.num_bytes for matrix in matrices)


# ---------------------------------------------------------------------------------- wrong arguments


def test_wrong_width():
    with pytest.raises(InputError, match=r"hidden_states \(\(3, 9\)\) must be \(rows, 8\)"):
        run(routed(), random_batch(sizes(5, 9), 3))
    batch = random_batch(sizes(), 3)
    with pytest.raises(InputError, match=r"hidden_states \(\(1, 3, 8\)\) must be \(rows, 8\)"):
        run(routed(), dataclasses.replace(batch, hidden_states=batch.hidden_states[None]))


def test_wrong_device():
    batch = random_batch(sizes(), 3)
    with pytest.raises(
        InputError, match=r"\(meta\) must be on the device of the weights; got cpu there"
    ):
        run(routed(), dataclasses.replace(batch, hidden_states=batch.hidden_states.to("meta")))


def test_wrong_dtype():
    batch = random_batch(sizes(), 3, dtype=torch.bfloat16)
    message = r"\(torch.bfloat16\) must have the dtype of the weights; got torch.float32 there"
    with pytest.raises(InputError, match=message):
        run(routed(), batch)
    meta = dataclasses.replace(batch, hidden_states=batch.hidden_states.to("meta"))
    with pytest.raises(InputError, match="must have the dtype of the weights"):
        run(routed().to("meta"), meta)


def test_autocast_allows_another_dtype():
    module, batch = routed(), random_batch(sizes(), 3, dtype=torch.bfloat16)
    wide = dataclasses.replace(batch, hidden_states=batch.hidden_states.float())
    expected = run(module, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(run(module, batch), expected) < 2 * RTOL[torch.bfloat16]
        out = module.run_batch(wide)
        out.sum().backward()
    assert relative_error(out, expected) < 2 * RTOL[torch.bfloat16]
    assert module.down_proj.grad.dtype == torch.float32


def test_ids_and_weights_must_go_with_the_rows():
    batch = random_batch(sizes(), 3)
    few = dataclasses.replace(batch, local_ids=batch.local_ids[:2])
    with pytest.raises(InputError, match=r"local_ids and topk_weights \(\(2, 2\), \(3, 2\)\)"):
        run(routed(), few)
    both = dataclasses.replace(few, topk_weights=batch.topk_weights[:2])
    with pytest.raises(InputError, match=r"must both be \(rows, top_k\); got 3 rows"):
        run(routed(), both)
    flat = dataclasses.replace(
        batch, local_ids=batch.local_ids[:, 0], topk_weights=batch.topk_weights[:, 0]
    )
    with pytest.raises(InputError, match=r"must both be \(rows, top_k\)"):
        run(routed(), flat)


# ------------------------------------------------------------------------------------------ choices


def test_a_kernel_is_chosen_once_for_a_problem(packing, monkeypatch):
    asked: list[ExpertsProblem] = []

    def cannot_run(self: Any, problem: ExpertsProblem) -> str | None:
        asked.append(problem)
        return None

    monkeypatch.setattr(PackingKernel, "cannot_run", cannot_run)
    module, batch = routed(), random_batch(sizes(), 3)
    for _ in range(3):
        run(module, batch)
    assert len(asked) == 1
    module.run_batch(batch)
    assert len(asked) == 1  # without a backward it is not asked again
    module.double()
    run(module, dataclasses.replace(batch, hidden_states=batch.hidden_states.double()))
    assert [problem.weight_dtype for problem in asked] == [torch.float32, torch.float64]


def test_options_reach_the_problem():
    module = routed(deterministic=True, weight_on=WeightOn.INPUT)
    problem = module.problem(torch.float32, needs_grad=True)
    assert (problem.is_deterministic, problem.weight_on) == (True, WeightOn.INPUT)
    assert problem.needs_grad
    assert module.decide(problem).kernel.name == "reference"
    batch = random_batch(sizes(), 3)
    expected = plain_experts(module.expert_weights, batch, WeightOn.INPUT)
    assert_close(run(module, batch), expected, torch.float32)
    assert module.state.held.kernel.name == "cpu"
    assert run(module, batch, reduce=False).shape == (3, 2, 8)


def test_threads_that_share_experts_pack_them_once(packing):
    module, batch = routed(), random_batch(sizes(), 5)
    expected = run(routed(kernel="torch"), batch)
    start, failures = threading.Barrier(8), []

    def work() -> None:
        try:
            start.wait()
            for _ in range(20):
                assert torch.equal(run(module, batch), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert packing.num_packs == 1


def test_compiled_experts_use_what_the_kernel_holds(packing):
    config = CONFIGS["bias"]
    module, batch = routed(config), random_batch(config, 5)
    expected = run(module, batch)
    torch._dynamo.reset()
    function = torch.compile(module.run_batch, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(function(batch), expected, torch.float32)
    assert is_freed(module)
