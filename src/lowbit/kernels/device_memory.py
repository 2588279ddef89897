"""How much memory is really free on a device, cgroup limits included; numbers on their way there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_GIB = 1 << 30
_LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, and asynchronous copies


def gpu_fault() -> str:
    """Why no GPU of this machine can be used; "" where the first one can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    found = torch.cuda.get_device_capability()
    if found >= _LEAST_CAPABILITY:
        return ""
    has, needed = (".".join(map(str, one)) for one in (found, _LEAST_CAPABILITY))
    return f"{torch.cuda.get_device_name()} has compute capability {has}, kernels need {needed}"


def has_gpu() -> bool:
    """Whether ``--device auto`` is a GPU."""
    return not gpu_fault()


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


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, whoever uses them."""
    return int(torch.cuda.mem_get_info(device)[1])


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps for later, which may lie in pieces that are too small."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays, all of one dtype, on the device, without waiting for what it does.

    One copy for all of them, from pinned memory: a copy from any other would wait for the stream. torch
    reuses pinned memory only after the copy. On a CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed, places = _packed(arrays)
    buffer = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
    return [
        buffer[place : place + array.size].view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


def _packed(arrays: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """All of them in one, and where each begins: at 16 bytes, as kernels are compiled for."""
    step = 16 // arrays[0].itemsize
    sizes = [-(-array.size // step) * step for array in arrays]
    places = [sum(sizes[:n]) for n in range(len(sizes))]
    packed = np.zeros(sum(sizes), dtype=arrays[0].dtype)
    for place, array in zip(places, arrays, strict=True):
        packed[place : place + array.size] = array.ravel()
    return packed, places


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
