"""How long balancing policies take, and what they reach, by default for DeepSeek-V3 on 32 ranks.

Loads are log-normal and drift by another log-normal factor. Policy `deepseek` stands beside the
published algorithm written with tensors and loops, whose plan it must equal. Prints a JSON line a
policy, then a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixtura.eplb import (
    Budget,
    ModelQuota,
    balancedness,
    equal_quota,
    moved_slots,
    plan_quota,
    policy_for,
)
from mixtura.parallel import ModelPlacement, Topology


class Sizes(NamedTuple):
    """A model and its ranks; the defaults are DeepSeek-V3's."""

    layers: int = 58
    experts: int = 256
    redundant: int = 32
    ranks: int = 32
    nodes: int = 4
    groups: int = 8

    @property
    def slots(self) -> int:
        """P."""
        return self.experts + self.redundant


def plain_pack(weights: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Heaviest item first, to the lightest pack with room: pack and place of each item."""
    num_rows, num_items = weights.shape
    pack, place = torch.arange(num_items).repeat(num_rows, 1), torch.zeros(weights.shape).long()
    if (size := num_items // num_packs) == 1:
        return pack, place
    order = weights.sort(dim=-1, descending=True, stable=True).indices
    for row in range(num_rows):
        total, filled = [torch.tensor(0.0).double()] * num_packs, [0] * num_packs
        for item in order[row]:
            open_packs = [index for index in range(num_packs) if filled[index] < size]
            lightest = min(open_packs, key=lambda index: total[index])
            pack[row, item], place[row, item] = lightest, filled[lightest]
            total[lightest] = total[lightest] + weights[row, item]
            filled[lightest] += 1
    return pack, place


def plain_replicate(loads: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """A slot each, and each further one to the expert with most load per replica."""
    num_rows, num_experts = loads.shape
    experts, count = torch.arange(num_slots).repeat(num_rows, 1), torch.ones_like(loads)
    rows = torch.arange(num_rows)
    for slot in range(num_experts, num_slots):
        hottest = (loads / count).max(-1).indices
        experts[:, slot] = hottest
        count[rows, hottest] += 1
    return experts, count


def plain_deepseek(
    loads: Tensor, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Tensor:
    """(layers, P) experts of the slots, by the published algorithm."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = loads.shape
    group_size, ranks_per_node = num_experts // num_groups, num_ranks // num_nodes
    node, place = plain_pack(loads.unflatten(1, (num_groups, -1)).sum(-1), num_nodes)
    position = node * (num_groups // num_nodes) + place
    by_node = torch.empty_like(position).scatter_(
        1, position, torch.arange(num_groups).repeat(num_layers, 1)
    )
    experts = (by_node.unsqueeze(2) * group_size + torch.arange(group_size)).flatten(1)
    rows = experts.reshape(num_layers * num_nodes, -1)
    node_loads = loads.gather(1, experts).reshape(rows.shape)
    replicas, count = plain_replicate(node_loads, num_slots // num_nodes)
    rank, place = plain_pack((node_loads / count).gather(1, replicas), ranks_per_node)
    slots = rank * (num_slots // num_ranks) + place
    placed = torch.empty_like(slots).scatter_(1, slots, rows.gather(1, replicas))
    return placed.reshape(num_layers, -1)


class Case(NamedTuple):
    """Loads after a drift, and the placement that was made before it."""

    loads: np.ndarray
    old: ModelPlacement


def make_case(seed: int, sizes: Sizes) -> Case:
    """Log-normal loads (sigma 1), placed by policy `global`, then drifting (sigma 0.3)."""
    generator = np.random.default_rng(seed)
    topology = Topology.even(sizes.slots, sizes.ranks, sizes.nodes)
    before = generator.lognormal(size=(sizes.layers, sizes.experts))
    after = before * generator.lognormal(sigma=0.3, size=before.shape)
    return Case(after, policy_for("global").plan(before, None, topology, Budget()))


def milliseconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of some runs: by the clock, and of processor time."""
    clocks = (time.perf_counter, time.process_time)
    times = []
    for _ in range(repeats):
        start = [clock() for clock in clocks]
        work()
        times.append([1e3 * (clock() - begun) for clock, begun in zip(clocks, start, strict=True)])
    by_clock, of_processor = (median(column) for column in zip(*times, strict=True))
    return by_clock, of_processor


def report(
    name: str, took: tuple[float, float], case: Case, new: ModelPlacement, quota: ModelQuota
) -> dict[str, Any]:
    """A line for one policy, printed and returned."""
    reached = balancedness(case.loads, new, quota)
    moved = moved_slots(case.old, new).mean() / new.topology.num_physical_experts
    line = {
        "policy": name,
        "ms": round(took[0], 1),
        "cpu_ms": round(took[1], 1),
        "cpu_ms_per_layer": round(took[1] / new.num_layers, 2),
        "balancedness": round(float(reached.mean()), 3),
        "least": round(float(reached.min()), 3),
        "moved": round(float(moved), 3),
    }
    print(json.dumps(line), flush=True)
    return line


def measure(seed: int, repeats: int, sizes: Sizes) -> list[dict[str, Any]]:
    """A line for the published algorithm, each policy and quotas."""
    case = make_case(seed, sizes)
    topology = case.old.topology
    tensors = torch.from_numpy(case.loads)

    def published() -> Tensor:
        return plain_deepseek(tensors, sizes.slots, sizes.groups, sizes.nodes, sizes.ranks)

    plain = ModelPlacement(published().int(), sizes.experts, topology)
    took = milliseconds(published, 3)
    lines = [report("deepseek, tensors and loops", took, case, plain, equal_quota(plain))]
    for name, fraction, target in (
        ("deepseek", None, 1.0),
        ("hierarchical", None, 1.0),
        ("global", None, 1.0),
        ("local_search", 0.06, 1.0),
        ("local_search", 0.11, 1.0),
        ("local_search", 0.15, 1.0),
        ("local_search", 0.15, 0.98),
        ("local_search", None, 1.0),
        ("random", None, 1.0),
        ("static", None, 1.0),
    ):
        moves = None if fraction is None else int(fraction * sizes.slots)
        budget = Budget(moves, target, sizes.groups)
        plan = partial(policy_for(name).plan, case.loads, case.old, topology, budget)
        new = plan()
        if name == "deepseek":
            assert new.digest == plain.digest
        label = name + ("" if fraction is None else f", at most {fraction:.0%}")
        label += "" if target == 1 else f", to {target}"
        lines.append(report(label, milliseconds(plan, repeats), case, new, equal_quota(new)))
    quota = partial(plan_quota, case.loads, case.old)
    lines.append(report("quota", milliseconds(quota, repeats), case, case.old, quota()))
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    for name, value in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    seed, repeats = arguments.pop("seed"), arguments.pop("repeats")
    lines = measure(seed, repeats, Sizes(**arguments))
    print("\n| policy | ms | CPU ms | CPU ms a layer | balancedness: mean | least | slots moved |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        print(
            f"| {line['policy']} | {line['ms']} | {line['cpu_ms']} | "
            f"{line['cpu_ms_per_layer']} | "
            f"{line['balancedness']} | {line['least']} | {line['moved']:.1%} |"
        )


if __name__ == "__main__":
    main()
