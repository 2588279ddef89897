"""gpt-oss (OpenAI, 2025)."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED
from lowbit.models.gguf_names import POST_NORM_GGUF_NAMES
from lowbit.models.registry import Family


def _gpt_oss(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner, window = keys.size("expert_feed_forward_length"), keys.size("attention.sliding_window")
        types: object = None
        # GGUF does not say that the bounds of gpt-oss' YaRN are not rounded.
        config = replace(config, rope_scaling=replace(config.rope_scaling, truncate=False))
    else:
        keys = json_keys(header)
        count = keys.size("num_local_experts", keys.size("num_experts", 128))
        used = keys.size("num_experts_per_tok", keys.size("experts_per_token", 4))
        inner, window = config.intermediate_size, keys.size("sliding_window", 128)
        types = keys.values.get("layer_types")
        limit = keys.number("swiglu_limit", 7.0)
        if limit != 7.0:
            raise LowbitError("E0242", f"{keys.place}: swiglu_limit {limit} is not supported; only 7 is")
    if not (isinstance(types, list) and len(types) == config.layers):
        types = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(config.layers)]
    return replace(
        config,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        activation="swiglu_clamped",
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
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
