"""How long until a server is ready? From the command to /readyz, beside ``python -c "import torch"``.

    python benchmarks/ready.py                              # the embedded model
    python benchmarks/ready.py MODEL --flags="--quantization fp8"
    python benchmarks/ready.py --repeats 15 --packed-cache off

The engine cannot be ready before torch is imported, and how long that takes depends on the machine, so both
are timed in turns, in the same run, and what counts is the difference. Starts without the packed cache
(``--packed-cache off``) and with a filled one take turns too. One start of each kind is not counted: it reads
files into the page cache, times the kernels of a new machine, and fills the packed cache, in a folder that is
removed afterwards.

Beside the seconds on the clock stand the CPU seconds (user and system) of both processes until they were
ready: on a busy machine these tell more. Each figure is the median over --repeats, its spread (largest less
smallest) behind it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

_POLL_SECONDS = 0.005
_READY_SECONDS = 3600.0


@dataclass
class Times:
    """Seconds of one kind of start, a number for each repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        """One more."""
        self.wall.append(wall)
        self.cpu.append(cpu)

    def summary(self) -> dict[str, float]:
        """Medians and spreads."""
        found: dict[str, float] = {}
        for name, values in (("wall", self.wall), ("cpu", self.cpu)):
            found[f"{name}_seconds"] = round(statistics.median(values), 4)
            found[f"{name}_spread"] = round(max(values) - min(values), 4)
        return found


def import_torch() -> tuple[float, float]:
    """(wall, CPU) seconds of ``python -c "import torch"``."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    wall, after = time.perf_counter() - started, os.times()
    return wall, _children(after) - _children(before)


def _children(times: os.times_result) -> float:
    return times.children_user + times.children_system


def ready(model: str, flags: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of ``lowbit serve`` until /readyz says 200; the server is then stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", model, "--port", str(port), "--log-level", "warning"]
    started = time.perf_counter()
    server = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    try:
        while not _is_ready(port):
            if server.poll() is not None:
                assert server.stderr is not None, "it is a pipe"
                raise SystemExit(f"the server ended with status {server.returncode}: {server.stderr.read()}")
            if time.perf_counter() - started > _READY_SECONDS:
                raise SystemExit(f"not ready after {_READY_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        return time.perf_counter() - started, cpu_seconds(server.pid)
    finally:
        server.terminate()
        server.communicate(timeout=60)


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process, its threads and its living children (Linux)."""
    if sys.platform != "linux":
        return float("nan")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def has_bytecode() -> bool:
    """Whether lowbit's own modules are compiled; else every start compiles them, a few tenths of a second."""
    spec = importlib.util.find_spec("lowbit.settings")
    return spec is not None and spec.cached is not None and Path(spec.cached).exists()


def main() -> None:
    """The table, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--flags", default="", help="further flags of lowbit serve, in one word")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--packed-cache", choices=("off", "on", "both"), default="both")
    options = parser.parse_args()
    if not has_bytecode():
        print("lowbit's bytecode is not cached: run python -m compileall -q src/lowbit", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lowbit-packed-") as folder:
        kinds = {"off": ["--packed-cache", "off"], "on": ["--packed-cache", folder]}
        wanted = [kind for kind in kinds if options.packed_cache in (kind, "both")]
        times = {name: Times() for name in ("import torch", *wanted)}
        for repeat in range(options.repeats + 1):
            for name in times:
                flags = [*shlex.split(options.flags), *kinds.get(name, [])]
                measured = import_torch() if name == "import torch" else ready(options.model, flags)
                if repeat:
                    times[name].add(*measured)
        if "on" in wanted and not list(Path(folder).glob("*.packed")):
            raise SystemExit("the packed cache kept nothing (the log says why): there is nothing to compare")
    torch = times["import torch"]
    result: dict[str, object] = {
        "benchmark": "ready",
        "model": options.model,
        "flags": options.flags,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": options.repeats,
        "bytecode": has_bytecode(),
        "import torch": torch.summary(),
    }
    print(f"{'':<28}{'wall':>9}{'spread':>9}{'CPU':>9}{'beyond import torch':>22}")
    for name, found in times.items():
        title = name if name == "import torch" else f"ready, packed cache {name}"
        summary = found.summary()
        line = f"{title:<28}{summary['wall_seconds']:>8.2f}s{summary['wall_spread']:>8.2f}s"
        line += f"{summary['cpu_seconds']:>8.2f}s"
        if name != "import torch":
            pairs = zip(found.wall, torch.wall, strict=True)
            summary["beyond_import_torch"] = round(statistics.median(mine - its for mine, its in pairs), 4)
            line += f"{summary['beyond_import_torch']:>21.2f}s"
            result[f"packed cache {name}"] = summary
        print(line)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
