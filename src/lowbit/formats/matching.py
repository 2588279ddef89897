"""Module names in quantization configs: every spelling under which a list may name a module.

The same module is ``model.layers.0.mlp.up_proj``, ``model.language_model.layers.0…`` or
``language_model.model.layers.0…`` depending on the version of the tool that wrote the list, and lists may
hold the fused name of a part (``qkv_proj``, ``gate_up_proj``, ``experts``). Each rule of the field
is one function ``rule(key, name) -> bool``; ``listed`` tries it under every spelling. ``Keys`` are for lists
that may be long: as long as a mixture of experts has modules.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Generic, TypeVar

from lowbit.errors import LowbitError, printable

_PREFIXES = ("model.", "language_model.", "model.language_model.", "language_model.model.", "")
_STEM = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?(?=.)")
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
}

Rule = Callable[[str, str], bool]
Value = TypeVar("Value")


@lru_cache(maxsize=1 << 16)
def spellings(name: str) -> tuple[str, ...]:
    """The name itself first, then under every prefix, then as the fused layer it may be a part of."""
    stem = _STEM.sub("", name, count=1)
    found = dict.fromkeys([name, *(prefix + stem for prefix in _PREFIXES)])
    leaf = name.rpartition(".")[2]
    if leaf in _FUSED:
        found |= dict.fromkeys(_with_leaf(spelling, _FUSED[leaf]) for spelling in list(found))
    return tuple(found)


def _with_leaf(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def listed(name: str, keys: Iterable[str], rule: Rule) -> bool:
    """Whether any key names the module under any of its spellings."""
    return any(matches(key, name, rule) for key in keys)


def matches(key: str, name: str, rule: Rule) -> bool:
    """Whether ``key`` names the module. The fused layer is only tried by keys that spell it out: a pattern
    for ``up_proj`` must not catch ``gate_proj`` through ``gate_up_proj``."""
    fused = _FUSED.get(name.rpartition(".")[2])
    return any(
        rule(key, spelling)
        for spelling in spellings(name)
        if fused is None or fused in key or not spelling.endswith(f".{fused}")
    )


def exact(key: str, name: str) -> bool:
    """The full module name (AutoFP8, vLLM ``ignored_layers``)."""
    return key == name


def module_prefix(key: str, name: str) -> bool:
    """transformers >= 5 ``modules_to_not_convert``: a regex matching up to a module border, or a suffix
    that may begin anywhere (``head`` is of ``lm_head``)."""
    return name.endswith(key) or compiled(f"(?:{key})(?:(?<=\\.)|(?=\\.|$))").match(name) is not None


def regex_or_exact(key: str, name: str) -> bool:
    """compressed-tensors: ``re:`` patterns match from the start, anything else is the exact name."""
    return regex(key[3:], name) if key.startswith("re:") else key == name


def regex(key: str, name: str) -> bool:
    """A regular expression from the name's start, with no anchor at its end (``re.match``)."""
    return compiled(key).match(name) is not None


def wildcard(key: str, name: str) -> bool:
    """ModelOpt ``exclude_modules``: a shell pattern for the whole name or for one dotted part of it."""
    if fnmatch.fnmatchcase(name, key):
        return True
    return any(fnmatch.fnmatchcase(part, key) for part in name.split("."))


_LONGEST = 1 << 16  # letters; alternatives of all experts of a layer are thousands
_MOST_REPEATS = 6
# One letter of a pattern that is no repetition: itself, escaped, of a class, any.
_LETTER = re.compile(r"(?:[^\\^$*+?{}\[\]|()]|\\[^0-9A-Za-z]|\\[dDwWsS]|\[\^?[^\]\\\[^]+\])(?![*+?{])")
_ANYTHING = re.compile(r"\.([*+])\??(?![*+?{])")


@lru_cache(maxsize=1 << 16)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of a config; one that cannot be compiled, or could run for ever, is E0212."""
    if reason := costly(pattern):
        raise LowbitError(
            "E0212",
            f"module pattern {printable(repr(pattern))} of the quantization config {reason}; such patterns "
            "may never end and are refused. Spell the modules' names out",
        )
    try:
        return re.compile(_forward(pattern) or pattern)
    except re.error as error:
        raise LowbitError(
            "E0212", f"module pattern {printable(repr(pattern))} of the quantization config: {error}"
        ) from None


def costly(pattern: str) -> str:
    """Why a name that does not match could be tried in very many ways; "" where it could not."""
    if len(pattern) > _LONGEST:
        return f"has {len(pattern):,} letters"
    if _forward(pattern) is not None:
        return ""
    if _repeats_choices(pattern):
        return "repeats a repetition"
    repeats = pattern.count("*") + pattern.count("+")
    return f"has {repeats} repetitions" if repeats > _MOST_REPEATS else ""


def _repeats_choices(pattern: str) -> bool:
    """Whether a group is repeated that holds a repetition or alternatives: the tries are exponential."""
    choices = [False]  # in each group that is open
    at = 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "(":
            choices.append(False)
        elif letter == ")" and len(choices) > 1:
            inside = choices.pop()
            repeated = pattern[at + 1 : at + 2] in ("*", "+", "{")
            if inside and repeated:
                return True
            choices[-1] |= inside
        elif letter in "*+{|":
            choices[-1] = True
        at += 2 if letter == "\\" else 1
    return False


def _forward(pattern: str) -> str | None:
    """The same of a pattern of letters and ``.*`` alone, however many, so that nothing is tried twice: after
    each ``.*`` the first place where what follows fits leaves most room for the rest. None of any other."""
    start = "^" if pattern.startswith("^") else ""
    end = "$" if pattern.endswith("$") and not pattern.endswith("\\$") else ""
    pieces, at, stop = [""], len(start), len(pattern) - len(end)
    while at < stop:
        found = _ANYTHING.match(pattern, at, stop) or _LETTER.match(pattern, at, stop)
        if found is None:
            return None
        if found.re is _LETTER:
            pieces[-1] += found[0]
        else:
            pieces[-1] += "." if found[1] == "+" else ""
            pieces.append("")
        at = found.end()
    first, *middle = pieces
    last = f".*{middle.pop()}$" if end and middle else end
    return start + first + "".join(f"(?>.*?{piece})" for piece in middle) + last


# A pattern of letters that stand for themselves, ``^`` or nothing before and ``$`` behind.
_WHOLE = re.compile(r"\^?((?:[^\\.^$*+?{}\[\]|()]|\\[^0-9A-Za-z])+)\$")


def sole_name(pattern: str) -> str | None:
    """The only name that a regular expression matches (``^model\\.norm$``), or None."""
    found = _WHOLE.fullmatch(pattern)
    return None if found is None else re.sub(r"\\(.)", r"\1", found[1])


def sole_name_or_exact(key: str) -> str | None:
    """The same of keys that ``regex_or_exact`` is for."""
    return sole_name(key[3:]) if key.startswith("re:") else key


def sole_wildcard(key: str) -> str | None:
    """The same of keys that ``wildcard`` is for: without a dot one may be a part of any name."""
    return key if "." in key and not set(key) & set("*?[") else None


class Keys(Generic[Value]):
    """What a config says of modules: keys in their order, and what each of them stands for.

    ``rule``: when a key names a module. ``name_of``: the only name that it can mean, None of a pattern. Names
    are found in a dictionary, as there may be one for every expert of a model; patterns are tried one by one,
    once for each module.
    """

    def __init__(
        self, items: Iterable[tuple[str, Value]], rule: Rule, name_of: Callable[[str], str | None]
    ) -> None:
        self._items, self._rule = list(items), rule
        self._named: dict[str, list[int]] = {}
        self._patterns: list[int] = []
        for at, (key, _) in enumerate(self._items):
            name = name_of(key)
            if name is None:
                self._patterns.append(at)
            else:
                self._named.setdefault(name, []).append(at)
        self._first: dict[tuple[str, ...], Value | None] = {}

    def first(self, *names: str) -> Value | None:
        """What the first key stands for that names the module, under any spelling of any of its names."""
        if names not in self._first:
            self._first[names] = next((value for _, value in self.all(*names)), None)
        return self._first[names]

    def all(self, *names: str) -> Iterator[tuple[str, Value]]:
        """Every such key, and what it stands for."""
        spelled = (spelling for name in names for spelling in spellings(name))
        return self._fitting(spelled, lambda key: any(matches(key, name, self._rule) for name in names))

    def spelled(self, name: str) -> Value | None:
        """What the first key stands for that has this very name, or fits it."""
        return next((value for _, value in self._fitting((name,), lambda key: self._rule(key, name))), None)

    def named(self, name: str) -> Value | None:
        """What the first key stands for that is this very name; no pattern is tried."""
        return next((self._items[at][1] for at in self._named.get(name, ())), None)

    def _fitting(self, names: Iterable[str], fits: Callable[[str], bool]) -> Iterator[tuple[str, Value]]:
        named = {at for name in names for at in self._named.get(name, ())}
        for at in sorted((*named, *self._patterns)):
            key, value = self._items[at]
            if at in named or fits(key):
                yield key, value


def strings(values: object, key: str, place: str) -> tuple[str, ...]:
    """A list of strings, or nothing: the value of an ignore key."""
    if values is None:
        return ()
    if isinstance(values, str):
        return (values,)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LowbitError("E0212", f"{place}.{key} must be a list of module names")
    return tuple(values)
