"""PagePool: who holds which KV page. Pages are numbers; what is in them is the attention kernels' business.

Every holder of a page counts once: each sequence whose page table lists it, and the prefix tree if it is
cached there. A page nobody holds is free; one that only the tree holds is idle, and may be evicted.
(PagedAttention: Kwon et al., 2023.)
"""

from __future__ import annotations


class PagePool:
    """``total`` pages, numbered from 0."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._cached = [False] * total
        self._idle = 0
        self._used = 0

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages only the prefix tree holds."""
        return self._idle

    @property
    def used(self) -> int:
        """Pages from 0 on that have ever been taken: new ones are taken in the order of their numbers."""
        return self._used

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def is_idle(self, page: int) -> bool:
        """Whether only the tree holds it."""
        return self._cached[page] and self._holders[page] == 1

    def take(self, count: int) -> list[int]:
        """``count`` free pages, held once; the caller has made sure that they are there."""
        assert count <= len(self._free), "the scheduler evicts before it takes"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        self._used = max(self._used, 1 + max(pages, default=-1))
        return pages

    def hold(self, pages: list[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            assert self._holders[page] > 0, "a free page cannot be shared"
            if self.is_idle(page):
                self._idle -= 1
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder less; a page nobody holds is free again."""
        for page in pages:
            assert self._holders[page] > 0, "a page is released once by each holder"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                assert not self._cached[page], "the tree's own hold goes last"
                self._free.append(page)
            elif self.is_idle(page):
                self._idle += 1

    def cache(self, page: int) -> None:
        """The tree becomes a holder."""
        assert not self._cached[page], "a page is in the tree once"
        self.hold([page])
        self._cached[page] = True

    def uncache(self, page: int) -> None:
        """The tree lets go of a page; an idle one is free then."""
        assert self._cached[page], "it is in the tree"
        self._idle -= self.is_idle(page)
        self._cached[page] = False
        self.release([page])

    def check(self, tables: list[list[int]], tree_pages: list[int]) -> list[str]:
        """Violations of the accounting; [] when all is right: what is held is counted, no page is in two
        places, none is lost."""
        expected = [0] * self.total
        for table in [*tables, tree_pages]:
            for page in table:
                expected[page] += 1
        found = [
            f"page {page}: {self._holders[page]} holders counted, {expected[page]} exist"
            for page in range(self.total)
            if self._holders[page] != expected[page]
        ]
        free = set(self._free)
        if len(free) != len(self._free):
            found.append("a page is free twice")
        found += [f"page {page} is free and held" for page in free if expected[page]]
        cached = set(tree_pages)
        if len(cached) != len(tree_pages):
            found.append("a page is in the tree twice")
        if cached != {page for page in range(self.total) if self._cached[page]}:
            found.append("the pool and the tree disagree on what is cached")
        idle = sum(expected[page] == 1 for page in cached)
        used = sum(1 for page in range(self.total) if expected[page] and page not in cached)
        shared = len(cached) - idle
        if idle != self._idle:
            found.append(f"{self._idle} idle pages counted, {idle} exist")
        if len(free) + idle + shared + used != self.total:
            found.append(f"{len(free)} free + {idle} idle + {shared} shared + {used} used != {self.total}")
        return found
