"""Granite 3 (IBM, 2024), dense and with experts: Llama's and Mixtral's blocks with four multipliers."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _granite(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        attention = keys.optional("attention.scale")
        names = ("embedding_scale", "residual_scale", "logit_scale")
    else:
        keys = json_keys(header)
        attention = keys.number("attention_multiplier", 1.0)
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        bias = keys.flag("attention_bias", False)
        config = replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias", False))
    embedding, residual, divisor = (keys.number(name, 1.0) for name in names)
    if divisor <= 0:
        raise LowbitError("E0216", f"{keys.place}: key {names[2]!r} must be above 0, found {divisor:g}")
    return replace(
        config,
        attention_scale=attention,
        embedding_scale=embedding,
        residual_scale=residual,
        logit_scale=1 / divisor,
    )


def _granite_moe(header: CheckpointHeader) -> ModelConfig:
    config = _granite(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        shared = keys.count("expert_shared_feed_forward_length", 0)
    else:
        keys = json_keys(header)
        count, used = keys.size("num_local_experts"), keys.size("num_experts_per_tok")
        shared = keys.count("shared_intermediate_size", 0)
    moe = MoeConfig(
        count,
        used,
        config.intermediate_size,
        frozenset(range(config.layers)),
        routing="top_k_softmax",
        router="router",
        shared_size=shared,
    )
    return replace(config, moe=moe)


_ALIASES = (
    (r"\.mlp\.router$", ".block_sparse_moe.router.layer"),
    (r"\.mlp\.router$", ".block_sparse_moe.router"),  # as transformers 5 has it in memory
    (r"\.mlp\.experts$", ".block_sparse_moe"),  # input_linear and output_linear of all experts
    (r"\.mlp\.experts\b", ".block_sparse_moe.experts"),
    (r"\.mlp\.shared_experts\.gate_up_proj$", ".shared_mlp.input_linear"),
    (r"\.mlp\.shared_experts\.down_proj$", ".shared_mlp.output_linear"),
)

GRANITE = Family("granite", _granite, build, GGUF_NAMES, True, UNUSED)
GRANITE_MOE = Family("granitemoe", _granite_moe, build, GGUF_NAMES, True, UNUSED, _ALIASES)
