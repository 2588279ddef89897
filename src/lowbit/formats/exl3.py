"""EXL3 checkpoints (ExLlamaV3): a trellis of codes (QTIP, Tseng et al., 2024) between Hadamard transforms.

    trellis   I16 [in / 16, out / 16, 16 K]  a tile of 16 x 16 weights, K bits each, K = 1 to 8
    suh, svh  F16 [in], [out]                signs and scales of inputs and outputs
    su, sv    I16 [in / 16], [out / 16]      in their place in the first files: signs alone, a set bit for -1
    mcg, mul1 I32 []                         which code book; neither: the first one
    bias      F16 [out]

What they mean is in ``numerics.trellis``: inputs are suh, outputs svh, and a layer without mcg and mul1 has
the first code book.

Weights stay as they are. Sizes that 128 does not divide are padded up to it, and so are the codes and scales
of what is read; what is behind the layer's own has no effect. The head has its own matrix
even where the config ties it to the embedding. The tool runs on GPUs only; its packing and reconstructing
kernels, compiled for a CPU, made the fixtures.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.exllama import ExLlama
from lowbit.formats.partly_dense import refuse_stack
from lowbit.formats.quantization_config import claimed_by_tensors
from lowbit.numerics.number_formats import number_format, trellis_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK, MULTIPLIERS, decoded

_WHAT = "an EXL3 weight"
_FLAGS = ("mcg", "mul1")
_LARGEST_NUMBER = 4.0  # of a code book


class Exl3(ExLlama):
    """See the module docstring."""

    name: ClassVar[str] = "exl3"
    reference: ClassVar[str] = "exllamav3"
    sign: ClassVar[str] = "trellis"

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method, or no config and tensors that only EXL3 has."""
        return claimed_by_tensors(header, ".trellis", cls.name)

    def _scheme(self, module: StoredModule) -> Scheme:
        """The trellis under scales of rows and columns."""
        bits = self._checked(module)
        half = number_format("f16")
        return Scheme(trellis_format(bits, self._book(module)), ((1, 0), (0, 1)), (half, half))

    def _tensors(self, module: StoredModule) -> list[str]:
        """Trellis, both vectors, and what says the code book."""
        names = ["trellis", self._vector(module, "su"), self._vector(module, "sv")]
        names += [flag for flag in _FLAGS if self._has(module, flag)]
        return [module.tensor(name) for name in names]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """As it is stored."""
        scheme, book = self._scheme(module), self._book(module)
        self._check_number(module, book, data)
        trellis = data.tensor(module.tensor("trellis"))
        inputs, outputs = (self._signs_and_scales(module, name, data) for name in ("su", "sv"))
        origin = origin_of(self.header, module, "trellis")
        layout, (out, columns) = scheme.weight.trellis, module.shape
        assert layout is not None, "its scheme says so"
        # No weight is larger than the sum of its block's; mostly that is far from too large.
        largest = float(inputs.abs().max()) * float(outputs.abs().max()) * _LARGEST_NUMBER * BLOCK
        if not largest <= torch.finfo(torch.float16).max:
            for start, part in decoded(trellis, book, inputs, outputs):
                if not part[: max(0, out - start), :columns].half().isfinite().all():
                    raise LowbitError(
                        "E0215",
                        f"{origin}: its scales give weights that float16 cannot hold; the file is damaged",
                    )
        scales = (outputs.half().unsqueeze(1), inputs.half().unsqueeze(0))
        return QuantizedTensor(scheme, module.shape, layout.codes(trellis), scales, origin=origin)

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

    def _book(self, module: StoredModule) -> str:
        """The code book's name."""
        return next((flag for flag in _FLAGS if self._has(module, flag)), "3inst")

    def _check_number(self, module: StoredModule, book: str, data: TensorData) -> None:
        """The code book's number in the file must be the only one there is."""
        if book not in _FLAGS:
            return
        name = module.tensor(book)
        found = int(data.tensor(name)) & 0xFFFFFFFF
        if found != MULTIPLIERS[book]:
            raise LowbitError(
                "E0218",
                f"{self.header.file_of(name)}: tensor {name!r} is 0x{found:08X}, its code book's number "
                f"is 0x{MULTIPLIERS[book]:08X}; quantize the model with ExLlamaV3 0.0.9 or newer",
            )

    def _checked(self, module: StoredModule) -> int:
        """Bits a weight; every tensor must be there, in the dtype and shape that the layer asks for."""
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
        for flag in _FLAGS:
            if self._has(module, flag):
                entry = entry_of(header, module, flag, ("I32",), what)
                check_shape(entry, entry.shape if entry.shape == (1,) else (), what)
        if self._has(module, "bias"):
            entry = entry_of(header, module, "bias", tuple(DENSE_DTYPES), what)
            check_shape(entry, (out,) if entry.shape == (out,) else (tiles,), what)
        return bits


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


FORMAT = Exl3
