"""Tests of the Triton kernels: on the GPU where there is one, else on the CPU in Triton's interpreter.

tests/conftest.py sets TRITON_INTERPRET where there is no GPU.
LOWBIT_TEST_RECORD_LAUNCHES names a file that gets every launch, a JSON line each (``test_compiles``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from lowbit.kernels.gpu import runtime

_RECORD = os.environ.get("LOWBIT_TEST_RECORD_LAUNCHES")
_written: set[runtime.Launch] = set()


@pytest.fixture
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _language_once() -> Iterator[None]:
    """Triton's interpreter patches its language once a launch, as it needs to.

    It does so again at every call of a ``triton.jit`` function inside a kernel, hundreds of attributes each
    time, and restores none of them before the launch ends. The first patch says it all.
    """
    if not runtime.INTERPRETED or runtime.missing():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope_type = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope_type is None:
        yield  # another Triton: only slower
        return
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value in (language, language.core)}
        if seen and seen <= patched:
            return scope_type()
        new, scope = seen - patched, patch(function)
        restore = scope.restore
        patched.update(new)

        def restore_and_forget() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restore_and_forget
        return scope

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with runtime.interpreting():
        if _RECORD is None:
            yield
            return
        with runtime.recording() as launches:
            yield
        _write(_RECORD, launches)


def _write(path: str, launches: list[runtime.Launch]) -> None:
    """Those of lowbit's kernels that this process has not written yet, behind what other processes write."""
    new = {launch for launch in launches if launch.module.startswith("lowbit.")} - _written
    _written.update(new)
    lines = "".join(json.dumps(asdict(launch)) + "\n" for launch in new).encode()
    with open(path, "ab", buffering=0) as file:
        assert file.write(lines) == len(lines), "one write, so that no line is torn"
