"""The families the decoder serves: how each spells its config, its tensors and its rows.

Llama (Touvron et al., 2023; Grattafiori et al., 2024), Mistral and Mixtral (Jiang et al., 2023, 2024), Qwen2
and Qwen3, dense and with experts (Yang et al., 2024, 2025), Gemma 2 and 3 (Gemma Team, 2024, 2025), Phi-3
(Abdin et al., 2024), gpt-oss (OpenAI, 2025).
"""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import (
    ConfigKeys,
    ModelConfig,
    MoeConfig,
    base_config,
    gguf_keys,
    json_keys,
    rope_keys,
)
from lowbit.models.decoder import build
from lowbit.models.gguf_names import GEMMA_GGUF_NAMES, GGUF_NAMES, GPT_OSS_GGUF_NAMES
from lowbit.models.registry import Family

UNUSED = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # a buffer old exports kept
    r"blk\.\d+\.attn_rot_embd\.weight",
    r"rope_factors_(long|short)\.weight",  # one of the two is used
)


def _llama(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias", False))


def _mistral(header: CheckpointHeader) -> ModelConfig:
    config, keys = base_config(header), json_keys(header)
    return replace(config, windows=_windows(keys, config.layers, everywhere=True))


def _qwen2(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    windows = _windows(keys, config.layers) if keys.flag("use_sliding_window", False) else ()
    return replace(config, qkv_bias=True, windows=windows)


def _qwen3(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        return replace(config, qk_norm=True)
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    windows = _windows(keys, config.layers) if keys.flag("use_sliding_window", False) else ()
    return replace(config, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows)


def _windows(keys: ConfigKeys, layers: int, everywhere: bool = False) -> tuple[int, ...]:
    """Each layer's window from ``layer_types``, or as the family's older configs imply it."""
    if not keys.has("sliding_window"):
        return ()
    window = keys.size("sliding_window")
    types = keys.values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if everywhere:
        return (window,) * layers
    first = keys.size("max_window_layers", layers) if keys.values.get("max_window_layers") else 0
    return tuple(window if n >= first else 0 for n in range(layers))


def _gemma(header: CheckpointHeader, period: int) -> ModelConfig:
    """Gemma 2 and 3; every ``period``-th layer sees all tokens, the others a window."""
    config = base_config(header)
    config = replace(config, post_norms=True, tied_head=True, embedding_scale=math.sqrt(config.hidden_size))
    if header.container == "gguf":
        keys = gguf_keys(header)
        # GGUF says nothing of the query scale: 1/sqrt(head_dim) but for Gemma 2 27B and Gemma 3 27B.
        scale = (config.hidden_size / config.heads) ** -0.5 if config.layers in (46, 62) else None
        names = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
        activation = "gelu_pytorch_tanh"
    else:
        keys = json_keys(header)
        scale = keys.number("query_pre_attn_scalar", config.head_dim) ** -0.5
        names = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
        activation = config.activation
        config = replace(config, norm_offset=1.0, tied_head=keys.flag("tie_word_embeddings", True))
    window = keys.size(names[2], 4096)
    types = keys.values.get("layer_types")
    if not (isinstance(types, list) and len(types) == config.layers):
        types = ["full_attention" if n % period == period - 1 else "" for n in range(config.layers)]
    return replace(
        config,
        activation=activation,
        attention_scale=scale,
        attention_softcap=keys.number(names[0], 0.0),
        logit_softcap=keys.number(names[1], 0.0),
        windows=tuple(0 if kind == "full_attention" else window for kind in types),
    )


def _gemma2(header: CheckpointHeader) -> ModelConfig:
    return _gemma(header, period=2)


def _gemma3(header: CheckpointHeader) -> ModelConfig:
    period = 6
    if header.container == "gguf":
        local_theta = gguf_keys(header).number("rope.freq_base_swa", 10000.0)
    else:
        keys = json_keys(header)
        period = keys.size("sliding_window_pattern", keys.size("_sliding_window_pattern", 6))
        local = rope_keys(keys, "sliding_attention")
        local_theta = keys.number("rope_local_base_freq", local.number("rope_theta", 10000.0))
    config = _gemma(header, period)
    theta = 1e6 if header.container == "gguf" and "gemma3.rope.freq_base" not in header.metadata else 0
    return replace(config, qk_norm=True, local_rope_theta=local_theta, rope_theta=theta or config.rope_theta)


def _phi3(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    keys = gguf_keys(header) if header.container == "gguf" else json_keys(header)
    name = "attention.sliding_window" if header.container == "gguf" else "sliding_window"
    window = keys.size(name) if keys.has(name) else 0
    windows = (window,) * config.layers if 0 < window < config.context_length else ()
    return replace(config, windows=windows)


def _mixtral(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
    else:
        keys = json_keys(header)
        count, used = keys.size("num_local_experts"), keys.size("num_experts_per_tok")
        config = replace(config, windows=_windows(keys, config.layers, everywhere=True))
    moe = MoeConfig(count, used, config.intermediate_size, frozenset(range(config.layers)))
    return replace(config, moe=moe)


def _llama_or_mixtral(header: CheckpointHeader) -> ModelConfig:
    """GGUF calls Mixtral ``llama`` with experts."""
    if header.container == "gguf" and gguf_keys(header).values.get("expert_count"):
        return _mixtral(header)
    return _llama(header)


def _qwen3_moe(header: CheckpointHeader) -> ModelConfig:
    config = _qwen3(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used = keys.size("expert_count"), keys.size("expert_used_count")
        inner, layers, renormalize = keys.size("expert_feed_forward_length"), list(range(config.layers)), True
    else:
        keys = json_keys(header)
        count = keys.size("num_experts", keys.size("num_local_experts", 128))
        used, inner = keys.size("num_experts_per_tok"), keys.size("moe_intermediate_size")
        renormalize = keys.flag("norm_topk_prob", False)
        step, dense = keys.size("decoder_sparse_step", 1), keys.values.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise LowbitError("E0216", f"{keys.place}: key 'mlp_only_layers' must be a list")
        layers = [n for n in range(config.layers) if n not in dense and (n + 1) % step == 0]
    moe = MoeConfig(count, used, inner, frozenset(layers), renormalize=renormalize)
    return replace(config, moe=moe)


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


# Mixtral's experts were block_sparse_moe before transformers 5; GPTQModel writes mlp.
MOE_ALIASES = ((r"\.mlp\.(gate|experts)\b(?!_)", r".block_sparse_moe.\1"),)
# unsloth's 4-bit gpt-oss wraps the router's matrix.
GPT_OSS_ALIASES = ((r"\.mlp\.router$", ".mlp.router.linear"),)

LLAMA = Family("llama", _llama_or_mixtral, build, GGUF_NAMES, True, UNUSED, MOE_ALIASES)
MISTRAL = Family("mistral", _mistral, build, GGUF_NAMES, True, UNUSED)
MIXTRAL = Family("mixtral", _mixtral, build, GGUF_NAMES, True, UNUSED, MOE_ALIASES)
QWEN2 = Family("qwen2", _qwen2, build, GGUF_NAMES, False, UNUSED)
QWEN3 = Family("qwen3", _qwen3, build, GGUF_NAMES, False, UNUSED)
QWEN3_MOE = Family("qwen3_moe", _qwen3_moe, build, GGUF_NAMES, False, UNUSED)
GEMMA2 = Family("gemma2", _gemma2, build, GEMMA_GGUF_NAMES, False, UNUSED)
GEMMA3 = Family("gemma3", _gemma3, build, GEMMA_GGUF_NAMES, False, UNUSED)
PHI3 = Family("phi3", _phi3, build, GGUF_NAMES, False, UNUSED)
GPT_OSS = Family("gpt_oss", _gpt_oss, build, GPT_OSS_GGUF_NAMES, False, UNUSED, GPT_OSS_ALIASES)
