"""AutoRound checkpoints (Cheng et al., 2023): the tensors of other formats under a config of its own.

``packing_format`` says whose tensors they are: GPTQ's with v1 zeros (``auto_round:auto_gptq``), GPTQ's with
plain zeros (``auto_round``, ``auto_round:gptqmodel`` …), AWQ's (``auto_round:auto_awq``), those of
compressed-tensors (``auto_round:llm_compressor``: NVFP4, MXFP4, MXFP8) or FP8's (``auto_round:fp8``: blocks,
``auto_round:fp8_static``: a scale a row, one for inputs); before April 2025 the key was ``backend``.
``extra_config`` gives modules other bits or leaves them alone (bits >= 16): an exact name first, then regular
expressions. MX and NVFP4 layers and their inputs: ``auto_round_floats``. Inputs of integer weights stay as
they are. Rotated exports, MLX layouts, and NVFP4 with e5m3 scales are refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredLinear, StoredModule, require_tensors
from lowbit.formats.auto_round_floats import FloatLayers, FloatRule
from lowbit.formats.awq import AwqRule, awq_scheme, awq_tensors, read_awq
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.fp8 import Fp8
from lowbit.formats.gptq import (
    GptqRule,
    check_bits,
    gptq_scheme,
    gptq_tensors,
    plain_beside_packed,
    read_gptq,
    read_number,
)
from lowbit.formats.matching import Keys, compiled, spellings
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, says_method
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")

_METHODS = ("auto-round", "auto_round", "intel/auto-round", "inc")
# The kernel that a tool thought of may follow; the keys of 2024 say ``autoround:exllamav2``, ``gptq:triton``.
_V1 = re.compile(r"(auto_round:)?(auto_)?gptq(:\w+)?")
_V2 = re.compile(r"auto_round(:gptqmodel)?(:(exllamav2|triton|tritonv2))?")
_AWQ = ("auto_round:auto_awq", "auto_awq", "awq", "auto_round:awq")
_FP8 = ("auto_round:fp8", "auto_round:fp8_static")
_FLOATS = "auto_round:llm_compressor"
_BITS = (2, 3, 4, 5, 6, 7, 8)


class AutoRound(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "auto-round"
    aliases: tuple[str, ...] = ("auto_round", "inc", "gptq", "gptq_marlin", "awq", "awq_marlin")
    reference: ClassVar[str] = "auto-round"
    unused: ClassVar[tuple[str, ...]] = (r".*\.workspace",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.values, self.place = found.values, found.place
        extra = self.values.get("extra_config") or {}
        if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
            raise LowbitError("E0212", f"{self.place}.extra_config must be an object of objects")
        # A key without a value is as if it were not there.
        rules = {name: {k: v for k, v in rule.items() if v is not None} for name, rule in extra.items()}
        self.extra = _by_module(header, rules)
        _refuse_rotated((self.values, *rules.values()), self.place)
        packing = self.values.get("packing_format")
        packing = self.values.get("backend", "auto_round") if packing is None else packing
        if not isinstance(packing, str):
            raise LowbitError(
                "E0212", f"{self.place}.packing_format must be a string, found {printable(repr(packing))}"
            )
        self.packing = re.sub("autoround|auto-round", "auto_round", packing.lower())
        kernels: tuple[str, ...] = ("gptq", "gptq_marlin")
        if self.packing in _AWQ:
            kernels = ("awq", "awq_marlin")
        if self.packing == _FLOATS:
            kernels = ("compressed-tensors", "compressed_tensors")
        if self.packing in _FP8:
            kernels = ("fp8",)
        self.aliases = ("auto_round", "inc", *kernels)
        self.fp8: Fp8 | None = None
        self.floats: FloatLayers | None = None
        if self.packing in _FP8:
            for rule in rules.values():
                _check_fp8_inputs({**self.values, **rule}, self.place)
            self.fp8 = Fp8(_as_fp8(header, self.values, self.place), notes)
            return
        if self.packing == _FLOATS:
            self.floats = FloatLayers(header, notes)
            self.floats.reader(FloatRule.of(self.values, self.place), False)
            return
        self.is_v1 = _V1.fullmatch(self.packing) is not None
        if not (self.is_v1 or _V2.fullmatch(self.packing) or self.packing in _AWQ):
            raise LowbitError(
                "E0218",
                f"{self.place}.packing_format {printable(repr(packing))} is not read; use another "
                "quantization of the same model, or export it with --format auto_gptq, auto_awq or "
                "llm_compressor",
            )
        check_bits(read_number(self.values, self.place, "bits"), _BITS, self.place)
        _group(self.values, self.place)
        if any(_act_bits(rule, self.place) < 16 for rule in (self.values, *rules.values())):
            _log.warning(
                "lowbit: %s.act_bits asks for inputs that are quantized too; they are left as they are",
                self.place,
            )
        require_tensors(header, (".qweight",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method auto-round in one of its spellings."""
        return says_method(header, *_METHODS)

    def describe(self) -> str:
        """Bits, group and packing."""
        bits, group = self.values.get("bits"), self.values.get("group_size")
        return f"auto-round, {bits}-bit, group {group}, {self.packing}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """As the packing format's own reader."""
        if self.floats is not None:
            rule, reader = self._float(module, self.floats)
            return rule.own_inputs(reader.scheme_of(module))
        return super().scheme_of(module) if self.fp8 is None else self.fp8.scheme_of(module)

    def tensors_of(self, module: StoredModule) -> list[str]:
        """As the packing format's own reader."""
        if self.floats is not None:
            return self._float(module, self.floats)[1].tensors_of(module)
        return super().tensors_of(module) if self.fp8 is None else self.fp8.tensors_of(module)

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """As the packing format's own reader."""
        if self.floats is not None:
            rule, reader = self._float(module, self.floats)
            found = reader.read(module, data)
            return replace(found, weight=replace(found.weight, scheme=rule.own_inputs(found.weight.scheme)))
        return super().read(module, data) if self.fp8 is None else self.fp8.read(module, data)

    def _float(self, module: StoredModule, floats: FloatLayers) -> tuple[FloatRule, CompressedTensors]:
        """A module's rule in llm_compressor packing, and who reads it."""
        own = self.extra.first(module.stored)
        rule = FloatRule.of({**self.values, **(own or {})}, self.place)
        return rule, floats.reader(rule, own is not None)

    def _scheme(self, module: StoredModule) -> Scheme:
        rule = self.rule_of(module)
        if isinstance(rule, AwqRule):
            return awq_scheme(self.header, module, rule)
        return gptq_scheme(self.header, module, rule)

    def _tensors(self, module: StoredModule) -> list[str]:
        if self.packing in _AWQ:
            return awq_tensors(self.header, module)
        return gptq_tensors(self.header, module)

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        rule = self.rule_of(module)
        if isinstance(rule, AwqRule):
            return read_awq(self.header, module, data, rule)
        return read_gptq(self.header, module, data, rule, self.notes)

    def _is_dense(self, module: StoredModule) -> bool:
        return plain_beside_packed(self.header, module)

    def rule_of(self, module: StoredModule) -> GptqRule | AwqRule:
        """How one module is packed, by whose rules."""
        values = {**self.values, **(self.extra.first(module.stored) or {})}
        bits = check_bits(read_number(values, self.place, "bits"), _BITS, self.place)
        group = _group(values, self.place)
        if self.packing in _AWQ:
            return AwqRule(bits, group, "gemm", symmetric=values.get("sym") is True)
        sym = values.get("sym")
        rule = GptqRule(bits, group, "v1" if self.is_v1 else "v2", sym if isinstance(sym, bool) else None)
        return replace(rule, desc_act=values.get("desc_act") is True)


def _searched(pattern: str, name: str) -> bool:
    return compiled(pattern).search(name) is not None


def _by_module(header: CheckpointHeader, rules: dict[str, dict[str, object]]) -> Keys[dict[str, object]]:
    """As the tool has it: what is the name of a module is no pattern, and goes before all that are; a pattern
    of an empty rule is none."""
    modules = {name.rpartition(".")[0] for name in header.tensors}
    named = {key for key in rules if modules.intersection(spellings(key))}
    ordered = sorted(rules.items(), key=lambda item: item[0] not in named)
    ordered = [(key, rule) for key, rule in ordered if rule or key in named]
    return Keys(ordered, _searched, lambda key: key if key in named else None)


def _refuse_rotated(rules: Iterable[dict[str, object]], place: str) -> None:
    """E0218 in every packing: nothing of it has to be in the tensors."""
    for key, value in (item for rule in rules for item in rule.items()):
        if ("rotation" in key or "spinquant" in key) and value:
            raise LowbitError(
                "E0218",
                f"{place}.{key}: inputs that AutoRound rotates at run time are not built in; use a version "
                "that was quantized without",
            )


def _act_bits(values: dict[str, object], place: str) -> int:
    return 16 if values.get("act_bits") is None else read_number(values, place, "act_bits")


def _check_fp8_inputs(values: dict[str, object], place: str) -> None:
    """Of a module with a rule of its own: its inputs are those of all, where its weight is FP8."""
    if read_number(values, place, "bits") <= 8 and _act_bits(values, place) != 8:
        raise LowbitError(
            "E0218",
            f"{place}.extra_config: FP8 with inputs of {_act_bits(values, place)} bits in single modules is "
            "not read; inputs of 8 are. Use another quantization of the same model",
        )


def _as_fp8(header: CheckpointHeader, values: dict[str, object], place: str) -> CheckpointHeader:
    """The checkpoint under the config FineGrainedFP8 would have written for the same tensors."""
    if values.get("fmt", "e4m3") != "e4m3" or values.get("act_bits", 8) != 8:
        raise LowbitError(
            "E0218",
            f"{place}: FP8 as {printable(repr(values.get('fmt')))} with inputs of "
            f"{printable(repr(values.get('act_bits')))} bits is not read; e4m3 with inputs of 8 is",
        )
    written: dict[str, object] = {"quant_method": "fp8"}
    static = values.get("packing_format") == "auto_round:fp8_static"  # where nothing else is said
    written["activation_scheme"] = "static" if values.get("act_dynamic", not static) is False else "dynamic"
    if values.get("weight_block_size") is not None:
        written["weight_block_size"] = values["weight_block_size"]
    return replace(header, config={**header.config, "quantization_config": written})


def _group(values: dict[str, object], place: str) -> int:
    """AutoRound writes 0 for one scale a tensor (not for packed codes) and -1 for one a channel."""
    size = read_number(values, place, "group_size")
    if size != -1 and size <= 0:
        raise LowbitError("E0212", f"{place}.group_size is {size}; packed codes have -1 or a positive number")
    return size


FORMAT = AutoRound
