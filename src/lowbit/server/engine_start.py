"""The engine as a child process: started, waited for, ended.

It imports torch, which takes longer than all else at start: whoever serves starts it before importing the
HTTP server itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import lowbit

_POLL_SECONDS = 0.02  # where the kernel has no pidfd (before Linux 5.3)


def engine_command() -> list[str]:
    """How to start the engine process; ``-P`` keeps the working directory out of its module path."""
    return [sys.executable, "-P", "-m", "lowbit.engine.process"]


class EngineProcess:
    """A running engine process. ``socket``: this side's end of the pair; who talks through it closes it.

    As a context it is not left behind: killed at the end, where nobody ended it before.
    """

    def __init__(self, command: Iterable[str] = ()) -> None:
        """OSError where it cannot be started."""
        self.socket, its = socket.socketpair()
        try:
            with its:
                arguments = [*(list(command) or engine_command()), "--fd", str(its.fileno())]
                self._child = subprocess.Popen(
                    [*arguments, "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.__stderr__,  # stdout belongs to the command that started the server
                    pass_fds=(its.fileno(),),
                    env=_environment(),
                )
        except BaseException:
            self.socket.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        return self._child.poll()

    async def wait(self) -> None:
        """Until it has ended."""
        import asyncio  # what is imported above delays the start

        if self.returncode is not None:
            return
        try:
            number = os.pidfd_open(self._child.pid)
        except (AttributeError, OSError):
            while self.returncode is None:
                await asyncio.sleep(_POLL_SECONDS)
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(number, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(number)
            os.close(number)
        self._child.wait()

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._child.wait()
        self.socket.close()


def _environment() -> dict[str, str]:
    """This environment, with the folder this lowbit was imported from on the module path.

    Threads of OpenMP sleep when they have nothing to do, unless the user says otherwise: torch's would spin
    and keep the cores from lowbit's own.
    """
    source = str(Path(lowbit.__path__[0]).parent)
    path = os.environ.get("PYTHONPATH")
    return {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source,
    }
