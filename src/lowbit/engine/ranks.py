"""Ranks: the processes that share a model with this one, and the model as the engine sees it then.

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
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from lowbit.engine.cuda_graphs import Graphs, Size, StepGraphs
from lowbit.engine.wire import FrameDecoder, encode_frames
from lowbit.errors import LowbitError, printable
from lowbit.kernels import native
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.parallel import Parallel, private_folder
from lowbit.kernels.recurrent import LayerMemory, LayerSpec
from lowbit.models.model import Model
from lowbit.settings import Settings

MEETING_SECONDS = 120.0  # for all processes to have started
STEP_SECONDS = 300.0  # that one rank waits for another inside a step
_LAST_WORD_SECONDS = 3.0  # for a rank that ends to be seen ending
_READ_SIZE = 1 << 20
RANK_MODULE = "lowbit.engine.rank"  # what the other processes run
_ARRAYS = (  # state_slots: where a model has states
    *("tokens", "positions", "write_slots", "query_lengths", "context_lengths", "page_table"),
    *("state_slots", "sample_rows"),
)

Joined = TypeVar("Joined")
Result = TypeVar("Result")


class StartRank(msgspec.Struct, frozen=True, tag="start"):
    """The first message to a rank. ``store``: the file over which all meet."""

    settings: dict[str, str | int | float | bool | None]
    rank: int
    store: str


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Make the KV caches, for sequences of up to ``context`` tokens: answered by a second ``RankReady``."""

    pages: int
    context: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A ``ForwardBatch``: the shapes of its index tensors by name, which come over the group as one int32
    tensor. Answered by ``StepDone``.

    ``lengths``: its ``host_lengths``, so that no rank waits for its device to know them. ``graph``: the size
    of the graph that runs it, or that is captured from it; None: eagerly.
    """

    shapes: dict[str, tuple[int, ...]]
    page_size: int
    max_query: int
    max_context: int
    lengths: tuple[list[int], list[int]] | None = None
    graph: tuple[int, int] | None = None
    capture: bool = False


class StepDone(msgspec.Struct, frozen=True, tag="done"):
    """All of a step is queued, or ``error`` says why it is not; this rank has left the group then."""

    error: str = ""
    out_of_memory: bool = False


class Regroup(msgspec.Struct, frozen=True, tag="regroup"):
    """Leave the group, give memory back, meet the others over a new file: answered by ``RankReady``."""

    store: str


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """A rank has loaded its part, or made its caches. ``token_bytes``: of a token in its KV cache;
    ``state_bytes``: of a sequence's states; ``free``: memory left."""

    token_bytes: int
    state_bytes: int
    free: int
    weight_bytes: int


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A rank ends; a LowbitError's code and message."""

    code: str
    message: str


ToRank = StartRank | Allocate | Step | Regroup
FromRank = RankReady | RankFailed | StepDone


@dataclass
class _Rank:
    """One of the other processes."""

    number: int
    child: subprocess.Popen[bytes]
    socket: socket.socket
    frames: FrameDecoder[FromRank]
    ready: RankReady | None = None
    failed: RankFailed | None = None
    done: StepDone | None = None


class Ranks:
    """The processes of ranks 1 and up, started by rank 0. Whoever starts them calls ``close``."""

    def __init__(self, settings: Settings) -> None:
        self.size = settings.tp_size
        self._device = device_of(settings, 0)
        check_devices(settings)
        folder = private_folder()
        self._store = Path(folder.name) / "store"
        self._groups = 0
        self._others: list[_Rank] = []
        self._end = weakref.finalize(self, _end, self._others, folder)
        self.parallel = Parallel(0, self.size)
        try:
            for number in range(1, self.size):
                self._others.append(_started(number, settings, self._store))
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
        failed: list[LowbitError] = []

        def run() -> None:
            try:
                found.append(join())
            except LowbitError as error:
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

    def _wait_for(self, told: Callable[[_Rank], bool], seconds: float = math.inf) -> None:
        """Until every one of the others has said something; E0712 where one has ended, or says nothing."""
        limit = time.monotonic() + seconds
        while waiting := [rank for rank in self._others if not told(rank)]:
            self.check()
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

    def finish(self, step: Step, error: Exception | None) -> None:
        """After this rank's own part of launching the step, which failed with ``error`` or did not.

        Raises where any rank's failed: torch.OutOfMemoryError where there was no memory for it, or
        RuntimeError where it was to be captured, both in a new group; else the error that it was.
        """
        if error is not None:
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
            limit = time.monotonic() + _LAST_WORD_SECONDS
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
                    f"{_said(status)}; each holds a part of every layer: nothing can be computed without it",
                ) from cause

    def close(self) -> None:
        """End the others, and the group."""
        self.parallel.close()
        self._end()

    @staticmethod
    def _listen(rank: _Rank) -> None:
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


def _end(others: list[_Rank], folder: Any) -> None:
    """A rank ends when its socket closes; one that does not is killed."""
    for rank in others:
        rank.socket.close()
    limit = time.monotonic() + _LAST_WORD_SECONDS
    for rank in others:
        try:
            rank.child.wait(max(limit - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            rank.child.kill()
            rank.child.wait()
    others.clear()
    folder.cleanup()


def _started(number: int, settings: Settings, store: Path) -> _Rank:
    ours, its = socket.socketpair()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        with its:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", RANK_MODULE, "--fd", str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                pass_fds=(its.fileno(),),
                env={"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path},
            )
    except BaseException:
        ours.close()
        raise
    ours.sendall(encode_frames([StartRank(asdict(settings), number, str(store))]))
    return _Rank(number, child, ours, FrameDecoder(FromRank))


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return printable(str(error).partition("\n")[0], 120)


def _said(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def device_of(settings: Settings, rank: int) -> torch.device:
    """Where a rank computes."""
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def check_devices(settings: Settings) -> None:
    """E0433 where there is not a GPU for each rank."""
    if device_of(settings, 0).type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.device_count()
        if found < settings.tp_size:
            raise LowbitError(
                "E0433",
                f"--tp-size {settings.tp_size}: torch sees {found} CUDA devices, and each rank needs one; "
                f"use --tp-size {found} or less, or --device cpu",
            )


def set_threads(settings: Settings) -> None:
    """The threads of one process: as asked for, or its share of the cores where several compute."""
    threads = settings.threads
    if threads is None and settings.tp_size > 1:
        threads = max(1, native.available_cores() // settings.tp_size)
    if threads is not None:
        native.set_threads(threads)
        torch.set_num_threads(threads)


class SharedModel:
    """Rank 0's part as the whole ``Model``: every batch is computed by all ranks."""

    def __init__(self, model: Model, ranks: Ranks, others: list[RankReady]) -> None:
        """``others``: what the other ranks said of their parts."""
        self._model = model
        self.ranks = ranks
        self.others = others
        self._graphs: list[StepGraphs] = []
        self.weight_bytes = model.weight_bytes + sum(other.weight_bytes for other in others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def cache_specs(self) -> Sequence[LayerSpec]:
        """This rank's."""
        return self._model.cache_specs()

    @property
    def part(self) -> Model:
        """What this rank computes; all of them have to."""
        return self._model

    def share_graphs(self, own: StepGraphs) -> Graphs:
        """This rank's graphs as those of all ranks."""
        self._graphs.append(own)
        return SharedGraphs(own, self)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """As one model's."""
        return self.together(batch, lambda: self._model.forward(batch, caches))

    def together(
        self,
        batch: ForwardBatch,
        compute: Callable[[], Result],
        graph: Size | None = None,
        capture: bool = False,
    ) -> Result:
        """What ``compute`` makes of this rank's part of a step, while the others do theirs; ``graph``,
        ``capture``: as of ``Step``."""
        step = step_of(batch, graph, capture)
        failed: Exception | None = None
        results: list[Result] = []
        sent = packed(step, batch)
        self.ranks.begin(step)
        try:
            self.ranks.parallel.broadcast(sent)
            results.append(compute())
        except (RuntimeError, OSError, LowbitError) as error:
            failed = error
        try:
            self.ranks.finish(step, failed)
        except RuntimeError:
            for graphs in self._graphs:
                graphs.clear()
            raise
        finally:
            failed = None  # its frames hold the step's tensors
        [result] = results  # nothing failed
        return result


class SharedGraphs:
    """``Graphs`` of all ranks: each captures and replays its own of a size when rank 0 does."""

    def __init__(self, own: StepGraphs, model: SharedModel) -> None:
        self._own = own
        self._model = model

    @property
    def sizes(self) -> list[Size]:
        """See ``Graphs``; every rank has the same."""
        return self._own.sizes

    def padding(self, size: Size) -> ForwardBatch:
        """See ``Graphs``."""
        return self._own.padding(size)

    def capture(self, batch: ForwardBatch, size: Size) -> Tensor | None:
        """See ``Graphs``; where one rank cannot, none has it."""
        return self._model.together(batch, lambda: self._own.capture(batch, size), size, capture=True)

    def replay(self, batch: ForwardBatch, size: Size) -> Tensor:
        """See ``Graphs``."""
        return self._model.together(batch, lambda: self._own.replay(batch, size), size)

    def clear(self) -> None:
        """See ``Graphs``: rank 0 asks for none of them again."""
        self._own.clear()


def step_of(batch: ForwardBatch, graph: Size | None = None, capture: bool = False) -> Step:
    """What the other ranks are told of a batch."""
    found = {name: getattr(batch, name) for name in _ARRAYS}
    shapes = {name: tuple(array.shape) for name, array in found.items() if array is not None}
    lengths = None
    if batch.host_lengths is not None:
        queries, contexts = batch.host_lengths
        lengths = queries.tolist(), contexts.tolist()
    return Step(shapes, batch.page_size, batch.max_query, batch.max_context, lengths, graph, capture)


def packed(step: Step, batch: ForwardBatch) -> Tensor:
    """int32: all index tensors of a batch, one behind another."""
    return torch.cat([getattr(batch, name).reshape(-1).int() for name in step.shapes])


def batch_of(step: Step, sent: Tensor) -> ForwardBatch:
    """The batch again, from ``packed``'s numbers on another rank's device."""
    sizes = [torch.Size(shape).numel() for shape in step.shapes.values()]
    # Each in memory of its own, as the kernels are given it elsewhere.
    parts = {
        name: part.view(shape).clone()
        for (name, shape), part in zip(step.shapes.items(), sent.split(sizes), strict=True)
    }
    lengths = None
    if step.lengths is not None:
        queries, contexts = (np.array(of, dtype=np.int32) for of in step.lengths)
        lengths = queries, contexts
    return ForwardBatch(
        sample_rows=parts.pop("sample_rows").long(),
        **parts,
        page_size=step.page_size,
        max_query=step.max_query,
        max_context=step.max_context,
        host_lengths=lengths,
    )


def numbers_of(step: Step) -> int:
    """How many numbers ``packed`` has."""
    return sum(torch.Size(shape).numel() for shape in step.shapes.values())
