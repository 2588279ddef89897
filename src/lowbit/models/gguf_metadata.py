"""The metadata of a GGUF file for a model: the keys llama.cpp's converter writes, from the parsed config.

The other way round than ``config`` and ``families`` read them; gpt-oss and DeepSeek, whose tensors GGUF cuts
anew, are refused. ``lost`` says what a family's GGUF files have no key for.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling, rotary_frequencies
from lowbit.models.config import ModelConfig, json_keys, rope_keys

# Family -> general.architecture. All of Llama's relatives are "llama".
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
# Families whose norms GGUF holds with 1 added.
SHIFTED_NORMS = ("gemma2", "gemma3")


def architecture_for(family: str, root: str) -> str:
    """``general.architecture``, or E0450."""
    if family not in ARCHITECTURES:
        raise LowbitError(
            "E0450",
            f"{root}: GGUF files of {printable(family)} are not written; those of "
            f"{', '.join(sorted(ARCHITECTURES))} are. Use llama.cpp's convert_hf_to_gguf.py",
        )
    return ARCHITECTURES[family]


def gguf_metadata(header: CheckpointHeader, family: str, config: ModelConfig) -> dict[str, object]:
    """The keys below the architecture's prefix, complete with it."""
    arch = architecture_for(family, header.root.name)
    values: dict[str, object] = {
        "block_count": config.layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotary_dim,
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        values["expert_count"] = config.moe.experts
        values["expert_used_count"] = config.moe.per_token
        if family == "qwen3_moe":
            values["expert_feed_forward_length"] = config.moe.intermediate_size
    if config.attention_softcap:
        values["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap:
        values["final_logit_softcapping"] = config.logit_softcap
    if family in ("gemma2", "gemma3", "phi3") and any(config.windows):
        values["attention.sliding_window"] = max(config.windows)
    if config.local_rope_theta is not None:
        values["rope.freq_base_swa"] = config.local_rope_theta
    values |= _rope(header, config)
    return {f"{arch}.{key}": value for key, value in values.items()}


def _rope(header: CheckpointHeader, config: ModelConfig) -> dict[str, object]:
    scaling = config.rope_scaling
    match scaling.kind:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
        case "yarn":
            found: dict[str, object] = {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": scaling.factor,
                "rope.scaling.original_context_length": scaling.original_context,
                "rope.scaling.yarn_beta_fast": scaling.beta_fast,
                "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            }
            factor = scaling.attention_factor
            return found if factor is None else found | {"rope.scaling.yarn_attn_factor": factor}
        case "divisors" | "table" if scaling.attention_factor is not None:
            return {
                "rope.scaling.attn_factor": scaling.attention_factor,
                "rope.scaling.original_context_length": scaling.original_context or config.context_length,
            }
    return {}


def rope_tensors(header: CheckpointHeader, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors that say what config.json says of the frequencies: ``rope_freqs``, ``rope_factors_*``."""
    scaling = config.rope_scaling
    if scaling.kind == "llama3":
        plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling())
        scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, scaling)
        return {"rope_freqs.weight": plain / scaled}
    if scaling.kind == "divisors":
        rope = rope_keys(json_keys(header))
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope.numbers(f"{length}_factor"))
            for length in ("long", "short")
        }
    return {}


def lost(before: ModelConfig, after: ModelConfig) -> list[str]:
    """The fields of a config that its GGUF file does not bring back, rope scaling aside."""
    # A bias is where its tensor is, and a scale of 1/sqrt(head_dim) need not be said.
    spelled = {"architecture", "rope_scaling", "qkv_bias", "output_bias", "mlp_bias", "moe", "norm_offset"}
    spelled |= {"attention_scale"} if _scale(before) == _scale(after) else set()
    return [
        field.name
        for field in fields(ModelConfig)
        if field.name not in spelled and not _alike(getattr(before, field.name), getattr(after, field.name))
    ]


def _scale(config: ModelConfig) -> float:
    return round(config.attention_scale or config.head_dim**-0.5, 9)


def _alike(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(one)
    if isinstance(one, tuple) and isinstance(other, tuple) and not any((*one, *other)):
        return True
    return one == other
