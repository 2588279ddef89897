"""More families from GGUF files of llama.cpp's converter, against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.kernels.reference import Reference
from models.family_cases import check_stored_logits

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_more_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    check_stored_logits(FOLDER, name, 1e-3)
