"""bitsandbytes, written as its ``from_prequantized`` reads it. The layouts are those of ``bitsandbytes``.

nf4 and fp4 in blocks along the flat weight, their scales in float32 or, given ``nested`` scales that stand
for exactly the weight's own, quantized again. int8 with a scale a row: ``SCB`` is stored, and the scale is
SCB * 0.00787…, in float32; a scale that is no such product is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.bitsandbytes import FOUR_BIT_KINDS
from lowbit.formats.writing import CheckpointWriter, cannot
from lowbit.numerics.llm_int8 import DEFAULT_THRESHOLD, INT8_STEP, llm_int8_inputs
from lowbit.numerics.nested_scales import BLOCK, NestedScales, dynamic_table
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_KINDS = {codes: kind for kind, codes in FOUR_BIT_KINDS.items()} | {"int8": "int8"}
_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytesWriter(CheckpointWriter):
    """``nested``: module name -> its scales quantized again, for those that are to be stored so.

    ``dtype``: what the tool dequantizes to and computes in, that of most plain matrices.
    """

    name = "bitsandbytes"
    writes = "nf4, fp4, with double quantization or without; int8"

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        self.nested: dict[str, NestedScales] = {}
        self.dtype = self.usual_float()
        kinds = {_KINDS[scheme.weight.name]: name for name, scheme in self.quantized().items()}
        if len(kinds) > 1:
            told = ", ".join(f"{kind} in {name}" for kind, name in sorted(kinds.items()))
            raise LowbitError("E0450", f"--format bitsandbytes: {told}; a checkpoint has one kind")
        self.kind = next(iter(kinds), "nf4")
        thresholds = {s.activation.outliers for s in self.quantized().values() if s.activation is not None}
        if len(thresholds) > 1:
            raise LowbitError(
                "E0450",
                f"--format bitsandbytes: outlier thresholds {sorted(thresholds)}; a checkpoint has one",
            )
        self.threshold = next(iter(thresholds), DEFAULT_THRESHOLD)

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks, scales and inputs, in this order."""
        if scheme.is_dense:
            return None
        kind = _KINDS.get(scheme.weight.name)
        if kind is None or scheme.zero != "none" or scheme.reordered or scheme.offset:
            return f"codes are nf4, fp4 or int8 without zero points; this is {scheme}"
        if tuple(scale.name for scale in scheme.scales) != ("f32",):
            return f"it has one level of float32 scales, not {scheme}"
        rows, columns = scheme.blocks[0]
        if kind == "int8":
            if (rows, columns) != (1, 0):
                return f"int8 has one scale a row, not {scheme}"
            found = scheme.activation
            like = found is not None and found == llm_int8_inputs(found.outliers)
            return None if like else "int8 weights come with int8 inputs (LLM.int8)"
        if scheme.activation is not None:
            return "its inputs are quantized, and 4-bit weights leave inputs alone"
        if rows != 1 or columns not in _SIZES:
            return f"blocks are 16 to 4096 weights, a power of two, not {scheme}"
        if scheme.flattened != (shape[1] % columns != 0):
            return f"blocks run over the flat weight: {columns} and {shape[1]} columns are not {scheme}"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        if self.kind == "int8":
            return {
                "weight": (weight.codes ^ 0x80).view(torch.int8),
                "SCB": self._row_maxima(module, weight.scales[0]),
                "weight_format": torch.zeros((), dtype=torch.uint8),
            }
        flat = weight.codes.flatten()
        pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
        state: dict[str, object] = {
            "quant_type": self.kind,
            "blocksize": weight.scheme.blocks[0][1],
            "dtype": self.dtype,
            "shape": list(module.shape),
        }
        scales = weight.scales[0].flatten()
        found = {
            "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
            "weight.absmax": scales,
            "weight.quant_map": weight.scheme.weight.table(),
        }
        nested = self.nested.get(module.stored)
        if nested is not None:
            if not torch.equal(nested.values(), scales):
                raise cannot(self.name, module, "its scales are not those that were quantized again")
            found["weight.absmax"] = nested.codes
            found["weight.nested_absmax"] = nested.steps
            found["weight.nested_quant_map"] = dynamic_table()
            more = {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset}
            state |= more
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        return found | {f"weight.quant_state.bitsandbytes__{self.kind}": text}

    def _row_maxima(self, module: StoredModule, scales: Tensor) -> Tensor:
        """float32 (out,) that times the tool's constant are the scales."""
        wanted = scales.flatten()
        near = (wanted.double() / INT8_STEP).float()
        found = near
        for candidate in (near, near.nextafter(torch.zeros(1)), near.nextafter(torch.full((1,), torch.inf))):
            found = torch.where(candidate * INT8_STEP == wanted, candidate, found)
        wrong = found * INT8_STEP != wanted
        if bool(wrong.any()):
            raise cannot(
                self.name,
                module,
                f"{int(wrong.sum())} of its {wanted.numel()} scales are no float32 times {INT8_STEP}",
            )
        return found

    def quantization_config(self) -> dict[str, object]:
        """transformers' BitsAndBytesConfig."""
        four, left = self.kind != "int8", self.left_alone()
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": self.kind if four else "fp4",
            "bnb_4bit_use_double_quant": bool(self.nested),
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": [*left, *self.run_as_one(left)],
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


WRITERS = (BitsAndBytesWriter,)
