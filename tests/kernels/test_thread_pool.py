"""The native thread pool, by a driver of its own that is compiled with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.kernels import native

SOURCES = Path(native.__file__).parents[1] / "csrc"
AFFINITY = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed package has no sources")
def test_jobs_that_fail_nest_or_meet_limits(tmp_path: Path) -> None:
    """What pool_driver.cpp does with it."""
    program = tmp_path / "driver"
    files = [Path(__file__).with_name("pool_driver.cpp"), SOURCES / "thread_pool.cpp"]
    command = [str(COMPILER), "-std=c++17", "-O1", "-pthread", f"-I{SOURCES}", *map(str, files), "-o"]
    built = subprocess.run([*command, str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.skipif(len(AFFINITY) < 2, reason="one processor")
def test_workers_that_shared_a_processor_part_and_keep_their_affinity() -> None:
    """A worker leaves the caller's processor, and may run on all that it could before."""
    program = """
import os, time
import torch
from lowbit.kernels import native, probes

native.set_threads(2)
buffer = torch.ones(1 << 16, dtype=torch.int64)
probes.read(buffer)  # starts the workers
threads = [int(name) for name in os.listdir("/proc/self/task")]
allowed = {thread: os.sched_getaffinity(thread) for thread in threads}
for thread in threads:
    os.sched_setaffinity(thread, {min(allowed[thread])})
for _ in range(50):
    probes.read(buffer)
for thread in threads:
    os.sched_setaffinity(thread, allowed[thread])
until = time.monotonic() + 0.3
while time.monotonic() < until:
    probes.read(buffer)
assert {thread: os.sched_getaffinity(thread) for thread in threads} == allowed
print("ok")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr
