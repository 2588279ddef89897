"""The memory cgroup (v2) of this process: its limit, and whether the kernel has killed for it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lowbit.errors import printable
from lowbit.server.limits import MiB


def _cgroup_file(name: str) -> str:
    """A file of this process's memory cgroup (v2), or ""."""
    with contextlib.suppress(OSError):
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        for folder in (Path("/sys/fs/cgroup", group), Path("/sys/fs/cgroup")):
            with contextlib.suppress(OSError):
                return (folder / name).read_text()
    return ""


def oom_kills() -> int:
    """How often the kernel killed a process of this cgroup for memory."""
    for line in _cgroup_file("memory.events").splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def memory_limit() -> str:
    """The limit in words."""
    limit = _cgroup_file("memory.max").strip()
    return (
        f"{int(limit) / MiB:,.0f} MiB".replace(",", " ") if limit.isdigit() else printable(limit or "unknown")
    )
