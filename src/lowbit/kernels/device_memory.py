"""How much memory is really free on a device, cgroup limits included."""

from __future__ import annotations

from pathlib import Path

import torch

_GIB = 1 << 30


def free_memory(device: torch.device) -> int:
    """Bytes this process could still take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * _GIB  # a kernel older than 3.14; a small guess


def _number(file: str) -> int | None:
    """The number in a cgroup file; None where there is none, or it says "max"."""
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return None
