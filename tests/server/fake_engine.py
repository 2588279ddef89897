"""An engine process without a model: the real message loop of lowbit.engine.process over a toy engine.

FAKE_ENGINE holds JSON that changes its behaviour; prompts may hold commands: CRASH (exception in a step),
KILL (SIGKILL to itself), HANG (a step that never ends), SLOW (one that takes two seconds and gets on), NAN
(numerical error), WIDE (32 KiB of text a token), REFUSE (submit raises).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lowbit.engine import process
from lowbit.engine.messages import (
    EngineReady,
    EngineStatus,
    MeasuredQuality,
    Request,
    TokenEvent,
    TokenLogprob,
)
from lowbit.engine.process import Connection, EngineLike, die_with_parent, serve_parent, set_signals
from lowbit.errors import LowbitError
from lowbit.settings import Settings
from server.fake_text import END, answer

OPTIONS = json.loads(os.environ.get("FAKE_ENGINE", "{}"))
CONTEXT, PAGE, POOL, RUNNING = 1000, 16, 640, 4
ADMITS = OPTIONS.get("admits", RUNNING)  # at once; the server knows of RUNNING


class Sequence:
    """A request and how far it is."""

    def __init__(self, request: Request) -> None:
        self.request = request
        wanted = request.sampling.max_tokens
        length = 40 if wanted is None else wanted
        self.length = length
        self.text = answer(request.prompt, length, request.sampling.seed or 0)
        self.done = 0
        self.begun = False
        self.sent = 0
        self.command = bytes(token for token in request.prompt if token < 256).decode(errors="replace")


class FakeEngine:
    """One token a step for up to RUNNING sequences."""

    def __init__(self) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.steps = self.prompt_tokens = self.generated = self.flushed = self.violations = 0
        self.cached = self.done = 0
        self.begun: list[str] = []

    def submit(self, request: Request) -> None:
        if b"REFUSE" in bytes(token for token in request.prompt if token < 256):
            raise LowbitError("never_fits", "the engine refuses this")
        self.cached += len(request.prompt) // 4
        self.prompt_tokens += len(request.prompt) - len(request.prompt) // 4
        self.sequences[request.id] = Sequence(request)

    def cancel(self, request_id: str) -> None:
        self.sequences.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.sequences)

    def step(self) -> list[TokenEvent]:
        time.sleep(OPTIONS.get("step_seconds", 0.002))
        self.steps += 1
        events = []
        self.begun = []
        for sequence in list(self.sequences.values())[:ADMITS]:
            if not sequence.begun:
                sequence.begun = True
                self.begun.append(sequence.request.id)
            event = self.advance(sequence)
            events.append(event)
            if event.finish_reason:
                del self.sequences[sequence.request.id]
        return events

    def admitted(self) -> list[str]:
        return self.begun

    def progress(self) -> int:
        return self.done

    def advance(self, sequence: Sequence) -> TokenEvent:
        request, sampling = sequence.request, sequence.request.sampling
        if sequence.done == 3:
            self.obey(sequence.command)
        if "NAN" in sequence.command and sequence.done == OPTIONS.get("nan_at", 0):
            text = "NaN in layer 17 mlp.down_proj (int4) at token 42; request stopped, others unaffected"
            return TokenEvent(
                id=request.id, finish_reason="error", error_code="model_numerical_error", error=text
            )
        if "ODDERROR" in sequence.command:
            return TokenEvent(id=request.id, finish_reason="error", error_code="E9999", error="/secret/path")
        prompt_logprobs = None
        if sequence.done == 0 and sampling.prompt_logprobs is not None:
            later = [logprob(token, sampling.prompt_logprobs) for token in request.prompt[1:]]
            prompt_logprobs = (None, *later)
        first = {"prompt_logprobs": prompt_logprobs, "cached_tokens": 2 if len(request.prompt) > 8 else 0}
        if request.echo_only:
            return TokenEvent(
                id=request.id,
                finish_reason="length",
                prompt_tokens=len(request.prompt),
                **first,
            )
        token = ord(sequence.text[sequence.done])
        sequence.done += 1
        self.generated += 1
        stop = next((s for s in sampling.stop if s in sequence.text[: sequence.done]), None)
        reason = "stop" if stop else "length" if sequence.done == sequence.length else None
        if stop:
            text = sequence.text[sequence.sent : sequence.text.index(stop)]
        else:  # every second token's text is held back, as a real detokenizer does with parts of characters
            certain = sequence.done - max((len(stop) - 1 for stop in sampling.stop), default=0)
            until = sequence.done if reason else sequence.sent if sequence.done % 2 else certain
            text = sequence.text[sequence.sent : max(sequence.sent, until)]
        sequence.sent += len(text)
        if "WIDE" in sequence.command:
            text = "w" * 32768
        return TokenEvent(
            id=request.id,
            tokens=(token,),
            text=text,
            logprobs=() if sampling.logprobs is None else (logprob(token, sampling.logprobs),),
            finish_reason=reason,
            matched_stop=stop,
            prompt_tokens=len(request.prompt) if reason else 0,
            completion_tokens=sequence.done if reason else 0,
            accepted_drafts=sequence.done // 3 if reason else 0,
            rejected_drafts=1 if reason else 0,
            **(first if sequence.done == 1 else {}),
        )

    def obey(self, command: str) -> None:
        if "CRASH" in command:
            raise RuntimeError("evil forward")
        if "KILL" in command:
            os.kill(os.getpid(), signal.SIGKILL)
        if "HANG" in command:
            time.sleep(1000)
        if "SLOW" in command:
            for _ in range(40):
                time.sleep(0.05)
                self.done += 1

    def status(self) -> EngineStatus:
        return EngineStatus(
            running=min(ADMITS, len(self.sequences)),
            waiting=max(0, len(self.sequences) - ADMITS),
            pages_total=POOL // PAGE,
            pages_free=POOL // PAGE - len(self.sequences),
            steps=self.steps,
            captured_steps=self.steps // 2,
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached,
            generated_tokens=self.generated,
            draft_tokens=self.generated // 2,
            accepted_draft_tokens=self.generated // 3,
            preemptions=self.flushed,
            invariant_violations=self.violations,
        )

    def idle_step(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to keep."""

    def flush_cache(self) -> None:
        self.flushed += 1

    def check(self) -> object:
        self.violations += bool(OPTIONS.get("violate"))
        return ["page 3 is free and used"] if OPTIONS.get("violate") else []


def logprob(token: int, count: int) -> TokenLogprob:
    """The token first, then its neighbours; one of them impossible."""
    top = tuple(((token + step) % 256, -0.25 * (step + 1)) for step in range(count))
    if count > 2:
        top = (*top[:-1], (top[-1][0], float("-inf")))
    return TokenLogprob(token, -0.25, top)


def build(settings: Settings, progress: Callable[[int, int, str], None]) -> tuple[EngineLike, EngineReady]:
    """Pretend to load."""
    assert (
        settings.model == "/fake"
        and settings.served_model_name
        and settings.api_key is None
        and settings.api_key_file is None
    )
    starts = OPTIONS.get("count_starts")
    if starts:
        with Path(starts).open("a") as file:
            file.write(f"{os.getpid()} {settings.max_running_requests}\n")
        started = len(Path(starts).read_text().splitlines())
        if OPTIONS.get("fail_after") and started > OPTIONS["fail_after"]:
            raise LowbitError("E0203", "x.gguf is truncated")
    steps = 10
    for step in range(steps):
        progress(step, steps, "weights")
        time.sleep(OPTIONS.get("load_seconds", 0.0) / steps)
    if OPTIONS.get("load_error"):
        raise LowbitError("E0203", "x.gguf is 10 bytes but its header needs 20: incomplete download")
    if OPTIONS.get("load_kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    progress(steps, steps, "weights")
    ready = EngineReady(
        model_name="fake",
        context_length=CONTEXT,
        pool_tokens=POOL,
        page_size=PAGE,
        vocab_size=END + 1,
        max_running=RUNNING,
        architecture="FakeForCausalLM",
        quantization='int4 "1x128"\n',
        weight_bytes=12345678901,
        quality=MeasuredQuality(**OPTIONS["quality"]) if "quality" in OPTIONS else None,
        details={"kernel": "none"},
    )
    return FakeEngine(), ready


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    set_signals()
    process._PULSE_SECONDS = OPTIONS.get("pulse_seconds", process._PULSE_SECONDS)
    die_with_parent(options.parent)
    sys.exit(serve_parent(Connection(socket.socket(fileno=options.fd)), build))
