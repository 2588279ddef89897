"""What a KV cache of each type keeps of K and V, in numpy from the definitions, one function a type.

x is (..., dim), the numbers of one token and head. Scales are bfloat16, rounded so that every code is within
reach.
"""

from __future__ import annotations

import numpy as np

GROUPS = {("int4", "k"): 16, ("int4", "v"): 64}  # channels that share a scale; else all of a head


def bfloat16(x: np.ndarray, towards: str = "nearest") -> np.ndarray:
    """The nearest bfloat16 (ties to even), or the next one ``up`` or ``down``, of two neighbours."""
    x = np.asarray(x, np.float32)
    cut = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # towards zero
    beyond = (cut.view(np.uint32) + np.uint32(0x10000)).view(np.float32)  # one step away from zero
    low, high = np.minimum(cut, beyond), np.maximum(cut, beyond)
    if towards == "up":
        return np.where(cut == x, x, high)
    if towards == "down":
        return np.where(cut == x, x, low)
    near, far = np.abs(x.astype(np.float64) - cut), np.abs(beyond.astype(np.float64) - x)
    odd = (cut.view(np.uint32) >> np.uint32(16)) & np.uint32(1)
    return np.where((near < far) | ((near == far) & (odd == 0)), cut, beyond)


def float8(exponent_bits: int, mantissa_bits: int, largest: float) -> np.ndarray:
    """All finite magnitudes of an 8-bit float, in the order of their codes."""
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
        leading = 1.0 if exponent else 0.0
        found.append((leading + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - bias))
    return np.array([value for value in found if value <= largest])


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """x as the nearest of +-magnitudes; between two, that of the even code; beyond the last, the last."""
    size = np.abs(x.astype(np.float64))
    above = np.searchsorted(magnitudes, size).clip(0, len(magnitudes) - 1)
    below = (above - 1).clip(0)
    up, down = magnitudes[above] - size, size - magnitudes[below]
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    return np.copysign(np.where(take_above, magnitudes[above], magnitudes[below]), x)


E4M3, E5M2 = float8(4, 3, 448.0), float8(5, 2, 57344.0)


def _group(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | float]:
    """One group of channels, code times scale, and what is added to that."""
    if kind == "int4":
        low = bfloat16(x.min(-1, keepdims=True), "down")
        scale = bfloat16((x.max(-1, keepdims=True) - low) / np.float32(15), "up")
        codes = np.rint((x - low) / np.where(scale > 0, scale, np.float32(1)))
        return np.where(scale > 0, codes, 0) * scale, low
    reach = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}[kind]
    scale = bfloat16(np.abs(x).max(-1, keepdims=True) / np.float32(reach), "up")
    quotients = x / np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(quotients) if kind == "int8" else nearest(quotients, E4M3 if "e4" in kind else E5M2)
    return codes.astype(np.float32) * scale, 0.0


def read_back(x: np.ndarray, kind: str, part: str, group: int = 0) -> np.ndarray:
    """What attention sees of x (..., dim) float32; ``part``: "k" or "v"; ``group``: a latent cache's."""
    x = np.asarray(x, np.float32)
    if kind == "f32":
        return x
    if kind == "bf16":
        return bfloat16(x)
    if kind == "fp16":
        return x.astype(np.float16).astype(np.float32)
    return np.concatenate([scaled + low for scaled, low in _groups(x, kind, part, group)], axis=-1)


def magnitudes(x: np.ndarray, kind: str, part: str, group: int = 0) -> np.ndarray:
    """Of the terms that each number attention sees is the sum of."""
    if kind in ("f32", "bf16", "fp16"):
        return np.abs(read_back(x, kind, part))
    parts = [np.abs(scaled) + np.abs(low) for scaled, low in _groups(x, kind, part, group)]
    return np.concatenate(parts, axis=-1)


def _groups(x: np.ndarray, kind: str, part: str, group: int) -> list[tuple[np.ndarray, np.ndarray | float]]:
    x = np.asarray(x, np.float32)
    group = group or GROUPS.get((kind, part), x.shape[-1])
    return [_group(x[..., at : at + group], kind) for at in range(0, x.shape[-1], group)]
