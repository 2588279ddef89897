"""Llama's relatives: those of transformers against it, the others against the Llama that they amount to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from models.family_cases import SIZES, check_logits, randomized, saved, write_checkpoint

Json = dict[str, Any]
ALPHA: Json = {"type": "dynamic", "rope_type": "dynamic", "rope_theta": 500.0, "factor": 1.0, "alpha": 20.0}
EXAONE_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
CASES: dict[str, Json] = {
    "Exaone4 with windows": {"sliding_window": 20, "num_hidden_layers": 6, "sliding_window_pattern": 4},
    "Exaone4 by letters": {"sliding_window": 30, "sliding_window_pattern": 2, "head_dim": 32},
    "ExaoneMoe": {**EXAONE_MOE, "sliding_window": 20, "num_hidden_layers": 6},
    "ExaoneMoe in groups, other layers": {
        **EXAONE_MOE,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "num_shared_experts": 2,
        "sliding_window": 30,
        "sliding_window_pattern": 2,
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "head_dim": 32,
    },
    "BitNet": {},
    "SeedOss": {"head_dim": 32},
    "SeedOss with other biases": {
        "head_dim": 16,
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "Ernie4_5": {"head_dim": 32},
    "Ernie4_5 with biases": {"head_dim": None, "use_bias": True, "tie_word_embeddings": False},
    "HunYuanDenseV1": {"head_dim": 32, "rope_parameters": ALPHA},
    "HunYuanDenseV1 with biases": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    "HunYuanMoEV1": {"num_experts": 6, "moe_topk": 3, "head_dim": 16, "rope_parameters": ALPHA},
    "HunYuanMoEV1 listed": {"num_experts": 4, "moe_topk": [2, 2, 2, 2], "head_dim": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = saved(case.split()[0], tmp_path, **SIZES | CASES[case])
    check_logits(tmp_path, oracle)


def test_exaone4_windows(tmp_path: Path) -> None:
    saved("Exaone4", tmp_path, **SIZES | CASES["Exaone4 with windows"])
    expected = [20, 20, 20, 0, 20, 20]
    header = open_checkpoint(str(tmp_path))
    assert [spec.window for spec in plan_model(header).cache_specs] == expected
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config | {"sliding_window_pattern": "LLG"}))
    windows = [spec.window for spec in plan_model(open_checkpoint(str(tmp_path))).cache_specs]
    assert windows == [20, 20, 0, 20, 20, 0]


def llama(**values: Any) -> transformers.LlamaForCausalLM:
    """A random Llama, for the families that are one under other names."""
    return randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **values})))


def common(config: transformers.LlamaConfig, architecture: str, **more: Any) -> Json:
    """config.json as published ones spell it."""
    return {
        "architectures": [architecture],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


def grouped(q: Tensor, k: Tensor, v: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Rows of Q, K and V as InternLM 2 fuses them: for each K/V head its queries, its K, its V."""
    parts = [part.unflatten(0, (kv_heads, -1, head_dim)) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 2)


def internlm2(oracle: Any) -> tuple[Json, dict[str, Tensor]]:
    """The mapping to a Llama, written down."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    state, tensors = oracle.state_dict(), {}
    bias = "model.layers.0.self_attn.q_proj.bias" in state
    for name, tensor in state.items():
        if ".q_proj." in name:
            others = [state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
            fused = name.replace("self_attn.q_proj", "attention.wqkv")
            tensors[fused] = grouped(
                tensor, *others, oracle.config.num_key_value_heads, oracle.config.head_dim
            )
        elif ".k_proj." not in name and ".v_proj." not in name:
            for usual, own in names.items():
                name = name.replace(usual, own)
            tensors[name] = tensor
    return common(oracle.config, "InternLM2ForCausalLM", bias=bias), tensors


def internlm3(oracle: Any) -> tuple[Json, dict[str, Tensor]]:
    bias = oracle.config.attention_bias
    config = common(
        oracle.config, "InternLM3ForCausalLM", bias=oracle.config.mlp_bias, qkv_bias=bias, head_dim=32
    )
    config["rope_scaling"] = {"factor": 6.0, "rope_type": "dynamic"}
    return config, oracle.state_dict()


def baichuan(oracle: Any) -> tuple[Json, dict[str, Tensor]]:
    """Q, K and V one below another."""
    state, tensors = oracle.state_dict(), {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            others = [state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
            tensors[name.replace("q_proj", "W_pack")] = torch.cat([tensor, *others])
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name] = tensor
    config = common(oracle.config, "BaichuanForCausalLM", model_max_length=512)
    del config["num_key_value_heads"]
    return config, tensors


def exaone(oracle: Any) -> tuple[Json, dict[str, Tensor]]:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn": "attn.attention",
        "o_proj": "out_proj",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        for usual, own in names.items():
            name = name.replace(usual, own)
        tensors[name] = tensor
    config = common(oracle.config, "ExaoneForCausalLM", activation_function="silu")
    config["num_layers"] = config.pop("num_hidden_layers")
    config["layer_norm_epsilon"] = config.pop("rms_norm_eps")
    config["rope_scaling"] = oracle.config.rope_parameters
    return config, tensors


def minicpm(oracle: Any) -> tuple[Json, dict[str, Tensor]]:
    """The factors taken out of the weights of a Llama."""
    config = common(oracle.config, "MiniCPMForCausalLM", scale_emb=12, scale_depth=1.4, dim_model_base=16)
    added = 1.4 / math.sqrt(config["num_hidden_layers"])
    factors = {
        "embed_tokens": 1 / 12,
        "o_proj": 1 / added,
        "down_proj": 1 / added,
        "lm_head": config["hidden_size"] / 16,
    }
    return config, {
        name: tensor * next((factor for part, factor in factors.items() if part in name), 1.0)
        for name, tensor in oracle.state_dict().items()
    }


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Mapping = Callable[[Any], tuple[Json, dict[str, Tensor]]]
RENAMED: dict[str, tuple[Mapping, Json]] = {
    "InternLM 2": (internlm2, {}),
    "InternLM 2 with biases": (internlm2, {"attention_bias": True}),
    "InternLM 3": (internlm3, {"head_dim": 32}),
    "InternLM 3 with biases": (internlm3, {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "Baichuan": (baichuan, {"num_key_value_heads": 4}),
    "EXAONE": (exaone, {}),
    "EXAONE 3.5": (exaone, {"rope_parameters": LLAMA3}),
    "MiniCPM": (minicpm, {}),
}


@pytest.mark.parametrize("case", RENAMED)
def test_logits_equal_the_llama_it_amounts_to(case: str, tmp_path: Path) -> None:
    mapping, values = RENAMED[case]
    oracle = llama(**values)
    write_checkpoint(tmp_path, *mapping(oracle))
    check_logits(tmp_path, oracle)


def test_internlm1_has_biases(tmp_path: Path) -> None:
    oracle = llama(attention_bias=True)
    config = common(oracle.config, "InternLMForCausalLM", bias=True)
    write_checkpoint(tmp_path, config, oracle.state_dict())
    check_logits(tmp_path, oracle)


def test_minicpm_ties_its_head_unless_told(tmp_path: Path) -> None:
    oracle = llama(tie_word_embeddings=True, num_hidden_layers=1)
    config, tensors = minicpm(oracle)
    del config["tie_word_embeddings"], tensors["lm_head.weight"]
    write_checkpoint(tmp_path, config | {"scale_emb": 1, "dim_model_base": 64}, tensors)
    scaled = oracle.state_dict()
    scaled["model.embed_tokens.weight"] /= 12  # tied: the head's factor is in the config alone
    check_logits(tmp_path, oracle)


def test_baichuan2_divides_the_head_by_its_rows_norms(tmp_path: Path) -> None:
    """Version 2 is told by its vocabulary of 125696 alone."""
    oracle = llama(
        vocab_size=125696,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    write_checkpoint(tmp_path, *baichuan(oracle))

    def normed(tokens: Tensor) -> Tensor:
        head = oracle.lm_head.weight
        return oracle(tokens).logits / head.norm(dim=1)

    check_logits(tmp_path, normed)


def test_baichuan_with_alibi_is_refused(tmp_path: Path) -> None:
    config, tensors = baichuan(llama(num_key_value_heads=4, num_hidden_layers=1))
    write_checkpoint(tmp_path / "a", config | {"num_hidden_layers": 40}, tensors)
    del config["max_position_embeddings"]
    write_checkpoint(tmp_path / "b", config, tensors)
    for name in ("a", "b"):
        with pytest.raises(LowbitError, match=r"E0242.*13B tells positions by ALiBi"):
            load_model(open_checkpoint(str(tmp_path / name)), device="cpu")


@pytest.mark.parametrize(
    "name", ["MiniCPM3ForCausalLM", "Llama4ForConditionalGeneration", "BloomForCausalLM"]
)
def test_known_but_unsupported(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"architectures": [name]}, {"x": torch.ones(1)})
    with pytest.raises(LowbitError, match=f"E0241.*'{name}' is not supported: .*") as caught:
        load_model(open_checkpoint(str(tmp_path)), device="cpu")
    assert "\n" not in str(caught.value)
