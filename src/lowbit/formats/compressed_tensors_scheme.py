"""What a compressed-tensors config says: groups of quantization arguments and the modules they are for.

    config_groups: {name: {targets, weights, input_activations, output_activations, format}}
    args:          num_bits · type int|float · symmetric · strategy · group_size · block_structure · dynamic …

``targets`` are module names, ``re:`` patterns (matched from the name's start) or class names; ``ignore``
beats them. A module that several targets name takes the exact name before a pattern before the class,
patterns in alphabetical order, and a target listed twice belongs to the last group: that is the tool's own
order. A group that is only a list of targets has a preset's name: ``"W8A8": ["Linear"]``.

Defined by compressed-tensors (Neural Magic, vLLM project), versions 0.3 to 0.20. Keys inside a group or its
arguments that no version knows are refused, as the tool does. ``observer`` and its arguments, and the
actorder kinds ``weight`` and ``static``, leave nothing in the file and are read over.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lowbit.errors import LowbitError, printable
from lowbit.formats.matching import Keys, costly, regex, regex_or_exact, sole_name_or_exact, strings
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

_log = logging.getLogger("lowbit")

FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "marlin-24",
    "sparse-bitmask",
    "sparse-24-bitmask",
)
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_ARGS_KEYS = frozenset(
    ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
     "scale_dtype", "zp_dtype", "observer", "observer_kwargs")
)  # fmt: skip
_GROUP_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_EMBEDDINGS = frozenset(("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"))
_MX_GROUP = 32


@dataclass(frozen=True)
class Args:
    """How weights, or a layer's input, are quantized. ``group`` is columns, ``block`` (rows, columns).

    ``dynamic``: "local" is NVFP4's: groups at run time under a stored outer scale.
    """

    bits: int
    kind: Literal["int", "float"]
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]
    dynamic: bool | Literal["local"]
    actorder: bool
    scale_dtype: str | None

    def __str__(self) -> str:
        shape = {"group": f"group {self.group}", "tensor_group": f"group {self.group}"}.get(self.strategy)
        if self.strategy == "block":
            shape = f"block {self.block[0]}x{self.block[1]}"
        return f"{self.kind}{self.bits} {shape or self.strategy}{'' if self.symmetric else ' asym'}"

    @property
    def number_name(self) -> str:
        """The number format of a symmetric code."""
        if self.kind == "int":
            return f"int{self.bits}"
        return {4: "e2m1", 6: "e2m3", 8: "e4m3"}[self.bits]


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``; ``outputs`` says that it also quantizes what a module returns."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None
    inputs: Args | None
    outputs: bool
    format: str | None


@dataclass(frozen=True)
class Config:
    """A checked config. ``version``: (major, minor) of the tool that wrote it, (0, 0) where unknown."""

    place: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str
    version: tuple[int, int]
    sparsity: str

    def group_of(self, names: tuple[str, ...]) -> Group | None:
        """The group that targets a module known under any of ``names``, whether or not it is ignored."""
        for name in names:
            if (group := self._targets.spelled(name)) is not None:
                return group
        found = self._targets.first(*names)
        return self._targets.named(_class_of(names)) if found is None else found

    def ignored(self, names: tuple[str, ...]) -> bool:
        """Whether the ignore list names the module."""
        return bool(self._ignored.named(_class_of(names)) or self._ignored.first(*names))

    @cached_property
    def _targets(self) -> Keys[Group]:
        owner = {target: group for group in self.groups for target in group.targets}
        ordered = sorted(owner, key=lambda target: ("re:" in target, target))
        return Keys([(target, owner[target]) for target in ordered], regex_or_exact, sole_name_or_exact)

    @cached_property
    def _ignored(self) -> Keys[bool]:
        return Keys([(key, True) for key in self.ignore], regex_or_exact, sole_name_or_exact)

    def quantizing(self) -> tuple[Group, ...]:
        """The groups that quantize weights, each distinct one once."""
        found: dict[tuple[Args, Args | None, str | None], Group] = {}
        for group in self.groups:
            if group.weights is not None:
                found.setdefault((group.weights, group.inputs, group.format), group)
        return tuple(found.values())


def _class_of(names: tuple[str, ...]) -> str:
    """Every module lowbit asks for is a Linear to the tool (routers too), but for the embedding."""
    return "Embedding" if any(name.rpartition(".")[2] in _EMBEDDINGS for name in names) else "Linear"


def parse_config(values: dict[str, object], place: str) -> Config:
    """The config, checked once; E0212 where no tool could have written it."""
    nested = values.get("quantization_config")
    inner = nested if isinstance(nested, dict) else values
    sparsity = _sparsity(values.get("sparsity_config") or inner.get("sparsity_config"), place)
    listed_groups = inner.get("config_groups")
    rotated = values.get("transform_config") or inner.get("transform_config")
    if listed_groups is None and (sparsity != "dense" or rotated):
        listed_groups = {}  # sparse or rotated, not quantized
    if not isinstance(listed_groups, dict):
        raise LowbitError("E0212", f"{place}.config_groups must be an object of groups")
    groups = tuple(
        _group(str(name), value, f"{place}.config_groups.{printable(name, 40)}")
        for name, value in listed_groups.items()
    )
    ignore = _usable(strings(inner.get("ignore"), "ignore", place), place)
    for pattern in (*ignore, *(target for group in groups for target in group.targets)):
        if pattern.startswith("re:"):
            regex(pattern[3:], "")  # a pattern that does not compile is refused now
    found_format = _format(inner.get("format"), place) or "dense"
    version = _version(values.get("version") or inner.get("version"))
    return Config(place, groups, ignore, found_format, version, sparsity)


def _usable(ignore: tuple[str, ...], place: str) -> tuple[str, ...]:
    """Without what would take too long to try: what is left plain the tensors say too."""
    left_out = [key for key in ignore if key.startswith("re:") and costly(key[3:])]
    if left_out:
        _log.warning(
            "lowbit: %s.ignore: %s %s and is not tried; modules are read as they are stored",
            place,
            printable(repr(left_out[0]), 80),
            costly(left_out[0][3:]),
        )
    return tuple(key for key in ignore if key not in left_out)


def _version(value: object) -> tuple[int, int]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _format(value: object, place: str) -> str | None:
    if value is None:
        return None
    if value not in FORMATS:
        raise LowbitError(
            "E0218",
            f"{place}.format is {printable(repr(value), 40)}, which this lowbit does not know; it reads "
            f"{', '.join(FORMATS)}. Use another quantization of the same model",
        )
    return str(value)


def _sparsity(value: object, place: str) -> str:
    if not value:
        return "dense"
    if not isinstance(value, dict):
        raise LowbitError("E0212", f"{place}.sparsity_config must be an object")
    return _format(value.get("format"), f"{place}.sparsity_config") or "dense"


def _group(name: str, value: object, place: str) -> Group:
    if isinstance(value, list):
        preset = PRESETS.get(name.upper())
        if preset is None:
            raise LowbitError(
                "E0212",
                f"{place} is a list of targets, so its name must be a preset scheme; {printable(name, 40)!r} "
                "is none (W4A16, W8A8, FP8_DYNAMIC, NVFP4 …)",
            )
        value = {"targets": value, **preset}
    if not isinstance(value, dict):
        raise LowbitError("E0212", f"{place} must be an object or a list of targets")
    _refuse_unknown(value, _GROUP_KEYS, place)
    targets = strings(value.get("targets"), "targets", place)
    parts = {key: _args(value.get(key), f"{place}.{key}") for key in ("weights", "input_activations")}
    outputs = _args(value.get("output_activations"), f"{place}.output_activations")
    weights = parts["weights"]
    if weights is not None:
        _check_weights(weights, f"{place}.weights")
    return Group(
        name,
        targets,
        weights,
        parts["input_activations"],
        outputs is not None,
        _format(value.get("format"), place),
    )


def _refuse_unknown(value: dict[str, object], known: frozenset[str], place: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise LowbitError(
            "E0212",
            f"{place} has the key {printable(unknown[0], 40)!r}, which no version of compressed-tensors up "
            "to 0.20 knows; it may change what the weights mean. Update lowbit, or remove the key",
        )


def _args(value: object, place: str) -> Args | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise LowbitError("E0212", f"{place} must be an object or null")
    _refuse_unknown(value, _ARGS_KEYS, place)
    bits, kind = value.get("num_bits", 8), str(value.get("type", "int")).lower()
    widths = {"int": (*range(1, 9), 16), "float": (4, 6, 8, 16)}.get(kind)
    if widths is None:
        raise LowbitError("E0212", f"{place}.type is {printable(repr(kind), 40)}; expected int or float")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in widths:
        raise LowbitError(
            "E0212",
            f"{place}.num_bits is {printable(repr(bits), 40)}; {kind} codes have "
            f"{'1 to 8' if kind == 'int' else '4, 6 or 8'} bits",
        )
    symmetric = value.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise LowbitError(
            "E0212",
            f"{place}.symmetric is {printable(repr(symmetric), 40)}; {kind} codes are symmetric"
            + (" or not (true, false)" if kind == "int" else ": a zero point needs integers"),
        )
    strategy, group = _strategy(value, place)
    return Args(
        bits=bits,
        kind="int" if kind == "int" else "float",
        symmetric=symmetric,
        strategy=strategy,
        group=group,
        block=_block(value.get("block_structure"), strategy, place),
        dynamic=_dynamic(value.get("dynamic", False), strategy, place),
        actorder=value.get("actorder") is True or str(value.get("actorder")).lower() in ("group", "dynamic"),
        scale_dtype=str(value["scale_dtype"]).removeprefix("torch.") if value.get("scale_dtype") else None,
    )


def _strategy(value: dict[str, object], place: str) -> tuple[str, int]:
    """The strategy, guessed from the group size where absent, as the tool does; and the group size or 0."""
    group = value.get("group_size")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < -1):
        raise LowbitError(
            "E0212", f"{place}.group_size is {printable(repr(group), 40)}; expected -1 or a positive number"
        )
    strategy = value.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = str(strategy).lower()
    if strategy not in STRATEGIES:
        raise LowbitError(
            "E0212",
            f"{place}.strategy is {printable(repr(strategy), 40)}; expected one of {', '.join(STRATEGIES)}",
        )
    grouped = strategy in ("group", "tensor_group")
    if grouped and (group is None or group <= 0):
        raise LowbitError(
            "E0212", f"{place}.group_size is {group}; strategy {strategy} needs a positive number"
        )
    return strategy, (group or 0) if grouped else 0


def _block(value: object, strategy: str, place: str) -> tuple[int, int]:
    if strategy != "block":
        return (0, 0)
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() else part for part in value.lower().split("x")]
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        raise LowbitError(
            "E0212",
            f"{place}.block_structure is {printable(repr(value), 40)}; strategy block needs [rows, columns]",
        )
    return (value[0], value[1])


def _dynamic(value: object, strategy: str, place: str) -> bool | Literal["local"]:
    if isinstance(value, str) and value.lower() == "local" and strategy == "tensor_group":
        return "local"
    if not isinstance(value, bool):
        raise LowbitError(
            "E0212",
            f"{place}.dynamic is {printable(repr(value), 40)}; expected true, false, or "
            '"local" with strategy tensor_group',
        )
    if strategy == "token" and not value:
        raise LowbitError("E0212", f"{place}: scales for each token cannot be static (dynamic is false)")
    return value


def _check_weights(args: Args, place: str) -> None:
    """What weights cannot be, though inputs or caches can."""
    if args.bits == 16:
        raise LowbitError("E0212", f"{place}.num_bits is 16; quantized weights have at most 8 bits")
    if args.strategy in ("token", "attn_head"):
        raise LowbitError("E0218", f"{place}.strategy is {args.strategy}, which is not one for weights")
    if args.strategy == "tensor_group" and args.kind == "int":
        raise LowbitError("E0218", f"{place}: strategy tensor_group is for 4-bit floats; this is {args}")


def activation_of(group: Group, place: str, name: str) -> ActivationScheme | None:
    """How the group wants a module's input quantized; E0218 where lowbit cannot."""
    args = group.inputs
    if args is None or args.bits == 16:
        return None
    number = number_format(args.number_name)
    mx = _is_mx(args, group.weights)
    scale = number_format("e8m0" if mx else "f32")
    # The tool's largest |x| of a block becomes half the code range: 127.5, where others use 127.
    limit = (2**args.bits - 1) / 2 if args.kind == "int" else 0.0
    if args.strategy == "tensor_group" and args.dynamic:
        return ActivationScheme(number, (1, args.group), scale=number_format("e4m3"))
    if args.dynamic and args.strategy == "token":
        return ActivationScheme(number, (1, 0), symmetric=args.symmetric, limit=limit)
    if args.dynamic and args.strategy == "tensor":
        # A scale for each token is finer, and a request's result does not hang on who it is served with.
        return ActivationScheme(number, (1, 0), symmetric=args.symmetric, limit=limit)
    if args.dynamic and args.strategy == "group" and args.symmetric:
        # Of a power of two: the last mantissa that is not nearer to the next one in so few bits.
        round_up = (1.9375 if args.bits == 6 else 1.75) if mx else 0.0
        return ActivationScheme(number, (1, args.group), limit=limit, scale=scale, round_up=round_up)
    if not args.dynamic and args.strategy == "tensor":
        return ActivationScheme(number, (0, 0), mode="static", symmetric=args.symmetric)
    how = "dynamic" if args.dynamic else "static"
    raise LowbitError(
        "E0218",
        f"{place}.config_groups.{printable(group.name, 40)}: {name} wants its input as {args} ({how}), which "
        "lowbit does not do. Use another quantization of the same model",
    )


def _is_mx(args: Args, weights: Args | None) -> bool:
    """Scales that are powers of two: told by their dtype, in files before 0.17 only by the group of 32."""
    if args.kind != "float" or args.strategy != "group" or args.group != _MX_GROUP:
        return False
    if args.scale_dtype == "uint8" or args.bits == 4:
        return True
    return weights is not None and weights.kind == "float" and weights.group == _MX_GROUP


def _int(bits: int, strategy: str = "group", symmetric: bool = True) -> dict[str, object]:
    size = {"group_size": 128} if strategy == "group" else {}
    return {"num_bits": bits, "strategy": strategy, "symmetric": symmetric, **size}


def _float(bits: int, strategy: str, group: int | None = None, **more: object) -> dict[str, object]:
    size = {"group_size": group} if group else {}
    return {"num_bits": bits, "type": "float", "strategy": strategy, **size, **more}


def _presets() -> dict[str, dict[str, object]]:
    """The named schemes of compressed-tensors 0.20."""

    def token(bits: int) -> dict[str, object]:
        return {"num_bits": bits, "strategy": "token", "dynamic": True}

    def mx(bits: int, **more: object) -> dict[str, object]:
        return _float(bits, "group", 32, scale_dtype="torch.uint8", **more)

    found: dict[str, dict[str, object]] = {"UNQUANTIZED": {}}
    for bits in range(2, 9):
        found[f"W{bits}A16"] = {"weights": _int(bits)}
        for inputs in (4, 8):
            if bits <= inputs:
                found[f"W{bits}A{inputs}"] = {"weights": _int(bits), "input_activations": token(inputs)}
    int8: dict[str, object] = {"weights": _int(8, "channel"), "input_activations": token(8)}
    fp8_token = _float(8, "token", dynamic=True)
    nvfp4 = _float(4, "tensor_group", 16)
    found |= {
        "W8A8": int8,
        "INT8": int8,
        "W4A16_ASYM": {"weights": _int(4, symmetric=False)},
        "W4AFP8": {"weights": _int(4), "input_activations": fp8_token},
        "FP8": {"weights": _float(8, "tensor"), "input_activations": _float(8, "tensor")},
        "FP8_DYNAMIC": {"weights": _float(8, "channel"), "input_activations": fp8_token},
        "FP8_BLOCK": {
            "weights": _float(8, "block", block_structure=[128, 128]),
            "input_activations": _float(8, "group", 128, dynamic=True),
        },
        "NVFP4A16": {"weights": nvfp4},
        "NVFP4": {"weights": nvfp4, "input_activations": {**nvfp4, "dynamic": "local"}},
        "MXFP4A16": {"weights": mx(4)},
        "MXFP4": {"weights": mx(4), "input_activations": mx(4, dynamic=True)},
        "MXFP4XFP8": {"weights": mx(4), "input_activations": _float(8, "group", 128, dynamic=True)},
        "MXFP6A16": {"weights": mx(6)},
        "MXFP6A8": {"weights": mx(6), "input_activations": mx(8, dynamic=True)},
        "MXFP8A16": {"weights": mx(8)},
        "MXFP8": {"weights": mx(8), "input_activations": mx(8, dynamic=True)},
    }
    return found


PRESETS = _presets()
