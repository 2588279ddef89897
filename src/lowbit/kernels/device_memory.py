"""How much memory is really free on a device, cgroup limits included."""

from __future__ import annotations

from pathlib import Path

import torch

_GIB = 1 << 30


def free_memory(device: torch.device, mapped: int = 0) -> int:
    """Bytes this process could still take on the device.

    ``mapped``: bytes of files that are mapped and always in use. Linux counts them as available, because it
    could drop them, and a cgroup counts those that it has read.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = max(_available() - mapped, 0)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None or used is None:
        return free
    return min(free, max(limit - used - max(mapped - _cached(), 0), 0))


def _cached() -> int:
    """Bytes of files in memory that count as this cgroup's."""
    try:
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("file "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


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
