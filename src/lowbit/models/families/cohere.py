"""Command-R (Cohere, 2024) and Command-R7B and Command-A (Cohere, 2025), ``cohere2``.

Attention and MLP side by side behind one LayerNorm without a bias; neighbours rotate. Cohere2's layers that
see all tokens have no rotary embedding.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, NormNames, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_by_types, windows_in_gguf
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _cohere(header: CheckpointHeader, theta: float = 500000.0) -> ModelConfig:
    config = replace(
        base_config(header, theta=theta, tied=True),
        layer_norm=True,
        norm_names=NormNames(mlp=""),
        parallel=True,
        rotates_neighbours=True,
    )
    if header.container == "gguf":
        scale, layered = gguf_keys(header).number("logit_scale"), "blk.0.attn_q_norm.weight" in header.tensors
    else:
        keys = json_keys(header)
        scale, layered = keys.number("logit_scale", 0.0625), keys.flag("use_qk_norm", False)
        bias = keys.flag("attention_bias", False)
        config = replace(config, qkv_bias=bias, output_bias=bias)
    return replace(config, logit_scale=scale, qk_norm="layer" if layered else "")


def _cohere2(header: CheckpointHeader) -> ModelConfig:
    config = _cohere(header, 10000.0)
    if header.container == "gguf":
        keys = gguf_keys(header)
        windows = windows_in_gguf(keys, keys.size("attention.sliding_window"), config.layers, 4)
    else:
        keys = json_keys(header)
        window, types = keys.size("sliding_window", 4096), keys.values.get("layer_types")
        windows = windows_by_types(types, window, config.layers, keys.size("sliding_window_pattern", 4))
    return replace(
        config, windows=windows, unrotated=frozenset(n for n, seen in enumerate(windows) if not seen)
    )


COHERE = Family("cohere", _cohere, build, GGUF_NAMES, False, UNUSED)
COHERE2 = Family("cohere2", _cohere2, build, GGUF_NAMES, False, UNUSED)
