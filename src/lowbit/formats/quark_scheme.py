"""What a Quark config says of a module: the specs of its weight and its inputs.

The first that speaks decides: ``exclude``, a pattern of ``layer_quant_config``, ``layer_type_quant_config``
of Linears, ``global_quant_config``. Of several patterns of one module Quark quantizes by the first, too, but
config.json has them sorted by name: which was the first is lost, and the tensors must tell. "Custom" configs,
which call themselves awq or fp8, are read as what Quark's own would say.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from lowbit.errors import LowbitError, printable
from lowbit.formats import StoredModule
from lowbit.formats.matching import Keys, regex, sole_name, strings

_REORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of a word that holds logical code 0, 1, …
# dtype -> (the dtype it is stored in, bits, whether it has a sign)
INTEGERS = {
    "int8": ("I8", 8, True),
    "uint8": ("U8", 8, False),
    "int4": ("I32", 4, True),
    "uint4": ("I32", 4, False),
}
# dtype -> (the dtype it is stored in, the number format)
FLOATS = {
    "fp8_e4m3": ("F8_E4M3", "e4m3"),
    "fp8_e5m2": ("F8_E5M2", "e5m2"),
    "fp4": ("U8", "e2m1"),
    "fp6_e2m3": ("U8", "e2m3"),
    "fp6_e3m2": ("U8", "e3m2"),
}
MANTISSA = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2}
_SCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_MODES = (None, "even", "floor", "ceil")
# What the tensors are called where Quark calls itself awq.
_AWQ = {"weight": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}


@dataclass(frozen=True)
class Spec:
    """A QTensorConfig, as far as it matters. ``block``: (rows, columns) of per_block."""

    dtype: str
    qscheme: str
    axis: int | None
    group: int
    block: tuple[int, int]
    symmetric: bool
    dynamic: bool
    e8m0: bool
    mode: str | None

    @property
    def code(self) -> str:
        """The number format's name."""
        return self.dtype if self.dtype in INTEGERS else FLOATS[self.dtype][1]


@dataclass(frozen=True)
class Rule:
    """What a config says of a module; ``outer``: the fp4 scales are e4m3, under one more.

    ``progressive``: the weight's integers are codes of FP8 numbers that have a scale of their own.
    """

    weight: Spec | None = None
    weight_outer: bool = False
    progressive: bool = False
    inputs: Spec | None = None
    inputs_outer: bool = False


class QuarkConfig:
    """A quantization config of Quark's, or one that calls itself ``method``; ``place``: file and key."""

    def __init__(self, place: str, values: dict[str, object], method: str) -> None:
        self.place = place
        self.suffixes: dict[str, str] = {}
        self.rotates = False  # whether any input is at run time
        self.rotated = _keys(())  # patterns of modules whose inputs are
        if method != "quark":
            values = self._undressed(values, method)
        self._refuse_unknown(values)
        # Its queries and softmax weights, in 8 bits.
        self.fp8_attention = values.get("softmax_quant_spec") is not None
        self.cache = tuple(self._object(values, "kv_cache_quant_config"))
        self.every = self._rule(values.get("global_quant_config"), "global_quant_config")
        layers = self._object(values, "layer_quant_config")
        self.layers = {name: self._rule(layer, name) for name, layer in layers.items()}
        self._of_layers = Keys(self.layers.items(), _pattern, _sole_name)
        self._found: dict[str, dict[str, Rule]] = {}  # by module
        types = self._object(values, "layer_type_quant_config")
        self.linears = [
            self._rule(types[name], name)
            for name in ("Linear", "nn.Linear", "torch.nn.Linear")
            if name in types
        ]
        self.excluded = _keys(strings(values.get("exclude"), "exclude", self.place))
        export = self._object(values, "export")
        packing = export.get("pack_method", "reorder")
        if packing not in ("reorder", "order"):
            raise LowbitError(
                "E0212",
                f"{self.place}.export.pack_method must be reorder or order, found {printable(repr(packing))}",
            )
        self.order = _REORDER if packing == "reorder" else None
        self.fake = export.get("weight_format") == "fake_quantized"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All but those of excluded modules."""
        return (self.every, *self.linears, *self.layers.values())

    def _object(self, values: dict[str, object], key: str) -> dict[str, object]:
        found = values.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise LowbitError("E0212", f"{self.place}.{key} must be an object, found {type(found).__name__}")
        return found

    def _undressed(self, values: dict[str, object], method: str) -> dict[str, object]:
        """What Quark's own config would say, of one that calls itself awq or fp8."""
        weight: dict[str, object] = {"qscheme": "per_tensor", "dtype": "fp8_e4m3"}
        inputs: dict[str, object] | None = None
        if method == "awq":
            self.suffixes = _AWQ
            symmetric, bits = values.get("zero_point") is False, values.get("bits")
            dtype = f"{'int' if symmetric else 'uint'}{bits}"
            group = {"group_size": values.get("group_size"), "ch_axis": 1, "symmetric": symmetric}
            weight = {"qscheme": "per_group", "dtype": dtype, **group}
        elif (activation := values.get("activation_scheme")) is not None:
            if activation not in ("static", "dynamic"):
                raise LowbitError(
                    "E0212",
                    f"{self.place}.activation_scheme must be static or dynamic, found "
                    f"{printable(repr(activation))}",
                )
            inputs = {**weight, "is_dynamic": activation == "dynamic"}
        return {
            "global_quant_config": {"weight": weight, "input_tensors": inputs},
            "exclude": values.get("modules_to_not_convert" if method == "awq" else "ignored_layers"),
            "export": values["export"],
        }

    def _refuse_unknown(self, values: dict[str, object]) -> None:
        algorithms = values.get("algo_config") or []
        for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
            told = algorithm if isinstance(algorithm, dict) else {}
            if told.get("name") == "rotation":
                self._rotations(told, bool(values.get("kv_cache_quant_config")))
            if told.get("name") in ("svdquant", "svd_quant"):
                raise self._unsupported("algo_config", "keeps a low-rank branch beside each weight")

    def _rotations(self, told: dict[str, object], cache: bool) -> None:
        """Which inputs are rotated at run time; R3 turns Q and K alike, and is gone from their products."""
        if told.get("r3") and cache:
            raise self._unsupported("algo_config", "rotates K before it quantizes it for the cache (r3)")
        self.rotates = any(told.get(key) for key in ("r4", "online_r1_rotation"))
        online = told.get("online_config")
        names = online.get("online_rotation_layers") if isinstance(online, dict) else None
        rotated = strings(names, "online_rotation_layers", f"{self.place}.algo_config.online_config")
        self.rotated = _keys((*rotated, "*.down_proj") if told.get("r4") else rotated)

    def _unsupported(self, key: str, why: str) -> LowbitError:
        return LowbitError(
            "E0218",
            f"{self.place}.{key} {why}, which is not supported; use a Quark export in fp8, int8, int4 or "
            "an MX format without it",
        )

    def _rule(self, values: object, name: str) -> Rule:
        """A QLayerConfig."""
        where = f"{self.place}: {printable(repr(name))}"
        if values is None:
            return Rule()
        if not isinstance(values, dict):
            raise LowbitError("E0212", f"{where} must be an object, found {type(values).__name__}")
        if values.get("bias") is not None:
            raise self._unsupported(name, "quantizes biases")
        if values.get("output_tensors") is not None and name not in self.cache:
            if not name.endswith("q_proj"):
                raise self._unsupported(name, "quantizes outputs (of others than Q, K and V)")
            self.fp8_attention = True
        weight, outer, progressive = self._weight_spec(values.get("weight"), f"{where}: weight")
        inputs, inputs_outer = self._spec(values.get("input_tensors"), f"{where}: input_tensors")
        if weight is not None and weight.dynamic:
            raise LowbitError("E0212", f"{where}: weight is_dynamic: weights in a file are not")
        return Rule(weight, outer, progressive, inputs, inputs_outer)

    def _weight_spec(self, values: object, where: str) -> tuple[Spec | None, bool, bool]:
        """(spec, scales under one more, codes of codes): of integers that stand for FP8 numbers theirs."""
        if isinstance(values, list) and len(values) == 2 and all(isinstance(one, dict) for one in values):
            first, second = (self._spec(stage, where)[0] for stage in values)
            numbers = first is not None and first.dtype.startswith("fp8") and first.qscheme == "per_tensor"
            if numbers and second is not None and second.dtype in INTEGERS:
                return second, False, True
        return *self._spec(values, where), False

    def _spec(self, values: object, where: str) -> tuple[Spec | None, bool]:
        """A QTensorConfig; of two stages the first, and True."""
        if values is None:
            return None, False
        if isinstance(values, list):
            stages = [self._spec(stage, where)[0] for stage in values]
            scaled = len(values) == 2 and isinstance(values[1], dict) and values[1].get("is_scale_quant")
            if not scaled or [stage and stage.dtype for stage in stages] != ["fp4", "fp8_e4m3"]:
                raise LowbitError(
                    "E0218",
                    f"{where} has {len(values)} stages of {[stage and stage.dtype for stage in stages]}; "
                    "only fp4 under fp8_e4m3 scales and integers of per-tensor fp8 are supported; use "
                    "another Quark scheme",
                )
            return stages[0], True
        if not isinstance(values, dict):
            raise LowbitError("E0212", f"{where} must be an object, found {type(values).__name__}")
        dtype, qscheme = values.get("dtype"), values.get("qscheme")
        if dtype in ("bfloat16", "float16", "float32"):  # Quark's word for what it only casts
            return None, False
        if dtype not in (*INTEGERS, *FLOATS):
            raise LowbitError(
                "E0218",
                f"{where}: dtype {printable(repr(dtype))} is not supported; supported are "
                f"{', '.join((*INTEGERS, *FLOATS))}",
            )
        if qscheme not in _SCHEMES:
            raise LowbitError(
                "E0212",
                f"{where}: qscheme must be one of {', '.join(_SCHEMES)}, found {printable(repr(qscheme))}",
            )
        scale_format = values.get("scale_format")
        if scale_format not in (None, "e8m0", "float32") or values.get("zero_point_type") == "float32":
            raise LowbitError(
                "E0218",
                f"{where}: scale_format {printable(repr(scale_format))}, zero_point_type "
                f"{printable(repr(values.get('zero_point_type')))}: only float32 and e8m0 scales with "
                "integer zero points are supported; use another Quark scheme",
            )
        mode = values.get("scale_calculation_mode")
        if mode not in _MODES:
            raise LowbitError(
                "E0212",
                f"{where}: scale_calculation_mode must be even, floor or ceil, found {printable(repr(mode))}",
            )
        axis, symmetric = values.get("ch_axis"), values.get("symmetric")
        if not (axis is None or axis in (-1, 0, 1)) or isinstance(axis, bool):
            raise LowbitError("E0212", f"{where}: ch_axis must be 0, 1 or -1, found {printable(repr(axis))}")
        if not isinstance(symmetric, bool | None) or not isinstance(values.get("is_dynamic"), bool | None):
            raise LowbitError("E0212", f"{where}: symmetric and is_dynamic must be true, false or null")
        return (
            Spec(
                str(dtype),
                str(qscheme),
                axis,
                self._group(values, qscheme, where),
                self._block(values, qscheme, where),
                symmetric is not False,
                values.get("is_dynamic") is True,
                scale_format == "e8m0",
                mode,
            ),
            False,
        )

    def _group(self, values: dict[str, object], qscheme: object, where: str) -> int:
        group = values.get("group_size")
        if qscheme != "per_group":
            return 0
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise LowbitError(
                "E0212", f"{where}: group_size must be a positive number, found {printable(repr(group))}"
            )
        return group

    def _block(self, values: dict[str, object], qscheme: object, where: str) -> tuple[int, int]:
        block = values.get("block_size")
        if qscheme != "per_block":
            return 0, 0
        sizes = block if isinstance(block, list) else []
        if len(sizes) != 2 or not all(
            isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes
        ):
            raise LowbitError(
                "E0212", f"{where}: block_size must be two positive numbers, found {printable(repr(block))}"
            )
        return sizes[0], sizes[1]

    def rule_of(self, module: StoredModule) -> Rule:
        """What it says of a module, where it says several things the first."""
        return next(iter(self.rules_of(module).values()))

    def rules_of(self, module: StoredModule) -> dict[str, Rule]:
        """All that it says of a module, by pattern, without repetitions; one rule at least."""
        name = module.stored
        if name not in self._found:
            self._found[name] = self._rules_of(name)
        return self._found[name]

    def _rules_of(self, name: str) -> dict[str, Rule]:
        if self.excluded.first(name):
            return {"exclude": Rule()}
        found: dict[str, Rule] = {}
        for pattern, rule in self._of_layers.all(name):
            if rule not in found.values():
                found[pattern] = rule
        return found or {"global_quant_config": self.linears[0] if self.linears else self.every}

    def rotates_inputs(self, module: StoredModule) -> bool:
        """Whether a pattern names it for that."""
        return bool(self.rotated.first(module.stored))


def _keys(patterns: tuple[str, ...]) -> Keys[bool]:
    return Keys([(pattern, True) for pattern in patterns], _pattern, _sole_name)


def _pattern(key: str, name: str) -> bool:
    """``re:`` and a regular expression, or a shell pattern of the whole name."""
    return regex(key[3:], name) if key.startswith("re:") else fnmatch.fnmatchcase(name, key)


def _sole_name(key: str) -> str | None:
    if key.startswith("re:"):
        return sole_name(key[3:])
    return None if set(key) & set("*?[") else key
