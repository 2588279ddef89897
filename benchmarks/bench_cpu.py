"""Everything that docs/results.md says of CPU speed, on this machine: ``make bench-cpu``.

Runs linear.py, with --cliffs too, attention.py, sampling.py, serving.py --rival all for the embedded model
and for the 1B one, and served_formats.py, keeps what they say under docs/results/ and writes the page's
section anew. Rivals' Pythons: LOWBIT_RIVAL_PYTHON
("llama.cpp=V/bin/python,openvino=W/bin/python,vllm=X/bin/python"; serving.py tells how each is made), and
LOWBIT_RIVAL_PYTHON_AVX2 for a llama.cpp built with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=OFF
-DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" and --no-cache-dir, which adds a
comparison under LOWBIT_ISA=avx2 (where the machine has more than AVX2). Whatever is not there is said in the
page. Takes an hour or two on a quiet machine; --only runs some of the steps, --quick a look at whether
everything works (kept elsewhere).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from machine import ROOT, machine_kind
from results_page import FOLDER, PAGE, machine_folder, store, update

from lowbit.kernels import native


@dataclass(frozen=True)
class Step:
    """A benchmark to run: its name among the kept results, its words, what its environment adds."""

    name: str
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def steps(quick: bool, folder: Path) -> list[Step]:
    """In order; ``folder``: where the plot goes."""
    isa = native.isa()
    plot: tuple[str, ...] = ()
    if importlib.util.find_spec("matplotlib"):
        place = folder / machine_folder(machine_kind(), isa)
        place.mkdir(parents=True, exist_ok=True)
        # Relative, because the page quotes the command.
        plot = ("--plot", os.path.relpath(place / "linear.svg", ROOT))
    few: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    some: tuple[str, ...] = ()
    if quick:
        few = ("--shapes", "135M out", "--tokens", "1", "32", "--repeats", "1")
        tiny = ("--repeats", "1", "--decode-tokens", "8", "--streams", "2")
        short = (*tiny, "--regimes", "decode")
        some = (*tiny, "--formats", "q4_0", "nf4")
    found = [
        Step("linear", ("linear.py", *few, *plot)),
        Step("cliffs", ("linear.py", "--cliffs", *(("--tokens", "32", "--repeats", "1") if quick else ()))),
        Step("attention", ("attention.py", *(("--repeats", "2") if quick else ()))),
        Step("sampling", ("sampling.py", *(("--repeats", "2", "--streams", "1") if quick else ()))),
        Step("serving-smollm2", ("serving.py", "--rival", "all", *short)),
        Step("served-formats", ("served_formats.py", *some)),
    ]
    if not quick:
        found.append(Step("serving-1b", ("serving.py", "--rival", "all", "--model", "1b", *LARGE)))
    avx2 = os.environ.get("LOWBIT_RIVAL_PYTHON_AVX2")
    if avx2 and isa != "avx2":
        environment = {"LOWBIT_ISA": "avx2", "LOWBIT_RIVAL_PYTHON": f"llama.cpp={avx2}"}
        found.append(
            Step("serving-smollm2-avx2", ("serving.py", "--rival", "llama.cpp", *short), environment)
        )
    return found


# Without the shared prefix: the embedded model shows it in a tenth of the time.
LARGE = ("--regimes", "prefill", "decode", "streams8", "streams32", "long", "--decode-tokens", "64")


def run(step: Step, folder: Path) -> None:
    """One benchmark, its lines shown, its JSON kept."""
    print(f"== {step.name}: {' '.join(step.words)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / step.words[0]), *step.words[1:]],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **step.environment},
    )
    assert process.stdout is not None, "a pipe was asked for"
    last = ""
    for line in process.stdout:
        if last:
            print(last, end="", flush=True)
        last = line
    if process.wait():
        raise SystemExit(f"{step.name} ended with status {process.returncode}")
    path = store(step.name, json.loads(last), folder)
    print(f"kept in {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", metavar="STEP", help="linear, attention, serving-smollm2 …")
    parser.add_argument("--quick", action="store_true", help="tiny, into build/: does it all work?")
    parser.add_argument("--page-only", action="store_true", help="only write the page from what is kept")
    options = parser.parse_args()
    folder, page = FOLDER, PAGE
    if options.quick:
        folder, page = ROOT / "build" / "results", ROOT / "build" / "results.md"
    planned = [] if options.page_only else steps(options.quick, folder)
    if unknown := set(options.only or ()) - {step.name for step in planned}:
        raise SystemExit(
            f"--only {' '.join(unknown)}: the steps here are {', '.join(s.name for s in planned)}"
        )
    for step in planned:
        if not options.only or step.name in options.only:
            run(step, folder)
            update(folder, page)
    update(folder, page)


if __name__ == "__main__":
    main()
