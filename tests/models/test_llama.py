"""Llama against transformers in float32: random tiny checkpoints of every shape the family comes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from models.family_cases import check_logits

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "gqa2": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 48},
    "many heads": {"head_dim": 16, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


def make_checkpoint(folder: Path, **changes: object) -> LlamaForCausalLM:
    """A random checkpoint, saved by transformers; norms and biases are random too."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    check_logits(tmp_path, make_checkpoint(tmp_path, **VARIANTS[variant]), lengths=(1, 37, 150))


def test_older_config_spelling_means_the_same(tmp_path: Path) -> None:
    """transformers < 5 wrote rope_theta beside rope_scaling."""
    make_checkpoint(tmp_path, **VARIANTS["llama3 rope"])
    new = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompts = [list(range(100))]
    assert torch.equal(prompt_logits(new, prompts)[0], prompt_logits(old, prompts)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints(dtype: str, tmp_path: Path) -> None:
    """16-bit weights run with 32-bit accumulation: close to transformers' float32 on the same weights."""
    make_checkpoint(tmp_path)
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    oracle = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompt = list(range(90))
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0]
    difference = (prompt_logits(model, [prompt])[0] - expected).abs().max() / expected.abs().max()
    assert difference < 0.03


def test_missing_and_leftover_tensors_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.extra.weight": torch.ones(2)}, file)
    with pytest.raises(LowbitError, match=r"model\.layers\.0\.extra\.weight") as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert caught.value.code == "E0217"
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    for act in (plan_model, load_model):
        with pytest.raises(LowbitError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
            act(open_checkpoint(str(tmp_path)))
        assert caught.value.code == "E0209"


def test_known_unused_tensor_is_accepted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.original_inv_freq": torch.ones(8),  # SINQ saves all buffers of transformers 5
        "model.rotary_emb.full_attention_original_inv_freq": torch.ones(8),
    }
    save_file({**load_file(file), **extra}, file)
    assert plan_model(open_checkpoint(str(tmp_path))).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("architectures", ["MambaForCausalLM"], "E0241"),
        ("architectures", [], "E0216"),
        ("num_key_value_heads", 3, "E0216"),
        ("hidden_size", 0, "E0216"),
        ("hidden_size", 10**12, "E0216"),
        ("hidden_size", "64", "E0216"),
        ("vocab_size", 130, "E0210"),
        ("rms_norm_eps", float("nan"), "E0"),
        ("num_hidden_layers", 2, "E0217"),
        ("num_hidden_layers", 4, "E0209"),
        ("rope_parameters", {"rope_type": "spiral"}, "E0242"),
        ("hidden_act", "swoosh", "E0242"),
    ],
)
def test_bad_configs_end_in_one_line(key: str, value: object, code: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert caught.value.code.startswith(code)
    assert "\n" not in caught.value.message


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["FooForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="never runs code") as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert caught.value.code == "E0240"
