"""GGUF's reference quantizers in numpy, one block at a time, from ggml's definitions.

Nothing here comes from lowbit. Arithmetic is float32 and sums run in the order of the weights.
"""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np

F = np.float32
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], F)


def total(terms: np.ndarray) -> np.float32:
    """One after the other."""
    return np.add.accumulate(terms, dtype=F)[-1]


def nearest(x: np.ndarray) -> np.ndarray:
    """ggml's nearest_int: the low bits of x + 1.5 * 2^23."""
    return ((np.asarray(x, F) + F(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def half(x: float) -> bytes:
    return np.float16(x).tobytes()


def nibbles(codes: np.ndarray) -> bytes:
    middle = len(codes) // 2
    return bytes(int(codes[j]) | int(codes[middle + j]) << 4 for j in range(middle))


def bits(codes: np.ndarray) -> bytes:
    return np.packbits(np.asarray(codes, np.uint8), bitorder="little").tobytes()


def two_bit_planes(codes: np.ndarray) -> bytes:
    """Byte l of a 128-chunk: elements l, l + 32, l + 64, l + 96."""
    out = bytearray()
    for chunk in (codes[:128], codes[128:]):
        out += bytes(sum(int(chunk[byte + 32 * n]) << 2 * n for n in range(4)) for byte in range(32))
    return bytes(out)


def bit_planes(codes: np.ndarray) -> bytes:
    """Bit k of byte l: element 32 k + l."""
    return bytes(sum(int(codes[32 * k + byte]) << k for k in range(8)) for byte in range(32))


def away(x: np.ndarray) -> np.ndarray:
    magnitude = np.abs(x)
    whole = np.floor(magnitude)
    return (np.sign(x) * (whole + np.floor(2 * (magnitude - whole)))).astype(np.int32)


def inverse(d: np.float32) -> np.float32:
    return F(1) / d if d != 0 else F(0)


# ---- one scale ----


def symmetric(x: np.ndarray, middle: int) -> tuple[np.float32, np.ndarray]:
    d = x[np.argmax(np.abs(x))] / F(-middle)
    return d, np.minimum(2 * middle - 1, (x * inverse(d) + F(middle + 0.5)).astype(np.int32))


def with_minimum(x: np.ndarray, levels: int) -> tuple[bytes, np.ndarray]:
    low = x[np.argmin(x)]  # the first: 0 has two signs
    d = (x.max() - low) / F(levels)
    codes = np.minimum(levels, ((x - low) * inverse(d) + F(0.5)).astype(np.int32))
    return half(d) + half(low), codes


def q4_0(x: np.ndarray) -> bytes:
    d, codes = symmetric(x, 8)
    return half(d) + nibbles(codes)


def q5_0(x: np.ndarray) -> bytes:
    d, codes = symmetric(x, 16)
    return half(d) + bits(codes >> 4) + nibbles(codes & 15)


def q4_1(x: np.ndarray) -> bytes:
    head, codes = with_minimum(x, 15)
    return head + nibbles(codes)


def q5_1(x: np.ndarray) -> bytes:
    head, codes = with_minimum(x, 31)
    return head + bits(codes >> 4) + nibbles(codes & 15)


def q8_0(x: np.ndarray) -> bytes:
    d = np.abs(x).max() / F(127)
    return half(d) + away(x * inverse(d)).astype(np.int8).tobytes()


def q1_0(x: np.ndarray) -> bytes:
    return half(total(np.abs(x)) / F(128)) + bits(x >= 0)


def tq1_0(x: np.ndarray) -> bytes:
    d = np.abs(x).max()
    trits = away(x * inverse(d)) + 1
    out = bytearray()
    for first, width, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        for m in range(width):
            q = sum(int(trits[first + m + width * n]) * 3 ** (4 - n) for n in range(count))
            out.append(-(-q * 256 // 243))
    return bytes(out) + half(d)


def tq2_0(x: np.ndarray) -> bytes:
    d = np.abs(x).max()
    return two_bit_planes(away(x * inverse(d)) + 1) + half(d)


def e2m1(x: np.ndarray, half_scale: np.float32) -> np.ndarray:
    return np.argmin(np.abs(E2M1_DOUBLED * half_scale - x[:, None]), -1)


def mxfp4(x: np.ndarray) -> bytes:
    largest = np.abs(x).max()
    e = int(np.floor(F(np.log2(np.float64(largest))))) + 125 if largest > 0 else 0
    return bytes([e]) + nibbles(e2m1(x, F(2.0 ** (e - 128))))


def nvfp4(x: np.ndarray) -> bytes:
    # Every code of e4m3 without a sign that a writer may use: below 256, and 448.
    table = np.array(
        [m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(15) for m in range(8)]
    )
    scales, codes = bytearray(), bytearray()
    for group in x.reshape(4, 16):
        wanted = np.abs(group).max() / F(6)
        # Halves up: the last code whose lower neighbour's midpoint the number has reached.
        code = int(np.searchsorted((table[:-1] + table[1:]) / 2, wanted, side="right"))
        if wanted < 2**-6:
            code = min(code, 7)  # the subnormals never round up to the first normal number
        if code == len(table) - 1 and wanted >= 248:  # past the midpoint of 240 and 256
            code = 0x7E
        scale = table[code] if code < len(table) else 448.0
        scales.append(code)
        codes += nibbles(e2m1(group, F(scale / 2)))
    return bytes(scales + codes)


# ---- searches ----


def qkx2(
    x: np.ndarray, w: np.ndarray, levels: int, first: float, delta: float, steps: int, mad: bool
) -> tuple[np.float32, np.float32, np.ndarray]:
    """make_qkx2_quants: scale, minimum (negated) and codes."""

    def error(scale: np.float32, low: np.float32, codes: np.ndarray) -> np.float32:
        diff = scale * codes.astype(F) + low - x
        return total(w * (np.abs(diff) if mad else diff * diff))

    low, high = min(x.min(), F(0)), x.max()
    if low == high:
        return F(0), -low, np.zeros(len(x), np.int32)
    sum_w, sum_x = total(w), total(w * x)
    iscale = F(levels) / (high - low)
    scale = F(1) / iscale
    codes = np.clip(nearest(iscale * (x - low)), 0, levels)
    best = error(scale, low, codes)
    for step in range(steps + 1):
        iscale = (F(first) + F(delta) * F(step) + F(levels)) / (high - low)
        tried = np.clip(nearest(iscale * (x - low)), 0, levels)
        wl = w * tried.astype(F)
        sum_l, sum_l2, sum_xl = total(wl), total(wl * tried.astype(F)), total(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if not determinant > 0:
            continue
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if new_low > 0:
            new_scale, new_low = sum_xl / sum_l2, F(0)
        now = error(new_scale, new_low, tried)
        if now < best:
            best, scale, low, codes = now, new_scale, new_low, tried
    return scale, -low, codes


def q2_k(x: np.ndarray) -> bytes:
    found = [qkx2(s, np.abs(s), 3, -0.5, 0.1, 15, True) for s in x.reshape(16, 16)]
    max_scale, max_min = (max(F(0), *(f[part] for f in found)) for part in (0, 1))
    scales = [int(nearest(F(15) / max_scale * f[0])) if max_scale > 0 else 0 for f in found]
    mins = [int(nearest(F(15) / max_min * f[1])) if max_min > 0 else 0 for f in found]
    d, dmin = np.float16(max_scale / F(15)), np.float16(max_min / F(15))
    codes = []
    for sub, (_, _, kept), scale, low in zip(x.reshape(16, 16), found, scales, mins, strict=True):
        step = F(d) * F(scale)
        codes.append(np.clip(nearest((sub + F(dmin) * F(low)) / step), 0, 3) if step != 0 else kept)
    packed = bytes(s | m << 4 for s, m in zip(scales, mins, strict=True))
    return packed + two_bit_planes(np.concatenate(codes)) + d.tobytes() + dmin.tobytes()


def q45_k(x: np.ndarray, levels: int) -> bytes:
    subs = x.reshape(8, 32)
    search = (15, -1.0, 0.1, 20, False) if levels == 15 else (31, -0.5, 0.1, 15, False)
    found = [qkx2(s, np.sqrt(total(s * s) / F(32)) + np.abs(s), *search) for s in subs]
    max_scale, max_min = (max(F(0), *(f[part] for f in found)) for part in (0, 1))
    scales = [min(63, int(nearest(F(63) / max_scale * f[0]))) if max_scale > 0 else 0 for f in found]
    mins = [min(63, int(nearest(F(63) / max_min * f[1]))) if max_min > 0 else 0 for f in found]
    d, dmin = np.float16(max_scale / F(63)), np.float16(max_min / F(63))
    codes = []
    for sub, (_, _, kept), scale, low in zip(subs, found, scales, mins, strict=True):
        step = F(d) * F(scale)
        codes.append(np.clip(nearest((sub + F(dmin) * F(low)) / step), 0, levels) if step != 0 else kept)
    flat = np.concatenate(codes)
    packed = bytearray(12)
    for j in range(4):
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6
        packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6
        packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4
    low_bits = b"".join(nibbles(flat[64 * c : 64 * c + 64] & 15) for c in range(4))
    high_bits = b"" if levels == 15 else bit_planes(flat >> 4)
    return d.tobytes() + dmin.tobytes() + bytes(packed) + high_bits + low_bits


def q3_search(x: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """make_q3_quants."""
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < F(1e-15):
        return F(0), np.zeros(16, np.int32)
    codes = np.clip(nearest(F(-4) / largest * x), -4, 3)
    w = x * x
    xl, l2 = total(w * x * codes.astype(F)), total(w * codes.astype(F) * codes.astype(F))
    for _ in range(5):
        changed = False
        for i in range(16):
            old = F(codes[i])
            other_xl, other_l2 = xl - w[i] * x[i] * old, l2 - w[i] * old * old
            if not other_xl > 0:
                continue
            code = int(np.clip(nearest(x[i] * other_l2 / other_xl), -4, 3))
            if code == codes[i]:
                continue
            other_xl, other_l2 = other_xl + w[i] * x[i] * F(code), other_l2 + w[i] * F(code) * F(code)
            if other_l2 > 0 and other_xl * other_xl * l2 > xl * xl * other_l2:
                codes[i], xl, l2, changed = code, other_xl, other_l2, True
        if not changed:
            break
    return (xl / l2 if l2 > 0 else F(0)), codes + 4


def q6_search(x: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """make_qx_quants with nmax 32 and rmse_type 1."""
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < F(1e-15):
        return F(0), np.zeros(16, np.int32)
    w = x * x

    def tried(iscale: np.float32) -> tuple[np.ndarray, np.float32, np.float32]:
        codes = np.clip(nearest(iscale * x), -32, 31)
        wide = codes.astype(F)
        return codes + 32, total(w * x * wide), total(w * wide * wide)

    best_codes, xl, l2 = tried(F(-32) / largest)
    scale = xl / l2 if l2 != 0 else F(0)
    best = scale * xl
    for step in range(-9, 10):
        if step == 0:
            continue
        codes, xl, l2 = tried(-(F(32) + F(0.1) * F(step)) / largest)
        if l2 > 0 and xl * xl > best * l2:
            best_codes, scale = codes, xl / l2
            best = scale * xl
    return scale, best_codes


def q3_k(x: np.ndarray) -> bytes:
    found = [q3_search(s) for s in x.reshape(16, 16)]
    scales = np.array([scale for scale, _ in found], F)
    largest = scales[np.argmax(np.abs(scales))]
    stored = np.zeros(16, np.int32)
    d = np.float16(0)
    if largest != 0:
        iscale = F(-32) / largest
        stored = np.clip(nearest(iscale * scales), -32, 31) + 32
        d = np.float16(F(1) / iscale)
    codes = []
    for sub, (_, kept), step in zip(x.reshape(16, 16), found, stored, strict=True):
        scale = F(d) * F(step - 32)
        codes.append(np.clip(nearest(sub / scale), -4, 3) + 4 if scale != 0 else kept)
    flat = np.concatenate(codes)
    low = bytes(int(stored[j] & 15) | int(stored[j + 8] & 15) << 4 for j in range(8))
    high = bytes(sum(int(stored[j + 4 * n]) >> 4 << 2 * n for n in range(4)) for j in range(4))
    return bit_planes(flat >> 2) + two_bit_planes(flat & 3) + low + high + d.tobytes()


def q6_k(x: np.ndarray) -> bytes:
    found = [q6_search(s) for s in x.reshape(16, 16)]
    scales = np.array([scale for scale, _ in found], F)
    largest = scales[np.argmax(np.abs(scales))]
    if abs(largest) < F(1e-15):
        return bytes(210)
    iscale = F(-128) / largest
    d = np.float16(F(1) / iscale)
    stored = np.minimum(127, nearest(iscale * scales))
    codes = []
    for sub, (_, kept), step in zip(x.reshape(16, 16), found, stored, strict=True):
        scale = F(d) * F(step)
        codes.append(np.clip(nearest(sub / scale), -32, 31) + 32 if scale != 0 else kept)
    flat = np.concatenate(codes)
    low = nibbles(flat[:128] & 15) + nibbles(flat[128:] & 15)
    return low + two_bit_planes(flat >> 4) + stored.astype(np.int8).tobytes() + d.tobytes()


def iq4_code(x: np.ndarray) -> np.ndarray:
    """The nearest entry of the table, the upper of two equally near ones."""
    above = np.clip(np.searchsorted(IQ4, x, side="right"), 1, 15)
    return np.where(x - IQ4[above - 1] < IQ4[above] - x, above - 1, above)


def iq4_scale(x: np.ndarray) -> np.float32:
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < F(1e-15):
        return F(0)
    w = x * x

    def tried(iscale: np.float32) -> tuple[np.float32, np.float32]:
        q = IQ4[iq4_code(iscale * x)]
        return total(w * q * x), total(w * q * q)

    xl, l2 = tried(F(1) / (-largest / F(-127)))
    d = xl / l2 if l2 > 0 else F(0)
    best = d * xl
    for step in range(-7, 8):
        xl, l2 = tried(F(step - 127) / largest)
        if l2 > 0 and xl * xl > best * l2:
            d = xl / l2
            best = d * xl
    return d


def iq4_nl(x: np.ndarray) -> bytes:
    d = iq4_scale(x)
    return half(d) + nibbles(iq4_code(inverse(d) * x))


def iq4_xs(x: np.ndarray) -> bytes:
    scales = np.array([iq4_scale(s) for s in x.reshape(8, 32)], F)
    d = -scales[np.argmax(np.abs(scales))] / F(32)
    steps = np.clip(nearest(inverse(d) * scales), -32, 31)
    codes = b"".join(
        nibbles(iq4_code(inverse(d * F(step)) * sub))
        for sub, step in zip(x.reshape(8, 32), steps, strict=True)
    )
    stored = [int(step) + 32 for step in steps]
    high = sum((s >> 4) << 2 * j for j, s in enumerate(stored))
    low = bytes(stored[2 * j] & 15 | (stored[2 * j + 1] & 15) << 4 for j in range(4))
    return half(d) + high.to_bytes(2, "little") + low + codes


@cache
def iq3_points() -> tuple[np.ndarray, list[list[int]]]:
    """The grid (512, 4) of the gguf package, and for each of 4096 points the grid points to choose from."""
    gguf.quants.IQ3_S.init_grid()
    grid = gguf.quants.IQ3_S.grid.reshape(512, 4).astype(np.int32)
    choices = []
    for point in range(4096):
        numbers = np.array([2 * (point >> 3 * i & 7) + 1 for i in range(4)])
        distance = ((grid - numbers) ** 2).sum(-1)
        near = np.argsort(distance, kind="stable")
        allowed = [0] if distance[near[0]] == 0 else np.unique(distance)[:3]
        choices.append(near[np.isin(distance[near], allowed)].tolist())
    return grid, choices


def iq3_search(x: np.ndarray) -> tuple[np.float32, list[int]]:
    """Magnitudes (32,) -> scale and eight grid points."""
    grid, choices = iq3_points()
    if x.max() == 0:
        return F(0), [0] * 8
    w = x * x

    def tried(inverse_scale: np.float32, scale: np.float32) -> tuple[list[int], bool, np.float32, np.float32]:
        codes = np.clip(nearest(F(0.5) * (inverse_scale * x - F(1))), 0, 7).reshape(8, 4)
        points, met = [], True
        for k in range(8):
            near = choices[sum(int(code) << 3 * i for i, code in enumerate(codes[k]))]
            part = slice(4 * k, 4 * k + 4)
            losses = [
                total(np.sqrt(w[part]) * d * d) for d in (scale * grid[j].astype(F) - x[part] for j in near)
            ]
            points.append(near[int(np.argmin(losses))])
            met &= bool((grid[points[-1]] == 2 * codes[k] + 1).all())
        q = grid[points].reshape(32).astype(F)
        return points, met, total(w * x * q), total(w * q * q)

    scale, best, points, met = x.max() / F(15), F(0), [0] * 8, False
    for step in range(-9, 10):
        inverse_scale = (F(15) + F(step) * F(0.2)) / x.max()
        now, now_met, qx, q2 = tried(inverse_scale, F(1) / inverse_scale)
        if q2 > 0 and qx * qx > best * q2:
            scale = qx / q2
            best, points, met = scale * qx, now, now_met
    if not met and scale > 0:
        points, _, qx, q2 = tried(F(1) / scale, scale)
        scale = qx / q2 if q2 > 0 else scale
    return scale, points


def iq3_s(x: np.ndarray) -> bytes:
    """Codes of a sub-block always at its own place: ggml's C moves those that follow a sub-block of zeros."""
    found = [iq3_search(np.abs(s)) for s in x.reshape(8, 32)]
    points = np.array([point for _, sub in found for point in sub])
    largest = max(scale for scale, _ in found)
    d = largest / F(31)
    steps = [0] * 8
    if largest > 0:
        steps = [int(np.clip(nearest(F(0.5) * (F(1) / d * scale - F(1))), 0, 15)) for scale, _ in found]
    packed = bytes(steps[2 * j] | steps[2 * j + 1] << 4 for j in range(4))
    return half(d * F(1.033)) + bytes((points & 255).tolist()) + bits(points >> 8) + bits(x < 0) + packed


TYPES = {
    "IQ3_S": (256, iq3_s),
    "Q4_0": (32, q4_0),
    "Q4_1": (32, q4_1),
    "Q5_0": (32, q5_0),
    "Q5_1": (32, q5_1),
    "Q8_0": (32, q8_0),
    "Q1_0": (128, q1_0),
    "TQ1_0": (256, tq1_0),
    "TQ2_0": (256, tq2_0),
    "MXFP4": (32, mxfp4),
    "NVFP4": (64, nvfp4),
    "Q2_K": (256, q2_k),
    "Q3_K": (256, q3_k),
    "Q4_K": (256, lambda x: q45_k(x, 15)),
    "Q5_K": (256, lambda x: q45_k(x, 31)),
    "Q6_K": (256, q6_k),
    "IQ4_NL": (32, iq4_nl),
    "IQ4_XS": (256, iq4_xs),
}


def encode(type_name: str, weight: np.ndarray) -> np.ndarray:
    """float32 (rows, columns) -> uint8 (rows, bytes of a row)."""
    size, function = TYPES[type_name]
    with np.errstate(all="ignore"):
        rows = [b"".join(function(block) for block in row.reshape(-1, size)) for row in weight.astype(F)]
    return np.stack([np.frombuffer(row, np.uint8) for row in rows])
