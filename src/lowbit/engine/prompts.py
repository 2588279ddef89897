"""Whether prompts' tokens may meet weights that are rounded for them (``kernels.prompt_rows``)."""

from __future__ import annotations

from lowbit.kernels.prompt_rows import rounded_weights, rounding
from lowbit.settings import Settings

__all__ = ["rounded_weights", "rounds_prompts"]


def rounds_prompts(settings: Settings, device: str) -> bool:
    """What the settings say, where there are kernels that do."""
    return not settings.exact_prompts and rounding(device)
