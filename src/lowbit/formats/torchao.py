"""torchao checkpoints, as transformers 5 saves them: tensor subclasses taken apart into plain tensors.

A parameter ``X.weight`` of class C lies in the safetensors file as ``X._weight_<part>``, one tensor a part,
and the file's ``__metadata__`` says under ``X.weight`` what it was: ``{"_type": C, "_data": {attributes}}``.
Those texts, of all shards together, decide; ``quantization_config`` only says what was asked for. They are
parsed as JSON, and nothing is made by name.

    class                      parts                            weight
    Int8Tensor                 qdata I8 (out, in)               (q - zero_point) * scale
                               scale F32, zero_point I8: one a block
    Float8Tensor               qdata F8 (out, in), scale F32    q * scale
    Int4Tensor                 qdata I8 (out, in / 2)           q * scale + zero_point
                               scale, zero_point (groups, out): transposed
    Int4TilePackedTo4dTensor   qdata I32 (N / 8, K / 16 T, 32, T / 2), T of 2, 4, 8    (q - 8) * scale + zero
                               scale_and_zero BF16 (K / group, N, 2)
    IntxUnpackedToInt8Tensor   qdata I8 (out, in), 1-8 bits     (q - zero_point) * scale
    MXTensor                   qdata F8 or, fp6, U8 (out, in); fp4: U8 (out, in / 2)    q * scale
                               scale F8_E8M0 (out, in / block)
    NVFP4Tensor                qdata U8 (out, in / 2), scale F8_E4M3 (out, in / 16)
                               per_tensor_scale F32 () or none    q * scale * per_tensor_scale
    any                        act_pre_scale (in,)              x is multiplied by it first

Int4Tensor's even column is the *low* nibble, both in two's complement; its zero point is in weight units: an
offset. The tiles are those of PyTorch's tinygemm kernels (``_convert_weight_to_int4pack``, NVIDIA's): N and K
are out and in, filled up to 8 and 1024; word [n, k, t, w] has of row 8 n + t // 4, in nibbles 0 to 7, columns
c, c + 8, c + 16, c + 24, c + 1, c + 9, c + 17, c + 25 where c = 16 T k + 32 w + 2 (t % 4). fp4 has the even
column in the low nibble; a code of fp6 is a byte. ``is_swizzled_scales``: scales of MXTensor and NVFP4Tensor
lie as ``tiled_scales`` says, in a matrix of 32 rows and 16 columns for each tile. What a block covers is
``block_size``. A float8 block of nothing but zeros has scale 0 and NaN for codes, 0 divided by 0; it is read
as the zeros it was made of. Inputs: ``act_quant_kwargs`` asks for torchao's own rule
(``numerics.torchao_inputs``), one scale a token or, PerTensor, one for all tokens of a step; MXTensor's
inputs are of its own kind, block by block. NVFP4Tensor's are under ``act_per_tensor_scale``, or one scale for
all tokens of a step: then they stay as they are, which is nearer to the original, and a warning says so.

A stack of experts, parameter ``X.experts.gate_up_proj``, is ``X.experts._gate_up_proj_<part>``, every part
with the experts along its first axis; per_tensor_scale may be F32 (experts, 1, 1). Tiles of scales are each
expert's own: torchao makes them of 128 n rows only.

Refused, each with what to do: Int4PlainInt32Tensor (XPU, NPU), static int8 and reduced-range inputs, int4
weights with float8 inputs, and stacks of other classes than MXTensor and NVFP4Tensor. torchao 0.14, the first
with safetensors, named every tensor ``X.weight:<part>``, plain ones too: refused. Of pickled checkpoints
(``pytorch_model.bin``) ``checkpoint.pickled_objects`` makes the same tensors and texts; older classes are
refused. transformers may rename tensors as it saves them (Gemma 3's ``language_model.model``), and never the
texts.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import InputRule, Notes, StoredModule, finite_scales
from lowbit.formats.dense import DENSE_DTYPES
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config
from lowbit.formats.tiled_scales import in_rows, tiles_of
from lowbit.formats.torchao_described import (
    FLOAT8,
    INT4,
    INT8,
    MX,
    NVFP4,
    READ,
    REFUSED,
    TILES,
    Stored,
    asked_for,
    described,
    dtype_of,
    float8_inputs_of,
    int8_inputs_of,
    mx_inputs_of,
    needs_all_tokens,
    nvfp4_inputs_of,
)
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.torchao_inputs import int8_inputs_with_zeros

_log = logging.getLogger("lowbit")

_FLOATS = tuple(DENSE_DTYPES)
_FLOAT8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_PARTS = (
    *("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale"),
    *("act_quant_scale", "act_quant_zero_point", "per_tensor_scale", "act_per_tensor_scale"),
)


class Torchao(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "torchao"
    reference: ClassVar[str] = "torchao"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place, self.asked = found.place, asked_for(found.values)
        old = next((name for name in header.tensors if ":" in name), None)
        if old is not None:
            raise LowbitError(
                "E0218",
                f"{header.file_of(old)}: tensor {printable(repr(old))} is named as torchao 0.14 did, whose "
                "files no later version reads; quantize the original model with torchao 0.15 or newer, or "
                "at load (--torchao-config)",
            )
        self.stored = described(header)
        if not self.stored:
            raise LowbitError(
                "E0213",
                f"{header.root.name}: {found.place} says torchao, but no safetensors file's __metadata__ "
                "describes a quantized tensor; if the model was dequantized, remove the quantization "
                "config, and if another tool re-saved the files (most drop __metadata__), use the "
                "original ones",
            )
        for name, stored in self.stored.items():
            if not name.endswith(".weight") and stored.kind not in (MX, NVFP4):
                raise stored.refuse(
                    f"a stack of experts as {stored.kind} is not read; use a version with a module for each "
                    "expert, or with MXTensor or NVFP4Tensor"
                )

        if any(needs_all_tokens(stored) for stored in self.stored.values()):
            _log.warning(
                "lowbit: %s: NVFP4Tensor quantizes inputs under one scale for all tokens of a step; they are "
                "left as they are, which is nearer to the original model",
                self.place,
            )

    def describe(self) -> str:
        """The classes that are there."""
        kinds = sorted({stored.kind for stored in self.stored.values()})
        asked = f" ({self.asked})" if self.asked else ""
        return f"torchao, {' and '.join(kinds)}{asked} in {self.place.split(':')[0]}"

    def _tensors(self, module: StoredModule) -> list[str]:
        """Every part."""
        names = [self._name(module, part) for part in _PARTS]
        return [name for name in names if name in self.header.tensors]

    # ---- where things lie

    def _stored(self, module: StoredModule) -> Stored:
        """What the metadata say of a weight that is not plain."""
        return self.stored[module.tensor("weight")]

    def _is_dense(self, module: StoredModule) -> bool:
        if module.tensor("weight") in self.stored:
            return False
        orphan = self._name(module, "qdata")
        if orphan in self.header.tensors:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(orphan)}: tensor {orphan!r} is part of a torchao weight, but no "
                f"__metadata__ describes {module.tensor('weight')!r}; the file was re-saved by a tool that "
                "dropped it, use the original one",
            )
        return True

    def _name(self, module: StoredModule, part: str) -> str:
        """The stored name of a part."""
        if module.expert is None:
            return module.tensor(f"_weight_{part}")
        place, _, leaf = module.stored.rpartition(".")
        return f"{place}._{leaf}_{part}"

    def _part(
        self, module: StoredModule, stored: Stored, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
    ) -> TensorEntry:
        """A part that must be there, of one of these dtypes and of this shape, in a stack of each expert."""
        name = self._name(module, part)
        shape = shape if module.expert is None else (module.experts, *shape)
        entry = self.header.tensors.get(name)
        if entry is None:
            raise self._missing(name, stored)
        if entry.dtype not in dtypes or entry.shape != shape:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; a {stored.kind} "
                f"of {list(module.shape)} with block_size {stored.data.get('block_size')} stores "
                f"{' or '.join(dtypes)} {list(shape)}. The file is damaged, or config and weights are from "
                "different models",
            )
        return entry

    def _missing(self, name: str, stored: Stored) -> LowbitError:
        text = f"{self.header.root.name}: no file contains {printable(repr(name))}, a part of {stored.place}"
        return LowbitError("E0209", text)

    # ---- schemes

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the metadata, and the parts' dtypes and shapes."""
        stored = self._stored(module)
        if stored.kind not in READ:
            raise stored.refuse(f"{stored.kind} {REFUSED[stored.kind]}")
        out, columns = module.shape
        told = stored.data.get("shape", [out, columns])
        if told != [out, columns]:
            raise LowbitError(
                "E0210",
                f"{stored.place} is {printable(repr(told))} but the config asks for {[out, columns]}; "
                "config and weights are from different models",
            )
        for part in stored.parts:
            if (name := self._name(module, part)) not in self.header.tensors:
                raise self._missing(name, stored)
        if stored.kind in (MX, NVFP4):
            return self._small_floats(module, stored)
        rows, group = stored.block(module.shape)
        grid = (out // rows, columns // group)
        if stored.kind == INT4:
            return self._int4(module, stored, rows, group, grid)
        if stored.kind == TILES:
            self._check_tiles(module, stored, rows, group)
            return Scheme(number_format("int4"), ((1, group),), (number_format("bf16"),), offset=True)
        kinds = {"F8_E4M3", "F8_E5M2"} if stored.kind == FLOAT8 else {"I8"}
        codes = self._part(module, stored, "qdata", tuple(sorted(kinds)), module.shape)
        scale = self._part(module, stored, "scale", _FLOATS, grid)
        # The whole weight, or whole rows, spelled as such; a single row is a row.
        whole = 0 if rows == out and out > 1 else rows, 0 if group == columns else group
        scheme = Scheme(
            number_format("int8"), (whole,), (number_format(DENSE_DTYPES[scale.dtype]),), activation=None
        )
        if stored.kind == FLOAT8:
            inputs = float8_inputs_of(stored)
            return replace(scheme, weight=number_format(_FLOAT8[codes.dtype]), activation=inputs)
        if stored.kind == INT8:
            if self._name(module, "zero_point") in self.header.tensors:
                self._part(module, stored, "zero_point", ("I8",), grid)
            if self._name(module, "act_quant_scale") in self.header.tensors:
                raise stored.refuse(
                    "static int8 inputs are not read; use an Int8DynamicActivationInt8WeightConfig version"
                )
            return replace(scheme, activation=int8_inputs_of(stored))
        return self._intx(module, stored, scheme, grid)

    def _int4(
        self, module: StoredModule, stored: Stored, rows: int, group: int, grid: tuple[int, int]
    ) -> Scheme:
        out, columns = module.shape
        if rows != 1 or columns % 2:
            raise stored.wrong("block_size", "[1, group], the columns even")
        if dtype_of(stored.data.get("activation_dtype")) not in ("", "bfloat16"):
            raise stored.refuse(
                "int4 weights with float8 inputs are not read; quantize the original model with "
                "Int4WeightOnlyConfig, or at load with --torchao-config int4wo-128"
            )
        self._part(module, stored, "qdata", ("I8", "U8"), (out, columns // 2))
        scale = self._part(module, stored, "scale", _FLOATS, grid[::-1])
        self._part(module, stored, "zero_point", (scale.dtype,), grid[::-1])
        scales = (number_format(DENSE_DTYPES[scale.dtype]),)
        return Scheme(number_format("int4"), ((1, group),), scales, offset=True)

    def _check_tiles(self, module: StoredModule, stored: Stored, rows: int, group: int) -> None:
        """Tiles of the right number; how far the columns were filled up, qdata says."""
        if rows != 1:
            raise stored.wrong("block_size", "[1, group]")
        out, columns = module.shape
        tiles = -(-out // 8)
        entry = self.header.tensors.get(self._name(module, "qdata"))
        shape = entry.shape if entry is not None and len(entry.shape) == 4 else (0, 0, 0, 4)
        half = shape[3] if shape[3] in (1, 2, 4) else 4  # of the tiles of 16 columns in a word's row
        padded = shape[1] * 32 * half
        if not columns <= padded < columns + 1024 or padded % group:
            padded = -(-columns // 1024) * 1024
        self._part(module, stored, "qdata", ("I32",), (tiles, padded // (32 * half), 32, half))
        self._part(module, stored, "scale_and_zero", ("BF16",), (padded // group, 8 * tiles, 2))

    def _intx(self, module: StoredModule, stored: Stored, scheme: Scheme, grid: tuple[int, int]) -> Scheme:
        target = dtype_of(stored.data.get("target_dtype"))
        if target not in {f"int{bits}" for bits in range(1, 9)}:
            raise stored.wrong("target_dtype", "torch.int1 to torch.int8")
        inputs = stored.data.get("activation_quantization")
        inputs = inputs.get("_data") if isinstance(inputs, dict) else inputs  # pickled: a member of an enum
        if inputs not in (None, "int8_asym_per_token", "INT8_ASYM_PER_TOKEN"):
            raise stored.wrong("activation_quantization", "null or int8_asym_per_token")
        self._part(module, stored, "zero_point", ("I8",), grid)
        activation = None if inputs is None else int8_inputs_with_zeros()
        return replace(scheme, weight=number_format(f"u{target}"), zero="integer", activation=activation)

    def _small_floats(self, module: StoredModule, stored: Stored) -> Scheme:
        """MXTensor and NVFP4Tensor."""
        out, columns = module.shape
        (code, dtype, packed), group = stored.element, stored.group(columns)
        if columns % packed:
            raise stored.wrong("elem_dtype", f"one of a byte for each of {columns} columns")
        self._part(module, stored, "qdata", (dtype,), (out, columns // packed))
        across = columns // group
        tiles = tiles_of(out, across)
        if module.expert is not None and module.transposed:
            raise stored.refuse(
                f"{module.name} lies as (experts, in, out), which torchao cuts into blocks of outputs; use a "
                "version with a module for each expert"
            )
        if module.expert is not None and stored.tiled and out % 128:
            raise stored.wrong("is_swizzled_scales", f"false for experts of {out} rows, no whole tiles")
        grid = (32 * tiles[0], 16 * tiles[1]) if stored.tiled else (out, across)
        scale, kind = ("e8m0", "F8_E8M0") if stored.kind == MX else ("e4m3", "F8_E4M3")
        self._part(module, stored, "scale", (kind,), grid)
        scheme = Scheme(number_format(code), ((1, group),), (number_format(scale),))
        if stored.kind == MX:
            return replace(scheme, activation=mx_inputs_of(stored, columns))
        entry = self.header.tensors.get(self._name(module, "per_tensor_scale"))
        if entry is not None:
            if entry.dtype != "F32" or entry.shape != ():  # one for all experts
                shape = () if module.expert is None else (1, 1)
                self._part(module, stored, "per_tensor_scale", ("F32",), shape)
            scales = (*scheme.scales, number_format("f32"))
            scheme = replace(scheme, blocks=((1, group), (0, 0)), scales=scales)
        return replace(scheme, activation=nvfp4_inputs_of(stored))

    # ---- inputs

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        stored = self._stored(module)
        if stored.kind == NVFP4:
            return self._outer_scale(module, stored, data)
        name = self._name(module, "act_pre_scale")
        entry = self.header.tensors.get(name)
        if entry is None:
            return None
        columns = module.shape[1]
        if entry.dtype not in _FLOATS or math.prod(entry.shape) != columns:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; one float for "
                f"each of {columns} columns is expected. The file is damaged",
            )
        return InputRule(finite_scales(self.header, name, data.tensor(name)).float().reshape(columns))

    def _outer_scale(self, module: StoredModule, stored: Stored, data: TensorData) -> InputRule | None:
        """What NVFP4Tensor's inputs are under besides their blocks' scales."""
        name = self._name(module, "act_per_tensor_scale")
        if name not in self.header.tensors or self._scheme(module).activation is None:
            return None
        self._part(module, stored, "act_per_tensor_scale", ("F32",), ())
        return InputRule(static_scale=finite_scales(self.header, name, data.tensor(name)))

    # ---- numbers

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The parts as codes, scales and zero points or offsets."""
        stored, scheme = self._stored(module), self._scheme(module)
        qdata, scale_name = self._name(module, "qdata"), self._name(module, "scale")
        if stored.kind == TILES:
            return self._tiles(module, scheme, data)
        if stored.kind in (MX, NVFP4):
            return self._of_small_floats(module, stored, scheme, data)
        raw = data.tensor(qdata).view(torch.uint8)
        scale = finite_scales(self.header, scale_name, data.tensor(scale_name))
        origin = f"{self.header.file_of(qdata)}: {module.name}"
        if stored.kind == INT4:
            codes = torch.stack((raw & 15, raw >> 4), -1).flatten(1) ^ 8  # two's complement to offset binary
            zero_name = self._name(module, "zero_point")
            zero = finite_scales(self.header, zero_name, data.tensor(zero_name))
            parts = (scale.T.contiguous(),), None, (zero.T.contiguous(),)
            return QuantizedTensor(scheme, module.shape, codes, *parts, origin=origin)
        if stored.kind == FLOAT8:
            codes = _without_zero_over_zero(raw, scale)
            return QuantizedTensor(scheme, module.shape, codes, (scale,), origin=origin)
        bits = int(scheme.weight.bits)
        codes = self._narrowed(qdata, stored, raw, bits)
        zeros = None
        zero_name = self._name(module, "zero_point")
        if zero_name in self.header.tensors:
            zeros = self._narrowed(zero_name, stored, data.tensor(zero_name).view(torch.uint8), bits)
            zeros = None if bool((zeros == 1 << bits - 1).all()) else zeros
        if zeros is None:
            symmetric = number_format(f"int{bits}") if bits > 1 else None
            if symmetric is not None:
                return QuantizedTensor(
                    replace(scheme, weight=symmetric, zero="none"),
                    module.shape,
                    codes,
                    (scale,),
                    origin=origin,
                )
            zeros = torch.full(scale.shape, 1 << bits - 1, dtype=torch.uint8)
        scheme = replace(scheme, weight=number_format(f"uint{bits}"), zero="integer")
        return QuantizedTensor(scheme, module.shape, codes, (scale,), zeros, origin=origin)

    def _tiles(self, module: StoredModule, scheme: Scheme, data: TensorData) -> QuantizedTensor:
        """Codes out of their tiles, and without the rows and columns that fill them up."""
        out, columns = module.shape
        groups = columns // scheme.blocks[0][1]
        qdata, name = self._name(module, "qdata"), self._name(module, "scale_and_zero")
        both = finite_scales(self.header, name, data.tensor(name))[:groups, :out]
        scale, zero = (part.T.contiguous() for part in both.unbind(-1))
        codes = _out_of_tiles(data.tensor(qdata))[:out, :columns].contiguous()
        origin = f"{self.header.file_of(qdata)}: {module.name}"
        return QuantizedTensor(scheme, module.shape, codes, (scale,), None, (zero,), origin=origin)

    def _of_small_floats(
        self, module: StoredModule, stored: Stored, scheme: Scheme, data: TensorData
    ) -> QuantizedTensor:
        """MXTensor and NVFP4Tensor: codes unpacked, scales in rows."""
        out, columns = module.shape
        qdata, name = self._name(module, "qdata"), self._name(module, "scale")
        codes = self._own(module, data, qdata).view(torch.uint8)
        if stored.element[2] == 2:
            codes = unpack_bits(codes, 4, columns)
        bits = int(scheme.weight.bits)
        if bits == 6 and int(codes.max()) >= 1 << bits:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(qdata)}: tensor {qdata!r} has a byte of {int(codes.max())}; codes of "
                f"{bits} bits are below {1 << bits}. The file is damaged",
            )
        scale = self._own(module, data, name)
        if stored.tiled:
            straight = in_rows(scale.view(torch.uint8), out, columns // scheme.blocks[0][1])
            scale = straight.contiguous().view(scale.dtype)
        scales = [finite_scales(self.header, name, scale)]
        if len(scheme.scales) == 2:
            name = self._name(module, "per_tensor_scale")
            outer = finite_scales(self.header, name, data.tensor(name))
            scales.append((outer if outer.ndim == 0 else outer[module.expert]).reshape(1, 1))
        origin = f"{self.header.file_of(qdata)}: {module.name}"
        return QuantizedTensor(scheme, module.shape, codes, tuple(scales), origin=origin)

    def _own(self, module: StoredModule, data: TensorData, name: str) -> Tensor:
        """The tensor, or what a stack has of the module."""
        return data.tensor(name) if module.expert is None else data.tensor(name)[module.expert]

    def _narrowed(self, name: str, stored: Stored, raw: Tensor, bits: int) -> Tensor:
        """Two's complement bytes of ``bits``-bit numbers as offset binary."""
        codes = raw ^ 0x80
        if bits == 8:
            return codes
        half = 1 << bits - 1
        low, high = int(codes.min()) - 128, int(codes.max()) - 128
        if low < -half or high >= half:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} holds numbers from {low} to {high}; the "
                f"target_dtype of {stored.place} has {-half} to {half - 1}. The file is damaged",
            )
        return codes - (128 - half)


def _out_of_tiles(words: Tensor) -> Tensor:
    """int32 (n, k, 32, w) -> uint8 (8 n, 32 w k) codes, in offset binary already."""
    n, k, _, w = words.shape
    lanes = words.view(n, k, 8, 4, w)  # row, pair of columns
    nibbles = torch.stack([(lanes >> 4 * nibble & 15).to(torch.uint8) for nibble in range(8)], -1)
    pairs = nibbles.view(n, k, 8, 4, w, 2, 4)  # second column of the pair, which 8 columns of 32
    return pairs.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * n, 32 * w * k)


def _without_zero_over_zero(codes: Tensor, scale: Tensor) -> Tensor:
    """Blocks of scale 0 as zeros: torchao divides 0 by 0 there, and stores NaN."""
    empty = scale == 0
    if not bool(empty.any()):
        return codes
    rows, columns = (whole // part for whole, part in zip(codes.shape, empty.shape, strict=True))
    return codes.masked_fill(empty.repeat_interleave(rows, 0).repeat_interleave(columns, 1), 0)


FORMAT = Torchao
