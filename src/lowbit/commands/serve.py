"""``lowbit serve [MODEL]``: the HTTP server, with the engine in a process of its own."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lowbit.commands.arguments import Parser, add_model, add_sglang_flags, settings_from
from lowbit.errors import LowbitError, printable, thousands

if TYPE_CHECKING:
    from lowbit.engine.messages import EngineReady

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model", "engine", "server")


def add_arguments(parser: Parser) -> None:
    """MODEL, and SGLang's flags that lowbit does not need."""
    add_model(parser)
    add_sglang_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop: a progress bar while the model loads, then where it is served and how."""
    settings = settings_from(arguments)
    from lowbit.server.engine_start import EngineProcess

    try:
        started = EngineProcess()
    except OSError as error:
        text = f"the engine process could not be started: {error.strerror or error}"
        raise LowbitError("E0710", text) from None
    with started as engine, ExitStack() as loading:
        # What follows takes a while to import; meanwhile the engine process imports torch.
        from lowbit.commands.console import progress_line
        from lowbit.server.app import serve

        show = loading.enter_context(progress_line())

        def on_ready(ready: EngineReady, url: str) -> None:
            loading.close()
            print(summary(ready, url), file=sys.stderr, flush=True)

        return serve(settings, on_ready, on_progress=show, engine=engine)


def summary(ready: EngineReady, url: str) -> str:
    """What is served where, and within which limits."""
    context = thousands(ready.context_length)
    first = (
        f"lowbit: ready: {printable(ready.model_name)} on {url}, context {context} tokens, KV cache "
        f"{thousands(ready.pool_tokens)} tokens, {ready.max_running} requests at once"
    )
    return "\n".join([first, *(f"lowbit: {printable(k)}: {printable(v)}" for k, v in ready.details.items())])
