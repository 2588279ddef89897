"""MXFP4, written as gpt-oss has it: stacked experts as blocks and scales, all else plain. See ``mxfp4``.

No tool reads other modules in this format; compressed-tensors and modelopt hold MXFP4 anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import CheckpointWriter
from lowbit.numerics.bit_packing import pack_bits
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_BLOCK = 32


class Mxfp4Writer(CheckpointWriter):
    """See the module docstring."""

    name = "mxfp4"
    writes = "gpt-oss' stacked experts"
    stacks = True

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, scales and sizes, in this order."""
        if scheme.is_dense:
            return None
        scales = tuple(scale.name for scale in scheme.scales)
        if scheme.weight.name != "e2m1" or scheme.blocks != ((1, _BLOCK),) or scales != ("e8m0",):
            return f"weights are e2m1 with a power of two for 32 columns, not {scheme}"
        if scheme.activation is not None:
            return "its inputs are quantized, and this format leaves inputs alone"
        if shape[1] % _BLOCK:
            return f"{shape[1]} columns are no whole blocks of 32"
        return None

    @classmethod
    def refuses_module(cls, module: StoredModule) -> str | None:
        """Whatever is no expert of a stack."""
        return None if module.expert is not None else "only stacked experts are quantized in this format"

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        out, columns = module.shape
        blocks = pack_bits(weight.codes, 4).view(out, columns // _BLOCK, _BLOCK // 2)
        return {"blocks": blocks, "scales": weight.scales[0].view(torch.uint8)}

    def quantization_config(self) -> dict[str, object]:
        """transformers' Mxfp4Config."""
        return {"quant_method": "mxfp4", "modules_to_not_convert": self.left_alone()}


WRITERS = (Mxfp4Writer,)
