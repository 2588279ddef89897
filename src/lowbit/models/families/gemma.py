"""Gemma 1, 2 and 3 (Gemma Team, 2024, 2024, 2025)."""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, NormNames, base_config
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_by_types, windows_in_gguf
from lowbit.models.families.spelling import respelled
from lowbit.models.gguf_names import GEMMA_GGUF_NAMES, GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import local_rope

NORMS = NormNames(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
_GELU = "gelu_pytorch_tanh"
_CAPS: dict[str, object] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_WINDOW: dict[str, object] = {"attention.sliding_window": 4096}


def _gemma1(header: CheckpointHeader) -> ModelConfig:
    """Llama's blocks and norms, Gemma's embedding and activation."""
    config = base_config(respelled(header, head_dim=256, hidden_act=_GELU), tied=True)
    config = replace(config, embedding_scale=math.sqrt(config.hidden_size))
    if header.container == "gguf":
        return replace(config, activation=_GELU, tied_head=True)
    keys = json_keys(header)
    _see_before(keys)
    bias = keys.flag("attention_bias", False)
    # The first configs say gelu, and mean what it was trained with.
    activation = _GELU if config.activation == "gelu" else config.activation
    return replace(config, norm_offset=1.0, qkv_bias=bias, output_bias=bias, activation=activation)


def _see_before(keys: ConfigKeys) -> None:
    """E0242 where tokens see those after them."""
    if keys.flag("use_bidirectional_attention", False):
        raise LowbitError(
            "E0242",
            f"{keys.place}: use_bidirectional_attention true is not supported: tokens see those before them "
            "only",
        )


def _gemma(header: CheckpointHeader, period: int, theta: float = 10000.0) -> ModelConfig:
    """Gemma 2 and 3; every ``period``-th layer sees all tokens, the others a window.

    ``theta``: the rotary base where config.json says none.
    """
    config, activation = base_config(respelled(header, head_dim=256), theta=theta), _GELU
    config = replace(config, norm_names=NORMS, tied_head=True, embedding_scale=math.sqrt(config.hidden_size))
    if header.container == "gguf":
        keys = gguf_keys(header)
        # GGUF says nothing of the query scale: 1/sqrt(head_dim) but for Gemma 2 27B and Gemma 3 27B.
        scale = (config.hidden_size / config.heads) ** -0.5 if config.layers in (46, 62) else None
        window = keys.count("attention.sliding_window", 0)
        windows = windows_in_gguf(keys, window, config.layers, period) if window else ()
    else:
        keys = json_keys(header)
        _see_before(keys)
        scale = keys.number("query_pre_attn_scalar", 256.0) ** -0.5
        window, types = keys.size("sliding_window", 4096), keys.values.get("layer_types")
        windows = windows_by_types(types, window, config.layers, period)
        activation, bias = keys.text("hidden_activation", activation), keys.flag("attention_bias", False)
        config = replace(
            config,
            norm_offset=1.0,
            tied_head=keys.flag("tie_word_embeddings", True),
            qkv_bias=bias,
            output_bias=bias,
        )
    return replace(
        config,
        activation=activation,
        attention_scale=scale,
        attention_softcap=keys.number("attn_logit_softcapping", 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0),
        windows=windows,
    )


def _gemma2(header: CheckpointHeader) -> ModelConfig:
    if header.container != "gguf":  # null, unlike no key, means that logits are not capped
        return _gemma(replace(header, config=_CAPS | header.config), period=2)
    # Files of June 2024 have none of these keys.
    absent = {f"gemma2.{key}": value for key, value in (_CAPS | _WINDOW).items()}
    return _gemma(replace(header, metadata=absent | header.metadata), period=2)


def _gemma3(header: CheckpointHeader) -> ModelConfig:
    period = 6
    if header.container == "gguf":
        local_theta = gguf_keys(header).number("rope.freq_base_swa", 10000.0)
    else:
        keys = json_keys(header)
        period = keys.size("sliding_window_pattern", keys.size("_sliding_window_pattern", 6))
        local_theta = keys.number("rope_local_base_freq", 10000.0)
    config = replace(_gemma(header, period, theta=1e6), qk_norm="head")
    if header.container == "gguf":
        theta = 1e6 if "gemma3.rope.freq_base" not in header.metadata else config.rope_theta
        return replace(config, local_rope_theta=local_theta, rope_theta=theta)
    local_theta, scaling = local_rope(keys, config.context_length, local_theta)
    return replace(config, local_rope_theta=local_theta, local_rope_scaling=scaling)


GEMMA = Family("gemma", _gemma1, build, GGUF_NAMES, False, UNUSED)
GEMMA2 = Family("gemma2", _gemma2, build, GEMMA_GGUF_NAMES, False, UNUSED)
GEMMA3 = Family("gemma3", _gemma3, build, GEMMA_GGUF_NAMES, False, UNUSED)
