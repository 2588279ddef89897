"""Llama (Touvron et al., 2023; Grattafiori et al., 2024), Mistral and Mixtral (Jiang et al., 2023, 2024).

Ministral 3 (Mistral AI, 2025) multiplies queries by 1 + beta log(1 + position // original context), which is
1 up to the context YaRN was told of. That is all the context it has here: attention knows no such factor.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_of
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import rope_keys


def _llama(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias", False))


def _mistral(header: CheckpointHeader) -> ModelConfig:
    config, keys = base_config(header), json_keys(header)
    return replace(config, windows=windows_of(keys, config.layers, everywhere=True, absent=4096))


# What a config.json of Ministral 3 that says nothing of rotary embeddings means.
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _ministral3(header: CheckpointHeader) -> ModelConfig:
    """GGUF's ``mistral3``: Mistral Small 3 too, which has neither YaRN nor the factor."""
    if not header.config.get("rope_scaling"):
        header = respelled(header, rope_parameters=_MINISTRAL3_ROPE)
    config = base_config(respelled(header, head_dim=128))
    if header.container == "gguf":
        keys = gguf_keys(header)
        grows = keys.number("attention.temperature_scale", 0.0) != 0
        told = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
        if config.rope_scaling.kind == "yarn" and told:
            scaling = replace(config.rope_scaling, mscale=1.0, mscale_all_dim=told)
            config = replace(config, rope_scaling=scaling)
    else:
        keys = json_keys(header)
        grows = rope_keys(keys).number("llama_4_scaling_beta", 0.0) != 0
        windows = windows_of(keys, config.layers, everywhere=True)
        config = replace(config, windows=windows)
    if not grows:
        return config
    original = config.rope_scaling.original_context
    if not original:
        raise LowbitError(
            "E0242", f"{keys.place}: queries that grow with the position are supported beside YaRN only"
        )
    return replace(config, context_length=min(config.context_length, original))


def _mixtral(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header, theta=1e6)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
    else:
        keys = json_keys(header)
        count, used = keys.size("num_local_experts"), keys.size("num_experts_per_tok")
        config = replace(config, windows=windows_of(keys, config.layers, everywhere=True))
    moe = MoeConfig(count, used, config.intermediate_size, frozenset(range(config.layers)))
    return replace(config, moe=moe)


def _llama_or_mixtral(header: CheckpointHeader) -> ModelConfig:
    """GGUF calls Mixtral ``llama`` with experts."""
    if header.container == "gguf" and gguf_keys(header).values.get("expert_count"):
        return _mixtral(header)
    return _llama(header)


# Mixtral's experts were block_sparse_moe before transformers 5; GPTQModel writes mlp.
MOE_ALIASES = ((r"\.mlp\.(gate|experts)\b(?!_)", r".block_sparse_moe.\1"),)

LLAMA = Family("llama", _llama_or_mixtral, build, GGUF_NAMES, True, UNUSED, MOE_ALIASES)
MISTRAL = Family("mistral", _mistral, build, GGUF_NAMES, True, UNUSED)
MINISTRAL3 = Family("ministral3", _ministral3, build, GGUF_NAMES, True, UNUSED)
MIXTRAL = Family("mixtral", _mixtral, build, GGUF_NAMES, True, UNUSED, MOE_ALIASES)
