"""GPTQ and AWQ packing in numpy, from the layouts' descriptions. Nothing here comes from lowbit."""

from __future__ import annotations

import numpy as np


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (n, m) -> uint32 words (n * bits / 32, m): one little-endian bit stream down each column."""
    rows, columns = codes.shape
    words = np.zeros((-(-rows * bits // 32), columns), np.uint64)
    for k in range(rows):
        for bit in range(bits):
            place = k * bits + bit
            words[place // 32] |= (codes[k].astype(np.uint64) >> bit & 1) << np.uint64(place % 32)
    return words.astype(np.uint32)


def planar(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQModel's planes: 32 codes become, plane by plane from the lowest, w words of 32 / w fields."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    out = []
    for start in range(0, codes.shape[0], 32):
        shift = 0
        for width in widths:
            per_word = 32 // width
            for word in range(width):
                value = np.zeros(codes.shape[1], np.uint64)
                for j in range(per_word):
                    code = codes[start + word * per_word + j].astype(np.uint64)
                    value |= (code >> shift & ((1 << width) - 1)) << np.uint64(width * j)
                out.append(value)
            shift += width
    return np.stack(out).astype(np.uint32)


def dequantize(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """codes (in, out), zeros and scales (groups, out), the group of each input -> float32 (out, in)."""
    difference = codes.astype(np.float32) - zeros.astype(np.float32)[groups]
    return (difference * scales.astype(np.float32)[groups]).T


AWQ_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of nibble k


def awq_gemm(codes: np.ndarray) -> np.ndarray:
    """Codes (rows, out) -> uint32 (rows, out / 8)."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate(AWQ_COLUMN):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words


def awq_gemv_fast(codes: np.ndarray) -> np.ndarray:
    """Codes (out, in) -> uint16 (out / 4, in)."""
    out, columns = codes.shape
    words = np.zeros((out // 4, columns), np.uint16)
    for big_row in range(out // 4):
        for block in range(columns // 64):
            for t in range(64):
                row, s = 4 * big_row + t // 16, t % 16
                for nibble in range(4):
                    column = 64 * block + 32 * (s // 8) + 8 * nibble + s % 8
                    words[big_row, 64 * block + t] |= int(codes[row, column]) << 4 * nibble
    return words


def marlin(codes: np.ndarray) -> np.ndarray:
    """Codes (in, out) -> uint32 (in / 16, out * 2)."""
    rows, out = codes.shape
    order = []
    for lane in range(32):
        first = []
        for block in (0, 1):
            for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1):
                first.append(16 * row + lane // 4 + 8 * block)
        for tile in range(4):
            order += [place + 256 * tile for place in first]
    order = np.array(order).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    tiles = codes.reshape(rows // 16, 16, out // 16, 16).transpose(0, 2, 1, 3).reshape(rows // 16, out * 16)
    shuffled = tiles.reshape(-1, 1024)[:, order].reshape(rows // 16, out * 16)
    words = np.zeros((rows // 16, out * 2), np.uint32)
    for nibble in range(8):
        words |= shuffled[:, nibble::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words


def marlin_scales(scales: np.ndarray) -> np.ndarray:
    """(groups, out) in the kernel's order."""
    if scales.shape[0] > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
