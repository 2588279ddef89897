"""Qwen3.5 from GGUF files of llama.cpp's converter, whose value heads lie otherwise than in checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.models.mixer_model import MixerModel
from lowbit.models.qwen_next import DeltaNet
from models.family_cases import check_stored_logits

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_recurrent_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    check_stored_logits(FOLDER, name, 1e-3)


def test_heads_change_places_where_a_key_head_has_several() -> None:
    moved = {}
    for name in NAMES:
        model = load_model(open_checkpoint(str(FOLDER / f"{name}.gguf")), device="cpu", dtype="float32")
        assert isinstance(model, MixerModel)
        mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, DeltaNet)]
        moved[name] = all(mixer.places is not None for mixer in mixers) and bool(mixers)
    assert moved == {"qwen35": True, "qwen35moe": True, "qwen35_one_each": False}


def test_bits_do_not_depend_on_company() -> None:
    """What changes places is done row by row."""
    model = load_model(open_checkpoint(str(FOLDER / "qwen35.gguf")), device="cpu")
    given = [list(range(3, 30)), list(range(9, 14))]
    together = prompt_logits(model, given)
    for prompt, logits in zip(given, together, strict=True):
        [alone] = prompt_logits(model, [prompt])
        assert torch.equal(alone, logits)


def test_what_is_refused(tmp_path: Path) -> None:
    """Ranks of such a file, and turning it into a folder."""
    header = open_checkpoint(str(FOLDER / "qwen35.gguf"))
    with pytest.raises(LowbitError, match=r"E0430.*the value heads of a key head lie apart"):
        plan_model(header, tp_size=2)
    with pytest.raises(LowbitError, match=r"E0450.*'qwen35' are not turned into Hugging Face folders"):
        convert(header, "dense", tmp_path / "out")
