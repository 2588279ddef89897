"""The engine process: frames, the loop's order, and how each failure is reported."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lowbit.engine import process as engine_process
from lowbit.engine.messages import (
    Cancel,
    Drain,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStatus,
    FlushCache,
    FromEngine,
    Ping,
    Request,
    SamplingParams,
    ToEngine,
    TokenEvent,
    TokenLogprob,
)
from lowbit.engine.process import Connection, ParentGoneError, serve_parent, settings_from
from lowbit.engine.wire import MAX_FRAME, FrameDecoder, FrameError, Start, encode_frames
from lowbit.errors import LowbitError
from lowbit.settings import Settings

READY = EngineReady(model_name="m", context_length=9, pool_tokens=9, page_size=1, vocab_size=9, max_running=1)
SAMPLING = SamplingParams(max_tokens=3, logit_bias={5: -1.5}, stop=("a",), seed=-(2**63))


def request(identity: str = "r") -> Request:
    return Request(id=identity, prompt=(1, 2, 3), sampling=SAMPLING, cache_salt="s")


# --- frames -------------------------------------------------------------------------------------------------


def test_every_message_survives_any_cut() -> None:
    to_engine: list[Any] = [Start(settings={"model": "m", "port": 1, "threads": None}), request()]
    to_engine += [Cancel("r"), Ping(), Drain(), FlushCache()]
    event = TokenEvent(
        id="r",
        tokens=(1, 2),
        text="é\ud7ff",
        logprobs=(TokenLogprob(1, float("-inf"), ((2, -0.5),)),),
        prompt_logprobs=(None, TokenLogprob(1, -1.0)),
        finish_reason="stop",
        matched_stop=7,
    )
    progress = EngineProgress(what="w", done=1, total=2)
    from_engine: list[Any] = [
        event,
        READY,
        progress,
        EngineFailed(code="E1", message="x"),
        EngineStatus(steps=3),
    ]
    for messages, schema in ((to_engine, Start | ToEngine), (from_engine, FromEngine)):
        data = encode_frames(messages)
        for size in (1, 2, 3, 7, 64, len(data)):
            decoder: FrameDecoder[Any] = FrameDecoder(schema)
            received = []
            for start in range(0, len(data), size):
                received += decoder.feed(data[start : start + size])
            assert received == messages


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack("<I", MAX_FRAME + 1), "limit"),
        (struct.pack("<I", 1) + b"\xc1", "not a message"),
        (encode_frames([{"type": "cancel", "id": 5}]), "not a message"),
        (encode_frames([{"type": "exec", "id": "5"}]), "not a message"),
    ],
)
def test_bad_frames(data: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        FrameDecoder(ToEngine).feed(data)


def test_frame_too_large_to_send() -> None:
    with pytest.raises(FrameError, match="a TokenEvent of"):
        encode_frames([TokenEvent(id="x", text="x" * (MAX_FRAME + 1))])


# --- the loop -----------------------------------------------------------------------------------------------


class ScriptedEngine:
    """Gives each request three tokens, one a step; fails where told to."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.calls: list[str] = []
        self.fail_in: str = ""
        self.violation: object = None
        self.violations = 10
        self.left_for_idle = 0
        self.idle_steps: list[bool] = []  # whether something was running meanwhile

    def submit(self, request: Request) -> None:
        self.calls.append(f"submit {request.id}")
        if request.id == "refused":
            raise LowbitError("never_fits", "too large")
        if request.id == "broken":
            raise KeyError("surprise")
        self.running[request.id] = 0

    def cancel(self, request_id: str) -> None:
        self.calls.append(f"cancel {request_id}")
        self.running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[TokenEvent]:
        if self.fail_in == "step":
            raise ZeroDivisionError("in a kernel")
        if self.fail_in == "memory":
            raise MemoryError
        time.sleep(0.01)
        events = []
        for identity in list(self.running):
            self.running[identity] += 1
            done = self.running[identity] == 3
            events.append(TokenEvent(id=identity, tokens=(1,), finish_reason="length" if done else None))
            if done:
                del self.running[identity]
        return events

    def admitted(self) -> list[str]:
        return [identity for identity, steps in self.running.items() if steps == 1]

    def progress(self) -> int:
        return sum(self.running.values())

    def status(self) -> EngineStatus:
        return EngineStatus(running=len(self.running), invariant_violations=self.violations)

    def idle_step(self) -> bool:
        self.idle_steps.append(bool(self.running))
        time.sleep(0.01)
        self.left_for_idle -= 1
        return self.left_for_idle >= 0

    def close(self) -> None:
        """Nothing to keep."""

    def flush_cache(self) -> None:
        self.calls.append("flush")

    def check(self) -> object:
        if isinstance(self.violation, Exception):
            raise self.violation
        self.violations += bool(self.violation)
        return self.violation


class Parent:
    """The HTTP process's end, and the engine process's main function in a thread."""

    def __init__(self, build: Any = None) -> None:
        self.engine = ScriptedEngine()
        self.seen: Settings | None = None
        self.status: int | None = None
        mine, its = socket.socketpair()
        mine.settimeout(5)
        self.socket = mine
        self._frames: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self._pending: list[Any] = []

        def default_build(settings: Settings, progress: Any) -> tuple[Any, EngineReady]:
            self.seen = settings
            for done in range(1001):
                progress(done, 1000, "weights")
            return self.engine, READY

        def run() -> None:
            self.status = serve_parent(Connection(its), build or default_build)
            its.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def send(self, *messages: Any) -> None:
        self.socket.sendall(encode_frames(messages))

    def receive(self) -> Any:
        while not self._pending:
            data = self.socket.recv(65536)
            if not data:
                return None
            self._pending = self._frames.feed(data)
        return self._pending.pop(0)

    def until(self, kind: type) -> Any:
        while not isinstance(message := self.receive(), kind):
            assert message is not None, "the engine closed the connection"
        return message

    def start(self) -> Parent:
        self.send(Start(settings={"model": "m"}))
        assert self.until(EngineReady) == READY
        return self

    def exit_status(self) -> int | None:
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.status


@pytest.fixture
def parent() -> Iterator[Parent]:
    made = Parent()
    yield made
    made.socket.close()
    made.thread.join(5)


def test_loading_is_reported(parent: Parent) -> None:
    parent.send(Start(settings={"model": "m", "max_running_requests": 3}))
    progress = []
    while isinstance(message := parent.receive(), EngineProgress):
        progress.append(message)
    assert message == READY
    assert progress[0].done == 0 and progress[-1].done == progress[-1].total == 1000
    assert len(progress) < 20  # a thousand reports in no time are told a few times
    assert parent.seen is not None
    assert (parent.seen.model, parent.seen.max_running_requests) == ("m", 3)


def test_tokens_then_leave_when_the_parent_does(parent: Parent) -> None:
    parent.start().send(request("a"), request("b"))
    events = [parent.until(TokenEvent) for _ in range(6)]
    assert [event.id for event in events] == ["a", "b"] * 3
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"] * 2
    parent.socket.close()
    assert parent.exit_status() == 0


def test_messages_are_read_while_there_is_work(parent: Parent) -> None:
    parent.start().send(request("a"))
    parent.until(TokenEvent)
    parent.send(Ping(), FlushCache(), Cancel("a"), Ping())
    assert parent.until(EngineStatus).running == 1
    assert parent.until(EngineStatus).running == 0
    assert parent.engine.calls == ["submit a", "flush", "cancel a"]


def test_what_can_wait_is_done_when_nothing_else_is(parent: Parent) -> None:
    parent.engine.left_for_idle = 100
    parent.start().send(request("a"))
    while parent.until(TokenEvent).finish_reason is None:
        pass
    assert len(parent.engine.idle_steps) < 100, "the request did not wait for all of them"
    parent.send(Ping())
    parent.until(EngineStatus)
    end = time.monotonic() + 5
    while len(parent.engine.idle_steps) < 101 and time.monotonic() < end:
        time.sleep(0.01)
    parent.send(Ping())
    parent.until(EngineStatus)
    assert parent.engine.idle_steps == [False] * 101, "until there was none left, and never again"


def test_refused_and_broken_requests_end_alone(parent: Parent, capfd: pytest.CaptureFixture[str]) -> None:
    parent.start().send(request("refused"), request("broken"), request("good"))
    events = {event.id: event for event in (parent.until(TokenEvent) for _ in range(5))}
    assert (events["refused"].error_code, events["refused"].error) == ("never_fits", "too large")
    assert (events["broken"].error_code, events["broken"].finish_reason) == ("internal", "error")
    assert "surprise" not in events["broken"].error
    assert events["broken"].prompt_tokens == 3
    assert events["good"].finish_reason == "length"
    assert "surprise" in capfd.readouterr().err


def test_drain_finishes_what_runs_and_takes_nothing_new(parent: Parent) -> None:
    parent.start().send(request("a"), Drain(), request("late"))
    events = [parent.until(TokenEvent) for _ in range(4)]
    assert [event.finish_reason for event in events if event.id == "a"] == [None, None, "length"]
    assert [event.error_code for event in events if event.id == "late"] == ["draining"]
    assert parent.exit_status() == 0


@pytest.mark.parametrize(
    ("fault", "code", "status", "said"),
    [
        ("step", "E0710", 70, "ZeroDivisionError at test_engine_process.py:"),
        ("memory", "E0500", 5, "out of memory"),
    ],
)
def test_exception_in_a_step_ends_the_process(
    parent: Parent, fault: str, code: str, status: int, said: str
) -> None:
    parent.engine.fail_in = fault
    parent.start().send(request("a"))
    failed = parent.until(EngineFailed)
    assert failed.code == code and said in failed.message
    assert parent.exit_status() == status


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (LowbitError("E0203", "cut off"), "E0203", 3),
        (RuntimeError("boo"), "E0710", 70),
        (MemoryError(), "E0500", 5),
    ],
)
def test_failure_to_load(error: Exception, code: str, status: int) -> None:
    def build(settings: Settings, progress: Any) -> Any:
        raise error

    parent = Parent(build)
    parent.send(Start(settings={}))
    assert parent.until(EngineFailed).code == code
    assert parent.exit_status() == status


@pytest.mark.parametrize("messages", [[Ping()], [Start(settings={"modle": "x"})]])
def test_wrong_first_message(messages: list[Any]) -> None:
    parent = Parent()
    parent.send(*messages)
    assert parent.until(EngineFailed).code == "E0710"
    assert parent.exit_status() == 70


@pytest.mark.parametrize("violation", [["page 3 is free and used"], AssertionError("a page")])
def test_idle_check_counts_violations(
    parent: Parent,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    violation: object,
) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_CHECK_SECONDS", 0.02)
    parent.start()
    parent.engine.violation = violation
    time.sleep(0.2)
    parent.engine.violation = None
    parent.send(Ping())
    assert parent.until(EngineStatus).invariant_violations > 12
    assert "accounting invariant violated" in capfd.readouterr().err


def test_sound_checks_count_nothing(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_CHECK_SECONDS", 0.02)
    parent.start()
    for nothing in (None, [], 0, ""):
        parent.engine.violation = nothing
        time.sleep(0.05)
    parent.send(Ping())
    assert parent.until(EngineStatus).invariant_violations == 10


def test_settings_are_checked() -> None:
    assert settings_from({"port": 5}).port == 5
    with pytest.raises(FrameError, match="unknown settings prot"):
        settings_from({"prot": 5})


def test_closed_socket_is_a_gone_parent() -> None:
    mine, its = socket.socketpair()
    connection = Connection(its)
    assert connection.receive(0.0) == []
    mine.close()
    with pytest.raises(ParentGoneError):
        connection.receive(1.0)
    with pytest.raises(ParentGoneError):
        connection.send([READY])
    its.close()


def test_process_without_its_parent_leaves() -> None:
    """The --parent it was given is not its parent any more: it must not wait for ever."""
    mine, its = socket.socketpair()
    with mine, its:
        command = [sys.executable, "-m", "lowbit.engine.process", "--fd", str(its.fileno()), "--parent", "1"]
        if os.getpid() == 1:
            command[-1] = "2"
        result = subprocess.run(command, pass_fds=(its.fileno(),), timeout=20, check=False)
    assert result.returncode == 0


def test_protocol_needs_no_torch() -> None:
    code = "import sys, lowbit.engine.process; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(READY))["type"] == "ready"


def test_what_the_model_code_says_reaches_stderr_at_the_level_asked_for() -> None:
    code = "import logging\nfrom lowbit.engine.process import show_log\nshow_log({!r})\n"
    code += "log = logging.getLogger('lowbit')\nlog.debug('d')\nlog.info('lowbit: i')\nlog.warning('w')"
    for level, expected in (("debug", "d\nlowbit: i\nw\n"), ("info", "lowbit: i\nw\n"), ("error", "")):
        done = subprocess.run([sys.executable, "-c", code.format(level)], capture_output=True, text=True)
        assert (done.stderr, done.stdout, done.returncode) == (expected, "", 0)
