"""Quantizers in numpy, from their written rules. Nothing here comes from lowbit."""

from __future__ import annotations

import ml_dtypes
import numpy as np

F32 = np.float32
BF16 = ml_dtypes.bfloat16


def e4m3(steps: np.ndarray) -> np.ndarray:
    """float32: the nearest e4m3, saturating."""
    return np.clip(steps, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(F32)


def fp8_rows(weight: np.ndarray) -> np.ndarray:
    """SGLang online: scale max(|row|, 1e-10) / 448."""
    scale = np.maximum(np.abs(weight).max(1, keepdims=True), F32(1e-10)) / F32(448)
    return e4m3(weight / scale) * scale


def fp8_tensor(weight: np.ndarray) -> np.ndarray:
    """SGLang's input_to_float8 in float32: codes w * (448 / max), max at least 1e-12."""
    factor = F32(448) / max(np.abs(weight).max(), F32(1e-12))
    return e4m3(weight * factor) * (F32(1) / factor)


def int8_rows(weight: np.ndarray) -> np.ndarray:
    """max / 127, half to even."""
    return _int8(weight, np.abs(weight).max(1, keepdims=True) / F32(127))


def int8_blocks(weight: np.ndarray, size: int = 128) -> np.ndarray:
    """max / 127 of each size x size block, one block at a time."""
    made = np.empty_like(weight)
    for row in range(0, weight.shape[0], size):
        for column in range(0, weight.shape[1], size):
            block = weight[row : row + size, column : column + size]
            made[row : row + size, column : column + size] = _int8(block, np.abs(block).max() / F32(127))
    return made


def _int8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.round(weight / np.where(scale == 0, F32(1), scale)) * scale


def torchao_inputs(x: np.ndarray, number: str, limit: float, floor: float, whole: bool) -> np.ndarray:
    """torchao's dynamic inputs: largest and quotient in bfloat16, then float32; whole: one scale for all.

    int8: codes x * (1 / scale); e4m3: x / scale, where torchao has NaN for scales of 0 and this has 0.
    """
    x = x.astype(BF16)
    largest = np.abs(x).max(None if whole else 1, keepdims=True)
    scale = np.maximum((largest.astype(F32) / F32(limit)).astype(BF16), BF16(floor)).astype(F32)
    safe = np.where(scale == 0, F32(1), scale)
    if number == "int8":
        return np.clip(np.round(x.astype(F32) * (F32(1) / safe)), -128, 127) * scale
    return e4m3(x.astype(F32) / safe) * scale
