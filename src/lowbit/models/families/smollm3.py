"""SmolLM3 (Hugging Face, 2025): Llama's blocks, every fourth layer without a rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, base_config
from lowbit.models.config_keys import json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import FULL, SLIDING, UNUSED, windows_by_types
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _smollm3(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header, theta=2000000.0, tied=True)
    if header.container == "gguf":
        return replace(config, unrotated=frozenset(range(3, config.layers, 4)))
    keys = json_keys(header)
    step = keys.size("no_rope_layer_interval", 4)
    rotated = keys.values.get("no_rope_layers")  # by its name, the other way round: 1 where rope is used
    if rotated is None:
        rotated = [int((n + 1) % step != 0) for n in range(config.layers)]
    if (
        not isinstance(rotated, list)
        or len(rotated) < config.layers
        or not set(map(str, rotated)) <= {"0", "1"}
    ):
        raise LowbitError(
            "E0216", f"{keys.place}: key 'no_rope_layers' must be a list of {config.layers} times 0 or 1"
        )
    bias = keys.flag("attention_bias", False)
    config = replace(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        unrotated=frozenset(n for n in range(config.layers) if not rotated[n]),
    )
    if not keys.flag("use_sliding_window", False) or not keys.has("sliding_window"):
        return config
    types = keys.values.get("layer_types")
    if types is None:
        types = [FULL if rotates else SLIDING for rotates in rotated[: config.layers]]
    return replace(config, windows=windows_by_types(types, keys.size("sliding_window"), config.layers))


SMOLLM3 = Family("smollm3", _smollm3, build, GGUF_NAMES, True, UNUSED)
