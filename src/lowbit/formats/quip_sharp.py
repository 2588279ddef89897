"""QuIP# checkpoints (Tseng et al., 2024): vectors of a lattice between two Hadamard transforms.

    Qidxs         I64 [out, words in / 64]   codes of 8 weights (``quip_codebooks``); 2, 3 or 4 words
    SU, SV        F16 [in], [out]            signs, fine-tuned; SV has the weights' scale too
    Wscale        F16, F32 []                another scale, of old files
    codebook_id   I64 []
    fuse_scales   F16, F32 [parts]           of qkv_proj (q, k, v) and upgate_proj (up, then gate)
    scaleWH       F16, F32 [in]              with rescale_WH: inputs are divided by it
    A, B          F16, F32 [out, rank], [rank, in]   with lora_rank: A B is added to the codes' matrix

With u the matrix of codes, H_n the Hadamard matrix of order n (``numerics.hadamard``):

    weight = SV * (H_out (Wscale u + A B) H_in^T) / sqrt(out in) * SU / scaleWH, a part's rows * fuse_scale

Codes stay as they are (``numerics.lattice``): inputs are SU / scaleWH, outputs all that multiplies rows, over
the root. E8P12RVQ3B's on a CPU and matrices with A B are decoded when they are loaded and kept in float16.
Sums are made in float32, of plain E8P12 codes exactly, and rounded once.

QuIP-for-all's files, which say quant_method QUiP, pad rows and columns and bring their own matrices; they
are refused.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import DENSE_DTYPES
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.formats.quip_codebooks import CODEBOOKS
from lowbit.numerics.hadamard import hadamard_factors
from lowbit.numerics.lattice import LatticeLayout, transformed
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_WHAT = "a QuIP# weight"
_LARGEST_NUMBER = 2.75  # of a vector


class QuipSharp(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "quip_sharp"
    sign: ClassVar[str] = "Qidxs"
    reference: ClassVar[str] = "quip-sharp"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place, values = found.place, found.values
        self.codebook_name = values.get("codebook")
        if not isinstance(self.codebook_name, str) or self.codebook_name not in CODEBOOKS:
            raise LowbitError(
                "E0218",
                f"{self.place}.codebook is {printable(repr(self.codebook_name))}; of QuIP#'s codebooks "
                f"{', '.join(CODEBOOKS)} are read. Use a newer export of the model (relaxml/…-E8P-2Bit)",
            )
        self.codebook = CODEBOOKS[self.codebook_name]
        self._check_versions(values)
        self.rank = self._number(values, "lora_rank", 0, int)
        self.rescaled = self._flag(values, "rescale_WH", False)
        divisor = self._number(values, "resid_scale_override", -1, float)
        self.divisor = divisor if divisor > 0 else self.codebook.divisor
        require_tensors(header, (".Qidxs",), self.place, self.name)

    def describe(self) -> str:
        """The codebook, and whether it is decoded."""
        decoded = ", decoded to 16 bits a weight on a CPU" if self.codebook.second == 8 else ""
        if self._layout is None:
            decoded = ", decoded to 16 bits a weight when loaded"
        return f"quip_sharp, {self.codebook_name} in {self.place.split(':')[0]}{decoded}"

    @property
    def _layout(self) -> LatticeLayout | None:
        """Of codes that stay as they are."""
        return None if self.rank > 0 else self.codebook.layout(self.divisor)

    def _scheme(self, module: StoredModule) -> Scheme:
        """The codes under scales of rows and columns; dense, float16, where they are decoded."""
        self._tensors(module)
        if self._layout is None:
            return dense("f16")
        single = number_format("f32")
        return Scheme(number_format(self._layout.name), ((1, 0), (0, 1)), (single, single))

    def _tensors(self, module: StoredModule) -> list[str]:
        """Everything of the matrix; dtypes and shapes checked."""
        found = self._expected(module)
        out, columns = module.shape
        what = f"{_WHAT} of {out} x {columns} with {self.codebook_name}"
        for suffix, (dtypes, shape) in found.items():
            check_shape(entry_of(self.header, module, suffix, dtypes, what), shape, what)
        return [module.tensor(suffix) for suffix in found]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """As it is stored, or decoded."""
        scheme, layout = self._scheme(module), self._layout
        self._check_codebook(module, data)
        outputs, inputs = self._outputs(module, data), self._inputs(module, data)
        # No weight is larger than the sum of all; mostly that is far from too large.
        largest = float(outputs.abs().max()) * float(inputs.abs().max()) * _LARGEST_NUMBER
        largest *= (1 + 1 / self.divisor) * module.shape[0] * module.shape[1]
        origin = f"{self.header.file_of(module.tensor('Qidxs'))}: {module.name}"
        decoded = None
        if layout is None or not largest <= torch.finfo(torch.float16).max:
            decoded = self._decoded(module, data, outputs, inputs)
        if layout is None:
            assert decoded is not None, "it has no other form"
            return QuantizedTensor(scheme, module.shape, decoded, origin=origin)
        codes = layout.codes(self.codebook.codes(data.tensor(module.tensor("Qidxs"))))
        scales = (outputs.unsqueeze(1), inputs.unsqueeze(0))
        return QuantizedTensor(scheme, module.shape, codes, scales, origin=origin)

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """Under the scales of its parts, as the weight."""
        bias, parts = super()._bias(module, data), self._parts(module)
        return bias.float() * self._fuse_scales(module, data) if bias is not None and parts else bias

    # ---- config

    def _check_versions(self, values: dict[str, object]) -> None:
        if values.get("codesz", 8) != 8 or isinstance(values.get("codesz"), bool):
            raise LowbitError(
                "E0212", f"{self.place}.codesz must be 8, found {printable(repr(values['codesz']))}"
            )
        version = values.get("codebook_version", 0)
        if type(version) is not int or version != self.codebook.version:
            raise LowbitError(
                "E0218",
                f"{self.place}.codebook_version is {printable(repr(version))}; of {self.codebook_name} the "
                f"packing {self.codebook.version} is read. Use a newer export of the model",
            )
        for key, usual in (("fused", True), ("outlier_channel_split", False), ("pack_out", False)):
            if self._flag(values, key, usual) is not usual:
                raise LowbitError(
                    "E0218",
                    f"{self.place}.{key} is {str(not usual).lower()}, which is not read. Use a newer export "
                    "of the model",
                )

    def _flag(self, values: dict[str, object], key: str, usual: bool) -> bool:
        value = values.get(key, usual)
        if not isinstance(value, bool):
            raise LowbitError(
                "E0212", f"{self.place}.{key} must be true or false, found {printable(repr(value))}"
            )
        return value

    def _number(self, values: dict[str, object], key: str, usual: int, kind: type) -> float:
        value = values.get(key, usual)
        fits = isinstance(value, int) or (kind is float and isinstance(value, float))
        if isinstance(value, bool) or not fits or not -1 <= value < 1 << 20:  # type: ignore[operator]
            raise LowbitError(
                "E0212",
                f"{self.place}.{key} must be a {'whole ' * (kind is int)}number from -1, found "
                f"{printable(repr(value))}",
            )
        return kind(value)

    # ---- tensors

    def _parts(self, module: StoredModule) -> tuple[int, ...]:
        """Rows of each part with a fuse scale, or none."""
        leaf, rows = module.stored.rpartition(".")[2], module.shape[0]
        if leaf == "upgate_proj":
            return (rows // 2, rows // 2)
        return self._qkv(rows, module) if leaf == "qkv_proj" else ()

    def _qkv(self, rows: int, module: StoredModule) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        told = []
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"):
            value = self.header.config.get(key)
            if value is not None and (type(value) is not int or value < 1):
                raise LowbitError(
                    "E0212",
                    f"config.json: {key} must be a whole number from 1, found {printable(repr(value))}",
                )
            told.append(value)
        heads, kv_heads, head, hidden = told
        head = head or (hidden // heads if heads and hidden else None)
        if not heads or not head:
            raise LowbitError(
                "E0212",
                f"config.json: num_attention_heads or hidden_size is missing; it cannot be told where K "
                f"begins in {module.stored!r}",
            )
        parts = (heads * head, (kv_heads or heads) * head, (kv_heads or heads) * head)
        if sum(parts) != rows:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(module.tensor('Qidxs'))}: {module.stored!r} has {rows} rows, but "
                f"config.json's heads are {' + '.join(map(str, parts))}; config and weights are from "
                "different models",
            )
        return parts

    def _expected(self, module: StoredModule) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Suffix -> dtypes and shape of each tensor of the matrix."""
        (out, columns), parts = module.shape, self._parts(module)
        refuse_stack(module, "QuIP#'s codes")
        codes = module.tensor("Qidxs")
        if out % 16 or columns % 64 or hadamard_factors(out) is None or hadamard_factors(columns) is None:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(codes)}: {module.stored!r} is {out} x {columns}; QuIP# packs tiles of "
                "16 x 64 and has Hadamard matrices of orders 2^k times 1, 12, 20, 28, 36, 52, 60, 108, 116, "
                "124, 140, 156 or 172. Config and weights are from different models",
            )
        floats, words = tuple(DENSE_DTYPES), self.codebook.words * columns // 64
        found: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            "Qidxs": (("I64",), (out, words)),
            "SU": (floats, (columns,)),
            "SV": (floats, (out,)),
            "Wscale": (floats, ()),
            "codebook_id": (("I64", "I32"), ()),
        }
        if parts:
            found["fuse_scales"] = (floats, (len(parts),))
        if self.rescaled:
            found["scaleWH"] = (floats, (columns,))
        if self.rank > 0:
            rank = int(self.rank)
            found |= {"A": (floats, (out, rank)), "B": (floats, (rank, columns))}
        return found

    # ---- numbers

    def _floats(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        name = module.tensor(suffix)
        return finite_scales(self.header, name, data.tensor(name)).float()

    def _outputs(self, module: StoredModule, data: TensorData) -> Tensor:
        """Float32 (out,): what multiplies rows, the roots too."""
        out, columns = module.shape
        rows = self._floats(module, "SV", data) / math.sqrt(out) / math.sqrt(columns)
        scale = self._floats(module, "Wscale", data)
        if self.rank <= 0:  # of the codes alone where there is A B
            rows = rows * scale
        return rows * self._fuse_scales(module, data) if self._parts(module) else rows

    def _inputs(self, module: StoredModule, data: TensorData) -> Tensor:
        """Float32 (in,): what multiplies columns."""
        inputs = self._floats(module, "SU", data)
        return inputs / self._floats(module, "scaleWH", data) if self.rescaled else inputs

    def _decoded(self, module: StoredModule, data: TensorData, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Float16 (out, in)."""
        words, scale = data.tensor(module.tensor("Qidxs")), self._floats(module, "Wscale", data)
        a, b = (self._floats(module, name, data) for name in "AB") if self.rank > 0 else (None, None)

        def vectors(rows: slice) -> Tensor:
            part = self.codebook.vectors(words[rows], self.divisor)
            return part if a is None or b is None else part * scale + a[rows] @ b

        weight = transformed(vectors, outputs, inputs)
        if not weight.isfinite().all():
            largest = float(self._floats(module, "SV", data).abs().max())
            raise LowbitError(
                "E0215",
                f"{self.header.file_of(module.tensor('SV'))}: {module.stored!r} decodes to numbers beyond "
                f"float16 (SV up to {largest:g}, Wscale {float(scale):g}); the file is damaged, download it "
                "again",
            )
        return weight

    def _fuse_scales(self, module: StoredModule, data: TensorData) -> Tensor:
        """Float32 (out,)."""
        name = module.tensor("fuse_scales")
        scales = finite_scales(self.header, name, data.tensor(name)).float()
        return scales.repeat_interleave(torch.tensor(self._parts(module)))

    def _check_codebook(self, module: StoredModule, data: TensorData) -> None:
        name = module.tensor("codebook_id")
        number = int(data.tensor(name))
        if number != self.codebook.number:
            known = next((name for name, book in CODEBOOKS.items() if book.number == number), "unknown")
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} is {number} ({known}), but {self.place} says "
                f"{self.codebook_name}, which is {self.codebook.number}; correct the config",
            )


FORMAT = QuipSharp
