"""``lowbit``: finds the command, runs it, and turns whatever goes wrong into one line and an exit status.

    lowbit: error[E0203]: model.safetensors is 1 073 741 824 bytes but its header needs 4 982 131 536 …

The codes are those of ``error_catalogue`` (``lowbit explain E0203``), the exit statuses those of ``errors``.
Only the command that runs is imported: ``lowbit --help`` loads neither torch nor a web framework.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.errors import EXIT_USAGE, LowbitError, printable
from lowbit.settings import did_you_mean

if TYPE_CHECKING:
    import argparse

    from lowbit.commands.arguments import Parser

COMMANDS = {
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "chat": "Talk to a model in the terminal.",
    "generate": "Continue one prompt and print the text.",
    "inspect": "Say what a checkpoint is and how it would run, without loading it.",
    "check": "Read all of a checkpoint and say what is wrong with it; --fix writes a corrected copy.",
    "convert": "Write a model in another format, its numbers unchanged, or as plain floats.",
    "pull": "Download a model, so that it can be served offline.",
    "models": "List what can be served: architectures, formats, models on this machine.",
    "explain": "Explain an error code: lowbit explain E0203.",
}

# What others call a command, or somebody may look for -> what does it here.
_SYNONYMS = {
    "quantize": "serve MODEL --quantization METHOD --save-quantized DIR, or convert",
    "doctor": "check MODEL",
    "run": "chat MODEL, or generate MODEL --prompt TEXT",
    "download": "pull MODEL",
    "list": "models",
    "info": "inspect MODEL",
    "launch_server": "serve MODEL",
}

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE: `lowbit models | head -1`


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words or _variable_on("LOWBIT_DEBUG")
    json_errors = "--json-errors" in words or _variable_on("LOWBIT_JSON_ERRORS")
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return report(as_lowbit_error(error), json_errors)


def report(error: LowbitError, as_json: bool = False) -> int:
    """Print the error's one line to stderr; its exit status."""
    if as_json:
        line = json.dumps(
            {"error": {"code": error.code, "message": error.message, "exit_code": error.exit_code}}
        )
    else:
        line = f"lowbit: {error}"
    print(line, file=sys.stderr, flush=True)
    return error.exit_code


def as_lowbit_error(error: Exception) -> LowbitError:
    """The line for an exception: its own, the operating system's word, or a bug of lowbit's."""
    if isinstance(error, LowbitError):
        return error
    if isinstance(error, MemoryError):
        return LowbitError("E0500", "out of memory; close other programs, or use a smaller model or context")
    if isinstance(error, OSError) and error.filename is not None:
        where, why = printable(os.fsdecode(error.filename)), error.strerror or type(error).__name__
        return LowbitError("E0300", f"{where}: {why}")
    text = printable(error, 300)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return LowbitError("E0700", f"unexpected {what}. This is a fault in lowbit; --debug shows where")


def _run(words: list[str]) -> int:
    # --debug and --json-errors belong to every command and may stand before its name.
    leading = [word for word in words[:2] if word in ("--debug", "--json-errors")]
    while words and words[0] in leading:
        words = words[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(f"lowbit {_version()}")
        return 0
    name, rest = words[0], [*words[1:], *leading]
    if name not in COMMANDS:
        hint = f"; use: lowbit {_SYNONYMS[name]}" if name in _SYNONYMS else did_you_mean(name, COMMANDS)
        hint = hint or f". Commands: {', '.join(COMMANDS)}"
        raise LowbitError("E0101", f"unknown command {printable(repr(name))}{hint}")
    module = importlib.import_module(f"lowbit.commands.{name}")
    arguments = parse(name, rest)
    status: int = module.run(arguments)
    return status


def parser_of(name: str) -> Parser:
    """The parser of one command, with the options of the groups it takes."""
    from lowbit.commands import arguments as command_arguments
    from lowbit.settings import Settings

    module = importlib.import_module(f"lowbit.commands.{name}")
    words = f"{module.USAGE} [options]" if module.USAGE else "[options]"
    parser = command_arguments.Parser(
        prog=f"lowbit {name}", usage=f"lowbit {name} {words}", description=COMMANDS[name]
    )
    module.add_arguments(parser)
    command_arguments.add_options(parser, Settings, (*module.GROUPS, "messages"))
    return parser


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command."""
    from lowbit.commands.arguments import parse_arguments

    return parse_arguments(parser_of(name), words)


def _variable_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # a few hundredths of a second

    try:
        return version("lowbit")
    except PackageNotFoundError:
        return "(not installed)"


def _overview() -> str:
    lines = [
        "usage: lowbit COMMAND [MODEL] [options]",
        "",
        "Serve quantized language models.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "MODEL is a folder, a GGUF file or a hub id; without one it is smollm2, the embedded model.",
        "lowbit COMMAND --help lists a command's options; docs/options.md lists all of them.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
