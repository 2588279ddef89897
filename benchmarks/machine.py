"""What a benchmark says of the machine and the code it ran on."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _cpu_fields() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """The processor's own name."""
    return _cpu_fields().get("model name") or platform.processor() or platform.machine()


def machine_kind() -> str:
    """The processor, with numbers where virtual machines only say "AMD EPYC": "… (family 25, model 17)"."""
    found = _cpu_fields()
    if "cpu family" not in found:
        return cpu_name()
    return f"{cpu_name()} (family {found['cpu family']}, model {found.get('model', '?')})"


def commit() -> str:
    """The commit measured, "-dirty" where files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def run_record(benchmark: str) -> dict[str, object]:
    """What the JSON line of a run says of it: code, command, machine."""
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "machine": machine_kind(),
    }
