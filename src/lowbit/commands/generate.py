"""``lowbit generate [MODEL] --prompt TEXT``: continue one prompt; text on stdout, or a JSON object."""

from __future__ import annotations

import argparse
import json
import sys

from lowbit.commands.arguments import Parser, add_model, add_options, options_from, settings_from
from lowbit.commands.sampling_options import GROUP, SamplingOptions
from lowbit.errors import LowbitError, printable

USAGE = "[MODEL] --prompt TEXT"
GROUPS: tuple[str, ...] = ("model", "engine")


def add_arguments(parser: Parser) -> None:
    """MODEL, the prompt, and how to sample."""
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue; without it, standard input")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
    parser.add_argument("--json", action="store_true", help="print text, counts and speed as one JSON object")
    add_options(parser, SamplingOptions, (GROUP,))


def run(arguments: argparse.Namespace) -> int:
    """Generate once."""
    settings, options = settings_from(arguments), options_from(SamplingOptions, arguments)
    prompt = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt:
        raise LowbitError("E0110", "no prompt; use --prompt TEXT, or pipe the text in")
    from lowbit.commands.local_model import Speed, load, stream, terminal_text

    llm = load(settings)
    if not arguments.chat:
        tokens = llm.tokenizer.encode(prompt)
    elif llm.chat_template is not None:
        tokens = llm.chat_template.render([{"role": "user", "content": prompt}])
    else:
        raise LowbitError("E0252", f"{printable(settings.model)} has no chat template; leave out --chat")
    text, last, speed = "", None, Speed()
    for last in stream(llm, tokens, options.applied_to(llm.default_sampling), speed):
        text += last.text
        if not arguments.json:
            print(terminal_text(last.text) if sys.stdout.isatty() else last.text, end="", flush=True)
    if not arguments.json:
        print()
        return 0
    assert last is not None, "every request ends in a final event"
    record = {
        "model": settings.model,
        "text": text,
        "finish_reason": last.finish_reason,
        "matched_stop": last.matched_stop,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "tokens_per_second": round(speed.rate, 2),
    }
    print(json.dumps(record, ensure_ascii=False))
    return 0
