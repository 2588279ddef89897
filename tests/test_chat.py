"""``lowbit chat`` and ``lowbit generate`` over a stand-in model that answers by rule."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar

import pytest

from lowbit.cli import main
from lowbit.engine.messages import SamplingParams, TokenEvent
from lowbit.errors import LowbitError
from lowbit.settings import Settings


class ByteTokenizer:
    """A token is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class BarTemplate:
    """``role|content`` for every message."""

    def render(self, messages: list[dict[str, object]]) -> list[int]:
        return list("\n".join(f"{m['role']}|{m['content']}" for m in messages).encode())


class Echo:
    """Answers with the last line of its prompt in capitals, two tokens an event."""

    made: ClassVar[list[Echo]] = []

    def __init__(self, settings: Settings, on_progress: Callable[[int, int, str], None]) -> None:
        on_progress(1, 1, "weights")
        self.settings = settings
        self.tokenizer = ByteTokenizer()
        self.chat_template: BarTemplate | None = None if settings.model == "base" else BarTemplate()
        self.default_sampling = SamplingParams(temperature=0.6, top_k=7)
        self.calls: list[tuple[str, SamplingParams]] = []
        Echo.made.append(self)

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Iterator[TokenEvent]:
        text = bytes(prompt).decode()
        self.calls.append((text, sampling))
        answer = text.splitlines()[-1].split("|")[-1].upper()
        if answer == "LONG":
            raise LowbitError("E0505", "prompt too long")
        if answer == "NAN":
            yield TokenEvent(id="a", finish_reason="error", error="NaN in layer 3")
            return
        for i in range(0, len(answer), 2):
            if answer == "STOP" and i:
                raise KeyboardInterrupt
            yield TokenEvent(id="a", tokens=(1, 2), text=answer[i : i + 2])
        yield TokenEvent(
            id="a", finish_reason="stop", prompt_tokens=len(prompt), completion_tokens=len(answer)
        )


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    Echo.made.clear()
    stub = ModuleType("lowbit.llm")
    stub.LLM = Echo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit.llm", stub)


class Terminal(io.StringIO):
    """Standard input of a test."""


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command with text on its standard input."""

    def run(words: list[str], text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        status = main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_piped_conversation(say: Say) -> None:
    status, out, err = say(["chat", "--system", "be brief"], "hello\n\nand you\n")
    assert (status, out) == (0, "HELLO\nAND YOU\n")
    assert [line.split(",")[0] for line in err.splitlines()] == ["[6 tokens", "[8 tokens"]
    assert all(line.endswith(" tok/s]") for line in err.splitlines())
    prompts = [text for text, _ in Echo.made[0].calls]
    assert prompts == [
        "system|be brief\nuser|hello",
        "system|be brief\nuser|hello\nassistant|HELLO\nuser|and you",
    ]


def test_reset_exit_and_unknown_commands(say: Say) -> None:
    status, out, err = say(["chat"], "one\n/reset\ntwo\n/what\n/exit\nthree\n")
    assert (status, out) == (0, "ONE\nTWO\n")
    assert "commands: /reset /exit\n" in err
    assert [text for text, _ in Echo.made[0].calls] == ["user|one", "user|two"]


def test_an_interrupt_stops_the_answer_and_keeps_it(say: Say) -> None:
    status, out, err = say(["chat"], "stop\nnext\n")
    assert (status, out) == (0, "ST\nNEXT\n")
    assert err.splitlines()[0].endswith(", stopped]")
    assert Echo.made[0].calls[1][0] == "user|stop\nassistant|ST\nuser|next"


def test_an_error_ends_a_piped_conversation(say: Say) -> None:
    assert say(["chat"], "long\nnext\n") == (5, "", "lowbit: error[E0505]: prompt too long\n")
    status, _, err = say(["chat"], "nan\n")
    assert (status, err) == (70, "lowbit: error[E0704]: the engine ended the request: NaN in layer 3\n")


def test_an_error_in_a_terminal_is_shown_and_its_message_forgotten(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: True)
    answers = iter(["long", "next"])

    def typed(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    status, out, err = say(["chat"])
    assert (status, out) == (0, "NEXT\n\n")
    assert "lowbit: error[E0505]: prompt too long\n" in err
    assert err.startswith("smollm2. /reset forgets the conversation, /exit leaves.\n")
    assert Echo.made[0].calls[1][0] == "user|next"


def test_a_terminal_never_obeys_the_model(say: Say) -> None:
    assert say(["chat"], "\x1b[2J\u202eok\n")[1] == "\\x1b[2J\\u202eOK\n"


def test_chat_needs_a_template(say: Say) -> None:
    status, _, err = say(["chat", "base"], "x\n")
    expected = "base has no chat template; use lowbit generate, or --chat-template FILE"
    assert (status, err) == (3, f"lowbit: error[E0252]: {expected}\n")


def test_sampling_flags_replace_what_the_checkpoint_recommends(say: Say) -> None:
    say(["chat"], "x\n")
    say(["chat", "--temperature", "0", "--max-tokens=9", "--seed", "-3", "--top-p", "0.5"], "x\n")
    assert Echo.made[0].calls[0][1] == SamplingParams(temperature=0.6, top_k=7)
    expected = SamplingParams(temperature=0.0, top_k=7, top_p=0.5, max_tokens=9, seed=-3)
    assert Echo.made[1].calls[0][1] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], "--temperature must be between 0 and 2, got nan"),
        (["--temperature", "hot"], "--temperature needs a number, got 'hot'"),
        (["--max-tokens", "0"], "--max-tokens must be 1 or more, got 0"),
        (["--top-p", "1.1"], "--top-p must be between 0 and 1, got 1.1"),
    ],
)
def test_bad_sampling_flags(say: Say, words: list[str], message: str) -> None:
    assert say(["generate", "--prompt", "x", *words]) == (2, "", f"lowbit: error[E0103]: {message}\n")
    assert not Echo.made, "checked before the model is loaded"


def test_generate(say: Say) -> None:
    assert say(["generate", "m", "--prompt", "abc", "--threads", "1"])[:2] == (0, "ABC\n")
    assert Echo.made[0].settings == Settings(model="m", threads=1)
    assert Echo.made[0].calls[0][0] == "abc"
    assert say(["generate"], "from a pipe")[1] == "FROM A PIPE\n"
    assert say(["generate", "--chat", "--prompt", "hi"])[1] == "HI\n"
    assert Echo.made[2].calls[0][0] == "user|hi"


def test_a_prompt_that_does_not_fit_is_a_wish_not_a_fault(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*arguments: object) -> Iterator[TokenEvent]:
        raise LowbitError("prompt_too_long", "prompt is 9 tokens and max_tokens 99: 108 > context 100")
        yield

    monkeypatch.setattr(Echo, "stream", stream)
    status, _, err = say(["generate", "--prompt", "x"])
    line = "lowbit: error[E0112]: prompt is 9 tokens and max_tokens 99: 108 > context 100\n"
    assert (status, err) == (2, line)


def test_generate_json(say: Say) -> None:
    record = json.loads(say(["generate", "--prompt", "äbc", "--json"])[1])
    assert record.pop("tokens_per_second") >= 0
    assert record == {
        "model": "smollm2",
        "text": "ÄBC",
        "finish_reason": "stop",
        "matched_stop": None,
        "prompt_tokens": 4,
        "completion_tokens": 3,
    }


def test_generate_needs_a_prompt(say: Say) -> None:
    line = "lowbit: error[E0110]: no prompt; use --prompt TEXT, or pipe the text in\n"
    assert say(["generate"]) == (2, "", line)
    assert say(["generate", "--prompt", ""]) == (2, "", line)
    line = "lowbit: error[E0252]: base has no chat template; leave out --chat\n"
    assert say(["generate", "base", "--chat", "--prompt", "x"]) == (3, "", line)
