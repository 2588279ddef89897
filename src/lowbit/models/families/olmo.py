"""OLMo 2 and 3 (OLMo Team, 2024, 2025), OLMoE (Muennighoff et al., 2024) and FlexOlmo (Shi et al., 2025).

OLMo 2 and 3 have no norms before attention and MLP, only after them; FlexOlmo is OLMo 2 with experts. All
norm Q and K whole, over all heads together.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.layers.rotary import RopeScaling
from lowbit.models.config import ModelConfig, MoeConfig, NormNames, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED, windows_by_types, windows_in_gguf
from lowbit.models.gguf_names import GEMMA_GGUF_NAMES, GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import local_rope

_NORMS = NormNames("", "", "post_attention_layernorm", "post_feedforward_layernorm")


def _olmo2(header: CheckpointHeader) -> ModelConfig:
    """GGUF calls OLMo 3 ``olmo2``, too: with a window."""
    config = replace(_biased(header, 10000.0), norm_names=_NORMS)
    return _windowed(header, config) if header.container == "gguf" else config


def _olmo3(header: CheckpointHeader) -> ModelConfig:
    return _windowed(header, replace(_biased(header, 500000.0), norm_names=_NORMS))


def _biased(header: CheckpointHeader, theta: float) -> ModelConfig:
    """``theta``: the rotary base where config.json says none."""
    config = replace(base_config(header, theta=theta), qk_norm="projection")
    if header.container == "gguf":
        return config
    bias = json_keys(header).flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias)


def _windowed(header: CheckpointHeader, config: ModelConfig) -> ModelConfig:
    """Every fourth layer sees all tokens, the others a window."""
    if header.container == "gguf":
        keys = gguf_keys(header)
        if not keys.has("attention.sliding_window"):
            return config
        window, scaling = keys.size("attention.sliding_window"), RopeScaling()
        theta = keys.number("rope.freq_base_swa", config.rope_theta)
        windows = windows_in_gguf(keys, window, config.layers, 4)
    else:
        keys = json_keys(header)
        window = keys.size("sliding_window", 4096)
        theta, scaling = local_rope(keys, config.context_length, config.rope_theta)
        windows = windows_by_types(keys.values.get("layer_types"), window, config.layers, period=4)
    return replace(
        config,
        windows=windows,
        local_rope_theta=theta,
        local_rope_scaling=scaling,
    )


def _olmoe(header: CheckpointHeader) -> ModelConfig:
    config = _biased(header, 10000.0)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used, renormalize = keys.size("expert_count"), keys.size("expert_used_count"), False
        clip = "attention.clamp_kqv"
    else:
        keys = json_keys(header)
        count, used = keys.size("num_experts"), keys.size("num_experts_per_tok")
        renormalize, clip = keys.flag("norm_topk_prob", False), "clip_qkv"
    if keys.has(clip):
        raise LowbitError(
            "E0242",
            f"{keys.place}: {clip} {keys.number(clip):g} is not supported; only models without it are",
        )
    layers = frozenset(range(config.layers))
    return replace(
        config, moe=MoeConfig(count, used, config.intermediate_size, layers, renormalize=renormalize)
    )


def _flex_olmo(header: CheckpointHeader) -> ModelConfig:
    config, keys = replace(_biased(header, 500000.0), norm_names=_NORMS), json_keys(header)
    moe = MoeConfig(
        keys.size("num_experts", keys.size("num_local_experts", 7)),
        keys.size("num_experts_per_tok", 5),
        config.intermediate_size,
        frozenset(range(config.layers)),
        renormalize=keys.flag("norm_topk_prob", False),
    )
    return replace(config, moe=moe)


OLMO2 = Family("olmo2", _olmo2, build, GEMMA_GGUF_NAMES, False, UNUSED)
OLMO3 = Family("olmo3", _olmo3, build, GEMMA_GGUF_NAMES, False, UNUSED)
OLMOE = Family("olmoe", _olmoe, build, GGUF_NAMES, False, UNUSED)
FLEX_OLMO = Family("flex_olmo", _flex_olmo, build, GEMMA_GGUF_NAMES, False, UNUSED)
