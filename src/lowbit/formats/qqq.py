"""QQQ checkpoints (Zhang et al., 2024): 4-bit weights, int8 inputs, as GPTQModel and the method's own tool
save them.

    B          I32 [in / 16, out * 2]    codes
    s_channel  F32 [1, out]              a scale a row
    s_group    F16 [in / 128, out]       in groups of 128; else it is empty or not there

    per channel   weight = code * 16 * s_channel            code -8 ... 7, two's complement
    grouped       weight = (code - 8) * s_group * s_channel

Codes and scales lie in tiles as Marlin's do (``marlin``), with other orders: a lane of a tensor core has four
rows next to each other, and eight codes of a word are taken in two orders, one for each kind. A row of 128
columns is per channel whatever the config says; other modules are as ``group_size`` and GPTQModel's
``dynamic`` rules say.

Inputs are rounded to int8 per token, the largest |x| = 127. The tool's kernel rounds (code - 8) * s_group to
int8 once more, as it multiplies; that is not done, which is nearer to what was quantized. Source: GPTQModel's
QQQLinear and QQQTorchLinear, the method's qlinear_marlin.py.
"""

from __future__ import annotations

from typing import ClassVar

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import origin_of
from lowbit.formats.gptq import dynamic_rules
from lowbit.formats.marlin import code_order, codes_in_rows, scales_in_rows
from lowbit.formats.matching import Keys, regex, sole_name
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_GROUP = 128
_GROUPED = code_order(4, (0, 2, 4, 6, 1, 3, 5, 7))
_PER_CHANNEL = code_order(4, (4, 0, 5, 1, 6, 2, 7, 3))


class Qqq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "qqq"
    reference: ClassVar[str] = "gptqmodel"
    sign: ClassVar[str] = "B"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.group = _group_of(found.values, self.place)
        rules = [
            (pattern, _group_of({**found.values, **values}, f"{self.place}.dynamic"))
            for pattern, values in dynamic_rules(found)
        ]
        self.rules = Keys(rules, regex, sole_name)
        require_tensors(header, (".B",), self.place, self.name)

    def describe(self) -> str:
        """Per channel or grouped."""
        groups = "per channel" if self.group == -1 else f"group {self.group}"
        return f"qqq, 4-bit {groups}, int8 inputs in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the config; dtypes and shapes must agree."""
        f32, activation = number_format("f32"), ActivationScheme(number_format("int8"), (1, 0), limit=127.0)
        if not self._grouped(module):
            return Scheme(number_format("int4"), ((1, 0),), (f32,), activation=activation)
        levels = ((1, _GROUP), (1, 0)), (number_format("f16"), f32)
        return Scheme(number_format("int4"), *levels, activation=activation)

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes and scales, an empty one too."""
        names = [module.tensor(suffix) for suffix in ("B", "s_channel", "s_group")]
        return [name for name in names if name in self.header.tensors]

    def _grouped(self, module: StoredModule) -> bool:
        """Whether rows have groups; every tensor checked."""
        (out, columns), header = module.shape, self.header
        refuse_stack(module, "QQQ's packing")
        what = f"QQQ's {out} x {columns} weight"
        packed = entry_of(header, module, "B", ("I32",), what)
        own = self.rules.first(module.stored)
        group = self.group if own is None else own
        grouped = group == _GROUP and columns != _GROUP
        if columns % (_GROUP if grouped else 16) or out % 64:
            raise LowbitError(
                "E0213",
                f"{packed.file.name}: {module.stored!r} is {out} x {columns}; QQQ packs multiples of 64 x "
                f"{_GROUP if grouped else 16}. Config and weights are from different models",
            )
        check_shape(packed, (columns // 16, out * 2), what)
        check_shape(entry_of(header, module, "s_channel", ("F32",), what), (1, out), what)
        if grouped or module.tensor("s_group") in header.tensors:
            scales = entry_of(header, module, "s_group", ("F16",), what)
            check_shape(scales, (columns // _GROUP, out) if grouped else (0,), what)
        return grouped

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes and scales in their places."""
        scheme = self._scheme(module)
        grouped = len(scheme.scales) == 2
        packed = data.tensor(module.tensor("B"))
        codes = codes_in_rows(packed, _GROUPED if grouped else _PER_CHANNEL, module.shape)
        names = (["s_group"] if grouped else []) + ["s_channel"]
        scales = []
        for name in map(module.tensor, names):
            stored = finite_scales(self.header, name, data.tensor(name))
            scales.append(scales_in_rows(stored, name.endswith("s_group")))
        if not grouped:
            codes, scales = codes ^ 8, [scales[0] * 16]  # two's complement, in a byte's high half
        origin = origin_of(self.header, module, "B")
        return QuantizedTensor(scheme, module.shape, codes.contiguous(), tuple(scales), origin=origin)


def _group_of(values: dict[str, object], place: str) -> int:
    """-1 or 128; E0212 where the config says what QQQ has not."""
    for key, wanted in (("wbits", 4), ("bits", 4), ("sym", True), ("desc_act", False)):
        found = values.get(key)
        if found is not None and (found != wanted or isinstance(found, bool) != isinstance(wanted, bool)):
            raise LowbitError(
                "E0212", f"{place}: {key} must be {wanted} for qqq, found {printable(repr(found))}"
            )
    group = values.get("group_size")
    if isinstance(group, bool) or not isinstance(group, int) or group not in (-1, _GROUP):
        raise LowbitError(
            "E0212", f"{place}: group_size must be -1 or 128 for qqq, found {printable(repr(group))}"
        )
    return group


FORMAT = Qqq
