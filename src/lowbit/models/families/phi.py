"""Phi-3 (Abdin et al., 2024) and Phi-4, which has no window (0 in GGUF files, null in config.json)."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.models.config import ModelConfig, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family


def _phi3(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    keys = gguf_keys(header) if header.container == "gguf" else json_keys(header)
    name = "attention.sliding_window" if header.container == "gguf" else "sliding_window"
    window = keys.count(name, 0)
    windows = (window,) * config.layers if 0 < window < config.context_length else ()
    return replace(config, windows=windows)


PHI3 = Family("phi3", _phi3, build, GGUF_NAMES, False, UNUSED)
