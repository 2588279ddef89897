"""What quantizing at load costs: ``python benchmarks/online.py [--layers N] [--hidden N] [--methods M ...]``.

A random bf16 Llama of more than 2 GB is written once and loaded with each method by a fresh process, all of
whose anonymous memory beyond what the imports took is watched. Printed for each: packed bytes, and over the
scheme's own; the peak and its bound (packed model + two modules as stored + 300 MB); what ``lowbit inspect``
had predicted; seconds, and beside loading the model as it is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loading import write_model

METHODS = (
    *("fp8", "fp8:weights=block", "w8a8_int8", "int8", "rtn", "int3", "mxfp4", "nvfp4", "nf4", "hqq"),
    *("gguf:type=q4_k_m", "gguf:type=q4_0", "gguf:type=q8_0", "int8dq", "int4wo-128"),
)
SLACK = 300 << 20

CHILD = """
import json, sys, threading, time
import torch
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.loading import load_model, plan_model
from lowbit.quantize.method import build_method
from lowbit.quantize.recipe import Asked

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

header = open_checkpoint(sys.argv[1])
asked = Asked(sys.argv[2] or None)
plan = plan_model(header, quantization=asked)
recipe = asked.recipe()
for spec in recipe.methods if recipe else ():
    build_method(spec)  # its module is an import, too
native.library()
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
model = load_model(header, quantization=asked)
seconds = time.perf_counter() - start
done = True
watcher.join()
largest = max(2 * m.shape[0] * m.shape[1] for m in plan.modules)
own = sum(m.shape[0] * m.shape[1] * m.scheme.bits_per_weight(m.shape) / 8 for m in plan.modules)
print(json.dumps({"seconds": seconds, "peak": peak - before, "packed": model.weight_bytes, "own": own,
                  "predicted": plan.peak_bytes, "module": largest, "stored": header.nbytes,
                  "kernels": sorted(model.kernels)}))
"""


def run(folder: Path, method: str) -> dict[str, float]:
    """The JSON a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), method], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{method}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Write once, then one line a method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    options = parser.parse_args()
    mib, rows = 1 << 20, []
    titles = ("packed", "of own", "peak", "bound", "predicted", "load", "to plain")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, "bf16", options.layers, options.hidden)
        run(folder, "")  # the files' pages are in memory from here on
        plain = run(folder, "")
        print(f"bf16: {plain['stored'] / 1e9:.2f} GB, loaded in {plain['seconds']:.2f} s")
        print(f"{'method':18} " + " ".join(f"{title:>10}" for title in titles))
        for method in options.methods:
            found = run(folder, method)
            bound = found["packed"] + 2 * found["module"] + SLACK
            cells = (
                f"{found['packed'] / mib:.0f} M",
                f"{found['packed'] / found['own']:.3f}",
                f"{found['peak'] / mib:.0f} M",
                f"{bound / mib:.0f} M",
                f"{found['predicted'] / mib:.0f} M",
                f"{found['seconds']:.2f} s",
                f"x {found['seconds'] / plain['seconds']:.2f}",
            )
            print(f"{method:18} " + " ".join(f"{cell:>10}" for cell in cells), flush=True)
            rows.append({"method": method, **found, "bound": bound, "within": found["peak"] <= bound})
    told = {"time": time.strftime("%Y-%m-%d"), "options": vars(options), "plain": plain}
    print(json.dumps({**told, "rows": rows}))


if __name__ == "__main__":
    main()
