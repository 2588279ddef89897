"""SGLang's own 8-bit checkpoints: w8a8_int8, w8a8_fp8 and blockwise_int8.

    w8a8_int8        weight I8      [out, in]   weight_scale      F32 [out, 1]
    w8a8_fp8         weight F8_E4M3 [out, in]   weight_scale      F32 [out, 1]
    blockwise_int8   weight I8      [out, in]   weight_scale_inv  F32 [ceil(out / b0), ceil(in / b1)]

    weight[r, c] = code[r, c] * weight_scale[r]
    weight[r, c] = code[r, c] * weight_scale_inv[r // b0, c // b1]        (b0, b1) = weight_block_size

Integers are two's complement (canonical form: offset binary, the sign bit turned over); "inv" is the inverse
of the quantization scale: it multiplies. Blocks at the edges are short. Inputs are always quantized when they
come, in the weight's number format: per token (largest |x| = 127 or 448), beside blocks per token and b1
columns. Experts are stored one by one; stacks (experts, out, in) with stacked scales are read too.

Which modules are quantized their dtype says, not ``ignore`` or ``ignored_layers``; ``is_dynamic`` and
``packed_modules_mapping`` change nothing here. Refused: static input scales (Ascend's exports under the name
w8a8_int8, ``activation_scheme: static``). SGLang writes none of these files, it only loads them: the fixtures
are what its own quantizers and layers make of a model on a CPU.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import is_dense, of_expert, origin_of
from lowbit.formats.fp8 import block_size
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_SCALES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_STATIC = ("input_scale", "input_offset", "deq_scale")  # what static exports have beside the weight


class W8a8Int8(PartlyDense):
    """Per-channel int8 weights, per-token int8 inputs."""

    name: ClassVar[str] = "w8a8_int8"
    reference: ClassVar[str] = "sglang"
    dtype: ClassVar[str] = "I8"
    scale_name: ClassVar[str] = "weight_scale"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        kind = found.values.get("activation_scheme")
        if kind not in (None, "dynamic"):
            raise LowbitError(
                "E0212",
                f"{self.place}.activation_scheme must be dynamic for {self.name}, found "
                f"{printable(repr(kind))}",
            )
        self.block = self._block(found.values)
        stacked = f"_{self.scale_name.removeprefix('weight_')}"
        require_tensors(header, (f".{self.scale_name}", stacked), self.place, self.name)

    def _block(self, values: dict[str, object]) -> tuple[int, int]:
        return (1, 0)

    def describe(self) -> str:
        """The name says it all, but for the size of blocks."""
        blocks = f", blocks {self.block[0]}x{self.block[1]}" if self.block[1] else ""
        return f"{self.name}{blocks} in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the weight's and the scale's dtype."""
        _, scale = self._entries(module)
        code = number_format("int8" if self.dtype == "I8" else "e4m3")
        limit = 127.0 if self.dtype == "I8" else 448.0
        activation = ActivationScheme(code, (1, self.block[1]), limit=limit)
        return Scheme(code, (self.block,), (number_format(_SCALES[scale.dtype]),), activation=activation)

    def _tensors(self, module: StoredModule) -> list[str]:
        """Weight and scale."""
        return [module.tensor("weight"), module.tensor(self.scale_name)]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The bytes as codes."""
        weight, scale = self._entries(module)
        codes = of_expert(module, data.tensor(weight.name)).view(torch.uint8)
        if self.dtype == "I8":
            codes = codes ^ 0x80  # two's complement to offset binary
        scales = finite_scales(self.header, scale.name, of_expert(module, data.tensor(scale.name)))
        return QuantizedTensor(
            self.scheme_of(module),
            module.shape,
            codes,
            (scales.reshape(self._grid(module)),),
            origin=origin_of(self.header, module),
        )

    def _is_dense(self, module: StoredModule) -> bool:
        return is_dense(self.header, module)

    def _grid(self, module: StoredModule) -> tuple[int, int]:
        (out, columns), (rows, width) = module.shape, self.block
        return -(-out // rows), -(-columns // (width or columns))

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
        """The weight and its scale, dtypes and shapes checked."""
        lead = () if module.expert is None else (module.experts,)
        weight = entry_of(self.header, module, "weight", (self.dtype,), self.name)
        check_shape(weight, (*lead, *module.shape), self.name)
        scale = entry_of(self.header, module, self.scale_name, tuple(_SCALES), self.name)
        grid = self._grid(module)
        if not (self.block == (1, 0) and scale.shape == (*lead, grid[0])):
            check_shape(scale, (*lead, *grid), self.name)
        for suffix in _STATIC:
            static = self.header.tensors.get(module.tensor(suffix))
            if static is not None:
                raise LowbitError(
                    "E0218",
                    f"{static.file.name}: tensor {static.name!r} is a scale for static inputs; {self.name} "
                    "quantizes inputs per token, and the static variant is not read. Export the model with "
                    "dynamic inputs",
                )
        return weight, scale


class W8a8Fp8(W8a8Int8):
    """Per-channel e4m3 weights, per-token e4m3 inputs."""

    name = "w8a8_fp8"
    dtype = "F8_E4M3"


class BlockwiseInt8(W8a8Int8):
    """int8 weights in blocks, inputs in groups of as many columns."""

    name = "blockwise_int8"
    scale_name = "weight_scale_inv"

    def _block(self, values: dict[str, object]) -> tuple[int, int]:
        block = block_size(values, self.place)
        if block is None:
            raise LowbitError(
                "E0212", f"{self.place} has no 'weight_block_size'; blocks cannot be read without it"
            )
        return block


FORMATS = (W8a8Int8, W8a8Fp8, BlockwiseInt8)
