"""Who has which heads and entries, for every number of ranks."""

from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.kernels.parallel import Parallel
from lowbit.layers.cuts import cut_evenly, cut_heads


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("entries", "unit"), [(64, 1), (100, 1), (29568, 128), (2880, 32), (1000, 64)])
def test_whole_units_and_at_most_one_more(size: int, entries: int, unit: int) -> None:
    cuts = [cut_evenly(Parallel(rank, size), entries, unit) for rank in range(size)]
    found = [(cut.start, cut.stop) for cut in cuts if cut is not None]
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == entries
    assert all(start % unit == 0 for start, _ in found)
    units = [-(-(stop - start) // unit) for start, stop in found]
    assert max(units) - min(units) <= 1 and units == sorted(units, reverse=True)


def test_fewer_units_than_ranks_are_no_cut() -> None:
    assert cut_evenly(Parallel(0, 4), 384, 128) is None
    assert cut_evenly(Parallel(0, 3), 384, 128) is not None


def heads_of(size: int, heads: int, kv_heads: int) -> list[tuple[range, range]]:
    found = []
    for rank in range(size):
        cuts = cut_heads(Parallel(rank, size), heads, kv_heads)
        assert cuts is not None
        found.append(tuple(range(cut.start, cut.stop) for cut in cuts))
    return found


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"),
    [(2, 8, 8), (2, 9, 3), (3, 32, 8), (8, 32, 8), (2, 4, 1), (4, 16, 2), (3, 5, 1), (8, 64, 4), (5, 40, 8)],
)
def test_every_head_once_and_with_its_own_kv_head(size: int, heads: int, kv_heads: int) -> None:
    group, found = heads // kv_heads, heads_of(size, heads, kv_heads)
    assert [head for queries, _ in found for head in queries] == list(range(heads))
    for queries, keys in found:
        assert {head // group for head in queries} == set(keys)
        assert len(queries) % len(keys) == 0, "attention kernels want as many query heads for each"
    assert max(len(keys) for _, keys in found) == -(-kv_heads // size)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "works"),
    [(3, 4, 2, "1, 2, 4"), (8, 4, 4, "1 to 4"), (3, 32, 2, "1, 2, 4, 6, 8, 10, 12"), (2, 1, 1, "1")],
)
def test_what_works_is_said(size: int, heads: int, kv_heads: int, works: str) -> None:
    with pytest.raises(LowbitError, match=f"what works: {works}") as caught:
        cut_heads(Parallel(0, size), heads, kv_heads)
    assert caught.value.code == "E0430"
