"""Random GGUF blocks of every type; needs no gguf package, as tests on GPUs may have none."""

from __future__ import annotations

import numpy as np
import torch

from lowbit.numerics.block_layouts import block_formats
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

# Where a block's f16 fields lie; IQ1_M spreads its d over the top nibbles of its last 8 bytes.
F16_FIELDS = {
    **dict.fromkeys(("q1_0", "q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"), (0,)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
NAMES = [name.removeprefix("gguf_") for name in block_formats()]


def random_blocks(name: str, rows: int = 48, blocks: int = 3) -> np.ndarray:
    """uint8 (rows, blocks * bytes): all codes random, scales finite, some negative, some zero."""
    rng = np.random.default_rng(sum(map(ord, name)))
    layout = number_format(f"gguf_{name}").block
    assert layout is not None
    raw = rng.integers(0, 256, (rows, blocks, layout.bytes), dtype=np.uint8)
    for at in F16_FIELDS.get(name, ()):
        scales = rng.normal(0, 1, (rows, blocks, 1)).astype(np.float16)
        scales[::7] = 0
        raw[..., at : at + 2] = scales.view(np.uint8)
    if name == "iq1_m":
        raw[..., 55] = raw[..., 55] & 0x8F | 0x30  # keeps the exponent of d small
    if name == "mxfp4":
        raw[..., 0] = rng.integers(0, 255, (rows, blocks))  # 255 is NaN in OCP's e8m0 and never written
    if name == "nvfp4":
        raw[..., :4] &= 0x7F  # scales are unsigned
    return raw.reshape(rows, -1)


def tensor_of(name: str, raw: np.ndarray) -> QuantizedTensor:
    fmt = number_format(f"gguf_{name}")
    assert fmt.block is not None
    columns = raw.shape[1] // fmt.block.bytes * fmt.block.weights
    return QuantizedTensor(Scheme(fmt), (len(raw), columns), torch.from_numpy(raw))
