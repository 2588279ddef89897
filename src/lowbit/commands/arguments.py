"""The command line of one command: argparse splits the words, ``Settings`` gives the flags and their values.

argparse is used for what it is good at (splitting, help text) and nothing else: values are parsed and
checked in ``settings``, so that a flag and its variable follow one rule and fail with one message.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any, NoReturn

from lowbit.commands.other_flags import what_instead
from lowbit.commands.sglang_flags import ONLY, WITHOUT_EFFECT, refusal
from lowbit.errors import LowbitError, printable
from lowbit.settings import (
    GROUPS,
    Settings,
    default_of,
    did_you_mean,
    flag_of,
    options_of,
    parse,
    range_text,
    type_of,
    unknown_variables,
)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and without exits: what is wrong is a LowbitError."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **keywords)
        self.set_defaults(given={}, without_effect=[])

    def error(self, message: str) -> NoReturn:
        raise LowbitError("E0104", f"{message}. See: {self.prog} --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _Record(argparse.Action):
    """Remembers the flag as it was spelt and its text; the last one counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        text: str | bool = True  # a switch
        if isinstance(values, str):
            text = values
        elif values:
            text = ",".join(values)
        namespace.given = {**namespace.given, self.dest: (option_string or self.dest, text)}


class _SglangFlag(argparse.Action):
    """A flag of ``sglang_flags``: noted, or checked to have its only value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        flag = option_string or ""
        if flag in ONLY:
            only, why = ONLY[flag]
            if values != only:
                raise LowbitError("E0106", f"{flag} {printable(values)}: {why}; use {flag} {only}")
            return
        namespace.without_effect = [*namespace.without_effect, f"{flag} ({WITHOUT_EFFECT[flag][1]})"]


def add_options(
    parser: Parser, owner: type, groups: Iterable[str], only: Container[str] | None = None
) -> None:
    """The flags of a dataclass of options, one help section a group; ``only`` these fields, if given."""
    for group in groups:
        section = parser.add_argument_group(GROUPS.get(group, group))
        for name, rule in options_of(owner).items():
            if rule.group != group or (only is not None and name not in only):
                continue
            kind, _ = type_of(owner, name)
            shape: dict[str, Any] = {"action": _Record, "dest": name, "default": argparse.SUPPRESS}
            shape |= (
                {"nargs": 0} if kind is bool else {"metavar": rule.metavar or _metavar(kind, rule.choices)}
            )
            if rule.many:
                shape["nargs"] = "+"
            section.add_argument(flag_of(name), help=_help(owner, name), **shape)
            for alias in rule.aliases:
                parser.add_argument(alias, help=argparse.SUPPRESS, **shape)


def _metavar(kind: type, choices: tuple[str, ...]) -> str:
    if choices:
        return "|".join(choices)
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(owner: type, name: str) -> str:
    rule, default = options_of(owner)[name], default_of(owner, name)
    text = rule.help
    if rule.minimum is not None or rule.maximum is not None:
        text += f" {range_text(rule).capitalize()}."
    if default not in (None, False, "", ()):
        text += f" Default: {default}."
    return text.replace("%", "%%")


def add_sglang_flags(parser: Parser) -> None:
    """SGLang's flags that lowbit does not need; hidden from help. ``parse_arguments`` refuses the others."""
    shapes: dict[str, dict[str, Any]] = {"switch": {"nargs": 0}, "value": {}, "values": {"nargs": "+"}}
    hidden: dict[str, Any] = {
        "action": _SglangFlag,
        "dest": "_sglang",
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    for flag, (arity, _) in WITHOUT_EFFECT.items():
        parser.add_argument(flag, **hidden, **shapes[arity])
    for flag in ONLY:
        parser.add_argument(flag, **hidden)
    parser.set_defaults(takes_sglang_flags=True)


def add_model(parser: Parser) -> None:
    """The positional MODEL, which is ``--model`` without its name."""
    parser.add_argument("MODEL", nargs="?", help="folder, GGUF file or hub id (default: smollm2)")


def parse_arguments(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The words as a namespace; an option nobody knows is an error with the nearest name, one that another
    server knows an error with lowbit's."""
    for word in words:
        _refuse_elsewhere(parser, word.split("=", 1)[0])
    arguments, unknown = parser.parse_known_args(words)
    manual = f"See: {parser.prog} --help"
    flag = next((word.split("=", 1)[0] for word in unknown if word.startswith("-") and word != "-"), None)
    if flag is not None:
        elsewhere = [flag_of(name) for name in Settings.options()]
        here = [known for known in parser._option_string_actions if known.startswith("--")]
        if flag in elsewhere:
            raise LowbitError("E0102", f"{parser.prog} has no option {flag}. {manual}")
        hint = did_you_mean(flag, here) or f". {manual}"
        raise LowbitError("E0102", f"unknown option {printable(flag)}{hint}")
    if unknown:
        raise LowbitError(
            "E0104", f"unexpected argument {printable(repr(unknown[0]))}. See: {parser.prog} --help"
        )
    return arguments


def _refuse_elsewhere(parser: Parser, flag: str) -> None:
    """E0105 or E0102 for a flag of SGLang, vLLM or llama.cpp: before argparse, which takes -hf for -h."""
    if not flag.startswith("-") or flag in parser._option_string_actions:
        return
    if parser.get_default("takes_sglang_flags") and (why := refusal(flag)):
        raise LowbitError("E0105", f"{flag}: {why}")
    if "--context-length" in parser._option_string_actions and (instead := what_instead(flag)):
        raise LowbitError("E0102", f"unknown option {flag}; {instead}")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Settings of the flags, the LOWBIT_* variables and the positional MODEL; notes go to stderr."""
    given = dict(arguments.given)
    if (model := getattr(arguments, "MODEL", None)) is not None:
        spelled, flagged = given.get("model", ("MODEL", model))
        if flagged != model:
            raise LowbitError(
                "E0107",
                f"two models: {printable(repr(model))} and {spelled} {printable(repr(flagged))}; name one",
            )
        given["model"] = ("MODEL", model)
    settings = Settings.from_sources(given, os.environ)
    if arguments.without_effect:
        print(f"lowbit: note: without effect here: {', '.join(arguments.without_effect)}", file=sys.stderr)
    for warning in unknown_variables(os.environ):
        print(f"lowbit: warning: {warning}", file=sys.stderr)
    return settings


def options_from(owner: type, arguments: argparse.Namespace) -> Any:
    """An ``owner`` (a dataclass of options, no variables) from the flags given."""
    given = {name: given for name, given in arguments.given.items() if name in options_of(owner)}
    return owner(**{name: parse(owner, name, *word) for name, word in given.items()})
