"""Recipe: which module gets which method. Imports no torch: what is wrong with one is said before anything
is read.

One word (``--quantization fp8``) is a recipe of one default. A file says more; the first rule whose pattern
names a module decides, ``default`` the rest:

    default = "fp8"                           # absent: what no rule names stays as it is

    [[rule]]
    modules = ["attention", "*.layers.0.*"]   # a pattern, or several
    quantization = "int8wo"                   # a method, or keep, bf16, f16, f32

    [[rule]]
    modules = "experts"
    quantization = "rtn"
    bits = 3                                  # options of the method, as in --quantization rtn:bits=3
    group_size = 64

A pattern is a role (attention, mlp, experts, head, embedding), ``re:`` and a regular expression for the
whole name, a shell pattern for it (``*.self_attn.*``), or some dotted parts of it (``down_proj``,
``layers.0.mlp``); a fused name (``qkv_proj``, ``gate_up_proj``) means its parts.

Never quantized: norms, routers, expert gates. Not unless a rule names them: embeddings and the head (but by
``gguf``, whose mixes define both), and tiny layers, whose scales would cost what their codes save.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lowbit.errors import LowbitError, printable
from lowbit.quantize.auto import parse_budget
from lowbit.quantize.specification import (
    KEEP,
    METHODS,
    MethodSpec,
    method_spec,
    parse_method,
    parse_torchao,
)

_LARGEST_FILE = 1 << 20
_TINY_ROWS, _TINY_COLUMNS = 16, 32
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
_ROLES = ("attention", "mlp", "experts", "head", "embedding")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a module: a method, a plain dtype ("" = as stored), and why where it stays plain."""

    method: MethodSpec | None
    dtype: str = ""
    reason: str = ""
    named: bool = False  # by a rule or pattern, not by default


@dataclass(frozen=True)
class Rule:
    """Modules that match one of ``patterns`` get ``method``, or stay plain in ``dtype`` ("": as stored)."""

    patterns: tuple[str, ...]
    method: MethodSpec | None
    dtype: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Recipe:
    """Rules in order and a default. ``described``: for people and for the model's details."""

    rules: tuple[Rule, ...]
    default: MethodSpec | None
    described: str

    @classmethod
    def of(cls, method: MethodSpec, ignore: Iterable[str] = ()) -> Recipe:
        """One method for everything but what ``ignore`` names."""
        return cls(_ignored(ignore), method, method.text)

    @classmethod
    def from_file(cls, path: Path, ignore: Iterable[str] = ()) -> Recipe:
        """A TOML file; E0404 says what is wrong and where."""
        values = _toml(path)
        _only(values, ("default", "rule"), path.name)
        default = values.get("default")
        rules = values.get("rule", [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise _wrong(path.name, "rules are tables: [[rule]]")
        if default is None and not rules:
            raise _wrong(path.name, 'says nothing: it needs default = "METHOD" or a [[rule]]')
        told = _default(default, path.name)
        listed = tuple(_rule(rule, f"{path.name}: rule {n}") for n, rule in enumerate(rules, 1))
        return cls((*_ignored(ignore), *listed), told, f"recipe {path.name}")

    @property
    def methods(self) -> list[MethodSpec]:
        """Every method it may use, once."""
        found = [rule.method for rule in self.rules] + [self.default]
        return list({method.key: method for method in found if method is not None}.values())

    @property
    def calibrated(self) -> bool:
        """Whether a method needs text run through the model."""
        return any(method.entry.calibrated for method in self.methods)

    @property
    def delayed_states(self) -> Path | None:
        """Where a method with delayed scales keeps them between runs."""
        for method in self.methods:
            if method.options.get("activation") == "delayed" and (file := method.options.get("scales")):
                return Path(str(file)).expanduser()
        return None

    def verdict(self, name: str, role: str, shape: tuple[int, int]) -> Verdict:
        """What becomes of a module; ``role``: linear, expert, router, head or embedding."""
        if role == "router":
            return Verdict(None, reason="routers and gates are never quantized")
        for rule in self.rules:
            if any(matches(pattern, name, role) for pattern in rule.patterns):
                return Verdict(rule.method, rule.dtype, rule.reason, named=True)
        if self.default is None:
            return Verdict(None, reason="no rule names it")
        takes_all = METHODS[self.default.name].module == "gguf"
        if role in ("head", "embedding") and not takes_all:
            return Verdict(None, reason=f"the {role} is quantized only where a rule names it")
        if shape[0] < _TINY_ROWS or shape[1] < _TINY_COLUMNS:
            return Verdict(None, reason=f"tiny ({shape[0]} x {shape[1]})")
        return Verdict(self.default)


class QuantizationSettings(Protocol):
    """The options of ``settings.Settings`` that say how to quantize."""

    quantization: str | None
    torchao_config: str | None
    quantization_recipe: str | None
    quantization_ignore: str
    gguf_type: str | None
    max_total_tokens: int | None
    context_length: int | None


@dataclass(frozen=True)
class Asked:
    """What a person asked for; ``recipe()`` checks it, once the checkpoint is known to be float."""

    quantization: str | None = None
    torchao_config: str | None = None
    recipe_file: str | None = None
    ignore: str = ""  # patterns, comma-separated
    gguf_type: str | None = None
    tokens: int | None = None  # of KV cache that auto leaves room for
    chosen: str = ""  # why auto became this

    def __post_init__(self) -> None:
        given = [flag for flag, value in self._flags() if value]
        if len(given) > 1:
            raise LowbitError("E0405", f"{given[0]} and {given[1]} both say how to quantize; use one")
        if self.torchao_config is not None:
            parse_torchao(self.torchao_config)
        if self.auto_budget:
            parse_budget(self.auto_budget)
        if self.auto_budget is not None and self.gguf_type is not None:
            raise LowbitError("E0405", f"--gguf-type belongs to --quantization gguf, not to {self.flag}")

    @classmethod
    def by(cls, settings: QuantizationSettings) -> Asked:
        """What the settings say."""
        return cls(
            settings.quantization,
            settings.torchao_config,
            settings.quantization_recipe,
            settings.quantization_ignore,
            settings.gguf_type,
            settings.max_total_tokens or settings.context_length,
        )

    @property
    def auto_budget(self) -> str | None:
        """The budget of ``auto``, "" where it has none; None: it is not auto that was asked for."""
        if self.quantization is None or self.quantization.partition(":")[0] != "auto":
            return None
        return str(parse_method(self.quantization).options["budget"])

    def _flags(self) -> tuple[tuple[str, str | None], ...]:
        return (
            ("--quantization", self.quantization),
            ("--torchao-config", self.torchao_config),
            ("--quantization-recipe", self.recipe_file),
        )

    @property
    def flag(self) -> str:
        """The flag and its value as written, or ""."""
        others = (("--gguf-type", self.gguf_type), ("--quantization-ignore", self.ignore))
        given = ((flag, value) for flag, value in (*self._flags(), *others) if value)
        return next((f"{flag} {printable(value)}" for flag, value in given), "")

    def recipe(self) -> Recipe | None:
        """The recipe, or None where nothing was asked for."""
        ignored = [pattern.strip() for pattern in self.ignore.split(",") if pattern.strip()]
        if self.recipe_file is not None:
            recipe = Recipe.from_file(Path(self.recipe_file), ignored)
        elif self.torchao_config is not None:
            recipe = Recipe.of(parse_torchao(self.torchao_config), ignored)
        elif self.quantization is not None:
            recipe = Recipe.of(self._method(self.quantization), ignored)
            if self.chosen:
                recipe = replace(recipe, described=f"auto: {recipe.described}")
        else:
            for flag, value in (("--quantization-ignore", self.ignore), ("--gguf-type", self.gguf_type)):
                if value:
                    raise LowbitError("E0405", f"{flag} says nothing without --quantization")
            return None
        if self.gguf_type is not None and recipe.methods[0].name != "gguf":
            raise LowbitError("E0405", f"--gguf-type belongs to --quantization gguf, not to {self.flag}")
        return recipe

    def _method(self, text: str) -> MethodSpec:
        spec = parse_method(text)
        if self.gguf_type is None or spec.name != "gguf":
            return spec
        if "type=" in text:
            raise LowbitError("E0405", f"--gguf-type and {self.flag} both name a type; use one")
        return parse_method(f"{text}{',' if ':' in text else ':'}type={self.gguf_type}")


def matches(pattern: str, name: str, role: str) -> bool:
    """Whether a recipe's pattern names the module, itself or by the fused layer it is a part of."""
    if pattern in _ROLES:
        return _has_role(pattern, name, role)
    return any(_matches(pattern, spelling) for spelling in {name, fused_name(name)})


def fused_name(name: str) -> str:
    """The layer a module runs in: ``qkv_proj`` for its ``q_proj``; most modules are layers of their own."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{_FUSED[leaf]}" if leaf in _FUSED else name


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(letter in pattern for letter in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _has_role(pattern: str, name: str, role: str) -> bool:
    if pattern == "experts":
        return role == "expert"
    if pattern in ("head", "embedding"):
        return role == pattern
    inside = ".self_attn." if pattern == "attention" else ".mlp."
    return role == "linear" and inside in name


def _ignored(patterns: Iterable[str]) -> tuple[Rule, ...]:
    checked = tuple(checked_pattern(pattern, "--quantization-ignore") for pattern in patterns)
    return tuple(Rule((pattern,), None, reason=f"--quantization-ignore {pattern}") for pattern in checked)


def _toml(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise _wrong(path.name, f"is larger than {_LARGEST_FILE} bytes; no recipe is")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowbitError("E0301", f"{printable(str(path))}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(path.name, f"is no TOML: {printable(error)}") from None


def _default(value: object, where: str) -> MethodSpec | None:
    if value is None or value == "keep":
        return None
    if not isinstance(value, str):
        raise _wrong(where, "default must be a method's name")
    return _usable(parse_method(value, where), where)


def _rule(values: Mapping[str, object], where: str) -> Rule:
    patterns, told = values.get("modules"), values.get("quantization")
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise _wrong(where, 'needs modules = "PATTERN", or a list of them')
    if not isinstance(told, str):
        raise _wrong(where, 'needs quantization = "METHOD", or "keep", "bf16", "f16", "f32"')
    checked = tuple(checked_pattern(pattern, where) for pattern in patterns)
    options = {key: value for key, value in values.items() if key not in ("modules", "quantization")}
    if told in KEEP:
        _only(options, (), where)
        return Rule(checked, None, "" if told == "keep" else told, f"{where} says {told}")
    name, _, inline = told.partition(":")
    if inline and options:
        raise _wrong(where, f"options of {name} stand in the method's name and beside it; use one place")
    spec = parse_method(told, where) if inline else method_spec(name, options, where)
    return Rule(checked, _usable(spec, where))


def _usable(spec: MethodSpec, where: str) -> MethodSpec:
    if spec.name == "auto":
        raise _wrong(where, "auto chooses for a whole model; use it as --quantization auto")
    return spec


def checked_pattern(pattern: str, where: str) -> str:
    """The pattern; E0404 where it makes no sense."""
    if not pattern or len(pattern) > 1024:
        raise _wrong(where, "a pattern of modules is empty or longer than 1,024 letters")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise _wrong(where, f"pattern {printable(repr(pattern))}: {error}") from None
    return pattern


def _only(values: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        has = ", ".join(known) or "none"
        raise _wrong(where, f"unknown key {printable(repr(unknown[0]))}; known here: {has}")


def _wrong(where: str, what: str) -> LowbitError:
    return LowbitError("E0404", f"{where}: {what}")
