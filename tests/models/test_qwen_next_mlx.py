"""Qwen3-Next as mlx-lm writes it: experts stacked, taps before the one channel, 1 added to norms."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from models.test_qwen_next import TOLERANCE, loaded, make_checkpoint, prompts, worst

GROUP = 32
SHIFTED = ("input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm")


def eight_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """MLX's affine codes of a matrix, with what belongs to them; and what they are worth."""
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 255).half()
    biases = low.half()
    codes = ((groups - biases[..., None].float()) / scales[..., None].float()).round().clamp(0, 255)
    values = codes * scales[..., None].float() + biases[..., None].float()
    words = codes.flatten(-2).to(torch.uint8).view(torch.int32).view(torch.uint32)
    return {"weight": words, "scales": scales, "biases": biases}, values.flatten(-2)


def as_mlx_writes(source: Path, folder: Path, *, quantized: bool = False) -> Path:
    """The checkpoint as mlx-lm changes it; where it is quantized ``source`` gets the codes' values."""
    [path] = source.glob("*.safetensors")
    tensors, found = load_file(path), {}
    experts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        weight = tensors[name]
        stem = name.removesuffix(".weight")
        plain = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) or weight.shape[-1] % GROUP
        if quantized and weight.dim() == 2 and not plain:
            packed, tensors[name] = eight_bits(weight)
        else:
            packed = {"weight": weight}
        if name.endswith("conv1d.weight"):
            packed = {"weight": weight.movedim(2, 1).contiguous()}
        elif name.endswith(tuple(f"{norm}.weight" for norm in SHIFTED)):
            packed = {"weight": weight + 1}
        one = re.fullmatch(r"(.+\.mlp)\.experts\.\d+\.(\w+)\.weight", name)
        if one is not None:
            for suffix, tensor in packed.items():
                experts.setdefault(f"{one[1]}.switch_mlp.{one[2]}.{suffix}", []).append(tensor)
        elif name.endswith(".weight"):
            found |= {f"{stem}.{suffix}": tensor for suffix, tensor in packed.items()}
        else:
            found[name] = weight
    found |= {name: torch.stack(each) for name, each in experts.items()}
    folder.mkdir()
    save_file(found, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    if quantized:
        save_file(tensors, path, {"format": "pt"})
        config["quantization"] = {"group_size": GROUP, "bits": 8, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=[False, True], ids=["floats", "8 bits"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """What transformers saves and what mlx-lm makes of it."""
    make_checkpoint(tmp_path / "plain")
    return tmp_path / "plain", as_mlx_writes(tmp_path / "plain", tmp_path / "mlx", quantized=request.param)


def test_logits(folders: tuple[Path, Path]) -> None:
    plain, mlx = folders
    given = prompts(1, 45)
    reference = {"device": "cpu", "dtype": "float32", "linear_kernel": "reference"}
    expected = prompt_logits(load_model(open_checkpoint(str(plain)), **reference), given)
    found = prompt_logits(load_model(open_checkpoint(str(mlx)), **reference), given)
    for logits, wanted in zip(found, expected, strict=True):
        assert worst(logits, wanted) <= TOLERANCE
    for logits, wanted in zip(prompt_logits(loaded(mlx), given), expected, strict=True):
        assert worst(logits, wanted) <= 0.05


def test_converting_gives_what_transformers_reads(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plain, mlx = folders
    convert(open_checkpoint(str(mlx)), "dense", tmp_path / "out", dtype="f32")
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (plain, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, wanted in before.items():
        assert after[name].shape == wanted.shape
        assert torch.allclose(after[name].float(), wanted, rtol=0, atol=1e-6), name
    oracle = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    [prompt] = prompts(45)
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0]
    [logits] = prompt_logits(loaded(plain), [prompt])
    assert worst(logits, expected) <= TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config


def test_a_convolution_of_another_shape(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "plain")
    mlx = as_mlx_writes(tmp_path / "plain", tmp_path / "mlx")
    tensors = load_file(mlx / "model.safetensors")
    name = "model.layers.0.linear_attn.conv1d.weight"
    tensors[name] = tensors[name][..., 0].contiguous()
    save_file(tensors, mlx / "model.safetensors")
    with pytest.raises(LowbitError, match=name) as caught:
        plan_model(open_checkpoint(str(mlx)), device="cpu")
    assert caught.value.code == "E0210"
