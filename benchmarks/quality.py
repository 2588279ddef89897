"""What does each method cost in quality, and what does it buy?

    python benchmarks/quality.py                              # everything; about an hour on 2 cores
    python benchmarks/quality.py --methods fp8 gguf --no-speed        # those whose name begins so
    python benchmarks/quality.py --keep build/quality --resume        # go on where the last run ended
    python benchmarks/quality.py --methods awq --write-quality FOLDER # quality.json for a quantized folder

Every method quantizes two float originals of the embedded model (``quality_originals``: as stored, and
dithered off the file's 4-bit grid) when they are loaded, and its next-token distributions over English text
are compared with the original's own in float32: mean KL in nats, its 99th percentile, its maximum, and how
often both name the same token first. Beside it: which share of the weights is quantized, packed bytes, and
the speed of the engine, one prompt of 512 tokens and one stream of 64, a median over --repeats.

A method that fails stays in the list with its error. Figures go to docs/results.md (between markers) and
docs/quality.svg; the last line printed is JSON. On a machine that is busy otherwise, OMP_NUM_THREADS=1 makes
quantizing several times faster: torch's threads wait for each other spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import quality_originals as originals
import quality_report as report
import torch
from rich.console import Console
from rich.progress import Progress

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.quality import NAME, Quality
from lowbit.engine.engine import Engine
from lowbit.engine.messages import Request, SamplingParams
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.models.model import Model
from lowbit.quantize.recipe import Asked
from lowbit.quantize.specification import TORCHAO
from lowbit.settings import Settings
from lowbit.tokenization import load_tokenizer

Row = dict[str, object]
DOCS = Path(__file__).resolve().parent.parent / "docs"
PREFILL, DECODE = 512, 64


@dataclass(frozen=True)
class Method:
    """One row. ``quantization``, ``torchao``, ``kv``: values of the flags; ``group``: its colour."""

    name: str
    group: str
    quantization: str | None = None
    torchao: str | None = None
    kv: str = "auto"

    @property
    def flag(self) -> str:
        """As a person asks for it."""
        if self.torchao:
            return f"--torchao-config {self.torchao}"
        if self.quantization:
            return f"--quantization {self.quantization}"
        return "" if self.kv == "auto" else f"--kv-cache-dtype {self.kv}"

    @property
    def asked(self) -> Asked:
        """For ``load_model``."""
        return Asked(self.quantization, self.torchao)


def _online(group: str, *names: str) -> list[Method]:
    return [Method(name, group, quantization=name) for name in names]


METHODS: list[Method] = [
    Method("bf16", "float"),
    *_online("8 bit", "fp8", "fp8:weights=tensor", "fp8:weights=tensor,activation=tensor"),
    *_online("8 bit", "fp8:weights=block", "fp8:activation=delayed", "fp8:activation=none"),
    *_online("8 bit", "w8a8_fp8", "w8a8_int8", "blockwise_int8", "mxfp8", "bitsandbytes:type=int8"),
    *_online("4 bit floats", "mxfp4", "nvfp4", "nf4", "nf4:double_quant=true", "fp4"),
    *_online("integers", "hqq:bits=8", "hqq:bits=4", "hqq:bits=3"),
    *_online("integers", *(f"rtn:bits={bits}" for bits in range(8, 1, -1)), "rtn:bits=4,symmetric=true"),
    *_online("integers", "rtn:bits=4,group_size=64"),
    *_online("calibrated", "gptq", "gptq:symmetric=false", "awq", "awq:group_size=64"),
    *_online("gguf", *(f"gguf:type={name}" for name in ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "iq4_xs"))),
    *_online("gguf", *(f"gguf:type={name}" for name in ("q5_k_m", "q6_k", "q8_0"))),
    *(Method(f"torchao {name}", "torchao", torchao=name) for name in TORCHAO),
    *(Method(f"KV cache {name}", "cache", kv=name) for name in ("fp8_e4m3", "int8", "int4")),
]


def main() -> None:
    """Measure, print, write."""
    options = _options()
    chosen = _chosen(options.methods)
    if options.keep is None:
        with tempfile.TemporaryDirectory(prefix="lowbit-quality-") as name:
            _run(options, chosen, Path(name))
    else:
        options.keep.mkdir(parents=True, exist_ok=True)
        _run(options, chosen, options.keep)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--positions", type=int, default=4000, help="tokens of text, at least (4000)")
    parser.add_argument(
        "--keep",
        "--originals",
        type=Path,
        metavar="DIR",
        help="where originals, reference and results stay; default: a temporary folder",
    )
    parser.add_argument("--resume", action="store_true", help="keep the results that are in --keep already")
    parser.add_argument("--no-speed", action="store_true", help="quality only")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing (5)")
    parser.add_argument("--no-plot", action="store_true", help="write no docs/quality.svg")
    parser.add_argument(
        "--docs",
        type=Path,
        default=DOCS,
        metavar="DIR",
        help="whose results.md and quality.svg are written (docs)",
    )
    parser.add_argument("--no-docs", action="store_true", help="print only")
    parser.add_argument(
        "--write-quality",
        type=Path,
        metavar="FOLDER",
        help="write quality.json of the one chosen method there (dithered original)",
    )
    options = parser.parse_args()
    if options.write_quality is not None and len(_chosen(options.methods)) != 1:
        parser.error("--write-quality needs --methods with exactly one method")
    return options


def _chosen(wanted: list[str] | None) -> list[Method]:
    """A full name means that method alone, else all whose names begin so."""
    if not wanted:
        return METHODS
    names = [method.name for method in METHODS]
    found = []
    for method in METHODS:
        if any(
            word == method.name or (word not in names and method.name.startswith(word)) for word in wanted
        ):
            found.append(method)
    if not found:
        raise SystemExit(f"--methods: none begins with {' or '.join(wanted)}; there are: {', '.join(names)}")
    return found


def _run(options: argparse.Namespace, chosen: list[Method], folder: Path) -> None:
    console = Console(stderr=True)
    store = _Results(folder / "results.json", options.resume)
    with Progress(console=console) as progress:
        task = progress.add_task("originals", total=2 * len(chosen) + 2)
        paths = originals.write_originals(folder)
        prompts = originals.english_prompts(options.positions)
        for name, path in paths.items():
            progress.update(task, description=f"{name}: float32 reference")
            reference = originals.Reference(path, prompts)
            reference.prepare()
            progress.advance(task)
            for method in chosen:
                progress.update(task, description=f"{name}: {method.name}")
                _measure(method, name, reference, store, options)
                progress.advance(task)
    rows = [store.rows[method.name] for method in METHODS if method.name in store.rows]
    _tell(rows, options, chosen)


class _Results:
    """Rows by name, written after every measurement."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        if resume and path.exists():
            self.rows = json.loads(path.read_text())

    def put(self, name: str, **values: object) -> None:
        """More of a row."""
        self.rows.setdefault(name, {}).update(values)
        self._path.write_text(json.dumps(self.rows, indent=1))


def _measure(
    method: Method,
    original: str,
    reference: originals.Reference,
    store: _Results,
    options: argparse.Namespace,
) -> None:
    """One method on one original; speeds on the dithered one. Its error instead, where it has one."""
    positions = sum(len(prompt) for prompt in reference.prompts)
    had = store.rows.get(method.name, {})
    before = had.get(original)
    want_speed = original == originals.DITHERED and not options.no_speed and "decode" not in had
    measured = isinstance(before, dict) and before["positions"] == positions
    if measured and not want_speed:
        return
    had.pop("error", None)
    threads = torch.get_num_threads()
    store.put(method.name, method=method.name, group=method.group, flag=method.flag)
    try:
        header = open_checkpoint(str(reference.original))
        model = load_model(header, quantization=method.asked, kv_cache_dtype=method.kv)
        torch.set_num_threads(1)  # as the server does: from here on the cores are the native kernels'
        if "share" not in had:
            store.put(method.name, **_size(header, method, model))
        if not measured:
            store.put(method.name, **{original: asdict(reference.divergence(model))})
        if want_speed:
            store.put(method.name, **_speed(header, method, model, options.repeats))
    except LowbitError as error:
        store.put(method.name, error=str(error))
    except Exception as error:  # one method's failure is a finding, not the end of the run
        store.put(method.name, error=f"{type(error).__name__}: {error}"[:300])
    finally:
        torch.set_num_threads(threads)


def _size(header: CheckpointHeader, method: Method, model: Model) -> Row:
    """The share of weights quantized, and bytes of them all."""
    modules = plan_model(header, quantization=method.asked).modules
    counts = {module.name: module.shape[0] * module.shape[1] for module in modules}
    quantized = sum(counts[module.name] for module in modules if not module.scheme.is_dense)
    weights = sum(counts.values())
    return {
        "share": quantized / weights,
        "nbytes": model.weight_bytes,
        "bits": 8 * model.weight_bytes / weights,
    }


def _speed(header: CheckpointHeader, method: Method, model: Model, repeats: int) -> Row:
    """Tokens a second through the engine: all of a prompt, and one stream after its first token."""
    settings = Settings(
        model=str(header.root), kv_cache_dtype=method.kv, max_total_tokens=4096, disable_radix_cache=True
    )
    engine = Engine(model, load_tokenizer(header), settings)
    draw = random.Random(1)
    runs = [
        _timed_request(engine, [draw.randrange(100, 40000) for _ in range(PREFILL)], f"speed-{number}")
        for number in range(repeats + 1)
    ][1:]
    return {
        "prefill": statistics.median(PREFILL / first for first, _ in runs),
        "decode": statistics.median(DECODE / rest for _, rest in runs),
    }


def _timed_request(engine: Engine, prompt: list[int], name: str) -> tuple[float, float]:
    """Seconds to the first token, and from there to ``DECODE`` more."""
    sampling = SamplingParams(max_tokens=DECODE + 1, temperature=0.0, ignore_eos=True)
    engine.submit(Request(id=name, prompt=tuple(prompt), sampling=sampling))
    began, first = time.perf_counter(), 0.0
    tokens = 0
    while engine.has_work():
        for event in engine.step():
            if event.finish_reason == "error":
                raise LowbitError("E0704", f"the engine ended the request: {event.error}")
            if event.tokens and not first:
                first = time.perf_counter()
            tokens += len(event.tokens)
    if tokens != DECODE + 1:
        raise RuntimeError(f"asked for {DECODE + 1} tokens, got {tokens}")
    return first - began, time.perf_counter() - first


def _tell(rows: list[Row], options: argparse.Namespace, chosen: list[Method]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(report.table(rows))
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']}: {row['error']}", markup=False)
    words = ["python", "benchmarks/quality.py", *sys.argv[1:]]
    hidden = {"--keep", "--originals", "--docs"}  # a place on one machine
    kept = [
        word for n, word in enumerate(words) if not ({word, words[n - 1]} & hidden) and word != "--resume"
    ]
    machine = f"{_processor()}, {os.cpu_count()} cores"
    if not options.no_docs:
        report.update_document(options.docs / "results.md", report.markdown(rows, shlex.join(kept), machine))
        if not options.no_plot:
            report.plot(rows, options.docs / "quality.svg")
    if options.write_quality is not None:
        _write_quality(options.write_quality, next(row for row in rows if row["method"] == chosen[0].name))
    print(json.dumps({"commit": _commit(), "machine": machine, "command": kept, "rows": rows}))


def _write_quality(folder: Path, row: Row) -> None:
    """quality.json, as lowbit.checkpoint.quality reads it."""
    found = row.get(originals.DITHERED)
    if not isinstance(found, dict):
        raise SystemExit(f"--write-quality: {row['method']} was not measured: {row.get('error')}")
    against = f"{originals.SOURCE} in float32, dithered off its 4-bit grid (benchmarks/quality.py)"
    told = Quality(found["mean_kl"], found["top1_agreement"], found["positions"], against)
    (folder / NAME).write_text(json.dumps(asdict(told)) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
