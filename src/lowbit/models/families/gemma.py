"""Gemma 2 and 3 (Gemma Team, 2024, 2025)."""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, NormNames, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_by_types
from lowbit.models.gguf_names import GEMMA_GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import rope_keys

NORMS = NormNames(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)


def _gemma(header: CheckpointHeader, period: int) -> ModelConfig:
    """Gemma 2 and 3; every ``period``-th layer sees all tokens, the others a window."""
    config = base_config(header)
    config = replace(config, norm_names=NORMS, tied_head=True, embedding_scale=math.sqrt(config.hidden_size))
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
    return replace(
        config,
        activation=activation,
        attention_scale=scale,
        attention_softcap=keys.number(names[0], 0.0),
        logit_softcap=keys.number(names[1], 0.0),
        windows=windows_by_types(keys.values.get("layer_types"), window, config.layers, period),
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
    return replace(
        config, qk_norm="head", local_rope_theta=local_theta, rope_theta=theta or config.rope_theta
    )


GEMMA2 = Family("gemma2", _gemma2, build, GEMMA_GGUF_NAMES, False, UNUSED)
GEMMA3 = Family("gemma3", _gemma3, build, GEMMA_GGUF_NAMES, False, UNUSED)
