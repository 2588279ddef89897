"""What the tensors of a GPTQ checkpoint prove about its config: zero points and g_idx.

    zero points   symmetric: every field is 2^(bits-1) - 1 (v1 stores zero - 1) or 2^(bits-1) (v2)
    damage        AutoGPTQ wrote v1 zero points of 0 as ones in *all* higher fields of the word:
                  0xFFFF7783 was 0x?????784 before 1 was subtracted, and ? is lost
    g_idx         the group of each input column: i // group_size, or a permutation of that (act-order)

Facts are gathered while ``values.scan`` reads the tensors; ``Packing.judge`` looks at all modules together,
because the config has one ``sym``, one ``desc_act`` and one ``checkpoint_format``. Corrections are certain
only where every module agrees. Bits and groups of a module come from the format's own reading of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import Report
from lowbit.doctor.values import Check
from lowbit.errors import LowbitError, printable, thousands
from lowbit.formats import CheckpointFormat, StoredModule
from lowbit.formats.auto_round import AutoRound
from lowbit.formats.gptq import Gptq, GptqRule
from lowbit.numerics.bit_packing import unpack_words


class ZeroFacts:
    """The fields of one ``qzeros`` tensor I32 [groups, words]."""

    def __init__(self, bits: int, out: int, words: int) -> None:
        self.bits, self.out = bits, out
        self.unit = 4 * words
        self.counts = torch.zeros(1 << bits, dtype=torch.int64)
        self.damaged = 0  # words whose two highest fields or more are all ones
        self.healthy = False  # a field of ones below another: AutoGPTQ's damage never looks so

    def add(self, raw: Tensor) -> None:
        """Count the fields of whole rows."""
        fields = unpack_words(raw.view(torch.int32).view(-1, self.unit // 4), self.bits, self.out, dim=1)
        self.counts += torch.bincount(fields.flatten(), minlength=1 << self.bits)
        size = 32 // self.bits
        if 32 % self.bits or self.out % size:
            return
        ones = fields.unflatten(1, (-1, size)) == (1 << self.bits) - 1
        self.damaged += int((ones[..., -1] & ones[..., -2]).sum())
        self.healthy = self.healthy or bool((ones[..., :-1] & ~ones[..., 1:]).any())

    def finish(self, report: Report) -> None:
        """Judged with all others."""

    @property
    def values(self) -> list[int]:
        """The values that occur."""
        return self.counts.nonzero().flatten().tolist()

    @property
    def proved(self) -> str | None:
        """ "v1" or "v2" where all fields are the middle of that form."""
        middle = 1 << self.bits - 1
        return {middle - 1: "v1", middle: "v2"}.get(self.values[0]) if len(self.values) == 1 else None


class IndexFacts:
    """One whole ``g_idx``."""

    def __init__(self, dtype: str) -> None:
        self._dtype = torch.int64 if dtype == "I64" else torch.int32
        self.unit = self._dtype.itemsize
        self._parts: list[Tensor] = []

    def add(self, raw: Tensor) -> None:
        """Keep a copy: the buffer is used again."""
        self._parts.append(raw.view(self._dtype).long())

    def finish(self, report: Report) -> None:
        """Judged with all others."""

    @property
    def index(self) -> Tensor:
        """int64 (columns,)."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0, dtype=torch.int64)


@dataclass
class Module:
    """One packed module."""

    stem: str
    rule: GptqRule
    columns: int
    zeros: ZeroFacts | None = None
    index: IndexFacts | None = None

    @property
    def group(self) -> int:
        return self.rule.columns(self.columns)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def trivial(self) -> Tensor:
        """int64 (columns,): the g_idx of columns that lie in order."""
        return torch.arange(self.columns) // self.group


@dataclass
class Packing:
    """The GPTQ modules of a checkpoint. ``place``: the file that holds the config."""

    header: CheckpointHeader
    place: str = ""
    base: GptqRule | None = None  # None: the config's keys are AutoRound's, which has no sym to prove
    modules: list[Module] = field(default_factory=list)

    def checks(self) -> dict[str, list[Check]]:
        """What must see which tensor."""
        found: dict[str, list[Check]] = {}
        for module in self.modules:
            if module.zeros is not None:
                found[f"{module.stem}.qzeros"] = [module.zeros]
            if module.index is not None:
                found[f"{module.stem}.g_idx"] = [module.index]
        return found

    def judge(self, report: Report, correction: Correction) -> None:
        """After the scan."""
        self._judge_order(report, correction)
        self._judge_zeros(report, correction)
        self._judge_damage(report)

    def _say(self, report: Report, rule: str, module: Module, suffix: str, what: str, fix: str = "") -> None:
        name = f"{module.stem}.{suffix}"
        file = self.header.file_of(name)
        message = f"{file}: tensor {printable(name)!r} {what}"
        report.add(rule, message, file=file, tensor=name, fix=fix)

    def _judge_order(self, report: Report, correction: Correction) -> None:
        kinds: dict[str, list[Module]] = {"missing": [], "plain": [], "unfilled": [], "reordered": []}
        for module in self.modules:
            kind = self._order_of(module, report)
            if kind in kinds:
                kinds[kind].append(module)
        moved = [module for module in kinds["reordered"] if not module.rule.desc_act]
        if moved:
            certain = self.base is not None and not self.base.desc_act
            self._say(
                report,
                "D306",
                moved[0],
                "g_idx",
                f"and {len(moved) - 1} more of {len(self.modules)} put columns in another order but "
                f"{self.place} says desc_act false; lowbit reads them with their order",
                "desc_act set to true" if certain else "",
            )
            if certain:
                correction.quantization["desc_act"] = True
        for module in kinds["unfilled"]:
            what = f"is all zero, with {module.groups} groups and desc_act false; lowbit ignores it"
            certain = not moved  # else desc_act false is a lie, and the order may be lost
            fix = "g_idx written as i // group_size" if certain else ""
            self._say(report, "D307", module, "g_idx", what, fix)
            if certain:
                correction.added[f"{module.stem}.g_idx"] = module.trivial.int()
        self._judge_trivial(kinds["missing"], kinds["reordered"], kinds["plain"], report, correction)

    def _order_of(self, module: Module, report: Report) -> str:
        """ "missing", "plain", "unfilled" or "reordered"; empty where it is wrong, or of no account."""
        if module.index is None:
            if not module.rule.desc_act or module.rule.static_groups or module.groups == 1:
                return "missing"
            what = "is in no file, and desc_act is true: nobody knows the group of each column. "
            self._say(report, "D303", module, "g_idx", what + "Export the model again")
            return ""
        index = module.index.index
        if torch.equal(index[: module.columns], module.trivial):
            return "plain"
        if module.groups == 1:
            return ""
        if not module.rule.desc_act and _is_unfilled(index, module):
            return "unfilled"
        return "reordered" if self._sound_order(module, index, report) else ""

    def _judge_trivial(
        self,
        missing: list[Module],
        reordered: list[Module],
        plain: list[Module],
        report: Report,
        correction: Correction,
    ) -> None:
        """Modules whose columns lie in order: no g_idx where one could be, desc_act where none is needed."""
        if missing and self.base is not None:
            self._say(
                report,
                "D308",
                missing[0],
                "g_idx",
                f"and {len(missing) - 1} more of {len(self.modules)} are in no file; lowbit needs none of "
                "them, some programs do",
                "g_idx added as i // group_size",
            )
            for module in missing:
                correction.added[f"{module.stem}.g_idx"] = module.trivial.int()
        base = self.base
        if base is None or not base.desc_act or base.static_groups or reordered:
            return
        if len(plain) == len(self.modules) and any(module.groups > 1 for module in plain):
            self._say(
                report,
                "D311",
                plain[0],
                "g_idx",
                f"and the {len(plain) - 1} others put every column in its place though desc_act is true",
                "desc_act set to false",
            )
            correction.quantization["desc_act"] = False

    def _sound_order(self, module: Module, index: Tensor, report: Report) -> bool:
        """Whether each group gets its columns."""
        if index.numel() < module.columns:
            what = f"has {index.numel()} columns, the module {module.columns}; the file is damaged"
            self._say(report, "D304", module, "g_idx", what)
            return False
        index = index[: module.columns]
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= module.groups:
            self._say(
                report,
                "D304",
                module,
                "g_idx",
                f"names groups {low} to {high}, there are {module.groups} of {module.group} columns; the "
                "file is damaged",
            )
            return False
        sizes, wanted = (torch.bincount(order, minlength=module.groups) for order in (index, module.trivial))
        if torch.equal(sizes, wanted):
            return True
        wrong = int((sizes != wanted).nonzero()[0])
        self._say(
            report,
            "D305",
            module,
            "g_idx",
            f"puts {int(sizes[wrong])} columns into group {wrong}, a group has {int(wanted[wrong])}; such a "
            "module cannot be read",
        )
        return False

    def _judge_zeros(self, report: Report, correction: Correction) -> None:
        known = [(module, module.zeros) for module in self.modules if module.zeros and module.zeros.values]
        if not known:
            return
        wrong = [(m, zeros) for m, zeros in known if zeros.proved not in (None, m.rule.zeros)]
        uneven = [(m, zeros) for m, zeros in known if zeros.proved is None and m.rule.sym is True]
        if wrong:
            self._say_wrong_form(wrong, len(known), report, correction)
        if uneven:
            module, zeros = uneven[0]
            certain = not wrong and self.base is not None
            self._say(
                report,
                "D302",
                module,
                "qzeros",
                f"and {len(uneven) - 1} more of {len(known)}: {self.place} says sym but the zero points are "
                f"stored from {min(zeros.values)} to {max(zeros.values)}; lowbit reads them as stored",
                "sym set to false" if certain else "",
            )
            if certain:
                correction.quantization["sym"] = False
        even = all(zeros.proved is not None for _, zeros in known)
        if self.base is not None and self.base.sym is False and even and not wrong:
            module, zeros = known[0]
            self._say(
                report,
                "D309",
                module,
                "qzeros",
                f"and the {len(known) - 1} others hold no zero point but the middle, {1 << zeros.bits - 1}, "
                f"while {self.place} says sym false",
                "sym set to true",
            )
            correction.quantization["sym"] = True

    def _say_wrong_form(
        self, wrong: list[tuple[Module, ZeroFacts]], known: int, report: Report, correction: Correction
    ) -> None:
        """D301; certain where every module is symmetric and says the same."""
        module, zeros = wrong[0]
        certain = len(wrong) == known and self.base is not None and self.base.sym is not False
        written = "gptq_v2" if zeros.proved == "v2" else "gptq"
        also = "" if module.rule.sym is not False else ", and sym false: one of the two is wrong"
        self._say(
            report,
            "D301",
            module,
            "qzeros",
            f"and {len(wrong) - 1} more of {known}: all zero points are stored as {zeros.values[0]} (GPTQ "
            f"{zeros.proved}) but {self.place} says GPTQ {module.rule.zeros}{also}",
            f"checkpoint_format set to {written!r}" if certain else "",
        )
        if certain:
            correction.quantization["checkpoint_format"] = written

    def _judge_damage(self, report: Report) -> None:
        """Only v1 files of other writers than GPTQModel, which adds what it subtracted."""
        found = [
            (module, module.zeros)
            for module in self.modules
            if module.zeros is not None and module.rule.zeros == "v1" and module.rule.gptqmodel is None
        ]
        if any(zeros.healthy for _, zeros in found):
            return
        hit = [(m, z) for m, z in found if z.damaged and len(z.values) > 1]
        if hit:
            words = sum(zeros.damaged for _, zeros in hit)
            self._say(
                report,
                "D310",
                hit[0][0],
                "qzeros",
                f"and {len(hit) - 1} more modules: {thousands(words)} words end in fields of all ones, as "
                "AutoGPTQ wrote when a zero point was 0: what was there is lost. Quantize again with another "
                "tool",
            )


def _is_unfilled(index: Tensor, module: Module) -> bool:
    """One number, zero or the mark -1, for all columns."""
    return index.numel() >= module.columns and int(index.min()) == int(index.max()) <= 0


def packing_of(header: CheckpointHeader, form: CheckpointFormat | None) -> Packing | None:
    """The GPTQ modules, where the checkpoint is GPTQ (or AutoRound's export of it); None otherwise."""
    if isinstance(form, Gptq) and not form.marlin:
        packing = Packing(header, form.config.place, form.rule)
    elif isinstance(form, AutoRound):
        packing = Packing(header, form.place)
    else:
        return None
    for name, entry in header.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix != "qweight" or entry.dtype != "I32" or len(entry.shape) != 2:
            continue
        out = entry.shape[1]
        try:
            rule = _rule(form, StoredModule(stem, stem, (out, 1)))
        except LowbitError:
            continue  # the survey says why
        if rule is not None:
            packing.modules.append(_module(header, stem, rule, entry.shape[0] * 32 // rule.bits, out))
    return packing


def _rule(form: CheckpointFormat, module: StoredModule) -> GptqRule | None:
    if isinstance(form, Gptq):
        return form.rule_of(module)
    assert isinstance(form, AutoRound), "packing_of chose it"
    rule = form.rule_of(module)
    return rule if isinstance(rule, GptqRule) else None


def _module(header: CheckpointHeader, stem: str, rule: GptqRule, columns: int, out: int) -> Module:
    """Its facts to gather; tensors of impossible shapes are left to the survey."""
    zeros, index = header.tensors.get(f"{stem}.qzeros"), header.tensors.get(f"{stem}.g_idx")
    if index is not None and len(index.shape) == 1 and index.shape[0] < columns:
        padding = columns - index.shape[0]
        # Rows the writer padded have no column; a writer pads by less than there is.
        columns = index.shape[0] if padding < min(128, columns // 2) else columns
    module = Module(stem, rule, columns)
    planar = rule.planar and rule.bits not in (2, 4, 8)
    words = -(-out * rule.bits // 32)
    if zeros is not None and zeros.dtype == "I32" and zeros.shape[1:] == (words,) and not planar:
        module.zeros = ZeroFacts(rule.bits, out, words)
    if index is not None and index.dtype in ("I32", "I64"):
        module.index = IndexFacts(index.dtype)
    return module
