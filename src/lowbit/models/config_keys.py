"""ConfigKeys: what a config.json or GGUF metadata say, in the types that are asked for.

A missing or absurd key is an error that names the file and the key; nothing that changes meaning has a silent
default.
"""

from __future__ import annotations

import math

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable

MAX_SIZE = 1 << 24  # no published model has a dimension, vocabulary or context near it

# GGUF keys that may list a number for each layer (Granite 4's do); where all are one, it is the model's.
_OF_LAYERS = {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}
_OF_LAYERS |= {"expert_feed_forward_length"}


class ConfigKeys:
    """Typed access to a dictionary of config keys; every refusal names file and key."""

    def __init__(self, values: dict[str, object], place: str) -> None:
        self.values = values
        self.place = place

    def _fail(self, key: str, expected: str) -> LowbitError:
        found = printable(repr(self.values[key])) if key in self.values else "nothing"
        return LowbitError("E0216", f"{self.place}: key {key!r} must be {expected}, found {found}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise self._fail(key, f"a whole number from 1 to {MAX_SIZE}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A number that may be 0, or null for none."""
        value = self.values.get(key)
        if key in self.values and value in (None, 0) and value is not False:
            return 0
        return default if default == 0 and not self.has(key) else self.size(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fail(key, "a finite number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and x is not True and math.isfinite(x) and x > 0 for x in value
        ):
            raise self._fail(key, "a list of positive numbers")
        return tuple(float(x) for x in value)

    def optional(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._fail(key, "a string")
        return value

    def section(self, key: str) -> dict[str, object]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._fail(key, "an object")
        return value


def architecture_of(header: CheckpointHeader) -> str:
    """``LlamaForCausalLM`` from config.json's ``architectures``, ``llama`` from GGUF metadata."""
    if header.container == "gguf":
        return ConfigKeys(header.metadata, header.root.name).text("general.architecture")
    listed = header.config.get("architectures")
    if isinstance(listed, list) and listed and isinstance(listed[0], str):
        return listed[0]
    raise LowbitError(
        "E0216", f"{header.root.name}/config.json: key 'architectures' must list the model's class"
    )


def json_keys(header: CheckpointHeader) -> ConfigKeys:
    """The keys of config.json."""
    return ConfigKeys(header.config, f"{header.root.name}/config.json")


def gguf_keys(header: CheckpointHeader) -> ConfigKeys:
    """The metadata keys under the architecture's prefix, without it."""
    name = architecture_of(header)
    prefix = f"{name}."
    values = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    for key in _OF_LAYERS & values.keys():
        listed = values[key]
        if isinstance(listed, list) and listed and listed.count(listed[0]) == len(listed):
            values[key] = listed[0]
    return ConfigKeys(values, f"{header.root.name}: {name}")
