"""Spelling: families whose config keys and tensors are the usual ones under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader


def respelled(
    header: CheckpointHeader, keys: Mapping[str, str] | None = None, **absent: object
) -> CheckpointHeader:
    """config.json with the usual keys beside the family's own: ``keys``, usual key -> the family's.

    ``absent``: usual keys that a config of the family may leave out, with what its class takes then. GGUF
    files spell all families alike and stay as they are.
    """
    if header.container == "gguf":
        return header
    config = dict(header.config)
    for usual, own in (keys or {}).items():
        if config.get(usual) is None and config.get(own) is not None:
            config[usual] = config[own]
    for key, value in absent.items():
        if config.get(key) is None:
            config[key] = value
    return replace(header, config=config)


def untold(header: CheckpointHeader, **values: object) -> CheckpointHeader:
    """config.json with what it means where these keys are not there; null is a value of its own."""
    return replace(header, config=values | header.config)


def aliases(
    layer: str, inside: Mapping[str, str], outside: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """The spellings of ``Family.aliases``: usual module -> the family's.

    ``inside``: under a layer, which the family calls ``layer`` (``transformer.h.{n}``); ``outside``: others.
    """
    prefix = layer.replace("{n}", r"\1")
    within = [
        (rf"^model\.layers\.(\d+)\.{re.escape(usual)}$", f"{prefix}.{own}") for usual, own in inside.items()
    ]
    return (*within, *((f"^{re.escape(usual)}$", own) for usual, own in (outside or {}).items()))
