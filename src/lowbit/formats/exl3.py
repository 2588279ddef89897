"""EXL3 checkpoints (ExLlamaV3): a trellis of codes (QTIP, Tseng et al., 2024) between Hadamard transforms.

    trellis   I16 [in / 16, out / 16, 16 K]  a tile of 16 x 16 weights, K bits each, K = 1 to 8
    suh, svh  F16 [in], [out]                signs and scales of inputs and outputs
    su, sv    I16 [in / 16], [out / 16]      in their place in the first files: signs alone, a set bit for -1
    mcg, mul1 I32 []                         which code book; neither: the first one
    bias      F16 [out]

    weight = (diag(suh) H tiles H diag(svh))^T      H: blocks of Hadamard's matrix of 128, over sqrt(128)

A tile's bits lie from the highest of each I16, of every two the second before the first. Weight t is the code
book's number for 16 bits: its own K, which end with bit K (t + 1), behind those before them, and before a
tile's first bit comes its last. In which order weights lie (a tensor core operand's) ``_places`` says. A code
book multiplies the 16 bits by a constant; its number is the sum of both halves of the product, with some bits
set, as float16 (the first, and mcg), or of its four bytes, scaled (mul1).

Sizes that 128 does not divide are padded up to it; what is behind the layer's own is not read. The head has
its own matrix even where the config ties it to the embedding. No kernel here runs a trellis: a weight is
decoded when it is loaded, in float32, and kept in float16. The tool runs on GPUs only; its packing and
reconstructing kernels, compiled for a CPU, made the fixtures.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import (
    Notes,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import (
    DENSE_DTYPES,
    origin_of,
)
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_by_tensors, quantization_config
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme, dense

_BLOCK = 128  # of a Hadamard transform
_WHAT = "an EXL3 weight"
_MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D, "": 89226354}
_SLICE = 1 << 22  # weights that are decoded at once


class Exl3(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "exl3"
    reference: ClassVar[str] = "exllamav3"
    sign: ClassVar[str] = "trellis"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = quantization_config(header)
        self.place = found.place if found is not None else "its tensors"
        self.bits = found.values.get("bits") if found is not None else None
        require_tensors(header, (".trellis",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method, or no config and tensors that only EXL3 has."""
        return claimed_by_tensors(header, ".trellis", cls.name)

    def describe(self) -> str:
        """Bits a weight as the config has them, and that it is decoded."""
        bits = f", {self.bits:g} bits" if isinstance(self.bits, int | float) else ""
        return f"exl3{bits} (from {self.place.split(':')[0]}), decoded to 16 bits a weight when loaded"

    def _scheme(self, module: StoredModule) -> Scheme:
        """Dense, float16."""
        self._checked(module)
        return dense("f16")

    def _tensors(self, module: StoredModule) -> list[str]:
        """Trellis, both vectors, and what says the code book."""
        names = ["trellis", self._vector(module, "su"), self._vector(module, "sv")]
        names += [flag for flag in ("mcg", "mul1") if self._has(module, flag)]
        return [module.tensor(name) for name in names]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Decoded, a slice of outputs at a time."""
        self._checked(module)
        trellis = data.tensor(module.tensor("trellis"))
        inputs, outputs = (self._signs_and_scales(module, name, data) for name in ("su", "sv"))
        table = code_book(self._book(module, data))
        weight = decode(trellis, table, inputs, outputs, module.shape)
        origin = origin_of(self.header, module, "trellis")
        if not weight.isfinite().all():
            raise LowbitError(
                "E0215", f"{origin}: its scales give weights that float16 cannot hold; the file is damaged"
            )
        return QuantizedTensor(dense("f16"), module.shape, weight, origin=origin)

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """Without its padding."""
        return data.tensor(module.tensor("bias"))[: module.shape[0]] if self._has(module, "bias") else None

    def _has(self, module: StoredModule, suffix: str) -> bool:
        return module.tensor(suffix) in self.header.tensors

    def _vector(self, module: StoredModule, name: str) -> str:
        """``suh`` for ``su``, but where only signs are stored."""
        return name if self._has(module, name) and not self._has(module, f"{name}h") else f"{name}h"

    def _signs_and_scales(self, module: StoredModule, name: str, data: TensorData) -> Tensor:
        """float32 (in,) or (out,), padding included."""
        suffix = self._vector(module, name)
        stored = data.tensor(module.tensor(suffix))
        if suffix == name:
            return 1.0 - 2.0 * (stored[:, None] >> torch.arange(16) & 1).flatten().float()
        return finite_scales(self.header, module.tensor(suffix), stored).float()

    def _book(self, module: StoredModule, data: TensorData) -> str:
        """The code book's name, "" for the first; its number in the file must be the only one there is."""
        book = next((flag for flag in ("mcg", "mul1") if self._has(module, flag)), "")
        if book:
            name = module.tensor(book)
            found = int(data.tensor(name)) & 0xFFFFFFFF
            if found != _MULTIPLIERS[book]:
                raise LowbitError(
                    "E0218",
                    f"{self.header.file_of(name)}: tensor {name!r} is 0x{found:08X}, its code book's number "
                    f"is 0x{_MULTIPLIERS[book]:08X}; quantize the model with ExLlamaV3 0.0.9 or newer",
                )
        return book

    def _checked(self, module: StoredModule) -> None:
        """That every tensor is there, in the dtype and shape that the layer asks for."""
        refuse_stack(module, "EXL3's packing")
        header, (out, columns) = self.header, module.shape
        trellis = entry_of(header, module, "trellis", ("I16",), _WHAT)
        rows, tiles = _padded(columns), _padded(out)
        what = f"{_WHAT} of {out} x {columns}"
        bits, rest = divmod(trellis.shape[-1], 16) if len(trellis.shape) == 3 else (0, 0)
        if rest or not 1 <= bits <= 8:
            raise LowbitError(
                "E0213",
                f"{trellis.file.name}: tensor {trellis.name!r} is {trellis.dtype} {list(trellis.shape)}; "
                f"{what} stores [{rows // 16}, {tiles // 16}, 16 K] with K from 1 to 8. The file is damaged, "
                "or config and weights are from different models",
            )
        check_shape(trellis, (rows // 16, tiles // 16, 16 * bits), what)
        for name, size in (("su", rows), ("sv", tiles)):
            suffix = self._vector(module, name)
            packed = suffix == name
            entry = entry_of(header, module, suffix, ("I16",) if packed else ("F16",), what)
            check_shape(entry, (size // 16 if packed else size,), what)
        if self._has(module, "mcg") and self._has(module, "mul1"):
            raise LowbitError(
                "E0213",
                f"{trellis.file.name}: {module.stored!r} has both 'mcg' and 'mul1', of two code books; "
                "the file is damaged, download it again",
            )
        for flag in ("mcg", "mul1"):
            if self._has(module, flag):
                entry = entry_of(header, module, flag, ("I32",), what)
                check_shape(entry, entry.shape if entry.shape == (1,) else (), what)
        if self._has(module, "bias"):
            entry = entry_of(header, module, "bias", tuple(DENSE_DTYPES), what)
            check_shape(entry, (out,) if entry.shape == (out,) else (tiles,), what)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@cache
def code_book(name: str) -> Tensor:
    """float16 (65536,): the number of each 16 bits."""
    product = torch.arange(1 << 16) * _MULTIPLIERS[name]
    if name == "mul1":  # float16 1024 + the sum, times one constant plus another, rounded once
        total = sum((product >> shift & 255 for shift in (0, 8, 16, 24)), torch.tensor(1024))
        scale, shift = _halves(torch.tensor([0x1EEE, 0xC931]))
        return (total.float() * scale + shift).half()
    if not name:
        product += 64248484
    low, high = (_halves((product >> shift & 0x8FFF) ^ 0x3B60) for shift in (0, 16))
    return (low + high).half()


def _halves(bits: Tensor) -> Tensor:
    """float32 of the float16 with these 16 bits."""
    return bits.to(torch.uint16).view(torch.float16).float()


@cache
def _places(bits: int) -> tuple[Tensor, Tensor]:
    """For a tile's weights as a matrix (in, out): the 16-bit word that a code ends in, int64 (256,), and
    how many bits of the word come after it, int32 (256, 1)."""
    row, column = torch.arange(16)[:, None], torch.arange(16)
    lane = column % 8 * 4 + row % 8 // 2
    number = lane * 8 + (row % 2 + row // 8 * 2 + column // 8 * 4)
    end = (number.flatten() + 1) * bits
    word = (end - 1) // 16
    return word, ((word + 1) * 16 - end).int()[:, None]


@cache
def _hadamard() -> Tensor:
    return Rotation.hadamard(_BLOCK)(torch.eye(_BLOCK))


def decode(trellis: Tensor, table: Tensor, inputs: Tensor, outputs: Tensor, shape: tuple[int, int]) -> Tensor:
    """float16 (out, in) of ``shape``; the trellis and ``inputs`` and ``outputs``, float32, are padded."""
    rows, _, words_a_tile = trellis.shape
    word, after = _places(words_a_tile // 16)
    order = torch.arange(words_a_tile) ^ 1
    turn, columns = _hadamard(), rows * 16
    weight = torch.empty(shape, dtype=torch.float16)
    step = max(1, _SLICE // (columns * _BLOCK)) * _BLOCK
    for start in range(0, shape[0], step):
        words = trellis[:, start // 16 : (start + step) // 16].reshape(-1, words_a_tile)
        words = words.int().T[order]  # (words, tiles)
        ends = words.roll(1, 0) << 16 | words & 0xFFFF  # each word behind the one before it
        codes = (ends.index_select(0, word) >> after).bitwise_and_(0xFFFF)
        values = table.index_select(0, codes.view(-1)).view(16, 16, rows, -1).permute(3, 1, 2, 0)
        part = values.reshape(-1, _BLOCK).float() @ turn
        part = part.view(-1, _BLOCK, columns) * inputs
        part = (turn @ part).view(-1, columns) * outputs[start : start + step, None]
        here = weight[start : start + step]
        here[:] = part[: len(here), : shape[1]]
    return weight


FORMAT = Exl3
