"""Tests of the Triton kernels: on the GPU where there is one, else on the CPU in Triton's interpreter.

tests/conftest.py sets TRITON_INTERPRET where there is no GPU.
LOWBIT_TEST_RECORD_LAUNCHES names a file that gets every launch, a JSON line each (``test_compiles``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from gpu.interpreter import hasten
from lowbit.kernels.gpu import runtime

_RECORD = os.environ.get("LOWBIT_TEST_RECORD_LAUNCHES")
_written: set[runtime.Launch] = set()


@pytest.fixture
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _faster(pytestconfig: pytest.Config) -> Iterator[None]:
    """``-m ""``, which has the slow tests too, also looks for integers that overflow in kernels."""
    if not runtime.INTERPRETED or runtime.missing():
        yield
        return
    with pytest.MonkeyPatch.context() as changes:
        hasten(changes, overflows=not pytestconfig.getoption("markexpr"))
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
