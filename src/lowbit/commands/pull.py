"""``lowbit pull MODEL``: a model's files on this disk, so that it can be served without a network."""

from __future__ import annotations

import argparse

from lowbit.commands.arguments import Parser, add_model, settings_from
from lowbit.errors import printable

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model",)


def add_arguments(parser: Parser) -> None:
    """MODEL."""
    add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fetch, check the headers, and say where it lies."""
    settings = settings_from(arguments)
    from lowbit.checkpoint import open_checkpoint
    from lowbit.commands.console import binary_size, progress_line

    with progress_line() as on_progress:
        header = open_checkpoint(
            settings.model, settings.revision, on_progress, load_format=settings.load_format
        )
    revision = f" at {header.revision}" if header.revision else ""
    print(
        f"{printable(settings.model)}{revision}: {len(header.tensors)} tensors, "
        f"{binary_size(header.nbytes)}, in {printable(header.root, 400)}"
    )
    return 0
