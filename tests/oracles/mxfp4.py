"""MXFP4 in numpy, from the OCP Microscaling specification. Nothing here comes from lowbit."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def encode(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (..., n) -> blocks uint8 (..., n / 32, 16) and exponents uint8 (..., n / 32)."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.maximum(largest, 2.0**-120))) - 2
    steps = groups / 2.0**exponent
    codes = np.abs(steps[..., None] - E2M1).argmin(-1).astype(np.uint8)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks, (exponent[..., 0] + 127).astype(np.uint8)


def decode(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """The inverse: float32 (..., n)."""
    codes = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:-1], 32)
    values = E2M1[codes] * 2.0 ** (exponents.astype(np.float32) - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)
