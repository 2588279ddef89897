"""ParoQuant checkpoints (Liang et al., 2025) as the method's own tool and GPTQModel write them: AWQ's int4
under rotations of pairs of inputs.

    qweight  I32 [in, out / 8]   qzeros I32 [groups, out / 8]   scales [groups, out]    as ``awq`` packs gemm
    channel_scales  float [1, in] or [in]
    pairs    I16 [krot, in]      columns of a group: i, j, i, j, …; each of the group's once
    theta    float [krot, in / 2]    an angle for each pair

    x = x * channel_scales; then krot times, all pairs of a group at once:
    x[i], x[j] = x[i] cos + x[j] sin, x[j] cos - x[i] sin
    y = x (code - zero)^T * scale

Groups of pairs are the weight's own. The own tool's mixtures of experts have one rotation for all experts of
a layer: ``experts.gate_up_weight_theta`` and ``experts.down_weight_theta``, and so on. GPUs round x to its
type after every step, and their sines are approximate; here all of it is float32.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, Notes, StoredModule, check_shape, finite_scales, require_tensors
from lowbit.formats.awq import AwqRule, awq_scheme, awq_tensors, read_awq
from lowbit.formats.gptq import check_bits, check_group_size, read_number
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import RotationScheme, Scheme

_FLOATS = ("F16", "BF16", "F32")
_PARTS = {"theta": _FLOATS, "pairs": ("I16", "I32", "I64"), "channel_scales": _FLOATS}
_OF_EXPERTS = {"gate_proj": "gate_up_weight", "up_proj": "gate_up_weight", "down_proj": "down_weight"}


class ParoQuant(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "paroquant"
    reference: ClassVar[str] = "gptqmodel"
    sign: ClassVar[str] = "qweight"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        bits = check_bits(read_number(found.values, self.place, "bits"), (4,), self.place)
        group = check_group_size(read_number(found.values, self.place, "group_size"), self.place)
        self.steps = read_number(found.values, self.place, "krot")
        self.rule = AwqRule(bits, group, "gemm")
        require_tensors(header, (".qweight",), self.place, self.name)
        self._shared: dict[str, Rotation] = {}  # of all experts of a layer

    def describe(self) -> str:
        """Group and rotations, as the config gives them."""
        group = "per channel" if self.rule.group_size == -1 else f"group {self.rule.group_size}"
        return f"paroquant, 4-bit, {group}, {self.steps} rotations in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From shapes and config."""
        scheme = awq_scheme(self.header, module, self.rule)
        self._names(module)
        return self._rotated(scheme, module)

    def _tensors(self, module: StoredModule) -> list[str]:
        """The packed weight's, and those of the rotation."""
        return awq_tensors(self.header, module) + list(self._names(module).values())

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The rotated weight."""
        weight = read_awq(self.header, module, data, self.rule)
        return replace(weight, scheme=self._rotated(weight.scheme, module))

    def _input(self, module: StoredModule, data: TensorData) -> InputRule:
        """The scales and rotations of its input."""
        names = self._names(module)
        if not names["theta"].startswith(f"{module.stored}."):  # all experts'
            if names["theta"] not in self._shared:
                self._shared[names["theta"]] = self._rotation(module, names, data)
            return InputRule(rotation=self._shared[names["theta"]])
        return InputRule(rotation=self._rotation(module, names, data))

    def _rotated(self, scheme: Scheme, module: StoredModule) -> Scheme:
        kind = RotationScheme("givens", self.rule.columns(module.shape[1]))
        return Scheme(scheme.weight, scheme.blocks, scheme.scales, zero=scheme.zero, rotation=kind)

    def _names(self, module: StoredModule) -> dict[str, str]:
        """The rotation's tensors, of the shapes that they must have."""
        columns = module.shape[1]
        group = self.rule.columns(columns)
        if columns % group or group % 2:
            raise LowbitError(
                "E0212",
                f"{self.place}.group_size is {self.rule.group_size}, and {module.name} has {columns} inputs: "
                "they are no whole groups of pairs",
            )
        shapes = {
            "theta": (self.steps, columns // 2),
            "pairs": (self.steps, columns),
            "channel_scales": (1, columns),
        }
        names = {part: module.tensor(part) for part in shapes}
        expert = re.fullmatch(r"(.*)\.\d+\.(gate_proj|up_proj|down_proj)", module.stored)
        if names["theta"] not in self.header.tensors and expert is not None:
            names = {part: f"{expert[1]}.{_OF_EXPERTS[expert[2]]}_{part}" for part in shapes}
        what = f"ParoQuant with {self.steps} rotations (krot)"
        for part, name in names.items():
            entry = self.header.tensors.get(name)
            if entry is None:
                raise LowbitError("E0209", f"{self.header.root.name}: no file contains {name!r} ({what})")
            if entry.dtype not in _PARTS[part]:
                raise LowbitError(
                    "E0213",
                    f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; {what} stores "
                    f"{' or '.join(_PARTS[part])}",
                )
            if part != "channel_scales" or entry.shape != (columns,):
                check_shape(entry, shapes[part], what)
        return names

    def _rotation(self, module: StoredModule, names: dict[str, str], data: TensorData) -> Rotation:
        columns = module.shape[1]
        group = self.rule.columns(columns)
        shape = (self.steps, columns // group, group // 2)
        angles, scales = (
            finite_scales(self.header, names[part], data.tensor(names[part])).float()
            for part in ("theta", "channel_scales")
        )
        pairs = data.tensor(names["pairs"]).long().view(*shape, 2)
        whole = torch.arange(group).expand(*shape[:2], group)
        if not torch.equal(pairs.flatten(2).sort().values, whole):
            wrong = self._first_wrong(pairs.flatten(2), whole)
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(names['pairs'])}: tensor {names['pairs']!r} does not pair all {group} "
                f"columns of group {wrong[1]} in rotation {wrong[0]}; the file is damaged",
            )
        before = None if bool((scales == 1).all()) else scales.flatten().contiguous()
        return Rotation.givens(group, pairs, angles.view(shape), before)

    @staticmethod
    def _first_wrong(pairs: Tensor, whole: Tensor) -> list[int]:
        return (pairs.sort().values != whole).any(-1).nonzero()[0].tolist()


FORMAT = ParoQuant
