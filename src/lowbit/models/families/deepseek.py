"""DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash: latent attention, then experts chosen by groups.

Sources: DeepSeek-V2 (2024), DeepSeek-V3 (2024), YaRN (Peng et al., 2023).
"""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.models.config import ModelConfig, MoeConfig, base_config, widened
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.deepseek import DeepseekConfig, build
from lowbit.models.families.common import UNUSED, listed_experts
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import rope_keys

LITE = "Glm4MoeLiteForCausalLM"  # GLM-4.7-Flash
_SOFTMAX, _SIGMOID = 1, 2  # GGUF's expert_gating_func


def read_config(header: CheckpointHeader) -> DeepseekConfig:
    """From config.json or GGUF metadata."""
    base = base_config(respelled(header, {"head_dim": "qk_rope_head_dim"}))
    if header.container == "gguf":
        return _from_gguf(base, gguf_keys(header), header)
    return _from_json(base, json_keys(header))


def _from_json(base: ModelConfig, keys: ConfigKeys) -> DeepseekConfig:
    nope, rope = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    third = base.architecture.startswith("DeepseekV3")
    scoring = keys.text("scoring_func", "sigmoid" if third or base.architecture == LITE else "softmax")
    method = keys.text("topk_method", "noaux_tc" if scoring == "sigmoid" else "greedy")
    if (scoring, method) not in (
        ("sigmoid", "noaux_tc"),
        ("softmax", "greedy"),
        ("softmax", "group_limited_greedy"),
    ):
        raise LowbitError(
            "E0242",
            f"{keys.place}: routing by {printable(scoring)} and {printable(method)} is not supported; "
            "supported: sigmoid with noaux_tc, softmax with greedy or group_limited_greedy",
        )
    usual = (8, 4) if third else (1, 1)  # of the classes
    groups, kept = (keys.size(key, n) for key, n in zip(("n_group", "topk_group"), usual, strict=True))
    if method == "greedy":
        groups = kept = 1
    inner = keys.size("moe_intermediate_size")
    rope_section = rope_keys(keys)
    part = rope_section.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if part != 1:
        raise LowbitError(
            "E0242",
            f"{keys.place}: partial_rotary_factor {part:g} is not supported beside qk_rope_head_dim",
        )
    return widened(
        DeepseekConfig,
        base,
        head_dim=nope + rope,
        rotary_dim=rope,
        kv_heads=1,
        attention_scale=_softmax_scale(
            nope + rope, rope_section.number("factor", 1.0), rope_section.number("mscale_all_dim", 0.0)
        ),
        mlp_bias=keys.flag("mlp_bias", False),
        attention_bias=keys.flag("attention_bias", False),
        rotates_neighbours=keys.flag("rope_interleave", True),
        q_lora_rank=keys.size("q_lora_rank") if keys.has("q_lora_rank") else 0,
        kv_lora_rank=keys.size("kv_lora_rank"),
        nope_dim=nope,
        v_dim=keys.size("v_head_dim"),
        moe=MoeConfig(
            keys.size("n_routed_experts"),
            keys.size("num_experts_per_tok"),
            inner,
            _sparse_layers(keys, base.layers),
            routing=_routing(scoring == "sigmoid", groups),
            # transformers' V2 never renormalizes; V3 does where the config says so.
            renormalize=scoring == "sigmoid" and keys.flag("norm_topk_prob", True),
            groups=groups,
            kept_groups=kept,
            scale=keys.number("routed_scaling_factor"),
            shared_size=keys.count("n_shared_experts") * inner,
        ),
    )


def _sparse_layers(keys: ConfigKeys, layers: int) -> frozenset[int]:
    """Those with experts: as transformers 5 lists them for GLM-4.7-Flash, or behind the first few."""
    if (listed := listed_experts(keys, layers)) is not None:
        return listed
    dense, step = keys.count("first_k_dense_replace"), keys.size("moe_layer_freq", 1)
    return frozenset(n for n in range(layers) if n >= dense and n % step == 0)


def _from_gguf(base: ModelConfig, keys: ConfigKeys, header: CheckpointHeader) -> DeepseekConfig:
    # Files from before the absorbed form give the heads' own sizes under the plain names.
    head = keys.size("attention.key_length_mla", base.head_dim)
    v_dim = keys.size("attention.value_length_mla", keys.size("attention.value_length", head))
    rope = keys.size("rope.dimension_count")
    if rope >= head:
        raise LowbitError("E0216", f"{keys.place}: heads of {head} with {rope} rotated dimensions")
    # ggml keeps 0.1 * mscale_all_dim; cosines and sines then need no factor of their own.
    mscale = keys.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    scaling = base.rope_scaling
    if scaling.kind == "yarn" and mscale:
        scaling = replace(scaling, mscale=mscale, mscale_all_dim=mscale)
    sigmoid, groups = _is_sigmoid(keys, header), keys.size("expert_group_count", 1)
    # Layers that predict further tokens are counted, and lie behind the model's own.
    layers = base.layers - keys.count("nextn_predict_layers", 0)
    inner = keys.size("expert_feed_forward_length")
    return widened(
        DeepseekConfig,
        base,
        layers=layers,
        head_dim=head,
        rotary_dim=rope,
        kv_heads=1,
        rope_scaling=scaling,
        rotates_neighbours=True,
        attention_scale=_softmax_scale(head, scaling.factor, mscale),
        q_lora_rank=keys.size("attention.q_lora_rank") if keys.has("attention.q_lora_rank") else 0,
        kv_lora_rank=keys.size("attention.kv_lora_rank"),
        nope_dim=head - rope,
        v_dim=v_dim,
        moe=MoeConfig(
            keys.size("expert_count"),
            keys.size("expert_used_count"),
            inner,
            frozenset(range(keys.count("leading_dense_block_count"), layers)),
            routing=_routing(sigmoid, groups),
            renormalize=keys.flag("expert_weights_norm", False),
            groups=groups,
            kept_groups=keys.size("expert_group_used_count", 1),
            scale=keys.number("expert_weights_scale", 1.0),
            shared_size=keys.count("expert_shared_count") * inner,
        ),
    )


def _is_sigmoid(keys: ConfigKeys, header: CheckpointHeader) -> bool:
    """Of a GGUF file. Converters leave the key out where the config does: corrections mean sigmoid then."""
    corrected = any(name.endswith("exp_probs_b.bias") for name in header.tensors)
    gating = keys.size("expert_gating_func", _SIGMOID if corrected else _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID) or (corrected and gating == _SOFTMAX):
        raise LowbitError(
            "E0242",
            f"{keys.place}: expert_gating_func {gating} {'with' if corrected else 'without'} corrections is "
            "not supported; supported: sigmoid (2) and, without exp_probs_b, softmax (1)",
        )
    return gating == _SIGMOID


def _routing(sigmoid: bool, groups: int) -> str:
    if sigmoid:
        return "group_sigmoid"
    return "group_softmax" if groups > 1 else "softmax_top_k"


def _softmax_scale(head_dim: int, factor: float, mscale_all_dim: float) -> float:
    """1 / sqrt(head_dim), with YaRN's temperature on both query and key."""
    mscale = 0.1 * mscale_all_dim * math.log(factor) + 1.0 if mscale_all_dim and factor > 1 else 1.0
    return head_dim**-0.5 * mscale * mscale


# mlx-lm cuts kv_b_proj by heads as GGUF does, K's half transposed, and names both halves by what they do.
_MLX_HALVES = ((r"\.k_b_proj$", ".embed_q"), (r"\.v_b_proj$", ".unembed_out"))

DEEPSEEK = Family(
    "deepseek", read_config, build, GGUF_NAMES, False, UNUSED, aliases=_MLX_HALVES, prediction_layers=True
)
