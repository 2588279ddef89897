"""GGUF tensors: block types as they are, plain floats, and what a block type says exactly in other words.

    numbers                                     written as
    GGUF blocks                                 themselves
    int4, int5, int8, a scale for 32 n columns  Q4_0, Q5_0, Q8_0: the f16 scale in each block of 32
    e2m1 with e8m0 for 32 columns               MXFP4
    e2m1 with e4m3 for 16 under one float32     NVFP4, the float32 beside it as ``<name>.scale``

A symmetric GPTQ or AWQ model is thus a Q4_0 file of the same numbers. Zero points are refused: Q4_1's offset
is a rounded product. Names, row order and the file itself are ``loading``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import CheckpointWriter, cannot
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_INTEGERS = {"int4": "Q4_0", "int5": "Q5_0", "int8": "Q8_0"}
_DENSE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_BLOCK = 32


def type_of(scheme: Scheme) -> str:
    """The GGUF type a scheme is written as; the scheme must be one that is not refused."""
    name = scheme.weight.name
    if scheme.is_dense:
        return _DENSE[name]
    if scheme.weight.block is not None:
        return name.removeprefix("gguf_").upper()
    if name == "e2m1":
        return "MXFP4" if len(scheme.blocks) == 1 else "NVFP4"
    return _INTEGERS[name]


class GgufWriter(CheckpointWriter):
    """``write`` gives ``<name>.weight`` as uint8 (out, row bytes), floats as they are."""

    name = "gguf"
    stacks = True  # loading makes one tensor of all experts
    embeddings = True
    writes = (
        "block types unchanged, plain floats; symmetric 4-, 5- and 8-bit as Q4_0, Q5_0, Q8_0; MXFP4, NVFP4"
    )

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks, scales and inputs, in this order."""
        if scheme.is_dense or (scheme.weight.block is not None and scheme.activation is None):
            return None
        name, columns = scheme.weight.name, shape[1]
        if scheme.activation is not None:
            return "its inputs are quantized, and GGUF leaves inputs alone"
        if scheme.zero != "none" or scheme.offset:
            return "it has zero points, and GGUF's offsets are rounded products"
        if scheme.reordered:
            return "its columns lie in another order (act-order), for which GGUF has no place"
        blocks, scales = scheme.blocks, tuple(scale.name for scale in scheme.scales)
        if name == "e2m1":
            if blocks == ((1, 32),) and scales == ("e8m0",):
                return None if columns % 32 == 0 else f"{columns} columns are no whole blocks of 32"
            if blocks == ((1, 16), (0, 0)) and scales == ("e4m3", "f32"):
                return None if columns % 64 == 0 else f"{columns} columns are no whole blocks of 64"
        if name not in _INTEGERS or len(blocks) != 1 or scheme.flattened:
            return f"no block type holds {scheme}"
        rows, width = blocks[0]
        if rows > 1 or width % _BLOCK or columns % _BLOCK or (width and columns % width):
            return f"scales must be for whole blocks of 32 columns of a row; this is {scheme}"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        if weight.scheme.weight.block is not None:
            return {"weight": weight.codes}
        out, columns = weight.shape[-2:]
        kind = type_of(weight.scheme)
        if kind == "NVFP4":
            return _nvfp4(weight)
        blocks = weight.codes.view(out, columns // _BLOCK, _BLOCK)
        halves = blocks[..., :16] & 15 | (blocks[..., 16:] & 15) << 4
        if kind == "MXFP4":
            heads = [weight.scales[0].view(torch.uint8).unsqueeze(-1)]
        else:
            heads = [self._f16_scales(module, weight)]
        if kind == "Q5_0":
            heads.append(_bits(blocks >> 4))
        body = blocks ^ 128 if kind == "Q8_0" else halves
        return {"weight": torch.cat([*heads, body], -1).view(out, -1)}

    def _f16_scales(self, module: StoredModule, weight: QuantizedTensor) -> Tensor:
        """uint8 (out, blocks, 2)."""
        out, columns = weight.shape[-2:]
        stored = weight.scales[0]
        half = stored.to(torch.float16)
        if not torch.equal(half.float(), stored.float()):
            raise cannot(self.name, module, f"its {weight.scheme.scales[0].name} scales are not exact in f16")
        half = half.expand(out, half.shape[1])
        spread = half.repeat_interleave(columns // _BLOCK // half.shape[1], 1).contiguous()
        return spread.unsqueeze(-1).view(torch.uint8)


def _bits(ones: Tensor) -> Tensor:
    """uint8 (..., 32) of 0 and 1 -> (..., 4), the lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (ones.unflatten(-1, (4, 8)) << shifts).sum(-1, dtype=torch.uint8)


def _nvfp4(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Blocks of 64: four e4m3 scales, then 16 codes in each 8 bytes."""
    out, columns = weight.shape[-2:]
    scales = weight.scales[0].view(torch.uint8).view(out, columns // 64, 4)
    parts = weight.codes.view(out, columns // 64, 4, 16)
    halves = parts[..., :8] | parts[..., 8:] << 4
    blocks = torch.cat([scales, halves.flatten(-2)], -1)
    return {"weight": blocks.view(out, -1), "scale": weight.scales[1].reshape(1)}


WRITERS = (GgufWriter,)
