"""What a model computes in on each kind of device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.loading.opened import Target


def header(folder: Path, config: dict[str, object], stored: torch.dtype) -> CheckpointHeader:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4, dtype=stored)}, folder / "model.safetensors")
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("config", "stored", "asked", "activation", "cache"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16, "auto", torch.bfloat16, "bf16"),
        ({}, torch.float16, "auto", torch.bfloat16, "bf16"),
        ({"torch_dtype": "float16"}, torch.float16, "auto", torch.float16, "fp16"),
        ({"dtype": "float16"}, torch.float16, "auto", torch.float16, "fp16"),
        ({"text_config": {"dtype": "float16"}}, torch.float16, "auto", torch.float16, "fp16"),
        ({"torch_dtype": "float16"}, torch.float16, "bfloat16", torch.bfloat16, "bf16"),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16, "float16", torch.float16, "fp16"),
        ({"torch_dtype": "float32"}, torch.float32, "auto", torch.float32, "f32"),
    ],
)
def test_gpus_compute_in_the_checkpoints_own_type(
    config: dict[str, object],
    stored: torch.dtype,
    asked: str,
    activation: torch.dtype,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    found = Target.resolve(header(tmp_path, config, stored), "auto", asked, "auto")
    assert found.device.type == "cuda" and found.activation_dtype is activation
    assert (found.cache_dtype.k.name, found.cache_dtype.v.name) == (cache, cache)
    on_cpu = Target.resolve(header(tmp_path, config, stored), "cpu", asked, "auto")
    assert on_cpu.activation_dtype is torch.float32
    assert on_cpu.cache_dtype.k.name == ("f32" if cache == "f32" else "bf16")
