"""``lowbit chat [MODEL]``: a conversation in the terminal, streamed, with its speed.

    > Hello!
    Hi, how can I help you?
    [8 tokens, 71.3 tok/s]

Lines come from the terminal, or from a file or pipe, one message a line. ``/reset`` forgets the
conversation, ``/exit`` (or the end of the input) leaves. Ctrl-C stops an answer; what was written stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowbit.commands.arguments import Parser, add_model, add_options, options_from, settings_from
from lowbit.commands.sampling_options import GROUP, SamplingOptions
from lowbit.errors import LowbitError, printable

if TYPE_CHECKING:
    from lowbit.engine.messages import SamplingParams
    from lowbit.llm import LLM

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model", "engine")


def add_arguments(parser: Parser) -> None:
    """MODEL, --system and how to sample."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message the conversation begins with")
    add_options(parser, SamplingOptions, (GROUP,))


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends."""
    settings, options = settings_from(arguments), options_from(SamplingOptions, arguments)
    from lowbit.commands.local_model import load

    llm = load(settings)
    if llm.chat_template is None:
        raise LowbitError(
            "E0252",
            f"{printable(settings.model)} has no chat template; use lowbit generate, or --chat-template FILE",
        )
    chat = Conversation(llm, options.applied_to(llm.default_sampling), arguments.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{printable(settings.model)}. /reset forgets the conversation, /exit leaves.", file=sys.stderr)
    converse(chat, lines_from_terminal() if interactive else sys.stdin, go_on_after_errors=interactive)
    return 0


def lines_from_terminal() -> Iterator[str]:
    """Lines with a prompt, editing and history."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines when it is loaded
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def converse(chat: Conversation, lines: Iterator[str], *, go_on_after_errors: bool) -> None:
    """Answer every line."""
    for line in lines:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print("commands: /reset /exit", file=sys.stderr)
        elif text:
            try:
                statistics = chat.say(text, lambda piece: print(piece, end="", flush=True))
                print()
                print(f"[{statistics}]", file=sys.stderr, flush=True)
            except LowbitError as error:
                if not go_on_after_errors:
                    raise
                print(f"lowbit: {error}", file=sys.stderr)


@dataclass
class Conversation:
    """The messages so far and who answers them."""

    llm: LLM
    sampling: SamplingParams
    system: str | None = None
    messages: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str, write: Callable[[str], object]) -> str:
        """Answer ``text``, writing pieces as they come; tokens and speed in words.

        Ctrl-C ends the answer and keeps it. A message that could not be answered is forgotten.
        """
        from lowbit.commands.local_model import Speed, stream, terminal_text

        self.messages.append({"role": "user", "content": text})
        answer, speed, stopped = "", Speed(), ""
        try:
            assert self.llm.chat_template is not None, "checked before the conversation began"
            prompt = self.llm.chat_template.render(self.messages)
            for event in stream(self.llm, prompt, self.sampling, speed):
                answer += event.text
                write(terminal_text(event.text))
                if event.finish_reason == "length":
                    stopped = ", cut: longest answer reached"
        except KeyboardInterrupt:
            stopped = ", stopped"
        except LowbitError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return f"{speed.tokens} tokens, {speed.rate:.1f} tok/s{stopped}"
