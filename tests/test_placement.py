"""Topologies, placements of experts over slots and ranks, and the file that keeps one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mixtura.errors import ConfigError, InputError, PlacementError
from mixtura.parallel import ModelPlacement, Move, Placement, Topology


def placement(ids: list[int], num_experts: int, slots: tuple[int, ...]) -> Placement:
    topology = Topology(slots, (0,) * len(slots))
    return Placement(torch.tensor(ids, dtype=torch.int32), num_experts, topology)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any valid placement: uneven ranks, empty slots, an expert twice on a rank."""
    num_experts = draw(st.integers(1, 12))
    further = draw(st.lists(st.integers(-1, num_experts - 1), max_size=12))
    ids = draw(st.permutations([*range(num_experts), *further]))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True))
    return placement(list(ids), num_experts, sizes)


class TestTopology:
    def test_slots_and_nodes_in_order_with_the_remainder_first(self):
        topology = Topology.even(10, num_ranks=4, num_nodes=3)
        assert topology.slots_per_rank == (3, 3, 2, 2)
        assert topology.node_of_rank == (0, 0, 1, 2)
        assert [topology.first_slot(rank) for rank in range(4)] == [0, 3, 6, 8]
        assert topology.rank_of_slot.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
        assert topology.rank_of_slot.dtype == torch.int32
        assert (topology.num_ranks, topology.num_physical_experts, topology.num_nodes) == (4, 10, 3)
        assert topology.slots_of(2) == range(6, 8)

    def test_ranks_without_slots_and_nodes_of_any_number(self):
        topology = Topology((2, 0, 3), (7, 7, 4), generation=5)
        assert topology.rank_of_slot.tolist() == [0, 0, 2, 2, 2]
        assert (topology.num_nodes, topology.first_slot(1), topology.first_slot(2)) == (2, 2, 2)

    def test_is_frozen_and_a_value(self):
        assert Topology.even(4, 2) == Topology((2, 2), (0, 0))
        with pytest.raises(FrozenInstanceError):
            Topology.even(4, 2).generation = 1

    @pytest.mark.parametrize(
        "build, message",
        [
            (lambda: Topology((2, 2), (0,)), r"slots_per_rank \(2 ranks\) must speak of the ranks"),
            (lambda: Topology((2, -1), (0, 0)), r"a number of slots_per_rank \(-1\) must be"),
            (lambda: Topology((2, 1), (0, -3)), r"a number of node_of_rank \(-3\) must be"),
            (lambda: Topology((0, 0), (0, 0)), r"slots_per_rank \(\(0, 0\)\) must have a slot"),
            (lambda: Topology((1,), (0,), -1), r"generation \(-1\) must be"),
            (lambda: Topology.even(4, 2, 3), r"num_nodes \(3\) must be at most num_ranks; got 2"),
            (lambda: Topology.even(0, 2), r"num_physical_experts \(0\) must be"),
            (lambda: Topology.even(4, 2).first_slot(2), r"rank \(2\) must be in \[0, 2\)"),
            (lambda: Topology.even(4, 2).slots_of(-1), r"rank \(-1\) must be in \[0, 2\)"),
        ],
    )
    def test_what_cannot_be(self, build, message):
        with pytest.raises(ConfigError, match=message):
            build()


class TestInitial:
    def test_linear_gives_the_remainder_to_the_first_ranks(self):
        linear = Placement.linear(10, Topology.even(10, 4))
        assert linear.physical_to_logical.tolist() == list(range(10))
        assert linear.expert_map(1).logical_to_local.tolist() == [-1] * 3 + [0, 1, 2] + [-1] * 4

    def test_round_robin_deals(self):
        dealt = Placement.round_robin(8, Topology.even(8, 2))
        assert dealt.physical_to_logical.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
        assert dealt.expert_map(1).logical_to_local.tolist() == [-1, 0, -1, 1, -1, 2, -1, 3]
        uneven = Placement.round_robin(7, Topology.even(7, 3))
        assert uneven.physical_to_logical.tolist() == [0, 3, 6, 1, 4, 2, 5]

    def test_redundant_slots_repeat_the_next_rank(self):
        topology = Topology.even(12, 4)
        assert Placement.linear(8, topology).physical_to_logical.view(4, 3).tolist() == [
            [0, 1, 2],
            [2, 3, 4],
            [4, 5, 6],
            [6, 7, 0],
        ]
        assert Placement.round_robin(8, topology).physical_to_logical.view(4, 3).tolist() == [
            [0, 4, 1],
            [1, 5, 2],
            [2, 6, 3],
            [3, 7, 0],
        ]

    def test_more_slots_than_experts_stay_empty(self):
        linear = Placement.linear(2, Topology((3, 1), (0, 0)))
        assert linear.physical_to_logical.tolist() == [0, 1, -1, 1]

    def test_fewer_experts_than_ranks(self):
        linear = Placement.linear(2, Topology.even(2, 4))
        assert linear.physical_to_logical.tolist() == [0, 1]
        assert linear.expert_map(3).num_local_experts == 0

    @settings(deadline=None, max_examples=150)
    @given(
        st.sampled_from([Placement.linear, Placement.round_robin]),
        st.integers(1, 20),
        st.lists(st.integers(0, 9), min_size=1, max_size=8),
    )
    def test_every_expert_once_at_least_and_once_a_rank_at_most(self, build, num_experts, slots):
        if sum(slots) < num_experts:
            slots[0] += num_experts - sum(slots)
        built = build(num_experts, Topology(tuple(slots), (0,) * len(slots)))
        assert built.missing_experts() == ()
        for rank, size in enumerate(slots):
            held = built.expert_map(rank).local_to_logical
            held = held[held >= 0].tolist()
            assert len(held) == len(set(held)) == min(size, num_experts)

    @pytest.mark.parametrize("build", [Placement.linear, Placement.round_robin])
    @pytest.mark.parametrize("num_redundant", [1, 2, 8, 11])
    def test_redundancy_leaves_equal_loads_even_and_varies_less(self, build, num_redundant):
        num_ranks, per_rank = 4, 8
        topology = Topology.even(num_ranks * (per_rank + num_redundant), num_ranks)
        built = build(num_ranks * per_rank, topology)
        share = 1.0 / built.replica_count.double()
        ids = built.physical_to_logical.long().view(num_ranks, -1)
        torch.testing.assert_close(share[ids].sum(1), torch.full((num_ranks,), 8.0).double())
        assert bool(((share[ids] ** 2).sum(1) < per_rank).all())  # variance of independent loads

    def test_fewer_slots_than_experts(self):
        with pytest.raises(InputError, match=r"num_physical_experts \(6\) must be at least .* 2 s"):
            Placement.linear(8, Topology.even(6, 2))


class TestPlacement:
    def test_worked_example(self):
        example = placement([1, 0, 3, -1, 0, 0, 2], 4, (3, 1, 3))
        assert example.logical_to_physical.tolist() == [
            [1, 4, 5],
            [0, -1, -1],
            [6, -1, -1],
            [2, -1, -1],
        ]
        assert example.replica_count.tolist() == [3, 1, 1, 1]
        assert example.logical_to_physical.dtype == example.replica_count.dtype == torch.int32
        assert example.max_replicas == 3
        last = example.expert_map(2)
        assert (last.rank, last.first_slot, last.num_local_experts) == (2, 4, 3)
        assert last.local_to_logical.tolist() == [0, 0, 2]
        assert last.logical_to_local.tolist() == [0, -1, 2, -1]  # the lower of two copies

    @settings(deadline=None, max_examples=150)
    @given(placements())
    def test_maps_are_inverse(self, built):
        table = built.logical_to_physical
        for expert in range(built.num_experts):
            slots = table[expert][table[expert] >= 0]
            assert slots.tolist() == sorted(slots.tolist())
            assert bool((built.physical_to_logical[slots] == expert).all())
            assert len(slots) == int(built.replica_count[expert]) >= 1
        assert int(built.replica_count.sum()) == int((built.physical_to_logical >= 0).sum())
        for rank in range(built.topology.num_ranks):
            found = built.expert_map(rank)
            for expert, local in enumerate(found.logical_to_local.tolist()):
                assert (local >= 0) == (expert in found.local_to_logical.tolist())
                if local >= 0:
                    assert int(found.local_to_logical[local]) == expert
                    assert int(built.physical_to_logical[found.first_slot + local]) == expert

    @settings(deadline=None, max_examples=100)
    @given(placements(), st.randoms(use_true_random=False))
    def test_moves_make_one_the_other(self, old, random):
        ids = old.physical_to_logical.tolist()
        random.shuffle(ids)
        new = Placement(torch.tensor(ids, dtype=torch.int32), old.num_experts, old.topology)
        slots = old.physical_to_logical.tolist()
        for slot, expert in old.moves(new):
            assert slots[slot] != expert
            slots[slot] = expert
        assert all(is_ in (now, -1) or now == -1 for is_, now in zip(slots, ids, strict=True))
        assert [s for s, now in zip(slots, ids, strict=True) if now >= 0] == [
            now for now in ids if now >= 0
        ]
        assert old.moves(old) == ()

    def test_moves_ascend_and_leave_emptied_slots_out(self):
        old, new = (placement(ids, 3, (2, 2)) for ids in ([0, 1, 2, 1], [1, 0, 2, -1]))
        assert old.moves(new) == (Move(slot=0, expert=1), Move(slot=1, expert=0))
        with pytest.raises(InputError, match=r"slots_per_rank .* must be the same"):
            old.moves(placement([0, 1, 2, 1], 3, (3, 1)))

    def test_lost_ranks(self):
        built = placement([0, 1, 2, 0, 3, -1], 4, (2, 2, 2))
        assert built.missing_experts() == ()
        assert built.missing_experts([0]) == (1,)
        assert built.missing_experts([1, 2]) == (2, 3)
        assert built.missing_experts({0, 1}) == (0, 1, 2)
        with pytest.raises(ConfigError, match=r"rank \(3\) must be in"):
            built.missing_experts([3])

    def test_digest_names_contents_alone(self):
        built = placement([0, 1, 2, 0], 3, (2, 2))
        assert built.digest == "3f6611aad053ab76"  # the same everywhere
        ids = built.physical_to_logical
        assert Placement(ids, 3, built.topology, version=7).digest == built.digest
        assert Placement(ids, 3, Topology((2, 2), (0, 0), generation=3)).digest == built.digest
        others = [
            placement([0, 1, 2, 1], 3, (2, 2)),
            placement([0, 1, 2, 0], 3, (1, 3)),
            Placement(ids, 3, Topology((2, 2), (0, 1))),
            ModelPlacement.stack([built]),
        ]
        assert len({built.digest, *(other.digest for other in others)}) == 5

    def test_keeps_a_copy_and_is_frozen(self):
        ids = torch.tensor([0, 1], dtype=torch.int32)
        built = Placement(ids, 2, Topology.even(2, 1))
        ids[0] = 1
        assert built.physical_to_logical.tolist() == [0, 1]
        with pytest.raises(FrozenInstanceError):
            built.version = 1

    @pytest.mark.parametrize(
        "ids, num_experts, message",
        [
            ([0, 1, 2, 3], 5, r"num_experts \(5\) must have a slot; got none for expert 4 \(1 in"),
            ([-1, 1, 1, 1], 4, r"none for expert 0, 2, 3 \(3 in all\)"),
            ([0, 1, 2, 3], 3, r"must be in \[0, 3\), .* got 0 to 3"),
            ([0, 1, -2, 1], 2, r"got -2 to 1"),
            ([0, 1, 1], 2, r"physical_to_logical \(3,\) must be one int32 id .* \(4,\)"),
        ],
    )
    def test_what_cannot_be(self, ids, num_experts, message):
        with pytest.raises(InputError, match=message):
            table = torch.tensor(ids, dtype=torch.int32)
            Placement(table, num_experts, Topology((2, 2), (0, 0)))

    def test_other_dtypes(self):
        with pytest.raises(InputError, match=r"got torch\.int64 on cpu"):
            Placement(torch.arange(4), 4, Topology.even(4, 2))


@pytest.fixture
def model() -> ModelPlacement:
    ids = torch.tensor([[1, 0, 2, 0, 0, 1], [0, 1, 2, -1, 2, 1]], dtype=torch.int32)
    return ModelPlacement(ids, 3, Topology((4, 2), (0, 3), generation=2), version=9)


class TestModelPlacement:
    def test_layers_are_placements(self, model):
        assert (model.num_layers, model.num_experts) == (2, 3)
        for index in range(2):
            layer = model.layer(index)
            assert layer.version == 9
            assert layer.physical_to_logical.tolist() == model.physical_to_logical[index].tolist()
            assert layer.replica_count.tolist() == model.replica_count[index].tolist()
            table = model.logical_to_physical[index, :, : layer.max_replicas]
            assert table.tolist() == layer.logical_to_physical.tolist()
        assert model.logical_to_physical.shape == (2, 3, 3)
        assert model.logical_to_physical[1].max(0).values.tolist() == [2, 5, -1]  # padding
        assert ModelPlacement.stack([model.layer(0), model.layer(1)]).digest == model.digest

    def test_tables_are_small(self):
        topology = Topology.even(288, 32)
        model = ModelPlacement.stack([Placement.linear(256, topology)] * 58)
        assert model.num_bytes == 4 * 58 * (288 + 2 * 256 + 256)

    def test_what_cannot_be(self, model):
        with pytest.raises(InputError, match=r"none for expert 1 of layer 1 \(1 in all\)"):
            ids = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32)
            ModelPlacement(ids, 2, Topology.even(2, 1))
        with pytest.raises(InputError, match=r"physical_to_logical \(0, 2\) must be"):
            ModelPlacement(torch.zeros(0, 2, dtype=torch.int32), 2, Topology.even(2, 1))
        with pytest.raises(InputError, match=r"layers \(0\) must be at least 1"):
            ModelPlacement.stack([])
        with pytest.raises(InputError, match=r"num_experts \(1\) must be the same"):
            ModelPlacement.stack([placement([0, 1], 2, (2,)), placement([0, 0], 1, (2,))])

    def test_file_round_trip(self, model, tmp_path):
        model.save(tmp_path / "p.safetensors")
        read = ModelPlacement.load(tmp_path / "p.safetensors")
        assert torch.equal(read.physical_to_logical, model.physical_to_logical)
        assert (read.num_experts, read.topology, read.version) == (3, model.topology, 9)
        turned = model.physical_to_logical.t().contiguous().t()  # in memory column by column
        ModelPlacement(turned, 3, model.topology).save(tmp_path / "p.safetensors")
        assert ModelPlacement.load(tmp_path / "p.safetensors").digest == model.digest


def rewritten(path: Path, **changes: str | None) -> None:
    """The file with other metadata; None takes an entry out."""
    with safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), **changes}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    kept = {name: text for name, text in metadata.items() if text is not None}
    save_file(tensors, path, metadata=kept)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "mixtura routing trace"}, "must be a placement; got a safetensors file"),
        ({"format_version": "2"}, r"must be of version 1; got '2'"),
        ({"num_experts": None}, "must be whole; got 'num_experts'"),
        ({"num_experts": "2"}, r"must be whole; got ids .* must be in \[0, 2\)"),
        ({"num_experts": "[3]"}, "must be whole"),
        ({"num_experts": "{"}, "must be whole"),
        ({"slots_per_rank": "5"}, "must be whole"),
        ({"slots_per_rank": "[4, 3]"}, "must be whole; got physical_to_logical"),
        ({"slots_per_rank": '[4, "2"]'}, "must be whole"),
        ({"generation": "-1"}, "must be whole; got generation"),
        ({"digest": "0" * 16}, "must have the digest that it names, 0{16}; got"),
        ({"digest": None}, "must be whole; got 'digest'"),
    ],
)
def test_a_file_that_says_something_else(model, tmp_path, changes, message):
    model.save(path := tmp_path / "p.safetensors")
    rewritten(path, **changes)
    with pytest.raises(PlacementError, match=message):
        ModelPlacement.load(path)


def test_a_file_that_is_broken_or_not_there(model, tmp_path):
    model.save(path := tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(PlacementError, match="must be a whole safetensors file"):
        ModelPlacement.load(path)
    with pytest.raises(PlacementError, match="must exist; got no such file"):
        ModelPlacement.load(tmp_path / "q.safetensors")
    with pytest.raises(PlacementError, match="must be writable"):
        model.save(tmp_path / "none" / "p.safetensors")
