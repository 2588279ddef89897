"""How near do engines stay to the model they serve? KL to float32 of lowbit and of others, beside each other.

    python benchmarks/accuracy.py                      # lowbit alone: exact, int8 inputs, int8 cache, both
    python benchmarks/accuracy.py --rival all          # and others; Pythons as in benchmarks/serving.py

The reference is transformers in float32 on the embedded model's own weights, decoded. Everyone gets the same
token ids of English text (Python's language reference, as in benchmarks/quality.py), and their distributions
of every next token are compared with the reference's: mean KL(reference ‖ engine) in nats, its 99th
percentile and maximum, and how often both name the same token first. Rows of the embedded file (Q4_1) have
those very weights, so that what they show is arithmetic; rows of another file also have what making that file
cost, and so has OpenVINO's gguf-q4_1: its reader makes a whole 4-bit zero point of each block's minimum.

Rivals answer from their own processes in the setting that they try first. Before a rival counts, the token it
serves after the first prompt must be the one its logits name. The table goes to docs/results.md (between
markers) unless --no-docs; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quality_originals as originals
import torch
from comparison import ENGINES, model_bytes, rival_pythons, start_rival, why_absent
from document import replace_section
from machine import commit, machine_kind
from results_page import PAGE
from rich.console import Console
from rich.table import Table
from serving import rival_file
from targets import RivalError, RivalTarget
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.loading import load_model

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
RIVAL_FILES = {"llama.cpp": ["q4_1", "q4_0"], "openvino": ["gguf-q4_1", "int4-g64"], "vllm": ["w4a16"]}
EXACT = "--exact-prompts"  # what all processors but those with AMX do anyway
SETTINGS: dict[str, dict[str, str]] = {  # of lowbit; the first is what it does unless asked
    "": {},
    EXACT: {},
    "--activation-quantization int8": {"activation_quantization": "int8"},
    "--kv-cache-dtype int8": {"kv_cache_dtype": "int8"},
    "--activation-quantization int8 --kv-cache-dtype int8": {
        "activation_quantization": "int8",
        "kv_cache_dtype": "int8",
    },
}
HEADINGS = ("engine", "file", "MB", "settings", "mean KL", "p99", "largest", "top-1")

Logits = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Row:
    """One engine with one file. ``settings``: flags of lowbit, a rival's variant."""

    engine: str
    file: str
    nbytes: int
    settings: str
    found: originals.Divergence

    def cells(self) -> list[str]:
        found = self.found
        return [
            self.engine,
            self.file,
            f"{self.nbytes / 1e6:.0f}",
            self.settings,
            f"{found.mean_kl:.6f}",
            f"{found.p99_kl:.4f}",
            f"{found.max_kl:.3f}",
            f"{found.top1_agreement:.2%}",
        ]


class Reference:
    """float32 log-probabilities of transformers over ``prompts``, in a file of ``folder``."""

    def __init__(self, prompts: list[list[int]], folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        path = open_checkpoint(originals.SOURCE).root
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self.prompts = prompts
        self._file = folder / "reference"
        self._words: int = model.config.vocab_size
        with self._file.open("wb") as file, torch.no_grad():
            for prompt in prompts:
                logits = model.eval()(torch.tensor([prompt])).logits[0]
                file.write(torch.log_softmax(logits, -1).numpy().tobytes())

    def divergence(self, logits: Logits) -> originals.Divergence:
        """Of what ``logits`` gives for each prompt, (tokens, vocabulary)."""
        found, start = [], 0
        for prompt in self.prompts:
            shape = (len(prompt), self._words)
            expected = np.memmap(self._file, np.float32, "c", 4 * start * self._words, shape)
            found.append(originals.compare(torch.from_numpy(expected), logits(prompt)))
            start += len(prompt)
        return originals.Divergence.of([kl for kl, _ in found], [same for _, same in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--positions", type=int, default=4000, help="tokens of text, at least (4000)")
    parser.add_argument("--threads", type=int, help="CPU threads of the rivals")
    parser.add_argument("--rival", action="append", default=[], choices=[*ENGINES, "all"])
    parser.add_argument("--rival-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--no-docs", action="store_true", help="print only")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="lowbit-accuracy-") as name:
        reference = Reference(originals.english_prompts(arguments.positions), Path(name))
        torch.set_num_threads(1)  # as the server does: the cores are the native kernels'
        rows = own_rows(reference)
        others, notes = rival_rows(reference, arguments, Path(name) / "logits")
    tell(rows + others, notes, arguments)


def own_rows(reference: Reference) -> list[Row]:
    """lowbit on the embedded file in every setting, and as it is on the other."""
    from made_models import EMBEDDED, gguf_file

    rows = []
    for kind in ("q4_1", "q4_0"):
        path = gguf_file(EMBEDDED, kind)
        for flags, settings in SETTINGS.items() if kind == "q4_1" else [("", {})]:
            model = load_model(open_checkpoint(str(path)), device="cpu", **settings)  # type: ignore[arg-type]
            found = reference.divergence(partial(originals.prompt_logits, model, exact=flags == EXACT))
            rows.append(Row("lowbit", kind, model_bytes(path), flags, found))
    return rows


def rival_rows(
    reference: Reference, arguments: argparse.Namespace, file: Path
) -> tuple[list[Row], list[str]]:
    """The others, and what could not be; each prompt's logits lie in ``file`` until they are compared."""
    rows: list[Row] = []
    notes: list[str] = []
    pythons = rival_pythons(arguments.rival_python)
    for name, engine in ENGINES.items():
        if name not in arguments.rival and "all" not in arguments.rival:
            continue
        if name not in pythons:
            notes.append(f"{name} was not run: {why_absent(engine)}")
            continue
        for kind in RIVAL_FILES[name]:
            try:
                path = rival_file(engine, pythons[name], originals.SOURCE, kind)
                assert path is not None, f"{kind} is a file of {name}"
                target = start_rival(engine, pythons[name], path, arguments.threads, kind)
            except RuntimeError as error:
                notes.append(f"{name} {kind} was not run: {error}")
                continue
            try:
                assert_served(target, reference.prompts[0], file)
                found = reference.divergence(partial(rival_logits, target, file=file))
                about = f"{name} {target.version}"
                rows.append(Row(about, kind, model_bytes(path), target.variants[0], found))
            except RivalError as error:
                notes.append(f"{name} {kind}: {error}")
            finally:
                target.close()
    return rows, notes


def rival_logits(target: RivalTarget, prompt: list[int], file: Path) -> Tensor:
    """float32 (tokens, vocabulary)."""
    shape = target.logits(prompt, file)
    return torch.from_numpy(np.fromfile(file, "<f4").reshape(shape))


def assert_served(target: RivalTarget, prompt: list[int], file: Path) -> None:
    """The token it serves next is one of those that its logits put first."""
    last = rival_logits(target, prompt, file)[-1]
    served = target.complete([prompt], 1)[0].ids[0]
    if last[served] < last.max():
        best = int(last.argmax())
        raise RivalError(f"{target.name} serves token {served}, its logits name {best}: they are not its own")


def markdown(rows: list[Row], notes: list[str], command: str, machine: str) -> str:
    """The section of docs/results.md, its marks included."""
    about = (
        f"`{command}` at {commit()}, {machine}, {rows[0].found.positions:,} positions: KL(transformers "
        "float32 ‖ engine) in nats. The reference has the weights of the embedded file, Q4_1; rows of others "
        "include what making that file cost, and so does gguf-q4_1, whose reader makes a whole 4-bit zero "
        "point of each block's minimum."
    )
    lines = [
        BEGIN,
        textwrap.fill(about, 110, break_long_words=False, break_on_hyphens=False),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
        "",
        *(f"- {note}" for note in notes),
        END,
        "",
    ]
    return "\n".join(lines)


def tell(rows: list[Row], notes: list[str], arguments: argparse.Namespace) -> None:
    table = Table(title="KL to float32")
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.cells())
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for note in notes:
        print(f"note: {note}")
    words = ["python", "benchmarks/accuracy.py", *(f"--rival {name}" for name in arguments.rival)]
    command = " ".join(words)  # without the Pythons: places on one machine
    machine = f"{machine_kind()}, {native.isa()}"
    if not arguments.no_docs:
        replace_section(PAGE, markdown(rows, notes, command, machine), BEGIN, END)
    told: dict[str, Any] = {"benchmark": "accuracy", "commit": commit(), "command": command}
    told |= {"machine": machine, "rows": [asdict(row) for row in rows], "notes": notes}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
