"""Float weights -> GGUF blocks: what llama-quantize writes without an importance matrix (ggml's quants).

    encode("Q4_K", weight)      (rows, columns) float32, float16 or bfloat16 -> uint8 (rows, bytes of a row)

A block is a run of 32, 64, 128 or 256 weights of one row (``block_weights``); its layout is the one
``numerics.block_layouts`` reads. Two sorts of types:

- one scale that the largest weight fixes, then rounding: Q4_0 … Q8_0, Q1_0, TQ1_0, TQ2_0 (here), MXFP4 and
  NVFP4. Bit for bit what ggml's C and, where it has the type, ``gguf.quants.quantize`` give;
- a search for the scale with the smallest weighted error: Q2_K … Q6_K, IQ4_NL, IQ4_XS (``gguf_searches``),
  IQ3_S (``gguf_iq3``).

csrc/quantize.cpp does the work; the torch versions give the same bits where there is no native library or the
weight is on a GPU. The bits are those of ggml's C compiled without contraction of products and sums: of every
build for a processor without FMA, such as plain x86-64. Compiled with FMA, ggml itself gives other ones,
because its searches compare errors that differ in their last bit or not at all (gaussian weights: 5 % of
Q2_K's bytes, 3 % of Q5_K's, 0.3 % of Q4_K's, 0.01 % of Q6_K's; about as good).

The other types need an importance matrix: ``REFUSED`` says so. NaN and infinity are refused, and so is a
weight whose scale float16 cannot hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.numerics.number_formats import number_format
from lowbit.quantize import gguf_iq3, gguf_searches
from lowbit.quantize.gguf_pack import (
    half_bytes,
    join_bits,
    join_nibbles,
    join_planes,
    largest_magnitude,
    largest_weight,
    over,
)

_CHUNK = 1 << 20  # weights that torch encodes at once: what fits the caches

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"),
        "needs an importance matrix, which needs text to run the model on",
    ),
    "Q2_0": "is written in two layouts (64 or 128 weights a block)",
}


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is infinite: for 0, and for scales far below what float16 holds."""
    inverse = over(1.0, scale)
    return torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse)


def _round_half_away(x: Tensor) -> Tensor:
    """C's roundf."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (magnitude - whole >= 0.5)).copysign(x)


# ---- One scale, then rounding: float32 (blocks, weights) -> uint8 (blocks, bytes) ----


def _symmetric(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The weight of largest magnitude, with its sign, becomes code 0, which is -half."""
    scale = largest_weight(x) / -half
    codes = (x * _inverse(scale) + (half + 0.5)).clamp_(max=2 * half - 1).to(torch.uint8)
    return half_bytes(scale), codes


def _with_minimum(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    low = x.gather(-1, x.argmin(-1, keepdim=True))  # the first one: 0 has two signs
    spread = x.amax(-1, keepdim=True) - low + 0.0  # never -0
    scale = spread / torch.full_like(spread, levels)
    codes = ((x - low) * _inverse(scale) + 0.5).clamp_(max=levels).to(torch.uint8)
    return torch.cat((half_bytes(scale), half_bytes(low)), -1), codes


def _q4_0(x: Tensor) -> Tensor:
    head, codes = _symmetric(x, 8)
    return torch.cat((head, join_nibbles(codes)), -1)


def _q4_1(x: Tensor) -> Tensor:
    head, codes = _with_minimum(x, 15)
    return torch.cat((head, join_nibbles(codes)), -1)


def _q5(head: Tensor, codes: Tensor) -> Tensor:
    return torch.cat((head, join_bits(codes >> 4), join_nibbles(codes & 15)), -1)


def _q5_0(x: Tensor) -> Tensor:
    return _q5(*_symmetric(x, 16))


def _q5_1(x: Tensor) -> Tensor:
    return _q5(*_with_minimum(x, 31))


def _q8_0(x: Tensor) -> Tensor:
    largest = largest_magnitude(x)
    scale = largest / torch.full_like(largest, 127)
    codes = _round_half_away(x * _inverse(scale)).to(torch.int8)
    return torch.cat((half_bytes(scale), codes.view(torch.uint8)), -1)


def _q1_0(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for magnitude in x.abs().t().contiguous():  # one after the other, as ggml adds them
        total += magnitude
    return torch.cat((half_bytes(total.unsqueeze(-1) / 128), join_bits((x >= 0).to(torch.uint8))), -1)


def _trits(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest_magnitude(x)
    return half_bytes(scale), (_round_half_away(x * _inverse(scale)) + 1).to(torch.uint8)


def _tq1_0(x: Tensor) -> Tensor:
    scale, trits = _trits(x)
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=x.device).unsqueeze(-1)

    def joined(part: Tensor, count: int) -> Tensor:
        """The first trit is the most significant; a fifth of 0 where there are four."""
        sums = (part.int().unflatten(-1, (count, -1)) * powers[:count]).sum(-2)
        return ((sums * 256 + 242) // 243).to(torch.uint8)

    parts = (joined(trits[:, :160], 5), joined(trits[:, 160:240], 5), joined(trits[:, 240:], 4))
    return torch.cat((*parts, scale), -1)


def _tq2_0(x: Tensor) -> Tensor:
    scale, trits = _trits(x)
    return torch.cat((join_planes(trits.view(-1, 2, 4, 32), 2).flatten(-2), scale), -1)


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q1_0": _q1_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}
_ENCODERS = _ROUNDED | gguf_searches.ENCODERS | {"IQ3_S": gguf_iq3.encode_iq3_s}
# What csrc/quantize.cpp calls them: GGUF's numbers of the types, and the kinds of floats.
_NATIVE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
}
_NATIVE_SOURCES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

ENCODABLE = (*_ENCODERS, *_FLOATS)

# Where a block's float16 scales lie, for the types that have any.
_SCALES = {
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q6_K": slice(208, 210),
    "TQ1_0": slice(52, 54),
    "TQ2_0": slice(64, 66),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), slice(0, 4)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "IQ4_NL", "IQ4_XS", "IQ3_S"), slice(0, 2)),
}


def _known(type_name: str) -> str:
    name = type_name.upper()
    if name in REFUSED:
        raise LowbitError("E0402", f"GGUF type {name} {REFUSED[name]}; use one of {', '.join(ENCODABLE)}")
    if name not in ENCODABLE:
        raise LowbitError(
            "E0402", f"{type_name!r} is no GGUF type lowbit can write; use one of {', '.join(ENCODABLE)}"
        )
    return name


def block_weights(type_name: str) -> int:
    """How many weights of a row share a block: a row must be a multiple of it."""
    return _block(_known(type_name))[0]


def _block(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    if name in _FLOATS:
        return 1, 2
    layout = number_format(f"gguf_{name.lower()}").block
    assert layout is not None, "every GGUF type of blocks has a layout"
    return layout.weights, layout.bytes


def encode(type_name: str, weight: Tensor) -> Tensor:
    """float (…, columns) -> uint8 (…, bytes of a row) in blocks of the GGUF type, on the weight's device."""
    name = _known(type_name)
    weights, size = _block(name)
    *rows, columns = weight.shape
    assert columns % weights == 0, f"a row of {columns} weights is no whole number of {name} blocks"
    assert weight.dtype in _NATIVE_SOURCES, f"{weight.dtype} weights are not float32, float16 or bfloat16"
    if name in _FLOATS:
        return weight.to(_FLOATS[name]).contiguous().view(torch.uint8)
    blocks = weight.contiguous().view(-1, weights)
    encode_blocks = _encode_in_torch if native.library() is None or not blocks.is_cpu else _encode_natively
    encoded = encode_blocks(name, blocks, size)
    if encoded is None:
        raise LowbitError(
            "E0402", f"a weight is NaN or infinite, which {name} cannot hold; use another checkpoint"
        )
    _check_scales(name, encoded)
    return encoded.view(*rows, columns // weights * size)


def _encode_natively(name: str, blocks: Tensor, size: int) -> Tensor | None:
    """None where a weight is not finite."""
    library = native.library()
    assert library is not None, "the caller has looked"
    out = torch.empty(len(blocks), size, dtype=torch.uint8)
    weights = (_NATIVE_SOURCES[blocks.dtype], blocks.data_ptr(), len(blocks), out.data_ptr())
    types = (ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    if name == "IQ3_S":
        tables = gguf_iq3.native_tables()
        function = library.lowbit_quantize_iq3_s
        function.argtypes = (*(ctypes.c_void_p,) * len(tables), *types)
        answer = function(*(table.data_ptr() for table in tables), *weights)
    else:
        function = library.lowbit_quantize_blocks
        function.argtypes = (ctypes.c_int32, *types)
        answer = function(_NATIVE_TYPES[name], *weights)
    assert answer != 1, f"csrc/quantize.cpp lacks {name}"
    return None if answer == 2 else out


def _encode_in_torch(name: str, blocks: Tensor, size: int) -> Tensor | None:
    """The same."""
    if not bool(blocks.isfinite().all()):
        return None
    out = torch.empty(len(blocks), size, dtype=torch.uint8, device=blocks.device)
    step = _CHUNK // blocks.shape[-1]
    for start in range(0, len(blocks), step):
        out[start : start + step] = _ENCODERS[name](blocks[start : start + step].float())
    return out


def _check_scales(name: str, blocks: Tensor) -> None:
    if name in _SCALES and not bool(
        blocks[:, _SCALES[name]].contiguous().view(torch.float16).isfinite().all()
    ):
        raise LowbitError(
            "E0402", f"weights are too large for {name}, whose scales are float16; quantize to BF16 instead"
        )
