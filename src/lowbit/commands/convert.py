"""``lowbit convert MODEL --format dense --out DIR``: the same numbers in another format.

    lowbit convert smollm2 --format dense --out smollm2-float
    lowbit convert ./model-gptq --format compressed-tensors --out ./model-ct
    lowbit convert ./model-fp8 --format gptq --requantize rtn:bits=8 --out ./model-int8

``dense`` is the model as plain floats, whatever it was: in the narrowest type that holds every weight
exactly, or in ``--dtype``, and then the output says how far weights were rounded. Other formats are written
where they can say exactly what the checkpoint says; what they cannot is refused, or with ``--requantize``
quantized anew, and then the output says how far each module's numbers went. The result is read back and
compared before it is there, and ``lowbit-conversion.json`` beside it says so. A run that was broken off goes
on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowbit.commands.arguments import Parser, add_model, add_options, settings_from
from lowbit.errors import LowbitError, printable
from lowbit.settings import Settings

USAGE = "[MODEL] --format FORMAT --out DIR"
GROUPS: tuple[str, ...] = ()
_OPTIONS = (
    "model",
    "revision",
    "tokenizer",
    "dtype",
    "load_format",
    "strict",
)  # of the group "model": heeded
_DTYPES = {"auto": None, "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def add_arguments(parser: Parser) -> None:
    """MODEL, --format, --out, --requantize, --force, --json."""
    add_model(parser)
    parser.add_argument("--format", metavar="FORMAT", help="dense, or a format that holds the same numbers")
    parser.add_argument("--out", metavar="DIR", help="folder to write; for gguf the file")
    parser.add_argument(
        "--requantize",
        metavar="METHOD",
        nargs="?",
        const="",
        help="quantize what the format cannot hold exactly, by this method or the format's usual one",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    add_options(parser, Settings, ("model",), _OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Convert the model; 0."""
    for flag in ("format", "out"):
        if not getattr(arguments, flag):
            raise LowbitError("E0104", f"--{flag} is missing. See: lowbit convert --help")
    settings = settings_from(arguments)
    from lowbit.checkpoint import open_checkpoint
    from lowbit.commands.console import progress_line
    from lowbit.loading.convert import convert, summary

    out = Path(arguments.out).expanduser()
    with progress_line() as on_progress:
        header = open_checkpoint(
            settings.model, settings.revision, on_progress, load_format=settings.load_format
        )
        done = convert(
            header,
            arguments.format,
            out,
            dtype=_DTYPES[settings.dtype],
            requantize=arguments.requantize,
            force=arguments.force,
            strict=settings.strict,
            tokenizer=None if settings.tokenizer is None else open_checkpoint(settings.tokenizer),
            on_progress=on_progress,
        )
    if arguments.json:
        told = {**vars(done), "out": str(done.out)}
        print(json.dumps(told, indent=2))
    else:
        for line in summary(done):
            print(printable(line, 400))
    return 0
