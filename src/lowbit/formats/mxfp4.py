"""MXFP4 as gpt-oss ships it (OpenAI, 2025; OCP Microscaling Formats v1.0): only the experts are quantized.

    mlp.experts.gate_up_proj_blocks  U8 [experts, 2 I, H / 32, 16]   byte j of a block: 2j low, 2j+1 high
    mlp.experts.gate_up_proj_scales  U8 [experts, 2 I, H / 32]       powers of two, 2^(byte - 127)
    mlp.experts.gate_up_proj_bias    BF16 [experts, 2 I]             (down_proj likewise)

Rows are output rows; that gate and up rows come in turn is the family's knowledge. A fine-tune may store its
experts as plain (experts, in, out) matrices: those are read as they are. Experts under names of their own
(``experts.3.down_proj.weight_blocks`` or ``experts.3.down_proj_blocks``, the bias likewise) have no first
axis. Inputs stay as they are. OpenAI's own layout (``original/``: ``mlp1_weight.blocks``) has no config and
is not read.
"""

from __future__ import annotations

import torch

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule, check_shape, finite_scales
from lowbit.formats.dense import bias_tensors, dense_scheme, dense_tensors, of_expert, read_bias, read_dense
from lowbit.formats.quantization_config import claimed_config, says_method
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_BLOCK = 32


class Mxfp4:
    """See the module docstring."""

    name = "mxfp4"
    aliases = ("gpt_oss_mxfp4",)
    reference = "transformers"
    unused = ()

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        if not any(name.endswith("_blocks") for name in header.tensors):
            notes.contradiction(
                "E0214",
                f"{header.root.name}: {self.place} says mxfp4 but no tensor ends in _blocks; reading the "
                "experts as plain matrices",
            )

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method mxfp4."""
        return says_method(header, cls.name, *cls.aliases)

    def describe(self) -> str:
        """Which modules are quantized."""
        return f"mxfp4 experts in {self.place.split(':')[0]}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """e2m1 with a power of two for 32 columns, or a plain matrix."""
        if self._blocks_entry(module) is None:
            return dense_scheme(self.header, module)
        self._entries(module)
        return Scheme(number_format("e2m1"), ((1, _BLOCK),), (number_format("e8m0"),))

    def tensors_of(self, module: StoredModule) -> list[str]:
        """Blocks, scales and bias."""
        blocks = self._blocks_entry(module)
        if blocks is None:
            return dense_tensors(self.header, module)
        scales = blocks.name.removesuffix("_blocks") + "_scales"
        return [blocks.name, scales, *bias_tensors(self.header, _named_like(blocks, module))]

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """Nibbles unpacked, low ones first."""
        if self._blocks_entry(module) is None:
            return read_dense(self.header, module, data)
        blocks, scales = self._entries(module)
        packed = of_expert(module, data.tensor(blocks.name)).flatten(-2)  # (out, in / 2)
        stored = of_expert(module, data.tensor(scales.name)).view(torch.float8_e8m0fnu)
        weight = QuantizedTensor(
            self.scheme_of(module),
            module.shape,
            unpack_bits(packed, 4, module.shape[1]),
            (finite_scales(self.header, scales.name, stored),),
            origin=f"{blocks.file.name}: {module.name}",
        )
        return StoredLinear(weight, read_bias(self.header, _named_like(blocks, module), data))

    def _blocks_entry(self, module: StoredModule) -> TensorEntry | None:
        """The blocks under any of their names, None for a plain matrix; scales alone are an error."""
        tensors = self.header.tensors
        stems = (module.stored,) if module.expert is not None else (f"{module.stored}.weight", module.stored)
        for stem in stems:
            if f"{stem}_blocks" in tensors:
                return tensors[f"{stem}_blocks"]
            if f"{stem}_scales" in tensors:
                raise LowbitError(
                    "E0209",
                    f"{self.header.root.name}: no file contains '{stem}_blocks', the codes that belong to "
                    f"'{stem}_scales'",
                )
        return None

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
        blocks = self._blocks_entry(module)
        assert blocks is not None, "asked before"
        name = blocks.name.removesuffix("_blocks") + "_scales"
        scales = self.header.tensors.get(name)
        if scales is None:
            raise LowbitError(
                "E0209", f"{self.header.root.name}: no file contains {name!r}, the scales of MXFP4"
            )
        out, columns = module.shape
        if columns % _BLOCK:
            raise LowbitError(
                "E0213",
                f"{blocks.file.name}: {module.stored!r} has {columns} columns; MXFP4 needs a multiple of 32",
            )
        lead = () if module.expert is None else (module.experts,)
        for entry, shape in (
            (blocks, (*lead, out, columns // _BLOCK, _BLOCK // 2)),
            (scales, (*lead, out, columns // _BLOCK)),
        ):
            if entry.dtype != "U8" and (entry is blocks or entry.dtype != "F8_E8M0"):
                raise LowbitError(
                    "E0213", f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype}, MXFP4 stores U8"
                )
            check_shape(entry, shape, f"MXFP4 with input {columns}")
        return blocks, scales


def _named_like(blocks: TensorEntry, module: StoredModule) -> StoredModule:
    """The module under the name its bias has: ``experts.3.down_proj_bias`` beside ``down_proj_blocks``."""
    if module.expert is not None or blocks.name.endswith(".weight_blocks"):
        return module
    return _Flat(module.name, module.stored, module.shape)


class _Flat(StoredModule):
    """A single module whose tensors are called ``<stored>_<suffix>``."""

    def tensor(self, suffix: str) -> str:
        return f"{self.stored}_{suffix}"


FORMAT = Mxfp4
