"""Ranks: the processes that share a model with this one.

    rank 0: Engine ── SharedModel ──┬─ Step, over a socket ─────────────────▶ rank 1 … : the same step
                                    ├─ the batch ── broadcast, on the device ──▶
                                    ├─ model.forward, or a graph's replay ◀── sums (kernels.parallel) ──▶
                                    └─ StepDone ◀── all of the step is queued there, or why it is not ──

Only rank 0 has an engine. The others (``engine.rank``) load their part at the same time, keep a KV cache of
the same pages, and compute each batch that rank 0 computes; scheduling and sampling are rank 0's alone. The
tokens of a batch may be known to rank 0's device only (a step launched before the last one is finished), so
the batch goes from device to device. Rank 0 also decides what runs by a graph: a Step names the size whose
graph every rank captures, or replays.

A step that one rank cannot launch leaves the others in the middle of a sum. Where it was for lack of memory,
or while a graph was captured, all leave the group, meet in a new one, and the step is no more: the engine
goes on with less. Graphs of the old group are forgotten. A rank that ends takes all with it: a part of a
model computes nothing.
"""

from __future__ import annotations

import math
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from lowbit.engine.rank_messages import (
    MEETING_SECONDS,
    STEP_SECONDS,
    Allocate,
    RankReady,
    Regroup,
    Step,
    StepDone,
    ToRank,
    first_line,
)
from lowbit.engine.rank_process import (
    LAST_WORD_SECONDS,
    RankProcess,
    check_devices,
    device_of,
    end,
    said_of,
    started,
)
from lowbit.engine.wire import encode_frames
from lowbit.errors import LowbitError
from lowbit.kernels.parallel import Parallel, private_folder
from lowbit.settings import Settings

_READ_SIZE = 1 << 20

Joined = TypeVar("Joined")


class Ranks:
    """The processes of ranks 1 and up, started by rank 0. Whoever starts them calls ``close``."""

    def __init__(self, settings: Settings) -> None:
        self.size = settings.tp_size
        self._device = device_of(settings, 0)
        check_devices(settings)
        folder = private_folder()
        self._store = Path(folder.name) / "store"
        self._groups = 0
        self._others: list[RankProcess] = []
        self._end = weakref.finalize(self, _end, self._others, folder)
        self.parallel = Parallel(0, self.size)
        try:
            for number in range(1, self.size):
                self._others.append(started(number, settings, self._store))
        except BaseException:
            self.close()
            raise

    def meet(self) -> None:
        """Form the group with the others. E0713 where they do not come, E0712 where one has ended."""
        self.parallel = self._watched(
            lambda: Parallel.join(0, self.size, self._store, self._device, MEETING_SECONDS, STEP_SECONDS)
        )

    def _watched(self, join: Callable[[], Joined]) -> Joined:
        """What ``join`` comes to, unless one of the others ends before."""
        found: list[Joined] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(join())
            except BaseException as error:  # raised where somebody waits for it
                failed.append(error)

        joining = threading.Thread(target=run, daemon=True)  # left behind where a rank has ended
        joining.start()
        while joining.is_alive():
            self.check()
            joining.join(0.05)
        if failed:
            raise failed[0]
        return found[0]

    def wait_until_ready(self) -> list[RankReady]:
        """What each of the others says once it has loaded, or allocated."""
        self._wait_for(lambda rank: rank.ready is not None)
        found = [rank.ready for rank in self._others if rank.ready is not None]
        for rank in self._others:
            rank.ready = None
        return found

    def _wait_for(self, told: Callable[[RankProcess], bool], seconds: float = math.inf) -> None:
        """Until every one of the others has said something; E0712 where one has ended, or says nothing."""
        limit = time.monotonic() + seconds
        while True:
            self.check()  # takes what is there: who has answered is known only then
            waiting = [rank for rank in self._others if not told(rank)]
            if not waiting:
                return
            if time.monotonic() > limit:
                numbers = ", ".join(str(rank.number) for rank in waiting)
                raise LowbitError("E0712", f"rank {numbers} of {self.size} did not answer in {seconds:g} s")
            select.select([rank.socket for rank in waiting], [], [], 1.0)

    def allocate(self, pages: int, context: int) -> None:
        """Have the others make KV caches of so many pages."""
        self.send(Allocate(pages, context))
        self.wait_until_ready()

    def begin(self, step: Step) -> None:
        """Have the others begin a step, as this rank does now."""
        for rank in self._others:
            rank.done = None
        self.parallel.begin_step()
        self.send(step)

    def finish(self, step: Step, error: Exception | None, forget: Callable[[], None]) -> None:
        """After this rank's own part of launching the step, which failed with ``error`` or did not.

        ``forget``: drops this rank's graphs, before it leaves the group: NCCL waits for graphs that hold its
        operations.

        Raises where any rank's failed: torch.OutOfMemoryError where there was no memory for it, or
        RuntimeError where it was to be captured, both in a new group; else the error that it was.
        """
        if error is not None:
            forget()
            self.parallel.leave()  # the others may wait for this one
        try:
            self._wait_for(lambda rank: rank.done is not None, STEP_SECONDS)
        except LowbitError as ended:
            raise ended from error
        told = [
            (rank.number, rank.done) for rank in self._others if rank.done is not None and rank.done.error
        ]
        if error is None and not told:
            return
        # A rank that was left in the middle of a sum fails too: which was the first is not known.
        said = [f"rank {number} of {self.size}: {done.error}" for number, done in told]
        if error is not None:
            said.append(f"rank 0: {first_line(error)}")
        cause = error or RuntimeError(said[0])
        if not isinstance(error, torch.OutOfMemoryError):
            if any(done.out_of_memory for _, done in told):
                cause = torch.OutOfMemoryError("; ".join(said))
            elif not step.capture:
                if not told or isinstance(error, LowbitError):
                    raise cause
                raise LowbitError("E0712", "; ".join(said)) from error
            elif told:
                cause = RuntimeError("; ".join(said))
        forget()
        self._regroup()
        raise cause from None

    def _regroup(self) -> None:
        """A new group of the same ranks."""
        self.parallel.leave()
        self._groups += 1
        store = self._store.with_name(f"store-{self._groups}")
        self.send(Regroup(str(store)))
        self._watched(lambda: self.parallel.rejoin(store, MEETING_SECONDS))
        self.wait_until_ready()

    def send(self, message: ToRank) -> None:
        """To every one of the others."""
        frame = encode_frames([message])
        with self.blamed():
            for rank in self._others:
                rank.socket.sendall(frame)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """An error inside is that of the rank that ended, where one did."""
        try:
            yield
        except (RuntimeError, OSError, LowbitError) as error:
            limit = time.monotonic() + LAST_WORD_SECONDS
            while time.monotonic() < limit:
                self.check(error)
                time.sleep(0.02)
            raise

    def check(self, cause: BaseException | None = None) -> None:
        """E0712, or its own error, where one of the others has failed or ended."""
        for rank in self._others:
            self._listen(rank)
            if rank.failed is not None:
                text = f"rank {rank.number} of {self.size}: {rank.failed.message}"
                raise LowbitError(rank.failed.code, text) from cause
        for rank in self._others:
            status = rank.child.poll()
            if status is not None:
                raise LowbitError(
                    "E0712",
                    f"rank {rank.number} of {self.size} (process {rank.child.pid}) ended with "
                    f"{said_of(status)}; each holds a part of every layer: "
                    "nothing can be computed without it",
                ) from cause

    def close(self) -> None:
        """End the others, and the group."""
        self.parallel.close()
        self._end()

    @staticmethod
    def _listen(rank: RankProcess) -> None:
        """Take what it has sent."""
        while select.select([rank.socket], [], [], 0)[0]:
            try:
                data = rank.socket.recv(_READ_SIZE)
            except OSError:
                return
            if not data:
                return
            for message in rank.frames.feed(data):
                if isinstance(message, RankReady):
                    rank.ready = message
                elif isinstance(message, StepDone):
                    rank.done = message
                else:
                    rank.failed = message


def _end(others: list[RankProcess], folder: TemporaryDirectory[str]) -> None:
    end(others)
    folder.cleanup()
