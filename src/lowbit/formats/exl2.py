"""EXL2 checkpoints (ExLlamaV2): groups of columns of different widths, in the order of their importance.

    q_weight     I32 [rows, out]       a column's codes one after another from the lowest bit, 32 codes of b
                                       bits in b words below each other; groups follow one another
    q_groups     I16 [2 groups]        (bits, first row of q_weight) of each group
    q_scale      I32 [groups, out / 8] 4 bits a group and column, eight in a word from the lowest
    q_scale_max  F16 [groups]
    q_invperm    I32 [in]              where input column i lies among the stored ones

    scale = (q + 1)^2 * (q_scale_max / 256)     weight = (code - 2^(b - 1)) * scale

Widths of 2, 3, 4, 5, 6 and 8 bits stand in one matrix. Canonically it has the widest of them: a narrower
code is moved so that its middle is the wide one's, which is the same number. Groups become the largest size
that divides all of them, scales repeated. So the matrix takes the room of its widest group; ``inspect`` shows
it. Scales are multiplied in float16 as the tool does; it rounds the weight to float16 too, here it is exact.

Output columns may be padded to a multiple of 32 (the head). The tool runs on GPUs only; its quantizing and
packing kernels and those that reconstruct, compiled for a CPU, made the fixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import origin_of
from lowbit.formats.exllama import ExLlama
from lowbit.formats.partly_dense import refuse_stack
from lowbit.formats.quantization_config import claimed_by_tensors
from lowbit.numerics.bit_packing import unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_WIDTHS = (2, 3, 4, 5, 6, 8)
_WHAT = "an EXL2 weight"


@dataclass(frozen=True)
class _Group:
    bits: int
    row: int  # of q_weight
    columns: int


class Exl2(ExLlama):
    """See the module docstring."""

    name: ClassVar[str] = "exl2"
    reference: ClassVar[str] = "exllamav2"
    sign: ClassVar[str] = "q_weight"

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method, or no config and tensors that only EXL2 has."""
        return claimed_by_tensors(header, ".q_invperm", cls.name)

    def _scheme(self, module: StoredModule) -> Scheme:
        """The widest code and the common size of the groups."""
        return _common_scheme(self._groups(module), module.shape[1])

    def _tensors(self, module: StoredModule) -> list[str]:
        """Everything of the layer."""
        suffixes = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm")
        return [module.tensor(suffix) for suffix in suffixes]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes of one width, scales as float16."""
        groups, (out, columns) = self._groups(module), module.shape
        scheme = _common_scheme(groups, columns)
        widest, size = int(scheme.weight.bits), scheme.blocks[0][1]
        words = data.tensor(module.tensor("q_weight"))
        codes = torch.empty(out, columns, dtype=torch.uint8)
        at = 0
        for group in groups:
            rows = words[group.row : group.row + group.columns * group.bits // 32, :out]
            narrow = unpack_words(rows.T.contiguous(), group.bits, group.columns)
            codes[:, at : at + group.columns] = narrow + ((1 << widest - 1) - (1 << group.bits - 1))
            at += group.columns
        repeats = torch.tensor([group.columns // size for group in groups])
        return QuantizedTensor(
            scheme,
            module.shape,
            codes,
            (self._scales(module, data).repeat_interleave(repeats, 1),),
            column_order=self._order(module, data),
            origin=origin_of(self.header, module, "q_weight"),
        )

    def _scales(self, module: StoredModule, data: TensorData) -> Tensor:
        """F16 (out, groups)."""
        name = module.tensor("q_scale_max")
        largest = finite_scales(self.header, name, data.tensor(name)) * (1 / 256)  # (groups,) F16
        stored = data.tensor(module.tensor("q_scale"))  # (groups, out / 8)
        small = unpack_words(stored, 4, stored.shape[1] * 8)[:, : module.shape[0]]
        squares = (small.int() + 1).square().half()
        return finite_scales(self.header, name, squares * largest[:, None]).T.contiguous()

    def _order(self, module: StoredModule, data: TensorData) -> Tensor:
        """int64 (in,): the input column of each stored one."""
        name, columns = module.tensor("q_invperm"), module.shape[1]
        stored = data.tensor(name)
        inverse = stored.long() & 0xFFFF if stored.dtype == torch.int16 else stored.long()
        if bool((inverse < 0).any()) or not torch.equal(inverse.sort().values, torch.arange(columns)):
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} is no permutation of {columns} columns; the "
                "file is damaged",
            )
        return torch.argsort(inverse)

    def _groups(self, module: StoredModule) -> list[_Group]:
        """The groups, whose sizes are in the data; every shape and place checked."""
        refuse_stack(module, "EXL2's packing")
        (out, columns), header = module.shape, self.header
        weight = entry_of(header, module, "q_weight", ("I32",), _WHAT)
        largest = entry_of(header, module, "q_scale_max", ("F16",), _WHAT)
        padded = -(-out // 32) * 32
        if len(weight.shape) != 2 or weight.shape[1] not in (out, padded) or len(largest.shape) != 1:
            check_shape(weight, (weight.shape[0] if weight.shape else 0, out), _WHAT)
            raise self._wrong(largest, "one number a group")
        rows, count = weight.shape[0], largest.shape[0]
        told = entry_of(header, module, "q_groups", ("I16",), _WHAT)
        check_shape(told, (2 * count,), _WHAT)
        scale = entry_of(header, module, "q_scale", ("I32",), _WHAT)
        if len(scale.shape) != 2 or scale.shape[0] != count or not out <= 8 * scale.shape[1] < out + 32 + 8:
            check_shape(scale, (count, -(-out // 8)), _WHAT)
        check_shape(entry_of(header, module, "q_invperm", ("I32", "I16"), _WHAT), (columns,), _WHAT)
        numbers = self._numbers(told)
        if not any(numbers):  # only headers were fetched: the middle width stands for them all
            bits = min((width for width in _WIDTHS if width * columns >= rows * 32), default=8)
            return [_Group(bits, 0, columns)]
        found = []
        for number in range(count):
            bits, first = numbers[2 * number], numbers[2 * number + 1]
            last = numbers[2 * number + 3] if number + 1 < count else rows
            size = (last - first) * 32 // bits if bits in _WIDTHS else 0
            if size <= 0 or size % 32 or (last - first) * 32 % bits or last > rows:
                raise self._wrong(told, f"groups of 2-8 bits and whole rows (group {number} is not)")
            found.append(_Group(bits, first, size))
        if numbers[1] or sum(group.columns for group in found) != columns:
            raise self._wrong(told, f"groups that cover {columns} columns")
        return found

    def _numbers(self, entry: TensorEntry) -> list[int]:
        """Unsigned 16-bit numbers, read from the file by themselves."""
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            raw = file.read(entry.nbytes)
        return [int.from_bytes(raw[at : at + 2], "little") for at in range(0, len(raw), 2)]

    def _wrong(self, entry: TensorEntry, expected: str) -> LowbitError:
        return LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {expected} "
            "are expected. The file is damaged, or config and weights are from different models",
        )


def _common_scheme(groups: list[_Group], columns: int) -> Scheme:
    widest = max(group.bits for group in groups)
    size = math.gcd(columns, *(group.columns for group in groups))
    return Scheme(number_format(f"int{widest}"), ((1, size),), (number_format("f16"),), reordered=True)


FORMAT = Exl2
