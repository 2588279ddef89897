"""Plain checkpoints in dtypes that few have: float64, and FP8 that is nothing but a cast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import read, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from models.family_cases import saved, write_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 32, "tie_word_embeddings": False}
NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_cast_model_is_its_numbers(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms too, as ``model.to(dtype)`` leaves them."""
    saved("Llama", tmp_path / "float", **SIZES)
    stored = load_file(tmp_path / "float" / "model.safetensors")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    logits = []
    for folder, last in (("cast", dtype), ("back", torch.float32)):
        tensors = {name: tensor.to(dtype).to(last) for name, tensor in stored.items()}
        write_checkpoint(tmp_path / folder, config, tensors)
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
        model = load_model(open_checkpoint(str(tmp_path / folder)), device="cpu", dtype="float32")
        logits.append(prompt_logits(model, [[1, 5, 9, 2, 7]])[0])
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[1].abs().max()
    monkeypatch.undo()
    plan = plan_model(open_checkpoint(str(tmp_path / "cast")), device="cpu")
    native = {"cpu_dense"} if dtype is torch.float64 else {"cpu_blocks"}
    assert {module.kernel for module in plan.modules if module.name.startswith("model.layers")} == native


def test_float64_is_read_as_the_nearest_float32(tmp_path: Path) -> None:
    weight = torch.rand(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folder = write_folder(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.bias": weight[:, 0]}, None)
    found = read(folder, NAME, (8, 16))
    assert torch.equal(found.weight.dequantize(), weight.float())
    assert found.bias is not None and torch.equal(found.bias, weight[:, 0].float())


def test_a_scale_anywhere_makes_fp8_more_than_a_cast(tmp_path: Path) -> None:
    weight = torch.ones(8, 16).to(torch.float8_e4m3fn)
    for more, code in (({}, None), ({"model.layers.1.mlp.up_proj.kind_of_scale": torch.ones(1)}, "E0219")):
        folder = write_folder(tmp_path, {f"{NAME}.weight": weight} | more, None)
        if code is None:
            assert torch.equal(read(folder, NAME, (8, 16)).weight.dequantize(), weight.float())
            continue
        with pytest.raises(LowbitError) as caught:
            read(folder, NAME, (8, 16))
        assert caught.value.code == code and "does not say how it is quantized" in caught.value.message
