"""The same numbers in another scheme: what lets a checkpoint of one format be written in another.

GGUF's simplest blocks are codes under one scale, as GPTQ's and compressed-tensors' groups are; and anything
is a plain matrix of floats. Nothing here rounds.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.formats import StoredModule
from lowbit.formats.dense_writer import DenseWriter, exact_dtype
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

# Blocks of 32 with one scale and nothing else: (codes, type of the scale).
_BLOCKS = {
    "gguf_q4_0": ("int4", "f16"),
    "gguf_q5_0": ("int5", "f16"),
    "gguf_q8_0": ("int8", "f16"),
    "gguf_mxfp4": ("e2m1", "e8m0"),
}


def spelled_out(scheme: Scheme) -> Scheme:
    """A block type as the codes and scales it is made of, where a scheme has exactly these."""
    found = _BLOCKS.get(scheme.weight.name)
    if found is None:
        return scheme
    codes, scale = (number_format(name) for name in found)
    return Scheme(codes, ((1, 32),), (scale,), activation=scheme.activation)


def plain(scheme: Scheme) -> Scheme:
    """The plain scheme that holds the same numbers."""
    return dense(exact_dtype(scheme))


def respelled(weight: QuantizedTensor, planned: Scheme) -> QuantizedTensor:
    """The weight as its plan says, which is its own scheme, or that spelled out, or plain."""
    if planned.is_dense and not weight.scheme.is_dense:
        name = planned.weight.name
        out, columns = weight.shape[-2:]
        module = StoredModule(weight.origin, weight.origin, (out, columns))
        [codes] = DenseWriter({}, name).write(module, weight).values()
        return QuantizedTensor(planned, weight.shape, codes, origin=weight.origin)
    if weight.scheme.weight.block is None or planned.weight.block is not None:
        return weight
    expanded = weight.expand()
    dtype = planned.scales[0].dtype
    scales = tuple(scale.to(dtype) for scale in expanded.scales)
    return replace(expanded, scheme=planned, scales=scales)
