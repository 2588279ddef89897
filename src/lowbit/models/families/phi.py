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

_LAYERS_OF_4K, _WINDOW_OF_4K = (32, 40), 2047  # Phi-3 mini and medium


def _phi3(header: CheckpointHeader) -> ModelConfig:
    config = base_config(header)
    keys = gguf_keys(header) if header.container == "gguf" else json_keys(header)
    name = "attention.sliding_window" if header.container == "gguf" else "sliding_window"
    # GGUF files from before August 2024 have no such key; those of 4,096 tokens are of models with a window.
    untold = header.container == "gguf" and not keys.has(name) and config.layers in _LAYERS_OF_4K
    window = _WINDOW_OF_4K if untold and config.context_length == 4096 else keys.count(name, 0)
    windows = (window,) * config.layers if 0 < window < config.context_length else ()
    return replace(config, windows=windows)


PHI3 = Family("phi3", _phi3, build, GGUF_NAMES, False, UNUSED)
