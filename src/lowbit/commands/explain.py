"""``lowbit explain E0203``: what an error means, where it comes from and what to do."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from lowbit.commands.arguments import Parser
from lowbit.error_catalogue import CATALOGUE, KINDS, Entry
from lowbit.errors import LowbitError, printable

USAGE = "[CODE]"
GROUPS: tuple[str, ...] = ()


def add_arguments(parser: Parser) -> None:
    """CODE; without it all codes are listed."""
    parser.add_argument("CODE", nargs="?", help="a code such as E0203; without one, all are listed")


def run(arguments: argparse.Namespace) -> int:
    """Print the paragraph of one code, or the titles of all."""
    if arguments.CODE is None:
        print(listing())
    else:
        code = normal_code(arguments.CODE)
        print(explanation(code, CATALOGUE[code], shutil.get_terminal_size((100, 24)).columns))
    return 0


def normal_code(text: str) -> str:
    """``e203`` or ``0203`` as ``E0203``; E0108 where there is no such error."""
    code = "E" + text.upper().removeprefix("ERROR[").rstrip("]:").removeprefix("E").rjust(4, "0")
    if code not in CATALOGUE:
        raise LowbitError("E0108", f"no error has the code {printable(repr(text))}; all: lowbit explain")
    return code


def explanation(code: str, entry: Entry, width: int) -> str:
    """The page of one error."""
    exit_code = LowbitError(code, "").exit_code
    paragraphs = [f"{code}: {entry.title}", entry.meaning, f"What to do: {entry.way_out}"]
    paragraphs.append(f"Kind: {KINDS[code[:3]]}; the command exits with status {exit_code}.")
    return "\n\n".join(textwrap.fill(paragraph, min(width, 100)) for paragraph in paragraphs)


def listing() -> str:
    """All codes with their titles, by kind."""
    lines = []
    for prefix, kind in KINDS.items():
        codes = sorted(code for code in CATALOGUE if code.startswith(prefix))
        if codes:
            lines += [
                "",
                kind[0].upper() + kind[1:],
                *(f"  {code}  {CATALOGUE[code].title}" for code in codes),
            ]
    return "\n".join(lines[1:])
