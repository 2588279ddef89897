"""docs/results.md's section on CPU speed, from the JSON that the benchmarks printed, machine by machine.

docs/results/<machine>/<name>.json holds what one command said; the section is made from all of them, so that
a new machine adds its part and leaves the others' alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from document import replace_section
from machine import ROOT

FOLDER = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- cpu speed: begin -->", "<!-- cpu speed: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu speed: begin -->", "<!-- gpu speed: end -->"

Record = dict[str, Any]
CLIFF = 1.5  # times as long as the fastest format of its size
_FOLDERS = re.compile(r"(?<![\w.…])/(?:[\w.+-]+/)+")  # of one machine, and nobody else's business


def machine_folder(kind: str, isa: str) -> str:
    """A folder's name for a machine of one kind with the instruction set in use."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {isa}".lower()).strip("-")


def store(name: str, record: Record, folder: Path = FOLDER) -> Path:
    """Keep what a benchmark said, in the place of what it said there before."""
    place = folder / machine_folder(record["machine"], record["isa"])
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.json"
    rows = record.get("rows")
    if isinstance(rows, list):  # a line a row: small, and a change shows
        rest = {key: value for key, value in record.items() if key != "rows"}
        head = json.dumps(rest, indent=1, ensure_ascii=False)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text = f'{head[:-2]},\n "rows": [\n{lines}\n]\n}}\n'
    else:
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    path.write_text(_FOLDERS.sub("…/", text), "utf-8")
    return path


def update(folder: Path = FOLDER, page: Path = PAGE) -> None:
    """Write the sections anew."""
    replace_section(page, section(folder), BEGIN, END)
    replace_section(page, gpu_section(folder), GPU_BEGIN, GPU_END)


def section(folder: Path) -> str:
    """The section, its marks included."""
    parts = [
        BEGIN,
        "## CPU speed by machine",
        "",
        "Made by `make bench-cpu` on each machine, from the JSON beside this page (`results/`); a run",
        "replaces its own machine's part only. *Ratio*: lowbit over the fastest rival whose model has about",
        "the same size (at most 1.25 times lowbit's), in the same run.",
        "",
    ]
    for place, records in _kept(folder, gpu=False):
        parts += _machine(place, records)
    return "\n".join([*parts, END, ""])


def gpu_section(folder: Path) -> str:
    """The same of GPUs; it says so where there is nothing."""
    parts = [
        GPU_BEGIN,
        "## GPU speed",
        "",
        "Made by `make bench-gpu` on each machine. *Bound* and torch's bf16 are of the same run.",
        "",
    ]
    kept = _kept(folder, gpu=True)
    for place, records in kept:
        parts += _machine(place, records)
    if not kept:
        parts += ["Nothing has been measured on a GPU yet.", ""]
    return "\n".join([*parts, GPU_END, ""])


def _kept(folder: Path, gpu: bool) -> list[tuple[Path, dict[str, Record]]]:
    """Each machine's folder and what is in it."""
    found = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        records = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(place.glob("*.json"))}
        if records and gpu == (next(iter(records.values()))["isa"] == "cuda"):
            found.append((place, records))
    return found


def _machine(place: Path, records: dict[str, Record]) -> list[str]:
    first = next(iter(records.values()))
    threads = max(record.get("threads", 1) for record in records.values())
    where = "" if first["isa"] == "cuda" else f", {first['isa']}, {threads} threads"
    lines = [f"### {first['machine']}{where}", ""]
    kinds = {"serving": _serving, "linear": _linear, "attention": _attention, "cliffs": _cliffs}
    kinds |= {"gpu_step": _gpu_step, "served formats": _served_formats, "sampling": _sampling}
    for record in records.values():
        write = kinds[record["benchmark"]]
        lines += [f"`{record['command']}` at {record['commit']}:", "", *write(record), ""]
        if record["benchmark"] == "linear" and (place / "linear.svg").exists():
            lines += [f"![% of the bound](results/{place.name}/linear.svg)", ""]
    return lines


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    titles = list(titles)
    marks = ["---", *["---:"] * (len(titles) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (titles, marks, *map(list, rows))]


def _serving(record: Record) -> list[str]:
    contestants = list(record["contestants"])
    rows = []
    for name, row in record["rows"].items():
        cells = [
            f"{figure['median']:,.0f} ± {figure['spread'] / 2:,.0f}"
            if (figure := row["figures"].get(contestant))
            else "–"
            for contestant in contestants
        ]
        rows.append([name, *cells, "–" if row["ratio"] is None else f"**{row['ratio']:.2f}**"])
    ready = [f"{record['contestants'][name]['ready_seconds']:.2f} s" for name in contestants]
    rows.append(["ready", *ready, ""])
    beyond = record["figures"]["server ready beyond import torch"]
    titles = [f"{record['model']} {record['file'] or ''}, tok/s".replace(" ,", ","), *contestants, "ratio"]
    lines = _table(titles, rows)
    lines += [
        "",
        f"Server ready beyond `import torch`: {beyond['median']:.2f} s ± {beyond['spread'] / 2:.2f}.",
    ]
    return lines + [f"- {note}" for note in record["notes"]]


def _linear(record: Record) -> list[str]:
    """Whole models' layers together: % of the bound and ratio to torch bf16, a line a format."""
    bounds = record["bounds"]
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in bounds["dots"].items() if rate)
    lines = [f"Bounds: {bounds['memory']:.1f} GB/s from memory; TFLOPS: {rates}.", ""]
    for model in dict.fromkeys(row["shape"].split()[0] for row in record["rows"]):
        mine = [row for row in record["rows"] if row["shape"].split()[0] == model]
        tokens = sorted({row["tokens"] for row in mine})
        rows = []
        for format in dict.fromkeys(row["format"] for row in mine):
            cells = []
            for count in tokens:
                found = [row for row in mine if (row["format"], row["tokens"]) == (format, count)]
                us = sum(row["us"] for row in found)
                bound, torch = (sum(row[key] for row in found) for key in ("bound_us", "torch_us"))
                cells.append(f"{100 * bound / us:.0f}% · {torch / us:.1f}" if found else "–")
            rows.append([format, *cells])
        titles = [f"{model}: % of bound · ratio to torch bf16", *(f"M = {count}" for count in tokens)]
        lines += [*_table(titles, rows), ""]
    return lines[:-1]


def _attention(record: Record) -> list[str]:
    titles = [f"attention, {record['cache']} pages", "ms", "GB/s", "GFLOPS", "ratio to torch"]
    return _table(
        titles,
        (
            [
                row["shape"],
                f"{row['ms']:.3f} ± {row['spread_ms'] / 2:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['gflops']:.0f}",
                f"{row['speedup']:.1f}",
            ]
            for row in record["results"]
        ),
    )


def _cliffs(record: Record) -> list[str]:
    """Formats that take longer than CLIFF times the fastest of their size; the others are counted."""
    rows, counts = record["rows"], list(record["rows"][0]["ratios"])
    heads = {count: f"{count} token{'s' * (count != '1')}" for count in counts}
    within = [f"{sum(row['ratios'][each] <= CLIFF for row in rows)} with {heads[each]}" for each in counts]
    lines = [
        f"Of {len(rows)} formats and group sizes, each beside those of its size: within {CLIFF} times the",
        f"time of the fastest are {', '.join(within)}. The others:",
        "",
    ]
    cells = [
        [row["format"], f"{row['bits']:.2f}", *(f"{row['ratios'][count]:.2f}" for count in counts)]
        for row in rows
        if max(row["ratios"].values()) > CLIFF
    ]
    return lines + _table(["time beside the fastest", "bits", *heads.values()], cells)


def _sampling(record: Record) -> list[str]:
    """What drawing a token takes, then whole steps beside greedy ones."""
    names = list(next(iter(record["rows"].values())))
    rows = ([rule, *(f"{found[name] * 1e6:.0f}" for name in names)] for rule, found in record["rows"].items())
    lines = [*_table(["µs a token drawn", *names], rows), ""]
    steps, greedy = record["steps"], record["steps"]["greedy"]
    cells = (
        [kind, *(f"{found[n] * 1e3:.2f} ({found[n] / greedy[n]:.2f})" for n in greedy)]
        for kind, found in steps.items()
    )
    lines += [*_table(["ms a step (beside greedy)", *(f"{n} streams" for n in greedy)], cells), ""]
    rates = [f"{found['one']:.0f} → {found['default']:.0f}" for found in record["continued"].values()]
    titles = ["greedy tok/s", *(f"{n} streams" for n in record["continued"])]
    return lines + _table(titles, [["a step a call → several", *rates]])


def _served_formats(record: Record) -> list[str]:
    """Rates of whole models, each with its time beside the fastest of its size; then those beside a rival."""
    rows, names = record["rows"], record["names"]

    def cells(row: Record) -> list[str]:
        times = [(row["figures"][name]["median"], row["beside"][name]) for name in names]
        return [f"{rate:,.0f} · {_marked(slower, slower > CLIFF)}" for rate, slower in times]

    far = sum(max(row["beside"].values()) > CLIFF for row in rows)
    lines = [
        "Tokens a second and, behind them, how many times as long that takes as in the fastest format within",
        f"{100 * (record['within'] - 1):.0f} % of the size of its layers (not embedding and head, which",
        "online methods leave bfloat16); only formats that quantize inputs to int8 are compared with such.",
        f"Beyond {CLIFF} times: {far or 'none'} of {len(rows)}.",
        "",
        *_table(
            [f"{record['model']}, tok/s · times as long", "MB", "layers, MB", *names],
            (
                [row["told"], *(f"{row[key] / 1e6:.1f}" for key in ("nbytes", "layer_bytes")), *cells(row)]
                for row in rows
            ),
        ),
    ]
    beside = [row for row in rows if any("rival" in figure for figure in row["figures"].values())]
    if beside:
        titles = [f"the same file in {record['rival']}, tok/s · ratio", *names]
        lines += ["", *_table(titles, ([row["told"], *_of_rival(row, names)] for row in beside))]
    return lines + (["", *(f"- {note}" for note in record["notes"])] if record["notes"] else [])


def _of_rival(row: Record, names: list[str]) -> list[str]:
    figures = [row["figures"][name] for name in names]
    return [
        f"{figure['rival']:,.0f} · {_marked(figure['ratio'], True)}" if "rival" in figure else "–"
        for figure in figures
    ]


def _marked(number: float, strong: bool) -> str:
    return f"**{number:.2f}**" if strong else f"{number:.2f}"


def _gpu_step(record: Record) -> list[str]:
    titles = [f"{record['model']}: step", "us", "kernels, us", "step / kernels", "weights, GB/s", "% of copy"]
    return _table(
        titles,
        (
            [
                name,
                f"{step['step_us']:,.0f}",
                f"{step['kernels_us']:,.0f}",
                f"{step['ratio']:.2f}",
                f"{step['weights_gb_per_s']:,.0f}",
                "–" if step["percent_of_bandwidth"] is None else f"{step['percent_of_bandwidth']:.0f}",
            ]
            for name, step in record["steps"].items()
        ),
    )
