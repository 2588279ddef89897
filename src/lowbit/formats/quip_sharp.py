"""QuIP# checkpoints (Tseng et al., 2024): vectors of a lattice between two Hadamard transforms.

    Qidxs         I64 [out, words in / 64]   codes of 8 weights (``quip_codebooks``); 2, 3 or 4 words
    SU, SV        F16 [in], [out]            signs, fine-tuned; SV has the weights' scale too
    Wscale        F16, F32 []                another scale, of old files
    codebook_id   I64 []
    fuse_scales   F16, F32 [parts]           of qkv_proj (q, k, v) and upgate_proj (up, gate)
    scaleWH       F16, F32 [in]              with rescale_WH: inputs are divided by it
    A, B          F16, F32 [out, rank], [rank, in]   with lora_rank: A B is added to the codes' matrix

With u the matrix of codes, H_n the Hadamard matrix of order n (``numerics.hadamard``):

    weight = SV * (H_out (Wscale u + A B) H_in^T) / sqrt(out in) * SU / scaleWH, a part's rows * fuse_scale

Rotated codes have no native form: a weight is decoded when it is loaded and kept in float16, 16 bits a weight
where the file takes 2 to 4. Sums are made in float32, of plain E8P12 codes exactly, and rounded once.

QuIP-for-all's files, which say quant_method QUiP, pad rows and columns and bring their own matrices; they
are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from lowbit.numerics.hadamard import hadamard_factors, times
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_WHAT = "a QuIP# weight"
_OF_UPGATE = ("up_proj", "gate_proj")
_SLICE = 1 << 22  # weights that are transformed at once


@dataclass(frozen=True)
class _Stored:
    """The matrix a module is all or some rows of. ``parts``: rows of each part with a fuse scale, or none."""

    module: StoredModule
    parts: tuple[int, ...]
    rows: slice


class QuipSharp(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "quip_sharp"
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
        # Of gate and up, which are decoded together, the one that was not asked for.
        self._kept: tuple[str, Tensor] | None = None
        require_tensors(header, (".Qidxs",), self.place, self.name)

    def describe(self) -> str:
        """The codebook, and that it is decoded."""
        return (
            f"quip_sharp, {self.codebook_name} in {self.place.split(':')[0]}, decoded to 16 bits a weight "
            "when loaded"
        )

    def _is_dense(self, module: StoredModule) -> bool:
        return self._place_of(module) is None

    def _scheme(self, module: StoredModule) -> Scheme:
        """Dense float16."""
        self._tensors(module)
        return dense("f16")

    def _tensors(self, module: StoredModule) -> list[str]:
        """Everything of the matrix the module is part of; dtypes and shapes of all of it checked."""
        stored = self._stored(module)
        found = self._expected(stored)
        out, columns = stored.module.shape
        what = f"{_WHAT} of {out} x {columns} with {self.codebook_name}"
        for suffix, (dtypes, shape) in found.items():
            check_shape(entry_of(self.header, stored.module, suffix, dtypes, what), shape, what)
        return [stored.module.tensor(suffix) for suffix in found]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Decoded."""
        self._tensors(module)
        stored = self._stored(module)
        if self._kept is not None and self._kept[0] == module.stored:
            weight, self._kept = self._kept[1], None
        else:
            whole = self._decoded(stored, data)
            weight = whole[stored.rows].clone() if len(whole) > module.shape[0] else whole
            if stored.module is not module:
                up, gate = whole.chunk(2)
                up_proj, gate_proj = (f"{module.stored.rpartition('.')[0]}.{leaf}" for leaf in _OF_UPGATE)
                self._kept = (gate_proj, gate.clone()) if stored.rows.start == 0 else (up_proj, up.clone())
        origin = f"{self.header.file_of(stored.module.tensor('Qidxs'))}: {module.name}"
        return QuantizedTensor(dense("f16"), module.shape, weight, origin=origin)

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """Under the scales of its parts, as the weight."""
        bias, stored = super()._bias(module, data), self._stored(module)
        return bias.float() * self._fuse_scales(stored, data) if bias is not None and stored.parts else bias

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

    def _stored(self, module: StoredModule) -> _Stored:
        """Where a module lies that is not plain."""
        stored = self._place_of(module)
        assert stored is not None, "a plain module is read elsewhere"
        return stored

    def _place_of(self, module: StoredModule) -> _Stored | None:
        """Where it lies; None where the module is plain."""
        (out, columns), tensors = module.shape, self.header.tensors
        parent, _, leaf = module.stored.rpartition(".")
        if module.tensor("Qidxs") in tensors:
            return _Stored(module, self._qkv(out, module) if leaf == "qkv_proj" else (), slice(0, out))
        fused = f"{parent}.upgate_proj"
        if leaf not in _OF_UPGATE or f"{fused}.Qidxs" not in tensors:
            return None
        start = out * _OF_UPGATE.index(leaf)
        whole = StoredModule(fused, fused, (2 * out, columns))
        return _Stored(whole, (out, out), slice(start, start + out))

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

    def _expected(self, stored: _Stored) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Suffix -> dtypes and shape of each tensor of the matrix."""
        module, (out, columns) = stored.module, stored.module.shape
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
        if stored.parts:
            found["fuse_scales"] = (floats, (len(stored.parts),))
        if self.rescaled:
            found["scaleWH"] = (floats, (columns,))
        if self.rank > 0:
            rank = int(self.rank)
            found |= {"A": (floats, (out, rank)), "B": (floats, (rank, columns))}
        return found

    # ---- numbers

    def _decoded(self, stored: _Stored, data: TensorData) -> Tensor:
        """Float16 (out, in) of the whole matrix."""
        module, (out, columns) = stored.module, stored.module.shape

        def floats(suffix: str) -> Tensor:
            name = module.tensor(suffix)
            return finite_scales(self.header, name, data.tensor(name)).float()

        self._check_codebook(module, data)
        left, right = hadamard_factors(columns), hadamard_factors(out)
        assert left is not None and right is not None, "checked before"
        words, scale = data.tensor(module.tensor("Qidxs")), floats("Wscale")
        a, b = (floats("A"), floats("B")) if self.rank > 0 else (None, None)
        inner = torch.empty(out, columns)
        step = max(16, _SLICE // columns // 16 * 16)
        for start in range(0, out, step):
            part = self.codebook.vectors(words[start : start + step], self.divisor)
            if a is not None and b is not None:
                part = part * scale + a[start : start + step] @ b
            inner[start : start + step] = times(left, part, 1)
        rows = floats("SV") / math.sqrt(out) / math.sqrt(columns)
        if a is None:
            rows = rows * scale
        if stored.parts:
            rows = rows * self._fuse_scales(stored, data)
        inputs = floats("SU")
        if self.rescaled:
            inputs = inputs / floats("scaleWH")
        weight = torch.empty(out, columns, dtype=torch.float16)
        step = max(1, _SLICE // out)
        for start in range(0, columns, step):
            part = inner[:, start : start + step].contiguous()
            part = times(right, part, part.shape[1])
            weight[:, start : start + step] = part * rows[:, None] * inputs[start : start + step]
        if not weight.isfinite().all():
            raise LowbitError(
                "E0215",
                f"{self.header.file_of(module.tensor('SV'))}: {module.stored!r} decodes to numbers beyond "
                f"float16 (SV up to {float(floats('SV').abs().max()):g}, Wscale {float(scale):g}); the file "
                "is damaged, download it again",
            )
        return weight

    def _fuse_scales(self, stored: _Stored, data: TensorData) -> Tensor:
        """Float32 (out,)."""
        name = stored.module.tensor("fuse_scales")
        scales = finite_scales(self.header, name, data.tensor(name)).float()
        return scales.repeat_interleave(torch.tensor(stored.parts))

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
