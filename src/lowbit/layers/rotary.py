"""Rotary position embedding tables (RoFormer: Su et al., 2021) with their context extensions.

Frequencies follow transformers' definitions bit for bit where float32 allows: linear (Chen et al., 2023),
llama3 (Llama 3.1's wavelength rule), YaRN (Peng et al., 2023) and LongRoPE (Ding et al., 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. ``kind``: none, linear, dynamic, llama3, yarn, divisors or table.

    "divisors" divides each frequency by ``divisors`` (LongRoPE, from config.json), "table" by a tensor of
    the checkpoint, ``tensor`` (GGUF ``rope_freqs``, ``rope_factors_long``). "dynamic" leaves them alone: it
    has another base for sequences beyond ``original_context``.
    """

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    tensor: str = ""


def rotary_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling, divisors: Tensor | None = None
) -> tuple[Tensor, float]:
    """(float32 (rotary_dim / 2,) radians a token, factor on cos and sin)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    plain = 1.0 / theta**exponents
    match scaling.kind:
        case "none" | "dynamic":
            return plain, 1.0
        case "table":
            assert divisors is not None, "table scaling comes with its divisors"
            return plain / divisors.float(), scaling.attention_factor or 1.0
        case "divisors":
            return 1.0 / (torch.tensor(scaling.divisors) * theta**exponents), scaling.attention_factor or 1.0
        case "linear":
            return plain / scaling.factor, 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, rotary_dim, theta, scaling), _yarn_magnitude(scaling)
    raise AssertionError(f"rope scaling {scaling.kind!r} passed the config reader")


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    low = scaling.original_context / scaling.low_frequency_factor
    high = scaling.original_context / scaling.high_frequency_factor
    stretched = torch.where(wavelength > low, plain / scaling.factor, plain)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    share = (scaling.original_context / wavelength - scaling.low_frequency_factor) / span
    between = (1 - share) * stretched / scaling.factor + share * stretched
    return torch.where((wavelength >= high) & (wavelength <= low), between, stretched)


def _yarn(plain: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Dimensions that turn often are kept, slow ones stretched, a linear ramp in between."""

    def dimension(rotations: float) -> float:
        wavelengths = scaling.original_context / (rotations * 2 * math.pi)
        return rotary_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a width
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return plain / scaling.factor * (1 - kept) + plain * kept


def _yarn_magnitude(scaling: RopeScaling) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
