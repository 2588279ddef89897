"""GLM-4 (Team GLM, 2024), ``glm`` and with norms on both sides ``glm4``, and GLM-4.5 (2025), ``glm4_moe``.

The first two rotate neighbours in the first half of a head, GLM-4.5 halves of that half. dots.llm1 (rednote,
2025) is GLM-4.5 whose heads turn whole and always have norms.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, MoeConfig, NormNames, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import FULL, SLIDING, UNUSED, require_sigmoid, windows_by_types
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import GGUF_NAMES, GLM4_GGUF_NAMES, POST_NORM_GGUF_NAMES
from lowbit.models.registry import Family

_NORMS = NormNames(
    "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
)


def _glm(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(respelled(header, head_dim=128), rotated=0.5), rotates_neighbours=True)
    if header.container == "gguf":
        return config
    return replace(config, qkv_bias=json_keys(header).flag("attention_bias", True))


def _glm4(header: CheckpointHeader) -> ModelConfig:
    """GGUF files of models that see have the rows of Q and K as halves (``in_halves``)."""
    config = replace(_glm(header), norm_names=_NORMS)
    return replace(config, rotates_neighbours=False) if in_halves(header) else config


def in_halves(header: CheckpointHeader) -> bool:
    """Whether it is a GGUF file whose positions have parts: ggml turns those by halves of a head only."""
    told = header.container == "gguf" and gguf_keys(header).values.get("rope.dimension_sections")
    return isinstance(told, list) and len(told) > 1 and told[0] not in (0, None) and told[1] not in (0, None)


def _glm4_moe(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header, rotated=0.5)
    if header.container == "gguf":
        # Layers that predict further tokens are counted, and lie behind the model's own.
        layers = config.layers - gguf_keys(header).count("nextn_predict_layers", 0)
        normed = "blk.0.attn_q_norm.weight" in header.tensors
        config = replace(config, layers=layers)
    else:
        keys = json_keys(header)
        normed = keys.flag("use_qk_norm", False)
        config = replace(config, qkv_bias=keys.flag("attention_bias", False))
    config = replace(config, qk_norm="head" if normed else "")
    return replace(config, moe=_experts(header, config.layers, True))


def _dots1(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(header), qk_norm="head")
    if header.container != "gguf":
        keys = json_keys(header)
        bias = keys.flag("attention_bias", False)
        # Of the class; published configs have layers without windows only, and say so by max_window_layers.
        window = keys.count("sliding_window", 0) if "sliding_window" in keys.values else 4096
        first, types = keys.count("max_window_layers", 62), keys.values.get("layer_types")
        kinds = [SLIDING if window and n >= first else FULL for n in range(config.layers)]
        windows = windows_by_types(kinds if types is None else types, window, config.layers)
        config = replace(config, qkv_bias=bias, output_bias=bias, windows=windows if any(windows) else ())
    return replace(config, moe=_experts(header, config.layers, False))


def _experts(header: CheckpointHeader, layers: int, renormalize: bool) -> MoeConfig:
    """DeepSeek-V3's, behind the first layers. ``renormalize``: what a config.json without the key means."""
    if header.container == "gguf":
        keys = gguf_keys(header)
        require_sigmoid(keys)
        count, used, inner = (
            keys.size(key) for key in ("expert_count", "expert_used_count", "expert_feed_forward_length")
        )
        shared, dense = keys.count("expert_shared_count", 0), keys.count("leading_dense_block_count", 0)
        groups, kept = keys.size("expert_group_count", 1), keys.size("expert_group_used_count", 1)
        normed, scale = keys.flag("expert_weights_norm", False), keys.number("expert_weights_scale", 1.0)
    else:
        keys = json_keys(header)
        count, used = keys.size("n_routed_experts"), keys.size("num_experts_per_tok")
        inner, shared = keys.size("moe_intermediate_size"), keys.count("n_shared_experts")
        dense = keys.count("first_k_dense_replace")
        groups, kept = keys.size("n_group", 1), keys.size("topk_group", 1)
        normed, scale = (
            keys.flag("norm_topk_prob", renormalize),
            keys.number("routed_scaling_factor", 1.0),
        )
    return MoeConfig(
        count,
        used,
        inner,
        frozenset(range(dense, layers)),
        routing="group_sigmoid",
        renormalize=normed,
        groups=groups,
        kept_groups=kept,
        scale=scale,
        shared_size=shared * inner,
    )


GLM = Family("glm", _glm, build, GGUF_NAMES, False, UNUSED)
GLM4 = Family("glm4", _glm4, build, GLM4_GGUF_NAMES, False, UNUSED)
GLM4_MOE = Family("glm4_moe", _glm4_moe, build, POST_NORM_GGUF_NAMES, False, UNUSED, prediction_layers=True)
DOTS1 = Family("dots1", _dots1, build, GGUF_NAMES, False, UNUSED)
