"""AWQ checkpoints (Lin et al., 2023) as AutoAWQ, GPTQModel and llm-awq write them; 4 bits a code.

``version: gemm`` packs along *out*; the columns of a word come in the order its kernel unpacks them:

    qweight I32 [in, out / 8]   qzeros I32 [groups, out / 8]   scales F16 [groups, out]
    bits  31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    out   8j+7   8j+5   8j+3   8j+1   8j+6   8j+4   8j+2   8j

``gemv`` packs along *in* in plain order, its zeros and scales padded to Z words a row:

    qweight I32 [out, in / 8]   qzeros I32 [out, Z]   scales F16 [out, 8 Z]

``gemv_fast`` (llm-awq) interleaves four rows in 16-bit words and stores -(zero * scale) rounded to F16:

    qweight I16 [out / 4, in]   qzeros F16 [8 Z, out]   scales F16 [8 Z, out]
    word [R, 64 b + 16 r + s], nibble n = code of row 4 R + r, column 64 b + 32 (s // 8) + 8 n + s % 8

weight[o, i] = (code - zero) * scale; for gemv_fast code * scale + stored, an offset. ``marlin`` files are
read by ``marlin``. GPTQModel's 2, 3 and 8 bits are packed like gemm without the reordering, AutoRound's (2 to
8 bits, a dense stream) with it, eight codes at a time. ``dynamic``: rules of single modules, as GPTQModel's
loader has them.

Where an activation stands between two Linears without a gate (StarCoder2, Falcon, GPT-NeoX),
``mlp.act.scales`` F16 [in] is what the second's input is divided by, packed or plain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import (
    InputRule,
    Notes,
    StoredLinear,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import origin_of
from lowbit.formats.gptq import (
    SCALE_DTYPES,
    check_bits,
    check_group_size,
    dynamic_rules,
    plain_beside_packed,
    read_number,
)
from lowbit.formats.marlin import marlin_scheme, marlin_tensors, read_marlin
from lowbit.formats.matching import Keys, regex, sole_name
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config, quantization_config
from lowbit.numerics.bit_packing import unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

GEMM_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of logical column 0, 1, … of a word
_AFTER_ACTIVATIONS = ("c_proj", "dense_4h_to_h")
_LAYOUTS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "llm-awq": "gemv_fast",
    "marlin": "marlin",
}


@dataclass(frozen=True)
class AwqRule:
    """How modules are packed. ``layout``: gemm, gemv, gemv_fast or marlin."""

    bits: int
    group_size: int  # -1: the whole input
    layout: str
    symmetric: bool = False  # whether the config promises no zero points
    reordered: bool = True  # whether gemm codes come eight by eight in the kernel's order

    def columns(self, columns: int) -> int:
        """Columns of a group."""
        return columns if self.group_size == -1 or self.group_size >= columns else self.group_size


class Awq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "awq"
    aliases = ("awq_marlin", "marlin")
    reference: ClassVar[str] = "autoawq"
    unused: ClassVar[tuple[str, ...]] = (r".*\.workspace",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        values, self.place = found.values, found.place
        written = str(
            values.get("version") or values.get("format") or values.get("checkpoint_format") or "gemm"
        )
        if values.get("backend") == "llm-awq":
            written = "llm-awq"
        layout = _LAYOUTS.get(written.lower())
        if layout is None:
            raise LowbitError(
                "E0218",
                f"{self.place}: AWQ version {printable(repr(written))} is not known; "
                f"known: {', '.join(_LAYOUTS)}",
            )
        self.rule = _rule(values, layout, self.place)
        place = f"{self.place}.dynamic"
        rules = [(key, _rule({**values, **own}, layout, place)) for key, own in dynamic_rules(found)]
        self.dynamic = Keys(rules, regex, sole_name)
        require_tensors(header, (".qweight", ".B"), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method awq, or AutoAWQ's quant_config.json."""
        found = quantization_config(header)
        if found is None or found.method.lower() not in ("awq", "awq_marlin"):
            return None
        if "export" in found.values:
            return None  # Quark in its "custom" dress: quark reads it
        return f"{found.place} says {found.method}"

    def describe(self) -> str:
        """Bits and group, as the config gives them."""
        group = "per channel" if self.rule.group_size == -1 else f"group {self.rule.group_size}"
        return f"awq, {self.rule.bits}-bit, {group} in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From shapes and config."""
        if self.rule.layout == "marlin":
            return marlin_scheme(self.header, module)
        return awq_scheme(self.header, module, self.rule_of(module))

    def rule_of(self, module: StoredModule) -> AwqRule:
        """The config's rule, or that of the first of GPTQModel's patterns that matches."""
        return self.dynamic.first(module.stored) or self.rule

    def _tensors(self, module: StoredModule) -> list[str]:
        """qweight, qzeros and scales."""
        if self.rule.layout == "marlin":
            return marlin_tensors(self.header, module)
        return awq_tensors(self.header, module)

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked and put in order."""
        if self.rule.layout == "marlin":
            return read_marlin(self.header, module, data)
        return read_awq(self.header, module, data, self.rule_of(module))

    def _is_dense(self, module: StoredModule) -> bool:
        return plain_beside_packed(self.header, module)

    def _beside(self, module: StoredModule) -> list[str]:
        """The scales of the activation before it."""
        entry = self._activation_scales(module)
        return [] if entry is None else [entry.name]

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """As stored, and what its input is divided by."""
        stored, entry = super().read(module, data), self._activation_scales(module)
        if entry is None:
            return stored
        check_shape(entry, (module.shape[1],), "AWQ behind a scaled activation")
        scales = finite_scales(self.header, entry.name, data.tensor(entry.name)).float()
        if not bool(scales.all()):
            raise LowbitError(
                "E0215",
                f"{entry.file.name}: tensor {entry.name!r} holds zeros, and inputs are divided by it; the "
                "file is damaged, download it again",
            )
        return replace(stored, input=InputRule(multiplier=1.0 / scales))

    def _activation_scales(self, module: StoredModule) -> TensorEntry | None:
        parent, _, leaf = module.stored.rpartition(".")
        return self.header.tensors.get(f"{parent}.act.scales") if leaf in _AFTER_ACTIVATIONS else None


def _rule(values: dict[str, object], layout: str, place: str) -> AwqRule:
    bits = check_bits(
        read_number(values, place, "bits", "w_bit"), (2, 3, 4, 8) if layout == "gemm" else (4,), place
    )
    return AwqRule(
        bits,
        check_group_size(read_number(values, place, "group_size", "q_group_size"), place),
        layout,
        symmetric=values.get("zero_point") is False or values.get("sym") is True,
        reordered=bits == 4,
    )


def awq_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """qweight and scales; qzeros where they are."""
    zeros = module.tensor("qzeros")
    found = [zeros] if zeros in header.tensors else []
    return [module.tensor("qweight"), module.tensor("scales"), *found]


def awq_scheme(header: CheckpointHeader, module: StoredModule, rule: AwqRule) -> Scheme:
    """The scheme by config; a module whose packing cannot be right is E0213."""
    _check_packing(header, module, rule)
    dtype = SCALE_DTYPES[header.tensors[module.tensor("scales")].dtype]
    columns = module.shape[1]
    block = (1, 0 if rule.columns(columns) == columns else rule.group_size)
    offset = rule.layout == "gemv_fast"
    has_zeros = module.tensor("qzeros") in header.tensors
    symmetric = not has_zeros
    return Scheme(
        number_format(f"{'int' if symmetric else 'uint'}{rule.bits}"),
        (block,),
        (number_format(dtype),),
        zero="none" if symmetric or offset else "integer",
        offset=offset and has_zeros,
    )


def _check_packing(header: CheckpointHeader, module: StoredModule, rule: AwqRule) -> None:
    refuse_stack(module, "AWQ packing")
    (out, columns), bits = module.shape, rule.bits
    group = rule.columns(columns)
    groups = -(-columns // group)
    what = f"{bits}-bit AWQ ({rule.layout}) with input {columns} and group size {rule.group_size}"
    words = -(-out * bits // 32)
    padded = _padded_zeros(groups, group)  # words of zeros in a gemv row
    shapes = {
        "gemm": ((columns, words), (groups, words), (groups, out)),
        "gemv": ((out, columns // 8), (out, padded), (out, padded * 8)),
        "gemv_fast": ((out // 4, columns), (padded * 8, out), (padded * 8, out)),
    }[rule.layout]
    fast = rule.layout == "gemv_fast"
    check_shape(entry_of(header, module, "qweight", ("I16",) if fast else ("I32",), what), shapes[0], what)
    if module.tensor("qzeros") in header.tensors:
        dtypes = ("F16", "BF16") if fast else ("I32",)
        check_shape(entry_of(header, module, "qzeros", dtypes, what), shapes[1], what)
    elif not rule.symmetric:
        raise LowbitError(
            "E0209",
            f"{header.root.name}: no file contains {module.tensor('qzeros')!r}, which {what} needs: "
            "nothing in the config says that there are no zero points",
        )
    check_shape(entry_of(header, module, "scales", tuple(SCALE_DTYPES), what), shapes[2], what)
    if fast and (columns % 64 or out % 4):
        raise LowbitError(
            "E0213", f"{header.root.name}: {module.stored!r} is {out} x {columns}; {what} needs 4 x 64"
        )


def _padded_zeros(groups: int, group: int) -> int:
    """Words of zero points in a row of the gemv layouts: its kernels read them a few at a time."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    words = -(-groups // 8)
    return -(-words // multiple) * multiple


def read_awq(
    header: CheckpointHeader, module: StoredModule, data: TensorData, rule: AwqRule
) -> QuantizedTensor:
    """One module in canonical form."""
    scheme = awq_scheme(header, module, rule)
    out, columns = module.shape
    groups = -(-columns // rule.columns(columns))
    qweight = data.tensor(module.tensor("qweight"))
    scales = finite_scales(header, module.tensor("scales"), data.tensor(module.tensor("scales")))
    qzeros = data.tensor(module.tensor("qzeros")) if module.tensor("qzeros") in header.tensors else None
    offsets: tuple[Tensor, ...] = ()
    zeros = None
    if rule.layout == "gemm":
        codes = _gemm_codes(qweight, rule, out).T  # (out, in)
        scales = scales.T
        zeros = None if qzeros is None else _gemm_codes(qzeros, rule, out).T
    elif rule.layout == "gemv":
        codes = unpack_words(qweight, 4, columns)
        scales = scales[:, :groups]
        zeros = None if qzeros is None else unpack_words(qzeros, 4, groups)
    else:
        codes = _fast_codes(qweight, out, columns)
        scales = scales[:groups].T
        if qzeros is not None:
            stored = finite_scales(header, module.tensor("qzeros"), qzeros)
            offsets = (stored[:groups].T.contiguous(),)
    if zeros is not None and bool((zeros == 1 << rule.bits - 1).all()):
        zeros = None
        scheme = Scheme(number_format(f"int{rule.bits}"), scheme.blocks, scheme.scales)
    return QuantizedTensor(
        scheme,
        module.shape,
        codes.contiguous(),
        (scales.contiguous(),),
        None if zeros is None else zeros.contiguous(),
        offsets,
        origin=origin_of(header, module, "qweight"),
    )


def _gemm_codes(words: Tensor, rule: AwqRule, out: int) -> Tensor:
    """uint8 (rows, out). Wider codes than a word's own straddle words; the order is of eight codes still."""
    padded = -(-out // 8) * 8
    codes = unpack_words(words, rule.bits, padded, dim=1)
    if rule.reordered and codes.shape[1] == padded:
        codes = codes.unflatten(1, (-1, 8))[..., list(GEMM_ORDER)].flatten(1)
    return codes[:, :out]


def _fast_codes(words: Tensor, out: int, columns: int) -> Tensor:
    """gemv_fast int16 (out / 4, in) -> uint8 (out, in)."""
    view = words.view(out // 4, columns // 64, 4, 2, 8).int()  # (R, block, row, half, s % 8)
    nibbles = torch.stack([view >> 4 * n & 15 for n in range(4)], dim=-2)  # (R, block, row, half, n, s % 8)
    return nibbles.permute(0, 2, 1, 3, 4, 5).reshape(out, columns).to(torch.uint8)


FORMAT = Awq
