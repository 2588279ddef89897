"""Qwen2 and Qwen3, dense and with experts (Yang et al., 2024, 2025)."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, base_config
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import FULL, SLIDING, UNUSED, experts_in_gguf, windows_by_types, windows_of
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _qwen2(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    context = _first_chunk(keys, config.context_length)
    return replace(config, qkv_bias=True, windows=_windows(keys, config.layers), context_length=context)


def _first_chunk(keys: ConfigKeys, context: int) -> int:
    """How many tokens see each other as usual: dual chunk attention (An et al., 2024; the models of a million
    tokens) gives others other positions, chunk by chunk, which lowbit's attention does not."""
    chunks = keys.section("dual_chunk_attention_config")
    if not chunks:
        return context
    inside = ConfigKeys(chunks, f"{keys.place}: dual_chunk_attention_config")
    size, local = inside.size("chunk_size"), inside.count("local_size", 0)
    if local >= size:
        raise LowbitError("E0216", f"{inside.place}: local_size {local} of chunk_size {size}; it is damaged")
    return min(context, size - local)


def _qwen3(header: CheckpointHeader) -> ModelConfig:
    return _qwen3_attention(respelled(header, head_dim=128))


def _qwen3_attention(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return replace(config, qk_norm="head")
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    return replace(
        config,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=_windows(keys, config.layers),
        context_length=_first_chunk(keys, config.context_length),
    )


def _windows(keys: ConfigKeys, layers: int, everywhere: bool = False) -> tuple[int, ...]:
    used = keys.flag("use_sliding_window", False)
    return windows_of(keys, layers, everywhere, absent=4096) if used else ()


def _qwen3_moe(header: CheckpointHeader) -> ModelConfig:
    config = _qwen3_attention(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner, layers, renormalize = keys.size("expert_feed_forward_length"), list(range(config.layers)), True
    else:
        keys = json_keys(header)
        count = keys.size("num_experts", keys.size("num_local_experts", 128))
        used, inner = keys.size("num_experts_per_tok"), keys.size("moe_intermediate_size")
        renormalize = keys.flag("norm_topk_prob", False)
        layers = sparse_layers(keys, config.layers)
        config = replace(config, windows=_windows(keys, config.layers, everywhere=True))
    moe = MoeConfig(count, used, inner, frozenset(layers), renormalize=renormalize)
    return replace(config, moe=moe)


def _qwen2_moe(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used, inner, shared = experts_in_gguf(keys)
        layers, renormalize = list(range(config.layers)), False
    else:
        keys = json_keys(header)
        count, used = keys.size("num_experts"), keys.size("num_experts_per_tok")
        inner, shared = keys.size("moe_intermediate_size"), keys.size("shared_expert_intermediate_size")
        layers, renormalize = sparse_layers(keys, config.layers), keys.flag("norm_topk_prob", False)
        config = replace(
            config, qkv_bias=keys.flag("qkv_bias", True), windows=_moe_windows(keys, config.layers)
        )
    moe = MoeConfig(
        count,
        used,
        inner,
        frozenset(layers),
        renormalize=renormalize,
        shared_size=shared,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    )
    return replace(config, moe=moe)


def _moe_windows(keys: ConfigKeys, layers: int) -> tuple[int, ...]:
    """Without ``layer_types``, of the first ``max_window_layers`` every other one."""
    if not keys.flag("use_sliding_window", False):
        return ()
    first, listed = keys.count("max_window_layers", 28), keys.values.get("layer_types")
    kinds = [SLIDING if n % 2 == 0 and n < first else FULL for n in range(layers)]
    return windows_by_types(kinds if listed is None else listed, keys.size("sliding_window", 4096), layers)


def sparse_layers(keys: ConfigKeys, layers: int) -> list[int]:
    """The layers with experts."""
    step, dense = keys.size("decoder_sparse_step", 1), keys.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise LowbitError("E0216", f"{keys.place}: key 'mlp_only_layers' must be a list")
    return [n for n in range(layers) if n not in dense and (n + 1) % step == 0]


QWEN2 = Family("qwen2", _qwen2, build, GGUF_NAMES, False, UNUSED)
QWEN2_MOE = Family("qwen2_moe", _qwen2_moe, build, GGUF_NAMES, False, UNUSED)
QWEN3 = Family("qwen3", _qwen3, build, GGUF_NAMES, False, UNUSED)
QWEN3_MOE = Family("qwen3_moe", _qwen3_moe, build, GGUF_NAMES, False, UNUSED)
