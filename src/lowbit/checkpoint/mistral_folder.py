"""Mistral's own layout: params.json beside consolidated.safetensors, as their inference code reads it.

    tok_embeddings.weight   layers.0.attention.{wq,wk,wv,wo}.weight   layers.0.feed_forward.{w1,w2,w3}.weight
    layers.0.attention_norm.weight   layers.0.ffn_norm.weight   norm.weight   output.weight
    layers.0.feed_forward.gate.weight   layers.0.feed_forward.experts.7.w1.weight     (mixtures of experts)
    layers.0.attention.wq.qscale_weight, qscale_act                                   (FP8: one number each)

The tensors get transformers' names here, where they lie stays: everything else then sees a Hugging Face
folder, but that the two rows of a head that rotate together lie side by side (``rotary_pairs``), as in Meta's
files. params.json becomes config.json's keys; what it asks for beyond them is refused by name.
Source: mistral-inference, vLLM's and transformers' readers of these files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from lowbit.checkpoint.header import TensorEntry
from lowbit.errors import LowbitError, printable

PARAMS = "params.json"
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings",
}
_CONTEXT = ("max_position_embeddings", "max_seq_len", "model_max_length")
# May be said, with the value that changes nothing.
_NEUTRAL: dict[str, object] = {"use_biases": False, "causal": True, "model_type": "transformer"}
_IGNORED = ("max_batch_size", "model_parallel", "dtype", "name")
_DEFAULT_CONTEXT = 128_000  # what vLLM takes where the file does not say

_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_SCALES = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.(w[123])")


def has_mistral_names(names: Iterable[str]) -> bool:
    """Whether the tensors are called as in Mistral's files."""
    return "tok_embeddings.weight" in names


def named_as_transformers(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The same tensors under transformers' names; one of no known name keeps its own."""
    renamed: dict[str, TensorEntry] = {}
    for stored, entry in tensors.items():
        name = _name(stored)
        if name in renamed:
            raise LowbitError(
                "E0226", f"{entry.file.name}: tensor {printable(stored)!r} and another are both {name!r}"
            )
        renamed[name] = replace(entry, name=name)
    return renamed


def _name(stored: str) -> str:
    stem, _, suffix = stored.rpartition(".")
    suffix = _SCALES.get(suffix, suffix)
    layer = _LAYER.fullmatch(stem)
    if layer is None:
        return f"{_OUTSIDE.get(stem, stem)}.{suffix}"
    number, module = layer[1], layer[2]
    expert = _EXPERT.fullmatch(module)
    inner = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}" if expert else _MODULES.get(module, module)
    return f"model.layers.{number}.{inner}.{suffix}"


def config_of(params: dict[str, object]) -> dict[str, object]:
    """config.json's keys for a params.json; values are checked where config.json's are."""
    windowed = params.get("sliding_window") is not None
    config: dict[str, object] = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,  # said, as transformers takes 4,096 where config.json has no such key
        "rope_theta": 10000.0 if windowed else 1e6,  # mistral-inference's, of 7B v0.1 and of what came later
        "max_position_embeddings": _DEFAULT_CONTEXT,
    }
    for key, value in params.items():
        if value is None or key in _IGNORED or key == "quantization":
            continue
        if key == "sliding_window" and isinstance(value, list):
            config |= _windows(value, params.get("n_layers"))
        elif key in _KEYS:
            config[_KEYS[key]] = value
        elif key in _CONTEXT:
            config["max_position_embeddings"] = value
        elif key == "moe":
            config |= _experts(value)
        elif key not in _NEUTRAL or value != _NEUTRAL[key]:
            raise LowbitError(
                "E0218",
                f"{PARAMS} asks for {printable(repr(key))}, which is not read from Mistral's own layout; use "
                "the Hugging Face version of the model",
            )
    if params.get("quantization") is not None:
        config["quantization_config"] = _quantization(params["quantization"])
    return config


def _windows(pattern: list[object], layers: object) -> dict[str, object]:
    """Windows in turns, null for none (Ministral 8B): mistral-inference repeats them until the last layer."""
    sizes = [size for size in pattern if size is not None]
    turns = layers // len(pattern) if isinstance(layers, int) and pattern else 0
    if turns * len(pattern) != layers or any(size != sizes[0] for size in sizes):
        raise LowbitError(
            "E0218",
            f"{PARAMS}: sliding_window {printable(repr(pattern), 100)} for {printable(repr(layers))} layers: "
            "only one size and null, as often as divides the layers, are supported; use the Hugging Face "
            "version of the model",
        )
    if not sizes:
        return {}
    kinds = ["full_attention" if size is None else "sliding_attention" for size in pattern]
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "sliding_window": sizes[0],
        "layer_types": kinds * turns,
    }


def _experts(value: object) -> dict[str, object]:
    known = {"num_experts", "num_experts_per_tok"}
    if not isinstance(value, dict) or not known <= set(value) or set(value) - known:
        raise LowbitError(
            "E0218",
            f"{PARAMS}: moe must say {' and '.join(sorted(known))} and no more, found "
            f"{printable(repr(value))}; use the Hugging Face version of the model",
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": value["num_experts"],
        "num_experts_per_tok": value["num_experts_per_tok"],
    }


def _quantization(value: object) -> dict[str, object]:
    """FP8 with one scale a tensor; anything else is refused."""
    inputs = {"TENSOR": "static", None: "static", "NO_SCALES": "dynamic"}
    asked = value.get("qscheme_act") if isinstance(value, dict) else ""
    known = asked is None or isinstance(asked, str)
    if not isinstance(value, dict) or value.get("qformat_weight") != "fp8_e4m3" or not known:
        asked = ""
    if asked not in inputs:
        raise LowbitError(
            "E0218",
            f"{PARAMS}: quantization {printable(repr(value))} is not read from Mistral's own layout, only "
            "qformat_weight fp8_e4m3 with qscheme_act TENSOR or NO_SCALES; use the Hugging Face version",
        )
    return {"quant_method": "fp8", "activation_scheme": inputs[asked]}
