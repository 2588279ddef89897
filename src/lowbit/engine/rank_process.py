"""A rank's process: where it computes, how rank 0 starts and ends it, and what is said of one that ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowbit.engine.rank_messages import FromRank, RankFailed, RankReady, StartRank, StepDone
from lowbit.engine.wire import FrameDecoder, encode_frames
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.device_memory import has_gpu
from lowbit.settings import Settings

LAST_WORD_SECONDS = 3.0  # for a rank that ends to be seen ending
RANK_MODULE = "lowbit.engine.rank"  # what the other processes run


@dataclass
class RankProcess:
    """One of the other processes."""

    number: int
    child: subprocess.Popen[bytes]
    socket: socket.socket
    frames: FrameDecoder[FromRank]
    ready: RankReady | None = None
    failed: RankFailed | None = None
    done: StepDone | None = None


def started(number: int, settings: Settings, store: Path) -> RankProcess:
    """Rank ``number``, told what to load and the file over which all meet."""
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
    return RankProcess(number, child, ours, FrameDecoder(FromRank))


def end(others: list[RankProcess]) -> None:
    """A rank ends when its socket closes; one that does not is killed."""
    for rank in others:
        rank.socket.close()
    limit = time.monotonic() + LAST_WORD_SECONDS
    for rank in others:
        try:
            rank.child.wait(max(limit - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            rank.child.kill()
            rank.child.wait()
    others.clear()


def said_of(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def device_of(settings: Settings, rank: int) -> torch.device:
    """Where a rank computes."""
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and has_gpu())
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
