"""Which formats can hold what others stored, bit for bit: every fixture against every writer.

A pair counts if every module is read, packed by the writer and has the source's numbers; nothing is written
to disk. ``dense`` holds everything in float32 and is left out.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

from formats.helpers import FIXTURES
from formats.writing_cases import source_of
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.gguf_writer import GgufWriter
from lowbit.formats.writing import all_writers
from lowbit.loading.convert import Work
from lowbit.loading.gguf_saving import _Plan
from lowbit.loading.source_modules import SourceModel
from lowbit.models.gguf_metadata import architecture_for

TARGETS = sorted(set(all_writers()) - {"dense"})


@cache
def models() -> dict[Path, SourceModel]:
    """Every fixture that is a whole quantized model."""
    folders = [path.parent for path in sorted(FIXTURES.glob("*/*/about.json"))]
    paths = folders + sorted((FIXTURES / "gguf_families").glob("*.gguf"))
    return {path: source for path in paths if (source := source_of(path)) is not None}


def refused(source: SourceModel, form: str) -> LowbitError | None:
    """Why the format cannot hold the checkpoint; None where every module fits."""
    try:
        source = source.for_gguf() if form == "gguf" else source
        work = Work(source, form, None, None)
        source = work.source  # experts of stacks as modules of their own, for some formats
        if isinstance(work.writer, GgufWriter):
            architecture_for(source.family.name, source.header)
            _Plan(source, work.writer.schemes).entries()
        with TensorData(source.header) as data:
            if form != "gguf":
                source.hf_config(data)
                work.writer.quantization_config()
            for module in work.source.modules:
                made = work.read(module, data)
                work.writer.write(made.target, made.weight, made.bias, made.input)
    except LowbitError as error:
        return error
    return None


@cache
def pairs() -> dict[tuple[str, str], list[Path]]:
    """(source format, target format) -> the fixtures of the one that the other holds exactly."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path, source in models().items():
        for form in TARGETS:
            if refused(source, form) is None:
                found[source.form.name, form].append(path)
    return dict(found)


def section() -> list[str]:
    """Markdown: the matrix, and which fixtures where it is not all of them."""
    sources: dict[str, list[Path]] = defaultdict(list)
    for path, source in models().items():
        sources[source.form.name].append(path)
    lines = [
        "## Pairs that lose nothing",
        "",
        "`lowbit convert A --format F --out B` writes F where it can hold the very numbers of A, and refuses "
        "otherwise, or with `--requantize` says how far they went. Here: of the fixtures of a format (rows), "
        "how many another (columns) holds bit for bit. `dense` holds all of them in float32. A column that "
        "is not there has no writer.",
        "",
        "| from | fixtures | " + " | ".join(f"`{form}`" for form in TARGETS) + " |",
        "| --- " * (len(TARGETS) + 2) + "|",
    ]
    for name in sorted(sources):
        counts = [len(pairs().get((name, form), [])) for form in TARGETS]
        cells = [str(count or "-") for count in counts]
        lines.append(f"| `{name}` | {len(sources[name])} | " + " | ".join(cells) + " |")
    lines += ["", "| from | to | these fixtures |", "| --- | --- | --- |"]
    for (name, form), paths in sorted(pairs().items()):
        if len(paths) < len(sources[name]):
            lines.append(f"| `{name}` | `{form}` | {', '.join(path.stem for path in paths)} |")
    return lines
