"""A rank but the first: ``python -m lowbit.engine.rank --fd N``. It computes what rank 0 (``ranks``) sends
it.

    StartRank ──▶ meet the others, load this rank's part ──▶ RankReady, or RankFailed and exit
    Allocate  ──▶ make the KV caches (``Runner``)        ──▶ RankReady
    KeepStates ─▶ remember the states of delayed scales, or put them back
    Step      ──▶ the same step as rank 0, whose tokens come over the group ──▶ StepDone; logits are of no use
    Regroup   ──▶ leave the group, meet in a new one     ──▶ RankReady

It ends when its socket does, also in the middle of a step: rank 0 is gone then, and what it waits for will
not come.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import socket
import sys
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.engine.process import set_signals, settings_from, show_log
from lowbit.errors import EXIT_BUG, EXIT_RESOURCES, LowbitError, printable

if TYPE_CHECKING:
    from lowbit.engine.rank_messages import StartRank, Step, StepDone, ToRank
    from lowbit.engine.runner import Runner
    from lowbit.kernels.parallel import Parallel
    from lowbit.models.model import Model
    from lowbit.settings import Settings


class _Connection:
    """This process's end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        from lowbit.engine.rank_messages import ToRank
        from lowbit.engine.wire import FrameDecoder

        self._socket = sock
        self._frames: FrameDecoder[ToRank] = FrameDecoder(ToRank)
        self._waiting: list[ToRank] = []
        threading.Thread(target=self._end_with_it, daemon=True).start()

    def send(self, message: object) -> None:
        """To rank 0; nobody hears it where that is gone."""
        from lowbit.engine.wire import encode_frames

        try:
            self._socket.sendall(encode_frames([message]))
        except OSError:
            os._exit(0)

    def fail(self, code: str, message: str) -> None:
        """The last word."""
        from lowbit.engine.rank_messages import RankFailed

        self.send(RankFailed(code, message))

    def receive(self) -> ToRank | None:
        """The next message; None: there will be none."""
        while not self._waiting:
            data = self._socket.recv(1 << 20)
            if not data:
                return None
            self._waiting = self._frames.feed(data)
        return self._waiting.pop(0)

    def _end_with_it(self) -> None:
        """A thread: rank 0 may go while this process waits for it in a sum."""
        if not hasattr(select, "POLLRDHUP"):
            return
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP)
        poll.poll()
        os._exit(0)


def _serve(connection: _Connection) -> None:
    """Until rank 0 closes the socket."""
    from lowbit.engine.rank_messages import (
        MEETING_SECONDS,
        Allocate,
        KeepStates,
        RankReady,
        Regroup,
        StartRank,
        Step,
    )
    from lowbit.engine.runner import Runner
    from lowbit.kernels.device_memory import free_memory, release_memory
    from lowbit.kernels.recurrent import state_bytes

    start = connection.receive()
    if start is None:
        return
    assert isinstance(start, StartRank), "rank 0 begins so"
    settings, model, parallel = _loaded(start)
    specs = model.cache_specs()
    token_bytes, each = sum(spec.token_bytes() for spec in specs), state_bytes(specs)
    runner: Runner | None = None
    kept = ExitStack()

    def ready() -> RankReady:
        return RankReady(token_bytes, each, free_memory(model.device), model.weight_bytes)

    connection.send(ready())
    gc.collect()
    gc.freeze()
    while (message := connection.receive()) is not None:
        if isinstance(message, Step):
            assert runner is not None, "caches come before steps"
            connection.send(_followed(message, runner, parallel, model))
        elif isinstance(message, Allocate):
            runner = Runner(model, message.pages, message.context, settings)
            connection.send(ready())
        elif isinstance(message, KeepStates):
            if message.begin:
                kept.enter_context(model.states.kept_as_they_are())
            else:
                kept.close()
        elif isinstance(message, Regroup):
            if runner is not None:
                runner.forget_graphs()  # before leaving: NCCL waits for graphs that hold its operations
            parallel.leave()
            release_memory(model.device)
            parallel.rejoin(Path(message.store), MEETING_SECONDS)
            connection.send(ready())


def _followed(step: Step, runner: Runner, parallel: Parallel, model: Model) -> StepDone:
    """Compute what rank 0 computes. Rank 0 says what follows from a failure; the others may wait for this
    one in a sum, and are let go."""
    import torch

    from lowbit.engine.cuda_graphs import where
    from lowbit.engine.rank_messages import StepDone, batch_of, first_line, numbers_of

    parallel.begin_step()  # only now: rank 0 goes on where all have launched the step before
    try:
        sent = parallel.broadcast(torch.empty(numbers_of(step), dtype=torch.int32, device=model.device))
        runner.follow(batch_of(step, sent), step.graph, step.capture)
        return StepDone()
    except RuntimeError as error:
        failed = StepDone(f"{where(error)}: {first_line(error)}", isinstance(error, torch.OutOfMemoryError))
    runner.forget_graphs()  # before leaving: NCCL waits for graphs that hold its operations
    parallel.leave()
    return failed


def _loaded(start: StartRank) -> tuple[Settings, Model, Parallel]:
    """This rank's part."""
    import torch

    from lowbit.checkpoint import open_checkpoint
    from lowbit.engine.load import load_part
    from lowbit.engine.rank_messages import MEETING_SECONDS, STEP_SECONDS
    from lowbit.engine.rank_process import device_of, set_threads
    from lowbit.kernels.parallel import Parallel
    from lowbit.quantize.recipe import Asked

    show_log("error")  # rank 0 says the rest
    settings = settings_from(start.settings)
    set_threads(settings)
    device = device_of(settings, start.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = Path(start.store)
    parallel = Parallel.join(start.rank, settings.tp_size, store, device, MEETING_SECONDS, STEP_SECONDS)
    header = open_checkpoint(settings.model, settings.revision, load_format=settings.load_format)
    return settings, load_part(settings, header, Asked.by(settings), parallel), parallel


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="lowbit.engine.rank")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args(arguments)
    set_signals()
    connection = _Connection(socket.socket(fileno=options.fd))
    try:
        _serve(connection)
    except LowbitError as error:
        connection.fail(error.code, error.message)
        return error.exit_code
    except MemoryError as error:
        connection.fail("E0500", f"out of memory: {printable(error) or 'malloc'}")
        return EXIT_RESOURCES
    except Exception as error:
        traceback.print_exc()
        connection.fail("E0712", f"{type(error).__name__}: {printable(error)}")
        return EXIT_BUG
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's threads may still wait for ranks that are gone
