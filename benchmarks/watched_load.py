"""A load in a process of its own, its memory watched: ``python benchmarks/watched_load.py FOLDER [METHOD]``.

The last line is JSON: ``seconds``; ``peak``, the most anonymous bytes beyond what the imports took;
``packed``, the bytes of all packed weights, and ``own``, what their schemes come to; what the plan had said
(``predicted`` at the peak, ``planned`` weights); the bytes of the ``largest`` module in 16 bits; those
``stored``; and the ``kernels``. ``load`` and ``memory`` are for the benchmarks that run this.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SLACK = 300 << 20  # what a bound grants beside the model


def memory(status: str, *kinds: str) -> int:
    """Bytes of these kinds (``RssAnon``, ``RssShmem``) by what /proc/PID/status says."""
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0].rstrip(":") in kinds)


def printed(*command: str) -> Any:
    """The JSON that a fresh Python prints last; where it fails, the end of what it says."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-2:])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(folder: Path, method: str = "") -> Any:
    """What such a process prints."""
    return printed(__file__, str(folder), method)


class Watch:
    """Of a ``with`` block: ``seconds``, and the most anonymous bytes beyond those at its start (``peak``)."""

    def __enter__(self) -> Watch:
        self._before = self._most = self._now()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watcher.join()
        self.peak = self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        return memory(Path("/proc/self/status").read_text(), "RssAnon")


def main() -> None:
    """Load and print."""
    from lowbit.checkpoint import open_checkpoint
    from lowbit.kernels import native
    from lowbit.loading import load_model, plan_model
    from lowbit.quantize.method import build_method
    from lowbit.quantize.recipe import Asked

    folder, method = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    header, asked = open_checkpoint(folder), Asked(method or None)
    plan = plan_model(header, quantization=asked)
    recipe = asked.recipe()
    for spec in recipe.methods if recipe else ():
        build_method(spec)  # its module is an import, too
    native.library()
    with Watch() as watch:
        model = load_model(header, quantization=asked)
    own = sum(m.shape[0] * m.shape[1] * m.scheme.bits_per_weight(m.shape) / 8 for m in plan.modules)
    told = {
        "seconds": watch.seconds,
        "peak": watch.peak,
        "packed": model.weight_bytes,
        "own": own,
        "predicted": plan.peak_bytes,
        "planned": plan.weight_bytes,
        "largest": max(2 * m.shape[0] * m.shape[1] for m in plan.modules),
        "stored": header.nbytes,
        "kernels": sorted(model.kernels),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
