"""GGUF's blocks in safetensors, as GPTQModel writes them (``quant_method: gguf``).

    qweight  U8 [out, row bytes]   the blocks of a row one after another, of one type; bias float [out]

``bits`` and ``format`` of the config name the type: 4 and q_k_m are Q4_K, as are q_k and q_k_s; 8 and q_0
are Q8_0; ``dynamic`` may name another for some modules. Rows are padded with zeros to whole blocks: such a
weight's blocks are taken apart. Q2_0 has 64 weights a block here, a float16 d and codes of which 1 stands
for zero:

    weight = (code - 1) * d      byte 2 + j holds codes 4j … 4j + 3, the lowest bits first
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import origin_of
from lowbit.formats.gptq import dynamic_rules
from lowbit.formats.matching import Keys, regex, sole_name
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config, says_method
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_TYPES = {
    "q1_0": "gguf_q1_0",
    "q1_0_g128": "gguf_q1_0",
    "q2_0": "q2_0",
    "q4_0": "gguf_q4_0",
    "q8_0": "gguf_q8_0",
    **{f"q{bits}_k{size}": f"gguf_q{bits}_k" for bits in (4, 5) for size in ("", "_s", "_m")},
    "q6_k": "gguf_q6_k",
}
_DEFAULTS = {1: "q1_0", 2: "q2_0", 4: "q4_0", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}  # where no format is named
_Q2_0 = (64, 18)  # weights and bytes of a block
_WHAT = "a layer of GGUF blocks"


class GgufLayers(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "gguf-layers"
    aliases = ("gguf",)
    reference: ClassVar[str] = "gptqmodel"
    sign: ClassVar[str] = "qweight"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.kind = _type_of(found.values, self.place)
        rules = [
            (pattern, _type_of({**found.values, "format": None, **values}, f"{self.place}.dynamic"))
            for pattern, values in dynamic_rules(found)
            if "bits" in values or "format" in values
        ]
        self.rules = Keys(rules, regex, sole_name)
        require_tensors(header, (".qweight",), self.place, "gguf")

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """The quant_method of a config: a GGUF file has none."""
        return says_method(header, "gguf")

    def describe(self) -> str:
        """The type of most modules."""
        return f"GGUF blocks in safetensors, {_shown(self.kind)} in {self.place.split(':')[0]}"

    def _kind(self, module: StoredModule) -> str:
        return self.rules.first(module.stored) or self.kind

    def _scheme(self, module: StoredModule) -> Scheme:
        """The block type; of rows that are no whole blocks, what it is made of."""
        kind, (out, columns) = self._kind(module), module.shape
        refuse_stack(module, "GGUF's blocks in safetensors")
        weights, size = _block(kind)
        blocks = -(-columns // weights)
        what = f"{_WHAT} ({_shown(kind)})"
        check_shape(entry_of(self.header, module, "qweight", ("U8",), what), (out, blocks * size), what)
        if kind == "q2_0":
            group = 0 if columns <= weights else weights
            return Scheme(number_format("uint2"), ((1, group),), (number_format("f16"),), zero="integer")
        return Scheme(number_format(kind)) if columns % weights == 0 else _cut_scheme(kind, columns)

    def _tensors(self, module: StoredModule) -> list[str]:
        """The blocks."""
        return [module.tensor("qweight")]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The stored rows, or the columns of them that are the module's."""
        scheme, kind, (out, columns) = self._scheme(module), self._kind(module), module.shape
        codes, origin = data.tensor(module.tensor("qweight")), origin_of(self.header, module, "qweight")
        weights, size = _block(kind)
        if kind == "q2_0":
            blocks = codes.view(out, -1, size)
            scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
            scales = finite_scales(self.header, module.tensor("qweight"), scales)
            codes = unpack_bits(blocks[..., 2:].reshape(out, -1), 2, columns)
            zeros = torch.ones(scales.shape, dtype=torch.uint8)
            return QuantizedTensor(scheme, module.shape, codes, (scales,), zeros, origin=origin)
        padded = (out, codes.shape[1] // size * weights)
        stored = QuantizedTensor(Scheme(number_format(kind)), padded, codes, origin=origin)
        if columns == padded[1]:
            return stored
        return _cut(stored, columns)


def _shown(kind: str) -> str:
    return kind.removeprefix("gguf_").upper()


def _block(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    layout = None if kind == "q2_0" else number_format(kind).block
    return _Q2_0 if layout is None else (layout.weights, layout.bytes)


def _cut(stored: QuantizedTensor, columns: int) -> QuantizedTensor:
    """The first columns, with one scale for each of the smallest groups: the product of float16's 11 bits and
    a whole number's 8 is exact."""
    parts = stored.expand()
    (_, width), groups = parts.scheme.blocks[0], parts.scales[0].shape[1]
    needed = -(-columns // width)

    def together(levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        one = levels[0]
        for level in levels[1:]:
            one = one * level.repeat_interleave(groups // level.shape[1], 1)
        return (one[:, :needed].contiguous(),)

    scheme = Scheme(
        parts.scheme.weight,
        ((1, 0 if width >= columns else width),),
        (number_format("f32"),),
        offset=parts.scheme.offset,
    )
    return QuantizedTensor(
        scheme,
        (stored.shape[0], columns),
        parts.codes[:, :columns].contiguous(),
        together(parts.scales),
        offsets=together(parts.offsets) if parts.offsets else (),
        origin=stored.origin,
    )


@cache
def _cut_scheme(kind: str, columns: int) -> Scheme:
    weights, size = _block(kind)
    blocks = torch.zeros(1, -(-columns // weights) * size, dtype=torch.uint8)
    shape = (1, -(-columns // weights) * weights)
    return _cut(QuantizedTensor(Scheme(number_format(kind)), shape, blocks), columns).scheme


def _type_of(values: dict[str, object], place: str) -> str:
    """``bits`` may say all of it ("q4_k_m"), or the number that ``format`` ("q_k_m") leaves out."""
    bits, named = values.get("bits"), values.get("format")
    key = str(bits).lower().replace("-", "_")
    if isinstance(bits, int) and not isinstance(bits, bool):
        known = isinstance(named, str) and named.startswith("q_")
        key = f"q{bits}{str(named)[1:]}" if known else _DEFAULTS.get(bits, str(bits))
    if key not in _TYPES:
        raise LowbitError(
            "E0212",
            f"{place}: bits {printable(repr(bits))} and format {printable(repr(named))} name no type of "
            f"GGUF's that is written so; known: {', '.join(_TYPES)}",
        )
    return _TYPES[key]


FORMAT = GgufLayers
