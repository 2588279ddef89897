"""Cuts: which rows, columns or heads of a layer a rank has (``kernels.parallel``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.parallel import Parallel


@dataclass(frozen=True, eq=False)
class Cut:
    """An axis of which each rank has a range. ``order``: int64 (size,), where this rank's entries lie in the
    model's order, if they are not just ``start`` to ``stop``."""

    rank: int
    ranges: tuple[tuple[int, int], ...]
    order: Tensor | None = None

    @property
    def start(self) -> int:
        """The first entry here."""
        return self.ranges[self.rank][0]

    @property
    def stop(self) -> int:
        """Behind the last entry here."""
        return self.ranges[self.rank][1]

    @property
    def size(self) -> int:
        """How many entries are here."""
        return self.stop - self.start

    @property
    def whole(self) -> int:
        """How many entries there are on all ranks together."""
        return max(stop for _, stop in self.ranges)

    @property
    def widths(self) -> tuple[int, ...]:
        """How many every rank has."""
        return tuple(stop - start for start, stop in self.ranges)

    @property
    def slice(self) -> slice:
        """The entries here, of a tensor of all."""
        return slice(self.start, self.stop)

    @property
    def first_of_its_kind(self) -> bool:
        """Whether no rank before has the same range."""
        return self.ranges.index(self.ranges[self.rank]) == self.rank

    def times(self, width: int) -> Cut:
        """The same of an axis where each entry is ``width`` wide."""
        return replace(self, ranges=tuple((start * width, stop * width) for start, stop in self.ranges))

    def __str__(self) -> str:
        return " | ".join(map(str, self.widths))


def cut_evenly(parallel: Parallel, size: int, unit: int = 1) -> Cut | None:
    """Whole units for every rank, one more for the first ranks where they do not divide; the last unit may be
    short. None where there are fewer units than ranks."""
    units = -(-size // unit)
    if units < parallel.size:
        return None
    each, more = divmod(units, parallel.size)
    borders = [min((rank * each + min(rank, more)) * unit, size) for rank in range(parallel.size + 1)]
    return Cut(parallel.rank, tuple(pairwise(borders)))


def cut_heads(
    parallel: Parallel, heads: int, kv_heads: int, called: tuple[str, str] = ("heads", "K/V heads")
) -> tuple[Cut, Cut] | None:
    """Query heads and K/V heads of a rank; None in one process. E0430 where the ranks cannot share them.

    A rank has whole groups of query heads with their K/V head, one more for the first ranks where they do not
    divide. Of more ranks than K/V heads several have the same one, and share its query heads. ``called``:
    what an error calls both.
    """
    if parallel.size == 1:
        return None
    cuts = _head_cuts(parallel, heads, kv_heads)
    if cuts is None:
        works = [n for n in range(1, heads + 1) if _head_cuts(Parallel(0, n), heads, kv_heads)]
        raise LowbitError(
            "E0430",
            f"--tp-size {parallel.size}: {heads} {called[0]} with {kv_heads} {called[1]} cannot be shared "
            f"so; what works: {_listed(works)}",
        )
    return cuts


def _head_cuts(parallel: Parallel, heads: int, kv_heads: int) -> tuple[Cut, Cut] | None:
    group = heads // kv_heads
    kv = cut_evenly(parallel, kv_heads)
    if kv is not None:
        return kv.times(group), kv
    sharers, rest = divmod(parallel.size, kv_heads)
    within = cut_evenly(Parallel(0, sharers), group)
    if rest or within is None:
        return None
    queries = [
        (head * group + start, head * group + stop)
        for head in range(kv_heads)
        for start, stop in within.ranges
    ]
    keys = [(head, head + 1) for head in range(kv_heads) for _ in range(sharers)]
    return Cut(parallel.rank, tuple(queries)), Cut(parallel.rank, tuple(keys))


def _listed(sizes: Sequence[int]) -> str:
    """1 to 4, 8"""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][-1] == size - 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
