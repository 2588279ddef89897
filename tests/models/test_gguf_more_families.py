"""More families from GGUF files of llama.cpp's converter, against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_more_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    expected = load_file(FOLDER / f"{name}.safetensors")
    model = load_model(open_checkpoint(str(FOLDER / f"{name}.gguf")), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [expected["tokens"].flatten().tolist()])
    wanted = expected["logits"].view(logits.shape)
    worst = ((logits - wanted).abs().amax(1) / wanted.abs().amax(1)).max()
    assert worst <= 1e-3, f"{name}: {worst:.2e}"
