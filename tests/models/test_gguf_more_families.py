"""More families from GGUF files of llama.cpp's converter, against transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import plan_model
from models.family_cases import check_stored_logits

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_more_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    check_stored_logits(FOLDER, name, 1e-3)


def test_queries_of_ministral3_grow_behind_its_context() -> None:
    """Within it their factor is 1, which is all that attention has; the file keeps the whole number."""
    header = open_checkpoint(str(FOLDER / "ministral3.gguf"))
    assert header.metadata["mistral3.context_length"] == 64
    assert plan_model(header).context_length == 32
    plain = open_checkpoint(str(FOLDER / "mistral3.gguf"))  # Mistral Small 3
    assert plan_model(plain).context_length == 64
    alone = replace(header, metadata={k: v for k, v in header.metadata.items() if "rope.scaling" not in k})
    with pytest.raises(LowbitError, match=r"^error\[E0242\]: ministral3.gguf: mistral3: queries that grow"):
        plan_model(alone)
