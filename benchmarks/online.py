"""What quantizing at load costs: ``python benchmarks/online.py [--layers N] [--hidden N] [--methods M ...]``.

A random bf16 Llama of more than 2 GB is written once and loaded with each method by a fresh process, all of
whose anonymous memory beyond what the imports took is watched. Printed for each: packed bytes, and over the
scheme's own; the peak and its bound (packed model + two modules as stored + 300 MB); what ``lowbit inspect``
had predicted; seconds, and beside loading the model as it is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from watched_load import SLACK, load

from loading import write_model

METHODS = (
    *("fp8", "fp8:weights=block", "w8a8_int8", "int8", "rtn", "int3", "mxfp4", "nvfp4", "nf4", "hqq"),
    *("gguf:type=q4_k_m", "gguf:type=q4_0", "gguf:type=q8_0", "int8dq", "int4wo-128"),
)


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
        load(folder)  # the files' pages are in memory from here on
        plain = load(folder)
        print(f"bf16: {plain['stored'] / 1e9:.2f} GB, loaded in {plain['seconds']:.2f} s")
        print(f"{'method':18} " + " ".join(f"{title:>10}" for title in titles))
        for method in options.methods:
            found = load(folder, method)
            bound = found["packed"] + 2 * found["largest"] + SLACK
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
