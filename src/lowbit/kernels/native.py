"""The native library: which instruction set this CPU has, and the shared library built for it.

One library for each of ``amx``, ``avx512`` (with VNNI, VBMI and BF16), ``avx512_vnni`` (the same without
BF16: Intel's Xeons from Ice Lake on where they have no AMX) and ``avx2`` (with FMA and F16C), on ARM for each
of ``neon_bf16`` and ``neon`` (ARMv8.2 with dot products), all from the same sources (csrc/),
behind one plain C ABI. The best one the CPU has is loaded on first use; ``LOWBIT_ISA`` names another
(``scalar``: none, everything runs on torch). Tensors pass as addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from lowbit.errors import LowbitError

INSTRUCTION_SETS = ("amx", "avx512", "avx512_vnni", "avx2", "neon_bf16", "neon")  # best first
_NEEDED_FLAGS = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512_vnni": {
        *("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
        *("avx512_vnni", "avx512vbmi"),
    },
    "neon": {"asimddp", "asimdrdm", "atomics"},
    "neon_bf16": {"asimddp", "asimdrdm", "atomics", "bf16"},
}
_NEEDED_FLAGS["avx512"] = _NEEDED_FLAGS["avx512_vnni"] | {"avx512_bf16"}
_NEEDED_FLAGS["amx"] = _NEEDED_FLAGS["avx512"] | {"amx_tile", "amx_bf16", "amx_int8"}
# For tests: AMX code with tiles in plain C++, AVX-512 code in plain C++ and AVX2.
_NEEDED_FLAGS["amx_emulated"] = _NEEDED_FLAGS["avx512"]
_NEEDED_FLAGS["avx512_emulated"] = _NEEDED_FLAGS["avx512_vnni_emulated"] = _NEEDED_FLAGS["avx2"]
# An ARM CPU's features: Linux's name, its place in the auxiliary vector (entry, bit), macOS's name.
_ARM_FEATURES = {
    "asimddp": (16, 20, "FEAT_DotProd"),
    "asimdrdm": (16, 12, "FEAT_RDM"),
    "atomics": (16, 8, "FEAT_LSE"),
    "bf16": (26, 14, "FEAT_BF16"),
}

_CGROUPS, _PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self")

_SYSCALL_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@cache
def cpu_flags() -> frozenset[str]:
    """The features the kernel reports for this CPU; it leaves out those whose registers it does not save."""
    if _on_arm():
        return frozenset(name for name in _ARM_FEATURES if _arm_has(name))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _on_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


def _arm_has(feature: str) -> bool:
    entry, bit, name = _ARM_FEATURES[feature]
    libc = ctypes.CDLL(None)
    if sys.platform == "darwin":
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        failed = libc.sysctlbyname(
            f"hw.optional.arm.{name}".encode(),
            *(ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)),
        )
        return failed == 0 and value.value != 0
    libc.getauxval.argtypes, libc.getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
    return bool(libc.getauxval(entry) >> bit & 1)


def has(isa: str) -> bool:
    """Whether this CPU has the instruction set."""
    return cpu_flags() >= _NEEDED_FLAGS[isa]


def _directories() -> Iterator[Path]:
    """Where the libraries may lie: a development build, beside this package, in an editable install."""
    if chosen := os.environ.get("LOWBIT_NATIVE_DIR"):
        yield Path(chosen)
    yield Path(__file__).parent.parent / "_native"
    import importlib.metadata  # reads a lot, and is seldom needed

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a source tree, not installed
        yield Path(str(importlib.metadata.distribution("lowbit").locate_file("lowbit/_native")))


def _library_file(isa: str) -> Path | None:
    for directory in _directories():
        file = directory / f"liblowbit_{isa}.so"
        if file.is_file():
            return file
    return None


def library_file() -> Path | None:
    """The file ``library`` loads; None where there is none."""
    return None if isa() == "scalar" else _library_file(isa())


def _ask_for_tiles() -> bool:
    """Linux lends a process the AMX tile registers only after it asks, before any thread uses them."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(_SYSCALL_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


@cache
def isa() -> str:
    """The instruction set in use: one of ``INSTRUCTION_SETS``, or ``scalar`` for none."""
    wanted = os.environ.get("LOWBIT_ISA", "")
    if wanted == "scalar":
        return "scalar"
    if wanted:
        if wanted not in _NEEDED_FLAGS:
            names = ", ".join((*INSTRUCTION_SETS, "scalar"))
            raise LowbitError("E0411", f"LOWBIT_ISA={wanted} is no instruction set; known: {names}")
        missing = sorted(_NEEDED_FLAGS[wanted] - cpu_flags())
        if missing:
            raise LowbitError(
                "E0411", f"LOWBIT_ISA={wanted} but this CPU has no {', '.join(missing)}; unset LOWBIT_ISA"
            )
        if _library_file(wanted) is None:
            raise LowbitError(
                "E0411",
                f"LOWBIT_ISA={wanted} but liblowbit_{wanted}.so was not built; install again with a compiler",
            )
        if wanted == "amx" and not _ask_for_tiles():
            raise LowbitError("E0411", "LOWBIT_ISA=amx but the operating system refuses AMX tiles")
        return wanted
    for candidate in INSTRUCTION_SETS:
        if has(candidate) and _library_file(candidate) and (candidate != "amx" or _ask_for_tiles()):
            return candidate
    return "scalar"


def base_isa() -> str:
    """``isa()``, or the instruction set that it emulates: whose kernels are in use."""
    return isa().removesuffix("_emulated")


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where lowbit runs on torch alone."""
    chosen = isa()
    if chosen == "scalar":
        return None
    loaded = ctypes.CDLL(str(_library_file(chosen)))
    loaded.lowbit_set_threads.argtypes = (ctypes.c_int,)
    loaded.lowbit_set_threads.restype = None
    loaded.lowbit_threads.restype = ctypes.c_int
    loaded.lowbit_set_threads(available_cores())
    return loaded


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by the CPU quotas of its cgroup and those around it."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [quota for group in _cgroups() if (quota := _cpu_quota(group)) is not None]
    return max(1, min([cores, *(round(quota) for quota in quotas)]))


def _cgroups() -> Iterator[Path]:
    """The folders of the cgroups (v2, and v1's of the CPU controller) that this process is in.

    In a container /proc/self/cgroup may name folders as the host has them: the mount's own is always asked.
    """
    try:
        lines = (_PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in ("0::/", "0:cpu:/", *lines):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = PurePosixPath(path.strip("/"))
        if ".." in group.parts:  # outside what this process sees
            continue
        for inner in (group, *group.parents):
            yield mount / inner


def _cpu_quota(group: Path) -> float | None:
    """Cores that a cgroup allows; None where it says nothing, or no limit."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def set_threads(count: int) -> None:
    """How many threads native kernels use, the caller included."""
    loaded = library()
    if loaded is not None:
        loaded.lowbit_set_threads(count)


def threads() -> int:
    """Threads in use."""
    loaded = library()
    return 1 if loaded is None else int(loaded.lowbit_threads())


def describe() -> str:
    """One line for the start-up log: "native kernels: avx512, 2 threads", or why there are none."""
    chosen = isa()
    if chosen != "scalar":
        return f"native kernels: {chosen}, {threads()} threads"
    if os.environ.get("LOWBIT_ISA") == "scalar":
        return "native kernels: none (LOWBIT_ISA=scalar); running on torch"
    if not has("neon" if _on_arm() else "avx2"):
        missing = "ARMv8.2 dot products" if _on_arm() else "AVX2"
        return f"native kernels: none for this CPU (no {missing}); running on torch, much slower"
    return "native kernels: not built (no C++ compiler at installation); running on torch, much slower"
