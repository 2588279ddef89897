"""``lowbit models``: what can be served, and which models are on this disk already."""

from __future__ import annotations

import argparse

from lowbit.commands.arguments import Parser
from lowbit.errors import printable

USAGE = ""
GROUPS: tuple[str, ...] = ()


def add_arguments(parser: Parser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print architectures, formats, the embedded model and the hub's cache."""
    from lowbit.formats import all_formats
    from lowbit.models.registry import supported_architectures

    print("architectures")
    for name in supported_architectures():
        print(f"  {name}")
    print("checkpoint formats")
    for form in all_formats():
        print(f"  {form.name:<12} {form.reference}")
    print("embedded model")
    print(f"  smollm2      SmolLM2-135M-Instruct, GGUF Q4_1 ({_embedded_state()})")
    print("hub cache")
    for line in _cached_models() or ["nothing"]:
        print(f"  {line}")
    return 0


def _embedded_state() -> str:
    from lowbit.checkpoint.embedded import cached_model

    where = cached_model()
    return f"in {printable(where, 400)}" if where else "not on this disk yet; fetched when first used"


def _cached_models() -> list[str]:
    """One line for each model repository in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from lowbit.commands.console import binary_size

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    repositories = sorted(cache.repos, key=lambda repository: repository.repo_id)
    return [
        f"{printable(repository.repo_id)}  {binary_size(repository.size_on_disk)}"
        for repository in repositories
        if repository.repo_type == "model"
    ]
