"""What does a whole model's speed cost by format? Every kind of format served, in one run on one machine.

    python benchmarks/served_formats.py                    # the embedded model; some minutes on 2 cores
    python benchmarks/served_formats.py --formats q4_k_m nf4 fp8
    python benchmarks/served_formats.py --model 1b         # 1.1 billion random weights, groups of 128

GGUF files of the embedded model (made_models) and online methods over its bfloat16 folder, each served by the
engine in this process in the regimes of serving.py: a prompt of 512 tokens, one stream, and some at once.
Before a format is timed, a greedy prompt must give the same tokens alone and among seven others; the first
round of each regime is not counted, a figure is the median over --repeats. *Beside*: how many times as long
as the fastest format whose packed layers are within 12 % of its size (cliffs.py has that for one product);
not the whole models, since online methods leave embedding and head in bfloat16, which for the embedded model
is as much as half its layers, and then screen the head's rows by codes of 8 bits. A format that quantizes
inputs to int8, which are multiplied at twice the rate, is compared with all, the others not with it. Beyond
1.5 is a cliff.

llama.cpp serves the same GGUF files in turns with lowbit (--rival-formats) where LOWBIT_RIVAL_PYTHON or
--rival-python names its Python. Models are made once, which takes a minute a GGUF type, and kept. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_models
from cliffs import LIKE, alike
from comparison import (
    ENGINES,
    OWN,
    TEXT,
    Comparison,
    Contestant,
    model_bytes,
    rival_contestant,
    rival_pythons,
    why_absent,
)
from machine import cpu_name, run_record
from regimes import Prompts, Regime, assert_same_alone_and_in_a_batch, rival_regimes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from targets import EngineTarget, RivalError

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.loading import plan_model
from lowbit.quantize.recipe import Asked
from lowbit.tokenization import load_tokenizer

Row = dict[str, Any]
RIVAL = "llama.cpp"
GROUPS = {"smollm2": 64, "1b": 128}  # of the 4-bit layouts of AWQ and GPTQ: the largest that divides
GGUF = ("q4_0", "iq4_xs", "q4_1", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
RIVAL_FORMATS = ("q4_0", "q4_k_m", "q6_k", "q8_0")
FIRST_TOKENS = 16  # decoded in the uncounted round, in which the rival tries its variants


@dataclass(frozen=True)
class Format:
    """A row. ``told``: what a person asks for; ``quantization``: of the bfloat16 folder."""

    key: str
    told: str
    quantization: str | None = None
    int8_inputs: bool = False

    def model(self, model: str) -> Path:
        """What lowbit opens; made where it is not there yet."""
        if self.key in GGUF:
            return made_models.gguf_file(model, self.key)
        if self.key == "act-order":
            return made_models.act_order_folder(model, GROUPS[model])
        return made_models.float_folder(model)


def formats(model: str) -> list[Format]:
    """All of them; those of about one size are measured one soon after the other."""
    group = GROUPS[model]

    def online(key: str, quantization: str, what: str, int8_inputs: bool = False) -> Format:
        return Format(key, f"{quantization} ({what})", quantization, int8_inputs)

    return [
        *(Format(kind, f"GGUF {kind}") for kind in GGUF[:5]),
        online("awq", f"rtn:bits=4,group_size={group}", "AWQ's layout"),
        Format("act-order", f"GPTQ 4 bit, groups of {group}, act-order"),
        online("nf4", "nf4", "groups of 64"),
        online("mxfp4", "mxfp4", "W4A16"),
        online("nvfp4", "nvfp4", "W4A16"),
        *(Format(kind, f"GGUF {kind}") for kind in GGUF[5:]),
        online("int8-row", "int8wo", "W8A16, a scale a row"),
        online("int8", "rtn:bits=8", "W8A16, groups, zero points"),
        online("w8a8", "w8a8_int8", "W8A8", int8_inputs=True),
        online("fp8-weights", "fp8:activation=none", "W8A16"),
        online("fp8", "fp8", "W8A8, a scale a row and a token"),
        online("fp8-block", "fp8:weights=block", "W8A8, 128 x 128"),
        Format("bf16", "bfloat16"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2", choices=list(GROUPS))
    parser.add_argument("--formats", nargs="*", metavar="KEY", help="q4_0 awq act-order fp8 …; default: all")
    parser.add_argument("--threads", type=int, help="CPU threads of each engine")
    parser.add_argument("--streams", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rival-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--rival-formats", nargs="*", default=RIVAL_FORMATS, metavar="TYPE", choices=GGUF)
    options = parser.parse_args()
    run(options, chosen(formats(options.model), options.formats))


def chosen(every: list[Format], keys: list[str] | None) -> list[Format]:
    """Those asked for, in the list's order."""
    if unknown := set(keys or ()) - {one.key for one in every}:
        known = ", ".join(one.key for one in every)
        raise SystemExit(f"--formats {' '.join(sorted(unknown))}: no such format; known: {known}")
    return [one for one in every if not keys or one.key in keys]


def run(options: argparse.Namespace, wanted: list[Format]) -> None:
    """Measure, print a table, and a line of JSON."""
    threads = options.threads or len(os.sched_getaffinity(0))
    python = rival_pythons(options.rival_python).get(RIVAL)
    rivals = [one.key for one in wanted if one.key in options.rival_formats]
    notes: list[str] = []
    if rivals and python is None:
        notes.append(f"{RIVAL} was not run: {why_absent(ENGINES[RIVAL])}")
    regimes = [one for one in rival_regimes(options.streams) if one.key not in ("long", "prefix")]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("formats", total=len(wanted))
        for one in wanted:
            progress.update(task, description=f"making {one.key}")
            model = one.model(options.model)
            progress.update(task, description=one.key)
            rival = python if one.key in rivals else None
            try:
                row = measured(one, model, regimes, options, threads, rival, notes)
                rows.append(row)
                rates = (f"{name} {figure['median']:,.0f}" for name, figure in row["figures"].items())
                progress.console.print(f"{one.key}: {', '.join(rates)} tok/s")
            except LowbitError as error:
                notes.append(f"{one.told}: {error.message}")
            gc.collect()  # its weights are gone before the next one's come
            progress.advance(task)
    rows.sort(key=lambda row: row["layer_bytes"])
    for row in rows:
        row["beside"] = {name: beside(row, rows, name) for name in row["figures"]}
    names = [figure_name(regime) for regime in regimes]
    show(rows, names, f"{options.model}, {cpu_name()}, {native.isa()}, {threads} threads")
    for note in notes:
        print(f"note: {note}")
    told = {"model": options.model, "isa": native.isa(), "threads": threads, "repeats": options.repeats}
    found = {"within": LIKE, "names": names, "rival": RIVAL, "notes": notes, "rows": rows}
    print(json.dumps(run_record("served formats") | told | found))


def measured(
    one: Format,
    model: Path,
    regimes: list[Regime],
    options: argparse.Namespace,
    threads: int,
    rival: str | None,
    notes: list[str],
) -> Row:
    """A format's figures, beside those of the rival in the Python ``rival`` where it is to run too."""
    own = EngineTarget(str(model), threads, quantization=one.quantization)
    prompts = Prompts(30000)  # the same ones for every format
    assert_same_alone_and_in_a_batch(own, prompts)
    comparison = Comparison([Contestant(OWN, own, model_bytes(model))])
    try:
        if rival is not None:
            text = load_tokenizer(open_checkpoint(str(model))).encode(TEXT)
            try:
                made = rival_contestant(ENGINES[RIVAL], rival, model, one.key, threads, own, text)
                comparison.contestants.append(made)
            except RivalError as error:
                notes.append(f"{RIVAL} {one.key}: {error}")
        for regime in regimes:
            few = min(FIRST_TOKENS, options.decode_tokens)
            comparison.run(regime, prompts, options.repeats, options.decode_tokens, few)
    finally:
        comparison.close()
    notes += [f"{one.key}: {note}" for note in comparison.notes]
    return row_of(one, own.weight_bytes, layer_bytes(model, one.quantization), regimes, comparison)


def layer_bytes(model: Path, quantization: str | None) -> int:
    """Of the packed layers, without embedding and head."""
    plan = plan_model(open_checkpoint(str(model)), quantization=Asked(quantization))
    return sum(module.nbytes for module in plan.modules if ".layers." in module.name)


def figure_name(regime: Regime) -> str:
    """What the table calls a regime's figure; of several streams the rate while all of them decode."""
    return regime.name.removeprefix("decode, ").removesuffix(", short")


def row_of(one: Format, nbytes: int, layers: int, regimes: list[Regime], comparison: Comparison) -> Row:
    """What is kept of a format."""
    figures: dict[str, Row] = {}
    for regime in regimes:
        row = regime.figure_name("decode" if regime.key.startswith("streams") else "")
        found = comparison.figures[row]
        told: Row = {"median": round(found[OWN].median, 2), "spread": round(found[OWN].spread, 2)}
        if best := comparison.best_rival(row):
            ratio = comparison.ratio(row)
            told |= {"rival": round(best[1], 2), "rival_spread": round(found[best[0]].spread, 2)}
            told["ratio"] = None if ratio is None else round(ratio, 3)
        figures[figure_name(regime)] = told
    rival: Row = comparison.contestants[-1].details
    return {
        "format": one.key,
        "told": one.told,
        "nbytes": nbytes,
        "layer_bytes": layers,
        "int8_inputs": one.int8_inputs,
        "figures": figures,
        **({"rival": rival, "variants": comparison.variants} if rival else {}),
    }


def beside(row: Row, rows: list[Row], name: str) -> float:
    """How many times as long it takes as the fastest format of its size."""
    like = [
        other
        for other in rows
        if alike(row["layer_bytes"], other["layer_bytes"])
        and (row["int8_inputs"] or not other["int8_inputs"])
    ]
    fastest: float = max(other["figures"][name]["median"] for other in like)
    return round(fastest / row["figures"][name]["median"], 2)


def megabytes(row: Row) -> list[str]:
    """Packed: all of it, and the layers."""
    return [f"{row[key] / 1e6:.1f}" for key in ("nbytes", "layer_bytes")]


def show(rows: list[Row], names: list[str], title: str) -> None:
    """Rates and, behind each, its time beside the fastest of its size and its ratio to the rival."""
    table = Table(title=f"{title}: tok/s · time beside the fastest of its size · ratio to {RIVAL}")
    table.add_column("format")
    for column in ("MB", "layers", *names):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for name in names:
            figure = row["figures"][name]
            ratio = f" · {figure['ratio']:.2f}" if figure.get("ratio") else ""
            cells.append(f"{figure['median']:,.0f} · {row['beside'][name]:.2f}{ratio}")
        table.add_row(row["told"], *megabytes(row), *cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
