"""config.json of a model that came as GGUF: what transformers would have written for it.

The other way round than ``families``: the same keys, from the sizes and constants read from the metadata.
What GGUF files leave out (formats of the fixtures' README) is the family's knowledge, as when reading: no
sliding window for Mistral, renormalized experts. Llama 3's frequency divisors, a tensor in GGUF, are put
back into the four numbers they were made from. gpt-oss and DeepSeek are refused: their GGUF tensors are cut
otherwise than their checkpoints'.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling, rotary_frequencies
from lowbit.models.config import ModelConfig, architecture_of, gguf_keys

Json = dict[str, object]
ReadTensor = Callable[[str], Tensor]

# Wavelengths up to original / _HIGH stay, from original / _LOW on are stretched: in all models of Meta's.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def hf_config(header: CheckpointHeader, config: ModelConfig, read: ReadTensor) -> Json:
    """The whole config.json; ``read`` gives a tensor of the file by its stored name."""
    name = architecture_of(header)
    family = _FAMILIES.get("mixtral" if name == "llama" and config.moe is not None else name)
    if family is None:
        raise LowbitError(
            "E0450",
            f"{header.root.name}: GGUF files of {printable(name)!r} are not turned into Hugging Face "
            f"folders; those of {', '.join(sorted(_FAMILIES))} are. Convert the original model instead",
        )
    values = _common(header, config) | family(header, config)
    scaling = _rope_scaling(header, config, read)
    return values | ({"rope_scaling": scaling} if scaling else {})


def shortest(value: float) -> float:
    """The shortest decimal of a float32: metadata hold 9.99999975e-06 where 1e-05 was written."""
    for digits in range(1, 10):
        found = float(f"{value:.{digits}g}")
        if struct.pack("<f", found) == struct.pack("<f", value):
            return found
    return value


def _common(header: CheckpointHeader, config: ModelConfig) -> Json:
    values: Json = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": shortest(config.norm_eps),
        "rope_theta": shortest(config.rope_theta),
        "hidden_act": config.activation,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied_head,
        "pad_token_id": None,  # some classes default to one beyond a small vocabulary
    }
    for key in ("bos", "eos", "padding"):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < config.vocab_size:
            values[f"{'pad' if key == 'padding' else key}_token_id"] = number
    return values


def _class(model_type: str, architecture: str) -> Json:
    return {"architectures": [architecture], "model_type": model_type}


def _llama(header: CheckpointHeader, config: ModelConfig) -> Json:
    if config.qkv_bias != config.output_bias:
        raise LowbitError(
            "E0450",
            f"{header.root.name}: attention has a bias on some projections only, which no config of "
            "LlamaForCausalLM says; convert the original model instead",
        )
    return _class("llama", "LlamaForCausalLM") | {"mlp_bias": config.mlp_bias}


def _mixtral(header: CheckpointHeader, config: ModelConfig) -> Json:
    assert config.moe is not None, "asked before"
    experts: Json = {"num_local_experts": config.moe.experts, "num_experts_per_tok": config.moe.per_token}
    return _class("mixtral", "MixtralForCausalLM") | experts


def _qwen2(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("qwen2", "Qwen2ForCausalLM")


def _qwen3(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("qwen3", "Qwen3ForCausalLM")


def _qwen3_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = config.moe
    assert moe is not None, "the family has experts"
    return _class("qwen3_moe", "Qwen3MoeForCausalLM") | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _windows(config: ModelConfig) -> Json:
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {"layer_types": kinds, "sliding_window": max(config.windows)}


def _gemma2(header: CheckpointHeader, config: ModelConfig) -> Json:
    scale = config.attention_scale or config.head_dim**-0.5
    values = _class("gemma2", "Gemma2ForCausalLM") | {
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }
    return values | _windows(config)


def _gemma3(header: CheckpointHeader, config: ModelConfig) -> Json:
    local = {"rope_local_base_freq": shortest(config.local_rope_theta or 10000.0)}
    return _gemma2(header, config) | _class("gemma3_text", "Gemma3ForCausalLM") | local


def _phi3(header: CheckpointHeader, config: ModelConfig) -> Json:
    values = _class("phi3", "Phi3ForCausalLM")
    values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.windows:
        values["sliding_window"] = max(config.windows)
    keys = gguf_keys(header)
    values["original_max_position_embeddings"] = keys.size(
        "rope.scaling.original_context_length", config.context_length
    )
    return values


_FAMILIES: dict[str, Callable[[CheckpointHeader, ModelConfig], Json]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _rope_scaling(header: CheckpointHeader, config: ModelConfig, read: ReadTensor) -> Json:
    scaling = config.rope_scaling
    match scaling.kind:
        case "none":
            return {}
        case "linear":
            return {"rope_type": "linear", "factor": shortest(scaling.factor)}
        case "yarn":
            found: Json = {
                "rope_type": "yarn",
                "factor": shortest(scaling.factor),
                "original_max_position_embeddings": scaling.original_context,
                "beta_fast": shortest(scaling.beta_fast),
                "beta_slow": shortest(scaling.beta_slow),
            }
            factor = scaling.attention_factor
            return found if factor is None else found | {"attention_factor": shortest(factor)}
    if scaling.tensor == "rope_freqs.weight":
        return _llama3_scaling(header, config, read(scaling.tensor).float())
    found = {"rope_type": "longrope"}
    for length in ("long", "short"):
        factors = read(f"rope_factors_{length}.weight").tolist()
        found[f"{length}_factor"] = [shortest(factor) for factor in factors]
    if scaling.attention_factor is not None:
        found["attention_factor"] = shortest(scaling.attention_factor)
    return found


def _llama3_scaling(header: CheckpointHeader, config: ModelConfig, divisors: Tensor) -> Json:
    """The llama3 rule whose divisors these are.

    Between the two wavelengths 1 / divisor = (1 - share) / factor + share, with share growing from 0 to 1 as
    original / wavelength does from _LOW to _HIGH: one such divisor tells the original context.
    """
    plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling())
    factor, original = shortest(float(divisors.max())), _ORIGINAL
    between = ((divisors > 1) & (divisors < factor)).nonzero().flatten()
    if between.numel() and math.isfinite(factor):
        one = int(between[len(between) // 2])
        share = (1 / float(divisors[one]) - 1 / factor) / (1 - 1 / factor)
        original = round(2 * math.pi / float(plain[one]) * (_LOW + share * (_HIGH - _LOW)))
    scaling = RopeScaling("llama3", factor, original, _LOW, _HIGH)
    scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, scaling)
    if torch.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
    raise LowbitError(
        "E0450",
        f"{header.root.name}: 'rope_freqs.weight' divides the frequencies by up to {factor:g}, not in the "
        "way Llama 3 does; no config.json can say this. Convert the original model instead",
    )
