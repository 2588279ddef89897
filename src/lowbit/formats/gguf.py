"""GGUF: a type for each tensor; block types keep their mapped bytes as codes.

Experts are stacked along the first axis (``blk.0.ffn_gate_exps.weight``, (experts, out, in)); files of
Mixtral from before April 2024 have them one by one (``blk.0.ffn_gate.3.weight``). NVFP4 weights may have a
sibling ``<module>.scale`` of one float, or of one for each expert, that multiplies them; beside another type
it stays unread, and loading refuses what is left. That Q and K of some architectures are stored as adjacent
rotary pairs is the family's knowledge, and ``loading`` puts their rows right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule
from lowbit.formats.dense import DENSE_DTYPES, of_expert
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense


class Gguf:
    """See the module docstring."""

    name = "gguf"
    aliases = ()
    reference = "ggml"
    unused = ()

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """Every GGUF file."""
        return "the file starts with GGUF" if header.container == "gguf" else None

    def describe(self) -> str:
        """The types of its matrices, most frequent first."""
        count = Counter(entry.dtype for entry in self.header.tensors.values() if len(entry.shape) > 1)
        return "gguf, " + ", ".join(name for name, _ in count.most_common(4))

    def scheme_of(self, module: StoredModule) -> Scheme:
        """The tensor's type; a missing tensor or another shape is an error."""
        name = f"{module.stored}.weight"
        entry = self.header.tensors.get(name)
        if entry is None:
            raise LowbitError("E0209", f"{self.header.root.name}: no file contains {name!r}")
        expected = _stacked(module, module.shape)
        if not entry.is_matrix_of(expected):
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {name!r} is {list(entry.shape)} but the metadata ask for "
                f"{list(expected)}; the file is damaged or of another kind",
            )
        if entry.dtype in DENSE_DTYPES:
            return dense(DENSE_DTYPES[entry.dtype])
        if self._outer_scale(module) is not None:
            # The outer scale makes it two levels: the blocks are taken apart.
            f32 = number_format("f32")
            return Scheme(number_format("e2m1"), ((1, 16), (0, 0)), (number_format("e4m3"), f32))
        if GGUF_TYPES_BY_NAME[entry.dtype].weights == 1:
            raise LowbitError(
                "E0219", f"{entry.file.name}: tensor {name!r} is {entry.dtype}, not a type of weights"
            )
        return Scheme(number_format(f"gguf_{entry.dtype.lower()}"))

    def tensors_of(self, module: StoredModule) -> list[str]:
        """Weight, bias, and what NVFP4 has beside it. Its input scale is not applied: inputs stay 16-bit."""
        names = [f"{module.stored}.weight", f"{module.stored}.bias"]
        if self._is_nvfp4(module):
            names += [f"{module.stored}.scale", f"{module.stored}.input_scale"]
        return [name for name in names if name in self.header.tensors or name == names[0]]

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """The mapped rows."""
        name = f"{module.stored}.weight"
        scheme = self.scheme_of(module)
        origin = f"{self.header.file_of(name)}: {module.name}"
        codes = of_expert(module, data.tensor(name).view(*_stacked(module, module.shape)[:-1], -1))
        stored = QuantizedTensor(scheme, module.shape, codes, origin=origin)
        outer = self._outer_scale(module)
        if outer is not None:
            scales = data.tensor(outer.name)
            stored = _with_outer_scale(stored, scales[module.expert or 0])
        return StoredLinear(stored, self._bias(module, data))

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        name = f"{module.stored}.bias"
        entry = self.header.tensors.get(name)
        if entry is None:
            return None
        expected = _stacked(module, module.shape[:1])
        if not entry.is_matrix_of(expected) or entry.dtype not in DENSE_DTYPES:
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, a bias of "
                f"{list(expected)} floats was expected",
            )
        return of_expert(module, data.tensor(name).view(expected))

    def _is_nvfp4(self, module: StoredModule) -> bool:
        entry = self.header.tensors.get(f"{module.stored}.weight")
        return entry is not None and entry.dtype == "NVFP4"

    def _outer_scale(self, module: StoredModule) -> TensorEntry | None:
        """NVFP4's tensor of one float, or of one an expert; of any other type nobody knows its meaning."""
        entry = self.header.tensors.get(f"{module.stored}.scale")
        if entry is None or not self._is_nvfp4(module):
            return None
        expected = (1,) if module.expert is None else (module.experts,)
        if entry.dtype != "F32" or entry.shape != expected:
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, the scale "
                f"of an NVFP4 weight is F32 {list(expected)}; the file is damaged or of another kind",
            )
        return entry


def _stacked(module: StoredModule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if module.expert is None else (module.experts, *shape)


def _with_outer_scale(stored: QuantizedTensor, outer: Tensor) -> QuantizedTensor:
    """NVFP4 with the per-tensor scale beside it, as two levels (ModelOpt's weight_scale_2)."""
    layout = number_format("gguf_nvfp4").block
    assert layout is not None, "nvfp4 is a block format"
    parts = layout.expand(stored.codes.unflatten(-1, (-1, layout.bytes)))
    inner = parts.scales[0].flatten(-2).to(torch.float8_e4m3fn)  # exact: they were e4m3 bytes
    scales = (inner, outer.reshape(1, 1))
    return replace(stored, codes=parts.codes.flatten(-2), scales=scales)


FORMAT = Gguf
