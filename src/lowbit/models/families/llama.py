"""Llama (Touvron et al., 2023; Grattafiori et al., 2024), Mistral and Mixtral (Jiang et al., 2023, 2024)."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_of
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


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
MIXTRAL = Family("mixtral", _mixtral, build, GGUF_NAMES, True, UNUSED, MOE_ALIASES)
