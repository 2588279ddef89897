"""Idle: what can wait until nobody waits for an answer, a moment's work at a time.

First memory for the pages that are next: the first use of a page costs a virtual machine as much as a tenth
of the prompt in it. Then what the engine was given to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from lowbit.engine.page_pool import PagePool
from lowbit.engine.runner import Runner

READY_TOKENS = 4096  # room for so many, or so many bytes of it, is kept ready beyond the pages in use
READY_BYTES = 256 << 20

_log = logging.getLogger("lowbit")


class IdleWork:
    """See the module docstring. ``later``: each of its steps takes a moment."""

    def __init__(self, pool: PagePool, runner: Runner, page_size: int) -> None:
        self.later: Iterator[None] = iter(())
        self._pool = pool
        self._runner = runner
        self._page_size = page_size
        self._ready_pages = 0  # pages from 0 on whose memory is there
        self._populating: Iterator[None] = iter(())

    def step(self) -> bool:
        """A moment of it; False: there was none left. What fails of ``later`` is logged."""
        if self._populate():
            return True
        try:
            next(self.later)
            return True
        except StopIteration:
            return False
        except Exception as error:
            _log.warning("lowbit: what was left for an idle moment failed: %r", error)
            return False

    def _populate(self) -> bool:
        """A moment's work on the memory of the next pages; False: there is enough."""
        for _ in self._populating:
            return True
        pool, first = self._pool, self._ready_pages
        ahead = min(READY_TOKENS // self._page_size, READY_BYTES // max(self._runner.page_bytes, 1))
        if first - pool.used > ahead // 2 or first >= pool.total:
            return False
        self._ready_pages = min(pool.used + ahead, pool.total)
        self._populating = self._runner.populate(max(first, pool.used), self._ready_pages)
        return self._ready_pages > first
