"""GPTQ checkpoints (Frantar et al., 2022) as AutoGPTQ, GPTQModel, Optimum and AutoRound write them.

    qweight  I32 [in * bits / 32, out]   codes packed along in, a little-endian bit stream per column
    qzeros   I32 [groups, out * bits / 32]   zero points packed along out
    scales   F16 [groups, out]      g_idx  I32 [in]: the group of each input column

A 4-bit word at [r, o]:   bits 31..28 … 7..4 3..0  =  code[8r+7, o] … code[8r+1, o] code[8r, o].
3-bit codes straddle words: 32 codes in 3. ``gptq_p`` (planar) stores 32 codes as bit planes of 4, 2 and 1.

weight[o, i] = (code[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

v1 files (``checkpoint_format: gptq``) store zero - 1, v2 files and planar ones the zero. A symmetric file
proves which: every field is 2^(bits-1) - 1 or 2^(bits-1). In an asymmetric v1 file a zero of 0 wraps:
GPTQModel adds 1 to the whole word, so a borrow reaches the neighbours; other writers wrap each field.
Act-order (``g_idx`` not i // group_size) becomes a column order. Marlin files hold the same codes in
tensor-core tiles (``marlin``; ``marlin_24`` where two of four columns are kept). An embedding that GPTQModel
quantized lies the other way: the vocabulary is what a Linear's inputs are, a group of ``group_size`` words
has a scale for each column. ``rotation``: inputs of down_proj are rotated at run time (``gptq_rotation``).
Stacked experts, adapters and other pack dtypes than int32 are refused.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import (
    InputRule,
    Notes,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import origin_of
from lowbit.formats.gptq_rotation import asks_for_rotation, is_rotated, rotation_of
from lowbit.formats.marlin import marlin_scheme, marlin_tensors, read_marlin
from lowbit.formats.marlin_24 import marlin_24_scheme, marlin_24_tensors, read_marlin_24
from lowbit.formats.matching import Keys, regex, sole_name
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import QuantizationConfig, claimed_config, says_method
from lowbit.numerics.bit_packing import unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import RotationScheme, Scheme

_log = logging.getLogger("lowbit")

SCALE_DTYPES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}
# What GPTQModel adds to whole words of v1 zero points; for 3 bits, before 7.0, a number for each of 3 words.
_WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_WORD_ONES_3 = (0x24924924, 0x92492492, 0x49249249)
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class GptqRule:
    """How one module is packed. ``zeros``: "v1" stores zero - 1. ``sym``: None where nothing says."""

    bits: int
    group_size: int  # -1: the whole input
    zeros: str = "v1"
    sym: bool | None = None
    desc_act: bool = False
    planar: bool = False
    gptqmodel: int | None = None  # its major version, where it wrote the file
    static_groups: bool = False

    def columns(self, columns: int) -> int:
        """Columns of a group."""
        return columns if self.group_size == -1 or self.group_size >= columns else self.group_size


class Gptq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "gptq"
    aliases = ("gptq_marlin", "gptq_marlin_24", "marlin", "gptq_bitblas", "exllama")
    reference: ClassVar[str] = "gptqmodel"
    unused: ClassVar[tuple[str, ...]] = (r".*\.workspace",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.config = found
        self.marlin = _marlin_of(found)
        self.rule = _base_rule(found)
        self.dynamic = Keys(dynamic_rules(found), regex, sole_name)
        self.rotates = asks_for_rotation(header, found)
        for key in ("adapter", "lora"):
            if found.values.get(key):
                raise LowbitError(
                    "E0218", f"{found.place}.{key}: adapters inside a checkpoint are not applied"
                )
        if found.values.get("activation"):  # GPTQModel's W4A-FP8 and NVFP4, chosen when it runs the model
            _log.warning(
                "lowbit: %s.activation asks for inputs that are quantized too; they are left as they are",
                found.place,
            )
        require_tensors(header, (".qweight", ".B", ".B_24"), found.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method gptq (or its Marlin form), or quantize_config.json."""
        return says_method(header, "gptq", "marlin", "gptq_marlin", "gptq_marlin_24")

    def describe(self) -> str:
        """Bits and group, as the config gives them."""
        group = "per channel" if self.rule.group_size == -1 else f"group {self.rule.group_size}"
        return f"{self.name}, {self.rule.bits}-bit, {group} in {self.config.place.split(':')[0]}"

    def rule_of(self, module: StoredModule) -> GptqRule:
        """The config's rule with the module's own overrides; the first matching pattern wins."""
        values = self.dynamic.first(module.stored)
        return self.rule if values is None else _overridden(self.rule, values, self.config.place)

    def _sparse(self, module: StoredModule) -> tuple[int, int]:
        """(bits, columns of a group) of sparse Marlin."""
        rule = self.rule_of(module)
        return rule.bits, rule.columns(module.shape[1])

    def _scheme(self, module: StoredModule) -> Scheme:
        """From shapes and config; whether zeros and order are trivial only the data say."""
        return self._rotated(self._packed(module), module)

    def _packed(self, module: StoredModule) -> Scheme:
        if self.marlin == "marlin_24":
            return marlin_24_scheme(self.header, module, *self._sparse(module))
        if self.marlin:
            return marlin_scheme(self.header, module)
        if (turned := _turned(self.header, module)) is not None:
            return _upright(gptq_scheme(self.header, turned, self.rule_of(module)), module, self.config.place)
        return gptq_scheme(self.header, module, self.rule_of(module))

    def _tensors(self, module: StoredModule) -> list[str]:
        """qweight, qzeros, scales and g_idx."""
        if self.marlin == "marlin_24":
            return marlin_24_tensors(module)
        return marlin_tensors(self.header, module) if self.marlin else gptq_tensors(self.header, module)

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, zeros decoded, columns in group order."""
        weight = self._unpacked(module, data)
        return replace(weight, scheme=self._rotated(weight.scheme, module))

    def _unpacked(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        if self.marlin == "marlin_24":
            return read_marlin_24(self.header, module, data, *self._sparse(module))
        if self.marlin:
            return read_marlin(self.header, module, data)
        if (turned := _turned(self.header, module)) is not None:
            found = read_gptq(self.header, turned, data, self.rule_of(module), self.notes)
            return QuantizedTensor(
                _upright(found.scheme, module, self.config.place),
                module.shape,
                found.codes.T.contiguous(),
                tuple(scales.T.contiguous() for scales in found.scales),
                None if found.zeros is None else found.zeros.T.contiguous(),
                origin=found.origin,
            )
        return read_gptq(self.header, module, data, self.rule_of(module), self.notes)

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """What it is rotated by."""
        rotated = self.rotates and is_rotated(module, self.config.place)
        return InputRule(rotation=rotation_of(module.shape[1])) if rotated else None

    def _rotated(self, scheme: Scheme, module: StoredModule) -> Scheme:
        rotated = self.rotates and is_rotated(module, self.config.place)
        return replace(scheme, rotation=RotationScheme("hadamard", module.shape[1])) if rotated else scheme

    def _is_dense(self, module: StoredModule) -> bool:
        return plain_beside_packed(self.header, module)


def _turned(header: CheckpointHeader, module: StoredModule) -> StoredModule | None:
    """An embedding as the Linear it is packed like, with the vocabulary for its inputs; None of any other."""
    rows, columns = module.shape
    entry = header.tensors.get(module.tensor("qweight"))
    if entry is None or module.expert is not None or len(entry.shape) != 2:
        return None
    return replace(module, shape=(columns, rows)) if entry.shape[1] == columns != rows else None


def _upright(scheme: Scheme, module: StoredModule, place: str) -> Scheme:
    """The scheme of an embedding from that of its transpose."""
    if scheme.reordered:
        raise LowbitError(
            "E0218",
            f"{place}: the vocabulary of {module.stored!r} is quantized in another order (desc_act), which "
            "is not read; quantize its embedding without",
        )
    return replace(scheme, blocks=tuple((columns, rows) for rows, columns in scheme.blocks))


def plain_beside_packed(header: CheckpointHeader, module: StoredModule) -> bool:
    """Whether a module of GPTQ's or AWQ's files is plain; one that has neither tensor lacks its codes."""
    packed = any(module.tensor(suffix) in header.tensors for suffix in ("qweight", "B", "B_24"))
    return not packed and module.tensor("weight") in header.tensors


def _marlin_of(found: QuantizationConfig) -> str:
    """ "marlin", "marlin_24" or ""."""
    written = str(found.values.get("checkpoint_format") or found.values.get("format") or "").lower()
    if found.method.lower() == "gptq_marlin_24" or written == "marlin_24":
        return "marlin_24"
    told = found.method == "marlin" or written == "marlin" or found.values.get("is_marlin_format") is True
    return "marlin" if told else ""


def read_number(values: dict[str, object], place: str, *keys: str) -> int:
    """The whole number under the first of ``keys`` that is there; E0212 otherwise."""
    for key in keys:
        value = values.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise LowbitError(
                    "E0212", f"{place}.{key} must be a whole number, found {printable(repr(value))}"
                )
            return value
    raise LowbitError("E0212", f"{place} has no {keys[0]!r}; the checkpoint cannot be read without it")


def check_group_size(size: int, place: str) -> int:
    """-1 or a positive number of columns."""
    if size != -1 and size <= 0:
        raise LowbitError(
            "E0212",
            f"{place}.group_size is {size}; expected -1 (per channel) or a positive divisor of the layers' "
            "inputs. The checkpoint is damaged or was made by a faulty tool",
        )
    return size


def check_bits(bits: int, allowed: tuple[int, ...], place: str) -> int:
    """One of ``allowed``."""
    if bits not in allowed:
        raise LowbitError(
            "E0212", f"{place}.bits is {bits}; this format has {', '.join(map(str, allowed))} bits"
        )
    return bits


def _base_rule(found: QuantizationConfig) -> GptqRule:
    values, place = found.values, found.place
    written = str(values.get("checkpoint_format") or values.get("format") or "gptq").lower()
    if written not in ("gptq", "gptq_v2", "gptq_p", "marlin", "marlin_24"):
        raise LowbitError(
            "E0218", f"{place}: GPTQ format {printable(repr(written))} is not read; re-export it as 'gptq'"
        )
    pack = values.get("pack_dtype", "int32")
    if pack != "int32":
        raise LowbitError("E0218", f"{place}.pack_dtype {printable(repr(pack))} is not read; only 'int32' is")
    planar = written == "gptq_p"
    bits = check_bits(
        read_number(values, place, "bits", "w_bit", "wbits"),
        (2, 3, 4, 5, 6, 7, 8) if planar else (2, 3, 4, 8),
        place,
    )
    sym = values.get("sym")
    meta = values.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    quantizers = [quantizers] if isinstance(quantizers, str) else quantizers
    versions = [re.match(r"gptqmodel:(\d+)", str(name).lower()) for name in quantizers or ()]
    majors = [int(match[1]) for match in versions if match]
    return GptqRule(
        bits,
        check_group_size(read_number(values, place, "group_size", "q_group_size"), place),
        "v1" if written == "gptq" else "v2",
        sym if isinstance(sym, bool) else None,
        values.get("desc_act") is True,
        planar,
        majors[0] if majors else None,
        values.get("static_groups") is True or (isinstance(meta, dict) and meta.get("static_groups") is True),
    )


def dynamic_rules(found: QuantizationConfig) -> list[tuple[str, dict[str, object]]]:
    """GPTQModel's patterns, in order; those of modules left alone are dropped: their tensors say so."""
    table = found.values.get("dynamic") or {}
    if not isinstance(table, dict):
        raise LowbitError("E0212", f"{found.place}.dynamic must be an object of patterns")
    rules = []
    for pattern, values in table.items():
        if not pattern.startswith("-:"):
            rules.append((pattern.removeprefix("+:"), values if isinstance(values, dict) else {}))
    return rules


def _overridden(rule: GptqRule, values: dict[str, object], place: str) -> GptqRule:
    known: dict[str, object] = {key: values[key] for key in ("sym", "desc_act") if key in values}
    if "bits" in values:
        allowed = (2, 3, 4, 5, 6, 7, 8) if rule.planar else (2, 3, 4, 8)
        known["bits"] = check_bits(read_number(values, place, "bits"), allowed, f"{place}.dynamic")
    if "group_size" in values:
        known["group_size"] = check_group_size(read_number(values, place, "group_size"), f"{place}.dynamic")
    return replace(rule, **known)  # type: ignore[arg-type]  # checked above


def gptq_scheme(header: CheckpointHeader, module: StoredModule, rule: GptqRule) -> Scheme:
    """The scheme by config; a module whose packing cannot be right is E0213."""
    _check_packing(header, module, rule)
    scales = header.tensors[module.tensor("scales")]
    columns = module.shape[1]
    block = (1, 0 if rule.columns(columns) == columns else rule.group_size)
    symmetric = bool(rule.sym) or module.tensor("qzeros") not in header.tensors
    prefix = "int" if symmetric else "uint"
    return Scheme(
        number_format(f"{prefix}{rule.bits}"),
        (block,),
        (number_format(SCALE_DTYPES[scales.dtype]),),
        zero="none" if symmetric else "integer",
        reordered=rule.desc_act and not rule.static_groups and module.tensor("g_idx") in header.tensors,
    )


def gptq_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """qweight and scales; qzeros and g_idx where they are."""
    optional = [module.tensor(suffix) for suffix in ("qzeros", "g_idx")]
    found = [name for name in optional if name in header.tensors]
    return [module.tensor("qweight"), module.tensor("scales"), *found]


def _check_packing(header: CheckpointHeader, module: StoredModule, rule: GptqRule) -> int:
    """The stored number of columns (a few more than the model's where the writer padded them)."""
    refuse_stack(module, "GPTQ packing")
    out, columns = module.shape
    what = f"{rule.bits}-bit GPTQ with input {columns}"
    qweight = entry_of(header, module, "qweight", ("I32",), what)
    need = -(-columns * rule.bits // 32)
    rows = qweight.shape[0] if len(qweight.shape) == 2 else 0
    stored = rows * 32 // rule.bits
    group = rule.columns(columns)
    padded = stored > columns and stored - columns < max(group, 128) and rows * 32 % rule.bits == 0
    if rows != need and not padded:
        check_shape(qweight, (need, out), what)
    check_shape(qweight, (rows, out), what)
    stored = max(stored, columns)
    groups = -(-(stored if group < columns else columns) // group)
    scales = entry_of(header, module, "scales", tuple(SCALE_DTYPES), what)
    check_shape(scales, (groups, out), f"{what} and group size {rule.group_size}")
    if module.tensor("qzeros") in header.tensors:
        qzeros = entry_of(header, module, "qzeros", ("I32",), what)
        check_shape(qzeros, (groups, -(-out * rule.bits // 32)), f"{what} and group size {rule.group_size}")
    elif rule.sym is not True:
        raise LowbitError(
            "E0209",
            f"{header.root.name}: no file contains {module.tensor('qzeros')!r}, which an asymmetric GPTQ "
            "module needs",
        )
    return stored


def read_gptq(
    header: CheckpointHeader, module: StoredModule, data: TensorData, rule: GptqRule, notes: Notes
) -> QuantizedTensor:
    """One module in canonical form."""
    stored = _check_packing(header, module, rule)
    columns = module.shape[1]
    bits, group = rule.bits, rule.columns(columns)
    qweight = data.tensor(module.tensor("qweight"))
    codes = _unpack(qweight, rule, stored, 0)[:columns].T.contiguous()  # (out, in)
    scales = finite_scales(header, module.tensor("scales"), data.tensor(module.tensor("scales")))
    groups = -(-columns // group)
    scales = scales[:groups].T.contiguous()  # (out, groups)
    zeros = _zeros(header, module, data, rule, notes)
    order = _column_order(header, module, data, rule, notes, group)
    if order is not None:
        codes = codes[:, order]
    middle = 1 << bits - 1
    symmetric = zeros is None or bool((zeros[:, :groups] == middle).all())
    scheme = Scheme(
        number_format(f"{'int' if symmetric else 'uint'}{bits}"),
        ((1, 0 if group == columns else group),),
        (number_format(SCALE_DTYPES[header.tensors[module.tensor("scales")].dtype]),),
        zero="none" if symmetric else "integer",
        reordered=order is not None,
    )
    return QuantizedTensor(
        scheme,
        module.shape,
        codes,
        (scales,),
        None if symmetric or zeros is None else zeros[:, :groups].contiguous(),
        column_order=order,
        origin=origin_of(header, module, "qweight"),
    )


def _unpack(words: Tensor, rule: GptqRule, count: int, dim: int) -> Tensor:
    if not rule.planar or rule.bits in (2, 4, 8):
        return unpack_words(words, rule.bits, count, dim=dim)
    # 32 codes are ``bits`` words: planes of 4, 2 and 1 bits from the lowest, each by itself a bit stream.
    grouped = words.movedim(dim, -1).unflatten(-1, (-1, rule.bits))
    codes, word, shift = None, 0, 0
    for width in _PLANES[rule.bits]:
        plane = unpack_words(grouped[..., word : word + width].contiguous(), width, 32) << shift
        codes = plane if codes is None else codes | plane
        word, shift = word + width, shift + width
    assert codes is not None, "every width has planes"
    return codes.flatten(-2)[..., :count].movedim(-1, dim)


def _zeros(
    header: CheckpointHeader, module: StoredModule, data: TensorData, rule: GptqRule, notes: Notes
) -> Tensor | None:
    """uint8 (out, groups) zero points, or None where none are stored (symmetric)."""
    name = module.tensor("qzeros")
    if name not in header.tensors:
        return None
    words, out = data.tensor(name), module.shape[0]
    fields = _unpack(words, rule, out, 1)
    middle = 1 << rule.bits - 1
    constant = int(fields[0, 0]) if bool((fields == fields[0, 0]).all()) else None
    proved = {middle - 1: "v1", middle: "v2"}.get(-1 if constant is None else constant)
    zeros = rule.zeros
    if rule.sym is not False and proved is not None and proved != zeros:
        notes.contradiction(
            "E0214",
            f"{header.file_of(name)}: stored zero points are {constant} (GPTQ {proved}) but the config says "
            f"GPTQ {zeros} (expects {middle - 1 if zeros == 'v1' else middle}); reading as {proved}",
        )
        zeros = proved
    elif rule.sym is True and proved is None:
        notes.contradiction(
            "E0214",
            f"{header.file_of(name)}: the config says sym but the zero points of {module.stored!r} differ "
            f"(from {int(fields.min())} to {int(fields.max())}); reading them as stored",
        )
    if zeros == "v1":
        fields = _plus_one(words, fields, rule, out)
    return fields.T.contiguous()


def _plus_one(words: Tensor, fields: Tensor, rule: GptqRule, out: int) -> Tensor:
    """v1 zero points: stored + 1, in each field or, as GPTQModel writes them, in the whole word."""
    bits = rule.bits
    if rule.gptqmodel is None or (bits == 3 and rule.gptqmodel >= 7):
        return fields + 1 & (1 << bits) - 1
    if bits == 3:
        ones = torch.tensor(_WORD_ONES_3, dtype=torch.int64).repeat(-(-words.shape[1] // 3))
        ones = ones[: words.shape[1]]
    else:
        ones = torch.tensor(_WORD_ONES[bits], dtype=torch.int64)
    wrapped = (words.long() + ones) & 0xFFFFFFFF
    signed = torch.where(wrapped >= 1 << 31, wrapped - (1 << 32), wrapped).int()
    return unpack_words(signed, bits, out, dim=1)


def _column_order(
    header: CheckpointHeader,
    module: StoredModule,
    data: TensorData,
    rule: GptqRule,
    notes: Notes,
    group: int,
) -> Tensor | None:
    """int64 (in,): columns in the order of their groups, or None where they are already."""
    name, columns = module.tensor("g_idx"), module.shape[1]
    groups = -(-columns // group)
    if name not in header.tensors:
        if rule.desc_act and not rule.static_groups and groups > 1:
            raise LowbitError(
                "E0209",
                f"{header.root.name}: no file contains {name!r}, which desc_act needs to know the group of "
                "each column",
            )
        return None
    entry = entry_of(header, module, "g_idx", ("I32", "I64"), "act-order")
    if len(entry.shape) != 1 or entry.shape[0] < columns:
        check_shape(entry, (columns,), f"act-order with input {columns}")
    return order_of(header, name, data.tensor(name)[:columns].long(), group, rule.desc_act, notes)


def order_of(
    header: CheckpointHeader, name: str, index: Tensor, group: int, desc_act: bool, notes: Notes
) -> Tensor | None:
    """The stable order that makes the groups of ``index`` int64 (in,) contiguous; None if they are."""
    columns = index.numel()
    groups = -(-columns // group)
    trivial = torch.arange(columns) // group
    if torch.equal(index, trivial):
        return None
    low, high = int(index.min()), int(index.max())
    if groups == 1 or (low == high and low <= 0 and not desc_act):
        return None  # a buffer nobody filled in
    if low < 0 or high >= groups:
        raise LowbitError(
            "E0213",
            f"{header.file_of(name)}: tensor {name!r} has groups from {low} to {high}, there are {groups} "
            f"of {group} columns; the file is damaged",
        )
    sizes = torch.bincount(index, minlength=groups)
    expected = torch.bincount(trivial, minlength=groups)
    if not torch.equal(sizes, expected):
        wrong = int((sizes != expected).nonzero()[0])
        raise LowbitError(
            "E0213",
            f"{header.file_of(name)}: tensor {name!r} puts {int(sizes[wrong])} columns into group {wrong}, "
            f"a group has {int(expected[wrong])}; such a module cannot be read",
        )
    if not desc_act:
        notes.contradiction(
            "E0214",
            f"{header.file_of(name)}: tensor {name!r} puts columns in another order but the config says "
            "desc_act false; reading with its order",
        )
    return index.argsort(stable=True)


FORMAT = Gptq
