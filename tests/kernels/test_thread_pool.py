"""The native thread pool, by a driver of its own that is compiled with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.kernels import native

SOURCES = Path(native.__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed package has no sources")
def test_memory_that_runs_out_in_a_task_reaches_the_caller(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    files = [Path(__file__).with_name("pool_driver.cpp"), SOURCES / "thread_pool.cpp"]
    command = [str(COMPILER), "-std=c++17", "-O1", "-pthread", f"-I{SOURCES}", *map(str, files), "-o"]
    built = subprocess.run([*command, str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr
