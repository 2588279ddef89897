"""MiniMax-M2 (MiniMax, 2025): half of each head turns, Q and K are normed whole.

Every layer has experts, chosen by sigmoids, and no shared one.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, require_sigmoid
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import CORRECTED_GGUF_NAMES
from lowbit.models.registry import Family


def _minimax_m2(header: CheckpointHeader) -> ModelConfig:
    if header.container == "gguf":
        config, keys = base_config(header), gguf_keys(header)
        require_sigmoid(keys)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner = keys.size("expert_feed_forward_length")
    else:
        keys = json_keys(header)
        config = base_config(respelled(header, head_dim=128), rotated=_rotated(keys), theta=5e6)
        _check(keys)
        count, used = keys.size("num_local_experts", 256), keys.size("num_experts_per_tok", 8)
        inner = config.intermediate_size
    moe = MoeConfig(
        count,
        used,
        inner,
        frozenset(range(config.layers)),
        routing="group_sigmoid",
        correction="e_score_correction_bias",
    )
    return replace(config, qk_norm="projection", moe=moe)


def _rotated(keys: ConfigKeys) -> float:
    """The part of a head that turns: published configs say how many dimensions."""
    return keys.size("rotary_dim") / keys.size("head_dim", 128) if keys.has("rotary_dim") else 1.0


def _check(keys: ConfigKeys) -> None:
    """E0242 for what the published code can do and no published model asks for."""
    for key, only in (("use_qk_norm", True), ("use_routing_bias", True)):
        if not keys.flag(key, only):
            raise LowbitError("E0242", f"{keys.place}: {key} false is not supported; only true is")
    for key, told in (("qk_norm_type", "per_layer"), ("scoring_func", "sigmoid")):
        if keys.text(key, told) != told:
            raise LowbitError("E0242", f"{keys.place}: {key} must be {told!r}; others are not supported")
    kinds = keys.values.get("attn_type_list")
    if isinstance(kinds, list) and set(kinds) - {1}:
        raise LowbitError(
            "E0242",
            f"{keys.place}: attn_type_list has layers of linear attention (0), which are "
            "not supported for MiniMax-M2",
        )
    if keys.count("shared_intermediate_size", 0):
        raise LowbitError("E0242", f"{keys.place}: a shared expert is not supported for MiniMax-M2")


_ALIASES = ((r"\.mlp$", ".block_sparse_moe"), (r"\.mlp\.(gate|experts)\b(?!_)", r".block_sparse_moe.\1"))
_PREDICTION = r"model\.mtp\..+"

MINIMAX_M2 = Family(
    "minimax_m2",
    _minimax_m2,
    build,
    CORRECTED_GGUF_NAMES,
    False,
    (*UNUSED, _PREDICTION),
    _ALIASES,
    prediction_layers=True,
)
