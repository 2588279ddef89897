"""Programs that go on with little memory: what native code says where it gets none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = """
import resource

def leave(spare):
    pages = int(open("/proc/self/statm").read().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, most))
"""


def memory_error_of(program: str) -> str:
    """The MemoryError of a program's ``work()``, when it has called ``leave(bytes)`` itself."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("asks as Linux answers")
    tried = "try:\n    work()\nexcept MemoryError as error:\n    print(error)"
    command = [sys.executable, "-c", f"{LIMIT}\n{program}\n{tried}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
    return ran.stdout.strip()
