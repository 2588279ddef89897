"""Layers whose inputs have delayed scales: who owns a state, and that every forward is a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint import tiny
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.activation_quant import InputTransform
from lowbit.loading import Loader, load_model
from lowbit.models.model import Model
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay

SCHEME = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=Delay(3))
LAYER = "model.layers.0"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny Llama all of whose layers ask for delayed scales, as an online method's reader would."""
    monkeypatch.setattr(Loader, "_transform", lambda *_: InputTransform(SCHEME))
    return load_model(open_checkpoint(str(tiny.write_folder(tmp_path))), device="cpu")


def test_parts_that_share_an_input_share_its_state(model: Model) -> None:
    names = [name for name, _ in model.states]
    assert names == [
        *(f"{LAYER}.{part}" for part in ("self_attn.qkv_proj", "self_attn.o_proj")),
        *(
            f"{LAYER}.{part}"
            for part in (
                "mlp.gate_up_proj",
                "mlp.down_proj",
            )
        ),
        "lm_head",
    ]


def test_every_forward_is_a_step(model: Model) -> None:
    seen: list[list[float]] = [[] for _ in range(5)]
    for step in range(1, 6):
        prompt_logits(model, [list(range(step, step + 4))])
        for scales, (_, state) in zip(seen, model.states, strict=True):
            assert state.amax_history[0] == 0 and (state.amax_history > 0).sum() == min(step, 2)
            window = state.amax_history.max()
            assert state.scale.item() <= 448.0 / window.item() * (1 + 1e-6)
            scales.append(state.scale.item())
    for scales in seen:
        assert len(set(scales)) > 1 and all(0 < scale < float("inf") for scale in scales)
    assert len({tuple(scales) for scales in seen}) == 5, "every layer its own"


def test_a_saved_model_goes_on_where_it_was(model: Model, tmp_path: Path) -> None:
    for step in range(3):
        prompt_logits(model, [[step, 2, 3]])
    model.states.save(tmp_path / "states.safetensors")
    expected = [prompt_logits(model, [[7, step]])[0] for step in range(3)]
    model.states.load(tmp_path / "states.safetensors")
    again = [prompt_logits(model, [[7, step]])[0] for step in range(3)]
    assert all(map(torch.equal, again, expected))
