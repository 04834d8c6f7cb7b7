"""Ranks that differ end in an error on all of them, which names the value and the rank."""

from __future__ import annotations

from typing import Any

import pytest
import virtual_ranks

from mixtura.errors import CheckpointError, ParallelError
from mixtura.parallel import Transport, agree, check_consistent


def everywhere(size: int, values: Any) -> list[str]:
    """What each rank's error says."""

    def work(transport: Transport) -> str:
        with pytest.raises((ParallelError, CheckpointError)) as caught:
            agree(transport, lambda: (values(transport.rank), None))
        return str(caught.value)

    return virtual_ranks.run(size, work)


def test_ranks_that_are_alike_go_on_with_their_own_results():
    def work(transport: Transport) -> int:
        return agree(transport, lambda: ({"ep_size": 3, "dtype": None}, transport.rank))

    assert virtual_ranks.run(3, work) == [0, 1, 2]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_odd_rank_is_named_on_all(odd):
    found = everywhere(3, lambda rank: {"kernel": "cpu", "path": "avx2" if rank == odd else "amx"})
    like = 1 if odd == 0 else 0
    message = f"path of rank {odd} (avx2) must be that of rank {like}; got amx there."
    assert all(text.startswith(message) for text in found)


def test_a_value_that_one_rank_lacks_is_told():
    message = r"size of b.safetensors of rank 1 \(None\) must be that of rank 0; got 7 there"
    with pytest.raises(ParallelError, match=message):
        check_consistent([{"size of b.safetensors": 7}, {}])


def test_a_failure_of_one_rank_is_told_to_all():
    def values(rank: int) -> dict[str, Any]:
        if rank == 1:
            raise CheckpointError("the file must be whole")
        return {}

    found = everywhere(2, values)
    assert "an error on rank 1: CheckpointError: the file must be whole" in found[0]
    assert found[1] == "the file must be whole"
