"""Everything that docs/results.md says of GPU speed, on this machine: ``make bench-gpu``.

Runs linear.py, attention.py and gpu_step.py on the GPU, keeps what they say under docs/results/ and writes
the page's section anew. Needs torch with CUDA, Triton and a GPU, nothing else: no network, and no native
library. --tune first measures sizes of launches, which what follows then has; --only runs some of the steps;
--quick is a look at whether everything works (kept under build/).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench_cpu import Step, run
from machine import ROOT
from results_page import FOLDER, PAGE, update

FORMATS = (
    *("bf16", "int4 g128", "awq g128", "gptq act-order", "q4_k", "q6_k", "nf4", "mxfp4", "int8 channel"),
    *("fp8 channel", "w8a8", "fp8 row x row", "fp8 block x group"),
    *("exl3 4 bits", "aqlm 1x16 g8", "aqlm 2x8 g8", "vptq v8 k65536+256"),
)


def steps(quick: bool) -> list[Step]:
    """In order, the shortest last words first: a lease may end."""
    few: tuple[str, ...] = ("--shapes", "8B out", "--tokens", "1", "1024", "--repeats", "2") if quick else ()
    cuda = ("--device", "cuda")
    return [
        Step("linear", ("linear.py", *cuda, "--formats", *FORMATS, *few)),
        Step("gpu-step", ("gpu_step.py", *(("--step", "1x128") if quick else ()))),
        Step("attention", ("attention.py", *cuda, "--repeats", "3" if quick else "15")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", metavar="STEP", help="linear, gpu-step, attention")
    parser.add_argument("--tune", action="store_true", help="first keep the fastest sizes (tune_gpu.py)")
    parser.add_argument("--quick", action="store_true", help="tiny, into build/: does it all work?")
    options = parser.parse_args()
    folder, page = FOLDER, PAGE
    if options.quick:
        folder, page = ROOT / "build" / "results", ROOT / "build" / "results.md"
    planned = steps(options.quick)
    if unknown := set(options.only or ()) - {step.name for step in planned}:
        raise SystemExit(
            f"--only {' '.join(unknown)}: the steps here are {', '.join(s.name for s in planned)}"
        )
    if options.tune:
        few = ("--shapes", "8B out", "--formats", "int4 g128", "--tokens", "1", "8") if options.quick else ()
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tune_gpu.py"), *few], check=True)
    for step in planned:
        if not options.only or step.name in options.only:
            run(step, folder)
            update(folder, page)


if __name__ == "__main__":
    main()
