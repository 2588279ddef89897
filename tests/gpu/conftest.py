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

from lowbit.kernels.gpu import runtime

_RECORD = os.environ.get("LOWBIT_TEST_RECORD_LAUNCHES")


@pytest.fixture
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        with open(_RECORD, "a") as file:
            own = {launch for launch in launches if launch.module.startswith("lowbit.")}
            file.writelines(json.dumps(asdict(launch)) + "\n" for launch in own)
