"""What humming-kernels calls a scheme and its tensors (humming.schema.HummingWeightSchema, 0.1.20).

    codes         whole numbers of 1 to 8 bits, 8-bit floats (e4m3, e5m2), e2m3, e3m2, e2m1
    scales        f16 or bf16, for groups of columns, rows or the whole matrix; x has their type. With
                  bfloat16 x also e8m0 for groups of columns (MXFP4), e4m3 under one f32 scale (NVFP4),
                  and one f32 scale for the whole matrix
    zero points   none, or whole numbers of unsigned codes, which must fit in as many bits as a code has

Codes go there as one stream of bits a row and zero points as one a column of groups (``pack_words``): nothing
is rounded on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.bit_packing import pack_words
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_FLOATS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
_SCALES = {
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "e8m0": "float8e8m0", "e4m3": "float8e4m3",
}  # fmt: skip
_MULTIPLE = 64  # of rows and columns: what its tiles need


@dataclass(frozen=True)
class Form:
    """A scheme in the package's words, and the type of x.

    ``group``: columns that share a scale, 0: all. ``whole``: one f32 scale for the matrix; ``second``: one
    over the groups'.
    """

    codes: str
    scales: str
    group: int
    whole: bool
    second: bool
    zeros: bool
    inputs: torch.dtype


def form_of(scheme: Scheme, shape: tuple[int, ...]) -> Form | str:
    """The scheme as the package has it, or why it has not."""
    name, stored = scheme.weight.name, [scale.name for scale in scheme.scales]
    if not scheme.weight.is_integer and name not in _FLOATS:
        return f"takes whole numbers of 1 to 8 bits and {', '.join(_FLOATS)}, got {name}"
    if scheme.activation is not None:
        return f"the scheme quantizes its input ({scheme.activation})"
    if scheme.flattened or scheme.offset or scheme.reordered or scheme.scattered:
        return "takes no flattened or scattered blocks, no offsets and no act-order"
    if len(shape) != 2 or any(size % _MULTIPLE for size in shape):
        return f"needs rows and columns in multiples of {_MULTIPLE}, got {' x '.join(map(str, shape))}"
    if scheme.zero != ("integer" if name.startswith("uint") else "none"):
        return "needs whole zero points for unsigned codes, and none for others"
    (rows, columns), first = (scheme.blocks or ((0, 0),))[0], (stored or [""])[0]
    group = 0 if columns in (0, shape[1]) else columns
    whole = stored == ["f32"] and rows == group == 0 and scheme.zero == "none"
    second = stored == ["e4m3", "f32"] and scheme.blocks[1] == (0, 0)
    if not (whole or second or stored in (["f16"], ["bf16"], ["e8m0"])):
        return "other scales would be rounded: takes f16, bf16, e8m0, f32 of a matrix, e4m3 under such a one"
    if rows > 1 or (group and (group < 16 or group & (group - 1) or shape[1] % group)):
        return f"needs scales for rows, or for groups of 16, 32, 64 … columns, got {rows} x {columns}"
    if first in ("e8m0", "e4m3") and not group:
        return f"takes {first} scales for groups of columns only"
    bits = int(scheme.weight.bits)
    codes = f"uint{bits}" if scheme.weight.is_integer else f"float{bits}{name}"
    inputs = torch.float16 if first == "f16" else torch.bfloat16
    return Form(codes, _SCALES[first], group, whole, second, scheme.zero == "integer", inputs)


def tensors_of(weight: QuantizedTensor, form: Form, device: torch.device) -> dict[str, Tensor]:
    """What the package calls weight, weight_scale, zero_point and weight_scale_2.

    int32 (out, in * bits / 32); (out, groups), or float32 (1,) of a matrix; int32 (out * bits / 32, groups);
    float32 (1,).
    """
    rows, bits, scale = weight.shape[0], int(weight.scheme.weight.bits), weight.scales[0].to(device)
    tensors = {
        "weight": pack_words(weight.codes.to(device), bits),
        "weight_scale": scale.reshape(1) if form.whole else scale.expand(rows, -1).contiguous(),
    }
    if weight.zeros is not None:
        low, high, most = int(weight.zeros.min()), int(weight.zeros.max()), (1 << bits) - 1
        if low < 0 or high > most:
            raise LowbitError(
                "E0414",
                f"{weight.origin}: gpu_humming keeps zero points in the {bits} bits of a code, up to {most}, "
                f"got {low} to {high}; give this layer another --linear-kernel",
            )
        zeros = weight.zeros.to(device, torch.uint8).expand(rows, -1)
        words = pack_words(zeros, bits, dim=0)
        # A copy always: a single column counts as contiguous whatever its strides.
        tensors["zero_point"] = words.clone(memory_format=torch.contiguous_format)
    if form.second:
        tensors["weight_scale_2"] = weight.scales[1].to(device).reshape(1)
    return tensors
