"""HQQ, written as transformers 4 and hqq 0.2 read it: the encoded state of every HQQLinear. The layout is
``hqq``'s.

Unsigned codes of 1, 2, 3, 4, 5, 6 or 8 bits with float zero points: groups along a row (or along the flat
weight, where a row is no whole groups), one for each column, or so many rows of a column as divide it, where
HQQ has them (axis 0). Scales and zero points are of one type, the
layer's compute_dtype. A kind of layer (``self_attn.q_proj``) is quantized in one way, or left alone, in all
layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.hqq import PACKINGS, linear_tag, pack, per_item, row_groups
from lowbit.formats.writing import CheckpointWriter, cannot
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

Json = dict[str, object]

_FLAGS = {
    **dict.fromkeys(("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"), True),
    **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta"), False),
}
_TORCH = {"f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16"}


class HqqWriter(CheckpointWriter):
    """See the module docstring."""

    name = "hqq"
    described = 4096  # twenty small tensors a layer
    writes = "1-6 and 8 bits with float zero points, groups of a row or of a column, as axis 0 has them"
    misread = (
        "transformers 4 with the hqq package loads it. transformers 5 has no code for HQQ's tensors and "
        "opens the folder all the same: after a warning its layers have random weights. The same numbers "
        "for transformers 5: --format dense"
    )

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        self.tags: dict[str, Scheme] = {}
        for name, scheme in self.schemes.items():
            tag = linear_tag(name)
            if self.tags.setdefault(tag, scheme) != scheme and not (
                scheme.is_dense and self.tags[tag].is_dense
            ):
                raise LowbitError(
                    "E0450",
                    f"--format hqq: {name} is {scheme}, other {tag} are {self.tags[tag]}; an HQQ "
                    "checkpoint has one way for all of a kind. Choose another format (dense holds "
                    "everything)",
                )

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, zero points, blocks and sizes, in this order."""
        if scheme.is_dense:
            return None
        bits = int(scheme.weight.bits)
        if scheme.weight.name not in {f"uint{width}" for width in PACKINGS} or scheme.zero != "float":
            widths = ", ".join(map(str, PACKINGS))
            return f"codes are unsigned, of {widths} bits, with float zero points; not {scheme}"
        if scheme.offset or scheme.reordered or scheme.activation is not None or len(scheme.blocks) != 1:
            return f"it has no place for {scheme}"
        if scheme.scales[0].name not in _TORCH:
            return f"scales are {', '.join(_TORCH)}, not {scheme.scales[0].name}"
        axis, size = _groups(scheme, shape)
        if axis and size == 1:
            return "a scale for each weight is no group"
        flat = axis == 1 and shape[1] % size != 0
        if not size or (shape[0] * shape[1]) % size or flat != scheme.flattened:
            return f"groups divide the flat weight: {shape[0]} x {shape[1]} and {scheme} do not fit"
        rows = shape[0] * shape[1] // size if axis else size
        if bits != 3 and rows % per_item(bits):
            return f"{rows} codes are no whole bytes of {bits} bits"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        scheme, scale, zero = weight.scheme, weight.scales[0], weight.zeros
        assert zero is not None, "its scheme has zero points"
        if zero.dtype != scale.dtype:
            raise cannot(self.name, module, f"zero points are {zero.dtype}, scales {scale.dtype}")
        bits, (axis, size) = int(scheme.weight.bits), _groups(scheme, module.shape)
        if scheme.scattered and not torch.equal(
            _stored(weight.row_groups), row_groups(module.shape[0], size)
        ):
            raise cannot(self.name, module, f"the rows of a block are not {module.shape[0] // size} apart")
        grid = (-1, size) if axis else (size, -1)
        one = (-1, 1) if axis else (1, -1)
        found = {
            "W_q": pack(weight.codes.reshape(grid), bits),
            "scale": scale.reshape(one),
            "zero": zero.reshape(one),
            "shape": torch.tensor(module.shape, dtype=torch.int64),
            "packing": _text(PACKINGS[bits]),
            "unpack_view_dtype": _text("torch.int32" if bits == 3 else "torch.uint8"),
            "compute_dtype": _text(_TORCH[scheme.scales[0].name]),
        }
        for name, number in (("nbits", bits), ("group_size", size), ("axis", axis)):
            found[name] = torch.tensor(number, dtype=torch.int32)
        for name, flag in (_FLAGS | {"round_zero": bits == 4}).items():
            found[name] = torch.tensor(int(flag), dtype=torch.uint8)
        return found

    def quantization_config(self) -> Json:
        """transformers' HqqConfig: the same words for all layers, or for each kind its own."""
        quantized = {tag: _rule(scheme) for tag, scheme in self.tags.items() if not scheme.is_dense}
        different = list({str(rule): rule for rule in quantized.values()}.values())
        names = list(self.quantized())
        # transformers skips every module with one of these words in its name: mlp.gate is in mlp.gate_proj.
        skipped = [
            name if any(linear_tag(name) in other for other in names) else linear_tag(name)
            for name in self.left_alone()
        ]
        return {
            "quant_method": "hqq",
            "quant_config": different[0] if len(different) == 1 else dict(quantized),
            "skip_modules": list(dict.fromkeys(skipped)),
        }


def _groups(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """(axis, weights of a group); 0 weights where HQQ has no such groups."""
    rows, columns = scheme.blocks[0]
    if scheme.flattened or rows == 1:
        return 1, columns or shape[1]
    if scheme.scattered and columns == 1 and shape[0] % rows == 0:
        return 0, rows
    return 0, shape[0] if rows in (0, shape[0]) and columns == 1 and not scheme.scattered else 0


def _rule(scheme: Scheme) -> Json:
    """BaseQuantizeConfig's dictionary; a group of a whole column or row is null."""
    size = scheme.blocks[0][0 if scheme.scattered else 1]
    bits, rows = int(scheme.weight.bits), scheme.blocks[0][0]
    axis = 1 if scheme.flattened or rows == 1 else 0
    weight = {
        "nbits": bits,
        "channel_wise": True,
        "group_size": (size or None) if axis or scheme.scattered else None,
        "optimize": True,
        "round_zero": bits == 4,
        "axis": axis,
        "view_as_float": False,
    }
    return {
        "weight_quant_params": weight,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def _stored(row_groups: Tensor | None) -> Tensor:
    assert row_groups is not None, "its scheme is scattered"
    return row_groups


def _text(value: str) -> Tensor:
    """The characters of a string, as HQQ puts one into a tensor."""
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


WRITERS = (HqqWriter,)
