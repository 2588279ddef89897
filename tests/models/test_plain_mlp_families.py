"""Families with an MLP of two matrices, against transformers on tiny random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from models.family_cases import SIZES, check_logits, saved

Json = dict[str, Any]
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FALCON = {key: value for key, value in NEOX.items() if key != "intermediate_size"}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160, "vocab_size": 131}
CASES: dict[str, Json] = {
    "Starcoder2": SIZES,
    "Starcoder2 with a window, untied": SIZES
    | {"sliding_window": 40, "tie_word_embeddings": False, "hidden_act": "gelu"},
    "Starcoder2 without biases": SIZES | {"use_bias": False, "hidden_act": "relu"},
    "Phi": SIZES | {"num_key_value_heads": 4},
    "Phi with fewer K/V heads": SIZES
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "Falcon": FALCON,
    "Falcon 40B": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "Falcon 11B": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    "Falcon in turn, heads of their own": FALCON
    | {"parallel_attn": False, "multi_query": False, "bias": True, "ffn_hidden_size": 80},
    "Falcon untied": FALCON | {"tie_word_embeddings": False},
    "Arcee": SIZES,
    "Arcee with biases, tied": SIZES
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    "Nemotron": SIZES,
    "Nemotron with biases": SIZES
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "head_dim": 32,
        "norm_eps": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    },
    "GPTNeoX": NEOX,
    "GPTNeoX in turn": NEOX
    | {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
    "GPT2": GPT2,
    "GPT2 unscaled": GPT2 | {"n_inner": 80, "activation_function": "relu"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = saved(case.split()[0], tmp_path, **CASES[case])
    check_logits(tmp_path, oracle)


def change(folder: Path, **values: object) -> None:
    """Config keys changed; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_older_configs_of_falcon(tmp_path: Path) -> None:
    """As saved in 2023: other keys, and neither context length nor activation."""
    oracle = saved("Falcon", tmp_path, **FALCON)
    change(
        tmp_path,
        architectures=["RWForCausalLM"],
        n_head=4,
        n_layer=4,
        **dict.fromkeys(("num_attention_heads", "num_hidden_layers", "num_kv_heads", "activation")),
        **dict.fromkeys(
            ("max_position_embeddings", "ffn_hidden_size", "tie_word_embeddings", "rope_parameters")
        ),
    )
    check_logits(tmp_path, oracle)


def test_older_configs_of_gpt_neox(tmp_path: Path) -> None:
    oracle = saved("GPTNeoX", tmp_path, **NEOX)
    change(tmp_path, rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000)
    check_logits(tmp_path, oracle)


def test_gpt2_as_first_published(tmp_path: Path) -> None:
    """Names without ``transformer.``, and the causal masks among the tensors."""
    oracle = saved("GPT2", tmp_path, **GPT2)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    renamed["h.0.attn.bias"] = renamed["h.0.ln_1.weight"].new_ones(1, 1, 160, 160)
    save_file(renamed, tmp_path / "model.safetensors")
    check_logits(tmp_path, oracle)


def test_window_of_starcoder2(tmp_path: Path) -> None:
    saved("Starcoder2", tmp_path, **CASES["Starcoder2 with a window, untied"])
    assert [spec.window for spec in plan_model(open_checkpoint(str(tmp_path))).cache_specs] == [40] * 4


def test_what_is_refused(tmp_path: Path) -> None:
    saved("Falcon", tmp_path / "falcon", **FALCON | {"alibi": True})
    saved("GPT2", tmp_path / "gpt2", **GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    saved("Phi", tmp_path / "phi", **SIZES | {"qk_layernorm": True})
    saved("Starcoder2", tmp_path / "starcoder2", **SIZES | {"hidden_act": "tanh"})
    for name, reason in {
        "falcon": r"E0242.*alibi true",
        "gpt2": r"E0242.*scale_attn_by_inverse_layer_idx true is not supported",
        "phi": r"E0242.*qk_layernorm true is not supported",
        "starcoder2": r"E0242.*activation 'tanh' is not supported",
    }.items():
        with pytest.raises(LowbitError, match=reason) as caught:
            load_model(open_checkpoint(str(tmp_path / name)), device="cpu")
        assert "\n" not in str(caught.value)
