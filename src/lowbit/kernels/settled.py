"""What is left to do to a layer's input once its kernel is known.

A native weight of integer codes can meet x as whole numbers: groups of 32 it rounds itself, and where the
layer's own rule makes int8 codes with one scale a token, their products are summed exactly. LLM.int8's
outliers stand beside the codes in float32: bfloat16 would lose of a number of 60 what int8 keeps of the rest.
Where a rule has scales for groups of columns (fp8 in blocks, MX, NVFP4), the kernel makes the codes itself
and scales their products: their values need not fit bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import INPUT_CODES, INPUT_FLOATS, INPUT_GROUPS, set_input, set_quantizer
from lowbit.numerics.int8_inputs import INT8_GROUPS


def settled(packed: PackedWeight, transform: InputTransform | None) -> InputTransform | None:
    """The transform that still has to run before ``packed`` is multiplied; tells the weight what comes."""
    if transform is None or transform.scheme is None:
        return transform
    if transform.scheme == INT8_GROUPS and transform.multiplier is None and set_input(packed, INPUT_GROUPS):
        return None if transform.rotation is None else replace(transform, scheme=None)
    columns = transform.scheme.block[1]
    if columns and transform.native is not None and set_quantizer(packed, transform.native, columns):
        return None
    if transform.scheme.outliers:
        set_input(packed, INPUT_FLOATS)
    if transform.gives_int8:
        set_input(packed, INPUT_CODES)
    return transform
