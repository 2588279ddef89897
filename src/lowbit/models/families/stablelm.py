"""StableLM 2 (Bellagente et al., 2024): LayerNorms with biases, a quarter of each head rotates."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, NormNames, base_config
from lowbit.models.config_keys import json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _stablelm(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(header, rotated=0.25), layer_norm=True, norm_bias=True)
    if header.container == "gguf":
        parallel = "blk.0.ffn_norm.weight" not in header.tensors  # the 12B says false, and has none
        layered = "blk.0.attn_q_norm.weight" in header.tensors
    else:
        keys = json_keys(header)
        parallel, layered = keys.flag("use_parallel_residual", False), keys.flag("qk_layernorm", False)
        config = replace(config, qkv_bias=keys.flag("use_qkv_bias", False))
    if parallel:
        config = replace(config, parallel=True, norm_names=NormNames(mlp=""))
    return replace(config, qk_norm="layer" if layered else "")


_ALIASES = ((r"\.self_attn\.([qk])_norm\b", r".self_attn.\1_layernorm"),)

STABLELM = Family("stablelm", _stablelm, build, GGUF_NAMES, False, UNUSED, _ALIASES)
