"""gpt-oss (OpenAI, 2025)."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_by_types, windows_in_gguf
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import POST_NORM_GGUF_NAMES
from lowbit.models.registry import Family

# What a config.json that says nothing of rotary embeddings means.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(header: CheckpointHeader) -> ModelConfig:
    if not header.config.get("rope_scaling"):
        header = respelled(header, rope_parameters=_ROPE)
    config = base_config(respelled(header, head_dim=64), theta=150000.0)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner, window = keys.size("expert_feed_forward_length"), keys.size("attention.sliding_window")
        windows, bias = windows_in_gguf(keys, window, config.layers, 2), True
        # GGUF does not say that the bounds of gpt-oss' YaRN are not rounded.
        config = replace(config, rope_scaling=replace(config.rope_scaling, truncate=False))
    else:
        keys = json_keys(header)
        count = keys.size("num_local_experts", keys.size("num_experts", 128))
        used = keys.size("num_experts_per_tok", keys.size("experts_per_token", 4))
        inner, window = config.intermediate_size, keys.size("sliding_window", 128)
        windows = windows_by_types(keys.values.get("layer_types"), window, config.layers, period=2)
        for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
            if (told := keys.number(key, only)) != only:
                raise LowbitError("E0242", f"{keys.place}: {key} {told:g} is not supported; only {only:g} is")
        bias = keys.flag("attention_bias", True)
    return replace(
        config,
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        activation="swiglu_clamped",
        windows=windows,
        moe=MoeConfig(
            count,
            used,
            inner,
            frozenset(range(config.layers)),
            routing="top_k_softmax",
            router="router",
            router_bias=True,
            expert_bias=True,
            interleaved=True,
            transposed=True,
        ),
    )


# unsloth's 4-bit gpt-oss wraps the router's matrix.
GPT_OSS_ALIASES = ((r"\.mlp\.router$", ".mlp.router.linear"),)

GPT_OSS = Family("gpt_oss", _gpt_oss, build, POST_NORM_GGUF_NAMES, False, UNUSED, GPT_OSS_ALIASES)
