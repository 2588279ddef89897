"""A plugin of pytest: which functions of the native library a run looked up, one a line, in the file that
the variable NATIVE_FUNCTIONS names (kernels/test_instruction_sets.py)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_looked_up: set[str] = set()
_look_up = ctypes.CDLL.__getitem__


def _recorded(library: ctypes.CDLL, name: object) -> object:
    found = _look_up(library, name)  # type: ignore[arg-type]
    if str(name).startswith("lowbit_"):
        _looked_up.add(str(name))
    return found


def pytest_configure() -> None:
    ctypes.CDLL.__getitem__ = _recorded  # type: ignore[method-assign, assignment]


def pytest_unconfigure() -> None:
    Path(os.environ["NATIVE_FUNCTIONS"]).write_text("".join(f"{name}\n" for name in sorted(_looked_up)))
