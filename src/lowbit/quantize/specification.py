"""Every online method once: its names, options and what it does. Imports no torch, so that a wrong name on
the command line is an error before anything is read.

A method is written ``NAME`` or ``NAME:option=value,option=value``:

    fp8                                  e4m3, a scale a row; inputs e4m3, a scale a token
    fp8:weights=block                    128 x 128 blocks and inputs in groups of 128, as DeepSeek V3
    fp8:activation=delayed,history=16    input scales from the largest |x| of the last 16 steps
    rtn:bits=3,group_size=64             round to nearest, as int3:group_size=64
    bitsandbytes:type=fp4,double_quant=true

``docs/options.md`` is made from this table, ``--quantization`` and recipes are checked against it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.errors import LowbitError, printable

Value = str | int | bool


@dataclass(frozen=True)
class Choice:
    """An option of a method. ``choices``: the allowed words; ``least``: of a number; None default: decided by
    the layer's shape or the other options."""

    default: Value | None
    help: str
    choices: tuple[str, ...] = ()
    least: int = 0
    kind: type = str

    @property
    def accepts(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return ", ".join(self.choices)
        return {bool: "true or false", int: f"a whole number from {self.least}"}.get(self.kind, "text")


@dataclass(frozen=True)
class Entry:
    """A method. ``module``: the file of this package that implements it. ``fixed``: options its name decides.
    ``calibrated``: needs text run through the model. ``family``: how docs group it."""

    module: str
    summary: str
    options: Mapping[str, Choice] = field(default_factory=dict)
    fixed: Mapping[str, Value] = field(default_factory=dict)
    calibrated: bool = False
    family: str = "quantization"


_GROUP = Choice(
    None, "columns that share a scale; default: the largest up to 128 that divides", kind=int, least=-1
)
_SYMMETRIC = Choice(False, "no zero points", kind=bool)
_BITS = Choice(4, "bits of a code", choices=tuple("2345678"), kind=int)
_FP8 = {
    "weights": Choice("channel", "what a weight scale covers", ("channel", "tensor", "block")),
    "activation": Choice(
        None,
        "what scales inputs; default: token, with block weights group",
        ("token", "tensor", "group", "static", "delayed", "none"),
    ),
    "scales": Choice(
        "", "safetensors file with <module>.input_scale of static, or the saved state of delayed"
    ),
    "history": Choice(1024, "steps whose largest |x| delayed scaling remembers", kind=int, least=1),
    "margin": Choice(0, "delayed scales leave room for |x| to grow 2^margin times", kind=int),
    "amax": Choice("max", "which of them counts", ("max", "most_recent")),
}
_INPUTS = Choice("token", "what scales inputs", ("token", "none"))
_MX_INPUTS = Choice("none", "inputs in the same form as the weight, or as they are", ("none", "group"))
_BITSANDBYTES = {
    "type": Choice("nf4", "codes", ("nf4", "fp4", "int8")),
    "double_quant": Choice(False, "4 bit: scales are 8-bit codes too", kind=bool),
}
_CALIBRATED = {
    "bits": Choice(4, "bits of a code", choices=("2", "3", "4", "8"), kind=int),
    "group_size": _GROUP,
    "symmetric": Choice(True, "no zero points", kind=bool),
    "act_order": Choice(True, "columns with the largest inputs first, each in its own group", kind=bool),
    "sequences": Choice(64, "calibration sequences", kind=int, least=1),
    "length": Choice(512, "tokens of each", kind=int, least=8),
}
_AWQ = {
    name: choice for name, choice in _CALIBRATED.items() if name not in ("act_order", "symmetric", "bits")
}
_MARLIN = {name: _CALIBRATED[name] for name in ("sequences", "length")}


def _gptq(summary: str, **fixed: Value) -> Entry:
    options = {name: choice for name, choice in _CALIBRATED.items() if name not in fixed}
    return Entry("calibrated", summary, options, fixed, calibrated=True)


METHODS: dict[str, Entry] = {
    "fp8": Entry("floats", "e4m3 weights and inputs", _FP8),
    "w8a8_fp8": Entry("floats", "fp8 with a scale a row and a scale a token", {"activation": _INPUTS}),
    "w8a8_int8": Entry("integers", "int8 weights, a scale a row; int8 inputs", {"activation": _INPUTS}),
    "blockwise_int8": Entry("integers", "int8 weights in 128 x 128 blocks, int8 inputs in groups of 128"),
    "mxfp8": Entry("floats", "e4m3 with a power of two for 32 columns", {"activation": _MX_INPUTS}),
    "mxfp4": Entry("floats", "e2m1 with a power of two for 32 columns", {"activation": _MX_INPUTS}),
    "nvfp4": Entry("floats", "e2m1 with an e4m3 scale for 16 columns under one of the tensor"),
    "bitsandbytes": Entry("bitsandbytes", "nf4, fp4 or LLM.int8", _BITSANDBYTES),
    "nf4": Entry(
        "bitsandbytes",
        "bitsandbytes' 4-bit codes",
        {"double_quant": _BITSANDBYTES["double_quant"]},
        {"type": "nf4"},
    ),
    "fp4": Entry(
        "bitsandbytes", "bitsandbytes' fp4", {"double_quant": _BITSANDBYTES["double_quant"]}, {"type": "fp4"}
    ),
    "hqq": Entry(
        "hqq",
        "integers whose float zero points minimise a sparse error",
        {"bits": _BITS, "group_size": Choice(64, "columns that share a scale", kind=int, least=8)},
    ),
    "gguf": Entry(
        "gguf",
        "llama.cpp's block types and mixes, head and embedding too",
        {
            "type": Choice("q4_k_m", "a mix or a block type"),
            "pure": Choice(False, "one type everywhere", kind=bool),
        },
    ),
    "rtn": Entry(
        "integers",
        "integers rounded to nearest",
        {"bits": _BITS, "group_size": _GROUP, "symmetric": _SYMMETRIC},
    ),
    **{
        f"int{bits}": Entry(
            "integers",
            "integers of so many bits, rounded to nearest",
            {"group_size": _GROUP, "symmetric": _SYMMETRIC},
            {"bits": bits},
        )
        for bits in range(2, 9)
    },
    "gptq": _gptq("GPTQ on calibration text (the fast kernel is chosen anyway)"),
    "gptq_marlin": _gptq("gptq"),
    "marlin": Entry(
        "calibrated",
        "GPTQ, 4 bit, symmetric, groups of 128",
        _MARLIN,
        {"bits": 4, "group_size": 128, "symmetric": True, "act_order": True},
        calibrated=True,
    ),
    "awq": Entry(
        "calibrated",
        "AWQ on calibration text, 4 bit with zero points (the fast kernel is chosen anyway)",
        _AWQ,
        calibrated=True,
    ),
    "awq_marlin": Entry("calibrated", "awq", _AWQ, calibrated=True),
    "auto": Entry(
        "auto",
        "chosen for this machine and a memory budget",
        {"budget": Choice("", "for the weights, 8G or 8GiB; default: 0.8 x what is free, less the KV cache")},
    ),
}
_TORCHAO = {
    "int8dq": "int8 weights a row, int8 inputs a token",
    "int8wo": "int8 weights a row",
    "fp8wo": "e4m3 weights a row",
    "fp8dq-per_tensor": "e4m3 weights and inputs, one scale each",
    "fp8dq-per_row": "e4m3 weights a row, inputs a token",
    **{f"int4wo-{group}": f"4-bit weights in groups of {group}" for group in (32, 64, 128, 256)},
}
METHODS |= {name: Entry("torchao", text, family="torchao") for name, text in _TORCHAO.items()}
TORCHAO = tuple(_TORCHAO)
# What SGLang and vLLM call a method, or take for a float model, and lowbit's word for it.
_ELSEWHERE = {
    **dict.fromkeys(("modelopt", "modelopt_fp8", "ptpc_fp8", "fbgemm_fp8", "fp8_per_tensor"), "fp8"),
    **dict.fromkeys(("modelopt_fp4", "nvfp4_online", "petit_nvfp4"), "nvfp4"),
    **dict.fromkeys(("quark_mxfp4", "mxfp_w4a8"), "mxfp4"),
    **dict.fromkeys(("experts_int8", "int8_per_channel", "mlx_q8"), "int8"),
    **dict.fromkeys(("moe_wna16", "w4afp8", "quark_int4fp8_moe", "mlx_q4"), "int4"),
    **dict.fromkeys(("auto-round", "auto_round", "inc"), "gptq"),
}
# These only name what a checkpoint is, and it says so itself.
_OF_CHECKPOINTS = ("compressed-tensors", "auto-round-int8", "quark", "modelslim", "modelopt_mixed", "torchao")
_NOTHING = ("none", "unquant")
_MIX = re.compile(r"(i?q|tq)\d_\w{1,8}", re.I)  # q4_k_m: how llama.cpp's users ask for a method
KEEP = ("keep", "bf16", "f16", "f32")  # what a recipe may say instead of a method: float, as stored or cast


@dataclass(frozen=True)
class MethodSpec:
    """A method and its options, checked and complete. ``text``: as it was written."""

    name: str
    options: Mapping[str, Value | None]
    text: str

    @property
    def entry(self) -> Entry:
        """What the table says of it."""
        return METHODS[self.name]

    @property
    def key(self) -> str:
        """The same for the same numerics, however written: ``fp8 activation=token weights=channel``."""
        words = (f"{name}={value}" for name, value in sorted(self.options.items()) if value not in (None, ""))
        return " ".join((self.name, *words))


def parse_method(text: str, flag: str = "--quantization") -> MethodSpec:
    """``NAME[:option=value,…]`` against the table; E0402 names the nearest method, option or the choices."""
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for word in filter(None, rest.split(",")):
        option, equals, value = word.partition("=")
        if not equals:
            raise _wrong(flag, f"{printable(repr(word))} is no option=value; write {name}:option=value")
        if option in given:
            raise _wrong(flag, f"option {printable(option)} of {name} stands there twice")
        given[option] = value
    return method_spec(name, given, flag)


def method_spec(name: str, given: Mapping[str, object], where: str) -> MethodSpec:
    """A method from its name and options, as a flag or a recipe gives them."""
    if name in _ELSEWHERE:
        raise _wrong(where, f"{name!r} is another engine's name; use {_ELSEWHERE[name]}")
    if name in _OF_CHECKPOINTS:
        text = (
            "names checkpoints, which say themselves what they are; drop it, or name a method for a float one"
        )
        raise _wrong(where, f"{name!r} {text}")
    if name in _NOTHING:
        raise _wrong(where, f"{name!r} is no method; drop it, and the model stays as it is stored")
    if _MIX.fullmatch(name):
        raise _wrong(where, f"{name!r} is a type of GGUF files; write gguf:type={name.lower()}")
    if name not in METHODS:
        raise _wrong(where, f"unknown quantization method {printable(repr(name))}{_nearest(name, METHODS)}")
    entry = METHODS[name]
    options: dict[str, Value | None] = {key: choice.default for key, choice in entry.options.items()}
    for key, value in given.items():
        if key in entry.fixed:
            raise _wrong(where, f"{name} fixes {key} at {entry.fixed[key]}")
        if key not in entry.options:
            has = ", ".join(entry.options) or "none"
            raise _wrong(where, f"{name} has no option {printable(repr(key))}; it has: {has}")
        options[key] = _value(value, entry.options[key], f"{name}:{key}", where)
    text = name + "".join(f"{',' if n else ':'}{key}={value}" for n, (key, value) in enumerate(given.items()))
    return MethodSpec(name, options | dict(entry.fixed), text)


def parse_torchao(text: str) -> MethodSpec:
    """One of torchao's nine names, as SGLang spells them, or E0402 with the choices."""
    if text not in TORCHAO:
        hint = "; int4wo needs a group size" if text in ("int4wo", "int4wo-") else _nearest(text, TORCHAO)
        raise _wrong(
            "--torchao-config", f"unknown {printable(repr(text))}{hint}; choices: {', '.join(TORCHAO)}"
        )
    return method_spec(text, {}, "--torchao-config")


def _value(value: object, choice: Choice, what: str, where: str) -> Value:
    """The option's value in its type; flags give text, recipes may give numbers and booleans."""
    if choice.kind is bool and isinstance(value, (bool, str)) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if choice.kind is int and not isinstance(value, bool):
        text = str(value)
        if text.removeprefix("-").isdecimal() and (not choice.choices or text in choice.choices):
            number = int(text)
            if choice.choices or number >= choice.least:
                return number
    if choice.kind is str and isinstance(value, str) and (not choice.choices or value in choice.choices):
        return value
    raise _wrong(where, f"{what} must be {choice.accepts}, got {printable(repr(value))}")


def _nearest(name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return hint if isinstance(known, tuple) else f"{hint or '.'} Known: {', '.join(known)}"


def _wrong(where: str, what: str) -> LowbitError:
    return LowbitError("E0402", f"{where}: {what}")
