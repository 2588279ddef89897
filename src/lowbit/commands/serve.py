"""``lowbit serve [MODEL]``: the HTTP server, with the engine in a process of its own."""

from __future__ import annotations

import argparse

from lowbit.commands.arguments import Parser, add_model, add_sglang_flags, settings_from

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model", "engine", "server")


def add_arguments(parser: Parser) -> None:
    """MODEL, and SGLang's flags that lowbit does not need."""
    add_model(parser)
    add_sglang_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    settings = settings_from(arguments)
    from lowbit.server.app import serve

    return serve(settings)
