"""Which GGUF architectures become which Hugging Face classes, and the other way: for docs/formats.md."""

from __future__ import annotations

import importlib
from collections import defaultdict

from formats.helpers import FIXTURES
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.loading.source_modules import SourceModel
from lowbit.models.config_keys import architecture_of
from lowbit.models.gguf_metadata import ARCHITECTURES, SEEING
from lowbit.models.registry import MODULES, Family


def becomes() -> dict[str, set[str]]:
    """GGUF architecture -> the classes of the folders made of the fixtures' files; empty: refused."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(FIXTURES.glob("gguf*families/*.gguf")):
        source = SourceModel(open_checkpoint(str(path)))
        classes = found[architecture_of(source.header)]
        with TensorData(source.header) as data:
            try:
                classes.update(map(str, source.hf_config(data)["architectures"]))  # type: ignore[call-overload]
            except LowbitError:
                assert not classes
    return found


def written_from() -> dict[str, set[str]]:
    """GGUF architecture -> the classes whose folders are written as it."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, (module, attribute) in MODULES.items():
        family = getattr(importlib.import_module(f"lowbit.models.{module}"), attribute)
        if name in SEEING:
            found[SEEING[name]].add(name)
        in_folders = name.endswith(("ForCausalLM", "LMHeadModel")) and isinstance(family, Family)
        if in_folders and family.name in ARCHITECTURES:
            found[ARCHITECTURES[family.name]].add(name)
    return found


def conversions() -> list[str]:
    """Markdown."""
    lines = [
        "## GGUF files and Hugging Face folders",
        "",
        "What `lowbit convert` makes of a GGUF file of an architecture, and which folders it writes as one. "
        "Of the fixtures every folder has its file's logits in transformers, and every file the tensors and "
        "keys of llama.cpp's converter. Classes that transformers does not have become those they amount to.",
        "",
        "| GGUF architecture | becomes | is written from |",
        "| --- | --- | --- |",
    ]
    folders, files = becomes(), written_from()
    for name in sorted(folders.keys() | files.keys()):
        made = ", ".join(f"`{one}`" for one in sorted(folders.get(name, ())))
        of = ", ".join(f"`{one}`" for one in sorted(files.get(name, ())))
        lines.append(f"| `{name}` | {made or 'refused'} | {of or 'refused'} |")
    return lines
