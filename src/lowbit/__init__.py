"""lowbit: serve quantized language models, fast and right, from any checkpoint format.

The public names are loaded on first use: importing lowbit imports no torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_NAMES = {
    "LLM": "lowbit.llm",
    "Completion": "lowbit.llm",
    "SamplingParams": "lowbit.engine.messages",
    "LowbitError": "lowbit.errors",
    "load_model": "lowbit.loading",
    "plan_model": "lowbit.loading",
    "open_checkpoint": "lowbit.checkpoint",
}

__all__ = [
    "LLM",
    "Completion",
    "LowbitError",
    "SamplingParams",
    "load_model",
    "open_checkpoint",
    "plan_model",
]


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
