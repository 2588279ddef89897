"""Ranks: the processes that share a model with this one, and the model as the engine sees it then.

    rank 0: Engine ── SharedModel.forward ──┬─ the batch, over a socket ──▶ rank 1 … : model.forward
                                            └─ model.forward ◀── sums (kernels.parallel) ──▶

Only rank 0 has an engine. The others (``engine.rank``) load their part at the same time, keep a KV cache of
the same pages, and compute each batch that rank 0 computes; scheduling and sampling are rank 0's alone. One
that ends takes all with it: a part of a model computes nothing.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from lowbit.engine.wire import FrameDecoder, encode_frames
from lowbit.errors import LowbitError
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
_ARRAYS = ("tokens", "positions", "write_slots", "query_lengths", "context_lengths", "page_table")


class StartRank(msgspec.Struct, frozen=True, tag="start"):
    """The first message to a rank. ``store``: the file over which all meet."""

    settings: dict[str, str | int | float | bool | None]
    rank: int
    store: str


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Make the KV caches: answered by a second ``RankReady``."""

    pages: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A ``ForwardBatch``. ``data``: its index tensors and ``sample_rows``, int32, one behind another; empty
    where they come over the group, from device to device."""

    shapes: list[tuple[int, ...]]
    page_size: int
    max_query: int
    max_context: int
    data: bytes = b""


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """A rank has loaded its part, or made its caches. ``token_bytes``: of its KV cache; ``free``: memory
    left."""

    token_bytes: int
    free: int
    weight_bytes: int


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A rank ends; a LowbitError's code and message."""

    code: str
    message: str


ToRank = StartRank | Allocate | Step
FromRank = RankReady | RankFailed


@dataclass
class _Rank:
    """One of the other processes."""

    number: int
    child: subprocess.Popen[bytes]
    socket: socket.socket
    frames: FrameDecoder[FromRank]
    ready: RankReady | None = None
    failed: RankFailed | None = None


class Ranks:
    """The processes of ranks 1 and up, started by rank 0. Whoever starts them calls ``close``."""

    def __init__(self, settings: Settings) -> None:
        self.size = settings.tp_size
        self._device = device_of(settings, 0)
        check_devices(settings)
        folder = private_folder()
        self._store = Path(folder.name) / "store"
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
        found: list[Parallel | LowbitError] = []

        def join() -> None:
            try:
                found.append(
                    Parallel.join(0, self.size, self._store, self._device, MEETING_SECONDS, STEP_SECONDS)
                )
            except LowbitError as error:
                found.append(error)

        joining = threading.Thread(target=join, daemon=True)  # left behind where a rank has ended
        joining.start()
        while joining.is_alive():
            self.check()
            joining.join(0.05)
        [result] = found
        if isinstance(result, LowbitError):
            raise result
        self.parallel = result

    def wait_until_ready(self) -> list[RankReady]:
        """What each of the others says once it has loaded, or allocated."""
        while waiting := [rank for rank in self._others if rank.ready is None]:
            self.check()
            select.select([rank.socket for rank in waiting], [], [], 1.0)
        found = [rank.ready for rank in self._others if rank.ready is not None]
        for rank in self._others:
            rank.ready = None
        return found

    def allocate(self, pages: int) -> None:
        """Have the others make KV caches of so many pages."""
        self.send(Allocate(pages))
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
                [sys.executable, "-P", "-m", "lowbit.engine.rank", "--fd", str(its.fileno())],
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
        self.weight_bytes = model.weight_bytes + sum(other.weight_bytes for other in others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def cache_specs(self) -> Sequence[LayerSpec]:
        """This rank's."""
        return self._model.cache_specs()

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """As one model's."""
        sent = packed(batch)
        on_cpu = sent.device.type == "cpu"
        self.ranks.send(
            Step(
                [tuple(getattr(batch, name).shape) for name in _ARRAYS] + [tuple(batch.sample_rows.shape)],
                batch.page_size,
                batch.max_query,
                batch.max_context,
                sent.numpy().tobytes() if on_cpu else b"",
            )
        )
        with self.ranks.blamed():
            if not on_cpu:
                self.ranks.parallel.broadcast(sent)
            return self._model.forward(batch, caches)


def packed(batch: ForwardBatch) -> Tensor:
    """int32: all index tensors of a batch, one behind another."""
    arrays = [getattr(batch, name).reshape(-1) for name in _ARRAYS]
    return torch.cat([*arrays, batch.sample_rows.int()])


def batch_of(step: Step, parallel: Parallel, device: torch.device) -> ForwardBatch:
    """The batch again, on another rank's device."""
    sizes = [torch.Size(shape).numel() for shape in step.shapes]
    if step.data:
        data = torch.frombuffer(bytearray(step.data), dtype=torch.int32).to(device)
    else:
        data = parallel.broadcast(torch.empty(sum(sizes), dtype=torch.int32, device=device))
    parts = [part.view(shape) for part, shape in zip(data.split(sizes), step.shapes, strict=True)]
    return ForwardBatch(
        **{name: part.clone() for name, part in zip(_ARRAYS, parts, strict=False)},
        sample_rows=parts[-1].long(),
        page_size=step.page_size,
        max_query=step.max_query,
        max_context=step.max_context,
    )
