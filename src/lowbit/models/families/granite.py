"""Granite 3 and 4 (IBM, 2024, 2025), dense and with experts: Llama's and Mixtral's blocks, four multipliers.

Granite 4's class has layers of Mamba-2 too. Models of it without any (Micro, 1B, 350M) are Granite 3, whose
MLP is called shared_mlp, as what stands beside experts is.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import architecture_of, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import FULL, UNUSED
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import MAMBA, Family


def _granite(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        attention = keys.optional("attention.scale")
        names = ("embedding_scale", "residual_scale", "logit_scale")
        switched_off = not keys.flag("rope.scaling.finetuned", True)
        if switched_off and architecture_of(header) == "granite":  # those with experts always rotate
            config = replace(config, unrotated=frozenset(range(config.layers)))
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


def _attention_only(header: CheckpointHeader) -> ModelConfig:
    """Granite 4 without Mamba-2."""
    keys = json_keys(header)
    if keys.count("num_local_experts", 0):
        config = _granite_moe(header)
    else:
        config = replace(_granite(header), intermediate_size=keys.size("shared_intermediate_size"))
    rotates = keys.text("position_embedding_type", "nope") == "rope"
    return config if rotates else replace(config, unrotated=frozenset(range(config.layers)))


def hybrid_family(header: CheckpointHeader) -> Family:
    """Of Granite 4's class, or E0241 where a layer is no attention."""
    kinds = header.config.get("layer_types", header.config.get("layers_block_type"))
    if not isinstance(kinds, list) or not kinds or set(map(str, kinds)) - {"attention", FULL}:
        raise LowbitError(
            "E0241",
            "architecture 'GraniteMoeHybridForCausalLM' is supported without Mamba-2 layers only "
            f"(Granite 4.0 Micro, 1B and 350M): {MAMBA}. See: lowbit models",
        )
    if json_keys(header).count("num_local_experts", 0):
        return replace(GRANITE_MOE, read_config=_attention_only)
    return replace(GRANITE, read_config=_attention_only, aliases=_DENSE_ALIASES)


_ALIASES = (
    (r"\.mlp\.router$", ".block_sparse_moe.router.layer"),
    (r"\.mlp\.router$", ".block_sparse_moe.router"),  # as transformers 5 has it in memory
    (r"\.mlp\.experts$", ".block_sparse_moe"),  # input_linear and output_linear of all experts
    (r"\.mlp\.experts\b", ".block_sparse_moe.experts"),
    (r"\.mlp\.shared_experts\.gate_up_proj$", ".shared_mlp.input_linear"),
    (r"\.mlp\.shared_experts\.down_proj$", ".shared_mlp.output_linear"),
)
_DENSE_ALIASES = (
    (r"\.mlp\.gate_up_proj$", ".shared_mlp.input_linear"),
    (r"\.mlp\.down_proj$", ".shared_mlp.output_linear"),
)

GRANITE = Family("granite", _granite, build, GGUF_NAMES, True, UNUSED)
GRANITE_MOE = Family("granitemoe", _granite_moe, build, GGUF_NAMES, True, UNUSED, _ALIASES)
