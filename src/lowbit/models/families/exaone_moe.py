"""K-EXAONE (LG AI Research, 2025): EXAONE 4's attention between Llama's norms, DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, MoeConfig, NormNames
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, listed_experts, require_sigmoid
from lowbit.models.families.llama_relatives import exaone4
from lowbit.models.gguf_names import CORRECTED_GGUF_NAMES
from lowbit.models.registry import Family


def _exaone_moe(header: CheckpointHeader) -> ModelConfig:
    config = replace(exaone4(header), norm_names=NormNames())
    if header.container == "gguf":
        keys = gguf_keys(header)
        require_sigmoid(keys)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner, shared = keys.size("expert_feed_forward_length"), keys.count("expert_shared_count", 0)
        layers = frozenset(range(keys.count("leading_dense_block_count", 0), config.layers))
        groups, kept = keys.size("expert_group_count", 1), keys.size("expert_group_used_count", 1)
        renormalize = keys.flag("expert_weights_norm", False)
        scale = keys.number("expert_weights_scale", 1.0)
    else:
        keys = json_keys(header)
        count, used = keys.size("num_experts", 64), keys.size("num_experts_per_tok", 8)
        inner = keys.size("moe_intermediate_size", 1024)
        shared = keys.count("num_shared_experts") if "num_shared_experts" in keys.values else 1
        layers = _sparse_layers(keys, config.layers)
        groups, kept = keys.size("n_group", 1), keys.size("topk_group", 1)
        renormalize = keys.flag("norm_topk_prob", True)
        scale = keys.number("routed_scaling_factor", 2.5)
    moe = MoeConfig(
        count,
        used,
        inner,
        layers,
        routing="group_sigmoid",
        correction="e_score_correction_bias",
        renormalize=renormalize,
        groups=groups,
        kept_groups=kept,
        scale=scale,
        shared_size=shared * inner,
    )
    return replace(config, moe=moe)


def _sparse_layers(keys: ConfigKeys, layers: int) -> frozenset[int]:
    """Those with experts: as listed, or behind the first few, one unless told otherwise."""
    if (listed := listed_experts(keys, layers)) is not None:
        return listed
    dense = keys.count("first_k_dense_replace") if "first_k_dense_replace" in keys.values else 1
    return frozenset(range(dense, layers))


# In memory transformers has the correction beside the router.
_ALIASES = ((r"\.mlp$", ".mlp.gate"),)
_PREDICTION = r"(model\.)?mtp\..+"

EXAONE_MOE = Family(
    "exaone_moe",
    _exaone_moe,
    build,
    CORRECTED_GGUF_NAMES,
    False,
    (*UNUSED, _PREDICTION),
    _ALIASES,
    prediction_layers=True,
)
