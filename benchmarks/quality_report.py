"""What ``benchmarks/quality.py`` writes: a table for people, a section of docs/results.md, a plot.

A row is a plain mapping, as it lies in the results file:

    {"method": "fp8", "group": "floats", "flag": "--quantization fp8", "share": 0.789, "nbytes": …, "bits": …,
     "stored": {"mean_kl": …, …}, "dithered": {…}, "prefill": …, "decode": …}

``error`` stands in place of the figures where a method failed. The plot needs matplotlib (``pip install
lowbit[bench]``), imported only here and on use.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from document import replace_section
from rich.table import Table

from lowbit.errors import thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row: TypeAlias = Mapping[str, object]

Point: TypeAlias = tuple[float, float, str]
_FONT = {"font.sans-serif": ["DejaVu Sans"]}  # measured with; a viewer without it takes its own
_LABEL_SIZE, _LABEL_GAP = 6.0, 8.0
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
_HEADINGS = (
    *("method", "quantized", "bits", "MB"),
    *("KL", "p99", "largest", "top-1", "KL, stored", "top-1, stored"),
    *("prefill tok/s", "decode tok/s"),
)
_COLOURS = {
    "float": "#333333",
    "8 bit": "#1f77b4",
    "4 bit floats": "#d62728",
    "integers": "#2ca02c",
    "gguf": "#9467bd",
    "calibrated": "#ff7f0e",
    "torchao": "#8c564b",
    "cache": "#7f7f7f",
}


def cells(row: Row) -> list[str]:
    """A row of the table as text; "–" for what was not measured, as all of a method that failed."""
    if "error" in row:
        return [str(row["method"]), *("–" for _ in _HEADINGS[1:])]
    dithered, stored = _figures(row, "dithered"), _figures(row, "stored")
    found = [
        str(row["method"]),
        f"{_number(row, 'share'):.0%}",
        f"{_number(row, 'bits'):.2f}",
        f"{_number(row, 'nbytes') / 1e6:.1f}",
    ]
    for key in ("mean_kl", "p99_kl", "max_kl"):
        found.append(f"{dithered[key]:#.3g}" if dithered else "–")
    found.append(f"{dithered['top1_agreement']:.1%}" if dithered else "–")
    found.append(f"{stored['mean_kl']:#.3g}" if stored else "–")
    found.append(f"{stored['top1_agreement']:.1%}" if stored else "–")
    for key in ("prefill", "decode"):
        found.append(thousands(round(_number(row, key))) if key in row else "–")
    return found


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    made = Table(box=None, pad_edge=False)
    for heading in _HEADINGS:
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        made.add_row(*cells(row))
    return made


def markdown(rows: Sequence[Row], command: str, machine: str) -> str:
    """The section of docs/results.md, between its markers."""
    positions = _positions(rows)
    paragraphs = [
        f"`{command}`, {positions} of English text (chapters of Python's language reference that calibration "
        "does not use). KL is the mean of KL(original ‖ method), in nats, over the next-token distributions; "
        "the original runs in float32 throughout, its cache too. *p99* and *largest*: of single positions. "
        "*Top-1*: where both name the same token first.",
        "The embedded model's file has 4 bits and groups of 32 (Q4_1), so methods on a like grid look free "
        "against its own numbers (the two *stored* columns): no ranking follows from those. The other "
        "columns are measured on a *dithered* original, in which each weight was moved by a seeded uniform "
        "random number of at most half its block's step. *Quantized*: the share of all weights, embedding "
        "included, that the method quantizes; most methods leave the embedding, a fifth of this small "
        "model, in bfloat16. *Bits* and *MB*: packed, of all weights. KV cache types run on the plain "
        "bfloat16 model.",
        f"Speeds: one prompt of 512 tokens, one stream of 64 tokens, medians, {machine}."
        if any("decode" in row for row in rows)
        else "Speeds were not measured in this run (`--no-speed`).",
    ]
    lines = [BEGIN, "## Quality", ""]
    for paragraph in paragraphs:
        lines += [textwrap.fill(paragraph, 110, break_on_hyphens=False, break_long_words=False), ""]
    lines += [
        "![Quality against bytes](quality.svg)",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "| --- |" + " ---: |" * (len(_HEADINGS) - 1),
    ]
    failed = [row for row in rows if "error" in row]
    for row in rows:
        if "error" not in row:
            first, *rest = cells(row)
            lines.append("| " + " | ".join([f"`{first}`", *rest]) + " |")
    if failed:
        lines += ["", "Not measured:", ""]
        lines += [f"- `{row['method']}`: {row['error']}" for row in failed]
    return "\n".join([*lines, END, ""])


def _positions(rows: Sequence[Row]) -> str:
    """How many there were, of each original where they differ."""
    counts = {
        original: sorted({int(found["positions"]) for row in rows if (found := _figures(row, original))})
        for original in ("dithered", "stored")
    }
    words = {
        original: " or ".join(thousands(count) for count in found)
        for original, found in counts.items()
        if found
    }
    if len(set(words.values())) == 1:
        return f"{words.popitem()[1]} positions"
    return (
        " and ".join(f"{told} positions ({original})" for original, told in words.items()) or "no positions"
    )


def update_document(path: Path, section: str) -> None:
    """Put the section in the place of the one before, or at the end."""
    replace_section(path, section, BEGIN, END)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Mean KL against packed bytes, both originals, as SVG; its text stays text.

    KV cache types are not in it: their bytes are elsewhere.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install 'lowbit[bench]', or --no-plot") from None
    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    titles = {
        "dithered": "dithered original",
        "stored": "stored original: lies on a 4-bit grid, no ranking",
    }
    settings = {"svg.fonttype": "none", "svg.hashsalt": "lowbit", "font.size": 8, **_FONT}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(1, 2, figsize=(14, 9), sharey=True, layout="constrained")
        points: list[list[Point]] = []
        for axis, original in zip(axes, titles, strict=True):
            points.append([])
            for group in _COLOURS:
                found = [
                    (_number(row, "nbytes") / 1e6, max(figures["mean_kl"], 1e-6), str(row["method"]))
                    for row in rows
                    if row["group"] == group != "cache" and (figures := _figures(row, original))
                ]
                if found:
                    x, y, _ = zip(*found, strict=True)
                    axis.scatter(x, y, s=14, color=_COLOURS[group], label=group, zorder=3)
                points[-1] += found
            axis.set(title=titles[original], xlabel="packed weights, MB", xscale="log", yscale="log")
            axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(ticker.FormatStrFormatter("%g"))
            axis.grid(True, linewidth=0.3, alpha=0.5)
            axis.margins(x=0.08)
        axes[0].set_ylabel("mean KL to the float32 original, nats")
        axes[0].legend(loc="lower left")
        figure.draw_without_rendering()  # axes have their sizes from here on
        for axis, of_axis in zip(axes, points, strict=True):
            _label(axis, of_axis)
        figure.savefig(path, format="svg", metadata={"Date": None}, dpi=figure.dpi)
        pyplot.close(figure)
    lines = [line.rstrip() for line in path.read_text("utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _label(axis: Axes, points: Sequence[Point]) -> None:
    """Each point's name beside it, a thin line to it where it had to move."""
    pixels = axis.transData.transform([point[:2] for point in points]) if points else []
    shifts = _label_shifts([(x, y, name) for (x, y), (*_, name) in zip(pixels, points, strict=True)])
    line = {"arrowstyle": "-", "linewidth": 0.3, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0}
    for (x, y, name), shift in zip(points, shifts, strict=True):
        moved = line if abs(shift) > _LABEL_SIZE else None
        axis.annotate(
            name,
            (x, y),
            xytext=(_LABEL_GAP, shift),
            textcoords="offset pixels",
            fontsize=_LABEL_SIZE,
            arrowprops=moved,
        )


def _label_shifts(points: Sequence[Point]) -> list[float]:
    """How far up or down each label goes, in pixels, so that none lies on another: from the top down, each at
    the free place that is nearest to its point."""
    height, letter = 1.7 * _LABEL_SIZE, 0.85 * _LABEL_SIZE
    shifts = [0.0] * len(points)
    placed: list[tuple[float, float, float]] = []  # left, right, middle
    for number in sorted(range(len(points)), key=lambda n: -points[n][1]):
        x, y, name = points[number]
        left, right = x, x + _LABEL_GAP + letter * len(name)
        near = [middle for a, b, middle in placed if a < right and left < b]
        tries = [y - height / 3, *(middle + side * height for middle in near for side in (1, -1))]
        free = [at for at in tries if all(abs(at - middle) >= height - 1e-6 for middle in near)]
        middle = min(free, key=lambda at: abs(at - y))
        placed.append((left, right, middle))
        shifts[number] = middle - y
    return shifts


def _figures(row: Row, original: str) -> dict[str, float]:
    found = row.get(original)
    return {str(key): float(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _number(row: Row, key: str) -> float:
    value = row[key]
    assert isinstance(value, (int, float)), f"{key} is a number in every results file"
    return float(value)
