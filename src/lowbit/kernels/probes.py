"""What this machine can do at most (csrc/probes.cpp): reading memory, and each kind of dot product.

The bounds that benchmarks set kernels' figures beside, taken with all threads of the native pool.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import native

DOTS = {"fp32 fma": 0, "bf16 dot": 1, "int8 dot": 2, "bf16 tiles": 3, "int8 tiles": 4}
PIECE = 512  # each thread reads a whole number of these bytes
_ROUNDS = 200_000  # of a probe: about 10 ms


@cache
def _functions() -> tuple[Callable[..., int], Callable[..., int]] | None:
    library = native.library()
    if library is None:
        return None
    library.lowbit_probe_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    library.lowbit_probe_read.restype = ctypes.c_uint64
    library.lowbit_probe_dot.argtypes = (ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(ctypes.c_double))
    library.lowbit_probe_dot.restype = ctypes.c_int64
    return library.lowbit_probe_read, library.lowbit_probe_dot


def read(buffer: Tensor, turns: int = 1) -> tuple[int, int]:
    """(bytes read in one turn, wrapping sum of their 64-bit words); buffer: contiguous, on the CPU."""
    assert buffer.is_contiguous() and buffer.device.type == "cpu", "the probe reads plain memory"
    loaded, threads = _functions(), native.threads()
    assert loaded is not None, "asked for with a library only"
    total = loaded[0](buffer.data_ptr(), buffer.nbytes, turns)
    return buffer.nbytes // threads // PIECE * PIECE * threads, total


def dot(kind: str, rounds: int = _ROUNDS) -> tuple[int, float]:
    """(multiply-adds done, total of the first lanes); (0, 0.0) where there is no such instruction."""
    loaded = _functions()
    assert loaded is not None, "asked for with a library only"
    total = ctypes.c_double(0)
    return loaded[1](DOTS[kind], rounds, ctypes.byref(total)), total.value


def read_bandwidth(nbytes: int, seconds: float = 0.2) -> float:
    """GB/s of reading about ``nbytes`` again and again: the fastest turn of those in ``seconds``."""
    buffer = torch.ones(max(nbytes // 8, native.threads() * PIECE // 8), dtype=torch.int64)
    turns = max(1, (4 << 20) // buffer.nbytes)  # so that the clock is read every few MiB at most
    read(buffer, turns)
    return max(_rates(lambda: read(buffer, turns)[0] * turns, seconds)) / 1e9


def dot_peak(kind: str, seconds: float = 0.1) -> float:
    """TFLOPS (multiplications and additions both count), the fastest run; 0 without such an instruction."""
    if not dot(kind, 1)[0]:
        return 0.0
    return 2 * max(_rates(lambda: dot(kind)[0], seconds)) / 1e12


def _rates(work: Callable[[], int], seconds: float) -> list[float]:
    """Units of work a second, run after run."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        done = work()
        found.append(done / (time.perf_counter() - began))
    return found
