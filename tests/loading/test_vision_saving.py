"""What stands beside a language model is kept when it is quantized or converted, and never quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.loading.quantizing import Quantizing
from models.test_vision_checkpoints import make

PROMPT = list(range(3, 40))


def towers(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder that belong to no language model."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: t for name, t in tensors.items() if "visi" in name or "visual" in name or "proj" in name[:25]
    }


@pytest.mark.parametrize("case", ["Llava", "Qwen2_5_VL", "Gemma3", "Qwen3VLMoe"])
@pytest.mark.parametrize("method", ["rtn", "nf4"])
def test_a_quantized_vision_checkpoint_is_whole(case: str, method: str, tmp_path: Path) -> None:
    make(case, tmp_path / "float").bfloat16().save_pretrained(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    served = load_model(header, device="cpu", quantization=method, save=tmp_path / "saved")
    before, after = towers(tmp_path / "float"), towers(tmp_path / "saved")
    assert len(before) > 5 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["vision_config"] == header.config["vision_config"]
    said = config["quantization_config"]
    left = said["ignore" if method == "rtn" else "llm_int8_skip_modules"]
    matrices = {
        name.removesuffix(".weight") for name, t in before.items() if t.ndim == 2 and ".weight" in name
    }
    assert matrices <= set(left)
    loaded = load_model(open_checkpoint(str(tmp_path / "saved")), device="cpu", strict=True)
    assert torch.equal(prompt_logits(served, [PROMPT])[0], prompt_logits(loaded, [PROMPT])[0])
    convert(open_checkpoint(str(tmp_path / "saved")), "dense", tmp_path / "dense")
    again = towers(tmp_path / "dense")
    assert before.keys() == again.keys() and all(torch.equal(before[n], again[n]) for n in before)


def test_experts_apart_lie_where_their_stack_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the language model's prefix: quantized by a calibrated method, and by a conversion."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    make("Qwen3VLMoe", tmp_path / "float").bfloat16().save_pretrained(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    monkeypatch.setattr(Quantizing, "_sequences", lambda self, spec: [list(range(3, 67))] * 2)
    load_model(header, device="cpu", quantization="gptq:group_size=32", save=tmp_path / "saved")
    convert(header, "compressed-tensors", tmp_path / "converted", requantize="")
    for folder, suffix in (("saved", "qweight"), ("converted", "weight_packed")):
        made = open_checkpoint(str(tmp_path / folder))
        assert f"model.language_model.layers.0.mlp.experts.1.up_proj.{suffix}" in made.tensors
        load_model(made, device="cpu", strict=True)


def test_gguf_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    monkeypatch.setattr("lowbit.loading.gguf_saving.tokenizer_metadata", lambda header, rows: tokens)
    make("Llava", tmp_path / "float")
    done = convert(open_checkpoint(str(tmp_path / "float")), "gguf", tmp_path / "out.gguf")
    count = len(towers(tmp_path / "float"))
    assert [
        note for note in done.notes if note.startswith(f"{count} tensors of vision or audio were left out")
    ]


def test_a_quantized_tower_is_refused(tmp_path: Path) -> None:
    make("Llava", tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "vision" in name and tensors[name].ndim == 2)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(LowbitError, match="E0450.*F8_E4M3, quantized in its own way"):
        convert(open_checkpoint(str(tmp_path / "float")), "dense", tmp_path / "out")
