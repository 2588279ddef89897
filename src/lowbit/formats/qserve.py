"""QServe checkpoints (QoQ; Lin et al., 2024): 4-bit weights, int8 inputs, as LMQuant and DeepCompressor's
models come out of the engine's converter.

    qweight    I8 [out, in / 2]   two codes a byte
    s1_scales  F16 [out]          one scale a row
    s1_szeros  F16 [out]          per channel: zero * scale, already multiplied
    s2_scales  I8 [in / g, out]   per group (g 128): the second level, whole numbers
    s2_zeros   I8 [in / g, out]   -zero * s2_scale

    per channel   weight = code * s1_scale - s1_szero
    per group     weight = (code * s2_scale + s2_zero) * s1_scale          the bracket fits int8

Codes lie in tiles of 32 rows and 32 columns, in the order in which tensor cores take them: byte
[d, g, f, c, h] of a tile holds row 8 c + d in its low nibble and row 16 + 8 c + d in its high one, of column
16 f + 4 g + h. Second-level scales and zeros of 32 rows stand as rows 0, 8, 16, 24, 1, 9 ….

Canonical form: codes 0-15; per channel a scale and an offset a row; per group two levels of scales and
whole zero points, as f16 and f32, which hold them exactly. Inputs are rounded to int8 per token (largest |x|
= 127).
These folders are a ``pytorch_model.bin`` and the original model's config.json: they are recognised by their
tensors too. The scale of the int8 KV cache (``kv_scale_quant_orig``) is not used.
Source: the engine's w4a8_linear.py and converter.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_by_tensors, quantization_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_TILE = 32
_LEVELS = ("s2_scales", "s2_zeros")


class QServe(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "qoq"
    aliases = ("qserve",)
    reference: ClassVar[str] = "omniserve"
    sign: ClassVar[str] = "qweight"
    unused: ClassVar[tuple[str, ...]] = (r".*\.self_attn\.kv_scale_quant_orig",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = quantization_config(header)
        self.place = found.place if found is not None else "its tensors"
        values = {} if found is None else found.values
        bits = values.get("wbits", values.get("w_bit", 4))
        if bits != 4:
            raise LowbitError(
                "E0212", f"{self.place}: wbits must be 4 for {self.name}, found {printable(repr(bits))}"
            )
        self.group = values.get("group_size")
        if self.group not in (None, -1, 128):
            raise LowbitError(
                "E0212",
                f"{self.place}: group_size must be -1 or 128 for {self.name}, found "
                f"{printable(repr(self.group))}",
            )
        require_tensors(header, (".s1_scales",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method, or no config and scales that only QServe has."""
        return claimed_by_tensors(header, ".s1_scales", cls.name, *cls.aliases)

    def describe(self) -> str:
        """Per channel or per group."""
        grouped = any(name.endswith(".s2_scales") for name in self.header.tensors)
        groups = "group 128" if grouped else "per channel"
        return f"qoq, 4-bit {groups}, int8 inputs (from {self.place.split(':')[0]})"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From which scales are there."""
        group = self._group(module)
        f16, code = number_format("f16"), number_format("uint4")
        activation = ActivationScheme(number_format("int8"), (1, 0), limit=127.0)
        if not group:
            return Scheme(code, ((1, 0),), (f16,), offset=True, activation=activation)
        wide = number_format("f32")
        return Scheme(code, ((1, group), (1, 0)), (f16, wide), zero="integer", activation=activation)

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes, scales and zeros."""
        levels = _LEVELS if self._group(module) else ("s1_szeros",)
        return [module.tensor(suffix) for suffix in ("qweight", "s1_scales", *levels)]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes and second-level scales in their places."""
        scheme, group = self.scheme_of(module), self._group(module)
        codes = unpack_tiles(data.tensor(module.tensor("qweight")))
        first = self._floats(module, "s1_scales", data)
        scales: tuple[Tensor, ...] = (first,)
        zeros: Tensor | None = None
        offsets: tuple[Tensor, ...] = ()
        if group:
            second, shifts = (in_rows(data.tensor(module.tensor(name))) for name in _LEVELS)
            scales = (second.half(), first.float())
            zeros = self._zeros(module, second.int(), shifts.int())
        else:
            offsets = (-self._floats(module, "s1_szeros", data),)
        return QuantizedTensor(
            scheme,
            module.shape,
            codes,
            scales,
            zeros,
            offsets,
            origin=origin_of(self.header, module, "qweight"),
        )

    def _group(self, module: StoredModule) -> int:
        """Columns of a second-level scale, 0 where there is none; shapes and dtypes checked."""
        (out, columns), header = module.shape, self.header
        refuse_stack(module, "QServe's packing")
        what = f"QServe's {out} x {columns} weight"
        check_shape(entry_of(header, module, "qweight", ("I8", "U8"), what), (out, columns // 2), what)
        if out % _TILE or columns % _TILE:
            raise LowbitError(
                "E0213",
                f"{header.file_of(module.tensor('qweight'))}: {module.stored!r} is {out} x {columns}; {what} "
                f"is made of tiles of {_TILE} x {_TILE}. Config and weights are from different models",
            )
        check_shape(entry_of(header, module, "s1_scales", ("F16",), what), (out,), what)
        if module.tensor("s2_scales") not in header.tensors:
            check_shape(entry_of(header, module, "s1_szeros", ("F16",), what), (out,), what)
            return 0
        scale = entry_of(header, module, "s2_scales", ("I8",), what)
        groups = scale.shape[0] if scale.shape else 0
        if len(scale.shape) != 2 or not groups or columns % groups or scale.shape[1] != out:
            check_shape(scale, (columns // 128, out), what)
        check_shape(entry_of(header, module, "s2_zeros", ("I8",), what), scale.shape, what)
        group = columns // groups
        if self.group not in (None, group):
            raise LowbitError(
                "E0213",
                f"{scale.file.name}: tensor {scale.name!r} is {list(scale.shape)}, groups of {group} "
                f"columns; {self.place} says group_size {self.group}. Correct the config",
            )
        return group

    def _floats(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """F16 (out, 1), finite."""
        name = module.tensor(suffix)
        return finite_scales(self.header, name, data.tensor(name)).unsqueeze(1)

    def _zeros(self, module: StoredModule, scales: Tensor, shifts: Tensor) -> Tensor:
        """uint8 (out, groups): the whole number z with shift = -z * scale."""
        zeros = torch.where(scales == 0, 0, -shifts // scales.where(scales != 0, torch.ones_like(scales)))
        wrong = (zeros * scales != -shifts) | (zeros < 0) | (zeros > 15)
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            name = module.tensor("s2_zeros")
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} holds {int(wrong.sum())} values that are no "
                f"zero point 0-15 times their scale (first of row {first[0]}, group {first[1]}); the file is "
                "damaged or of another layout",
            )
        return zeros.to(torch.uint8)


def unpack_tiles(packed: Tensor) -> Tensor:
    """I8 (out, in / 2) -> uint8 codes (out, in)."""
    out, half = packed.shape
    a, e = out // _TILE, 2 * half // _TILE
    tiles = packed.contiguous().view(torch.uint8).view(a, e, 8, 4, 2, 2, 4)  # rows d, columns g f, rows c …
    nibbles = torch.stack((tiles & 15, tiles >> 4), -1)  # (a, e, d, g, f, c, h, b)
    return nibbles.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(out, 2 * half)  # a b c d, e f g h


def in_rows(stored: Tensor) -> Tensor:
    """(groups, out) in the kernel's order of rows -> (out, groups)."""
    groups, out = stored.shape
    return stored.view(groups, out // _TILE, 8, 4).transpose(-2, -1).reshape(groups, out).T.contiguous()


FORMAT = QServe
