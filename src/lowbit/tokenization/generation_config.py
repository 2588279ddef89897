"""What a checkpoint recommends for sampling, and every token id that ends its turns."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, fields
from typing import Any

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling defaults (None: the checkpoint says nothing) and stop ids named outside the tokenizer."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] = frozenset()

    def sampling(self) -> dict[str, float]:
        """The defaults it has, by the names that requests and ``SamplingParams`` give them."""
        values = {name: getattr(self, name) for name in RECOMMENDED}
        return {name: value for name, value in values.items() if value is not None}


RECOMMENDED = tuple(each.name for each in fields(GenerationConfig) if each.name != "stop_ids")


# What llama.cpp's converter makes of a generation_config.json. Its penalty is left out: that one looks at the
# last tokens only, whose number is another key.
_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
}
_RANGES = {  # of --preferred-sampling-params: those of requests
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
}


def sampling_defaults(header: CheckpointHeader, source: str, preferred: str | None) -> dict[str, float]:
    """What holds where a request says nothing: ``--sampling-defaults`` ("model" or "openai"), under what
    ``--preferred-sampling-params`` (a JSON object) says."""
    found = load_generation_config(header).sampling() if source == "model" else {}
    return found if preferred is None else found | _preferred(preferred)


def object_of(flag: str, text: str) -> dict[str, Any]:
    """The JSON object that is a flag's value; E0103 where it is none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LowbitError("E0103", f"{flag} is not JSON: {printable(error)}") from None
    if not isinstance(given, dict):
        raise LowbitError("E0103", f"{flag} must be a JSON object, got {printable(text)}")
    return given


def _preferred(text: str) -> dict[str, float]:
    flag = "--preferred-sampling-params"
    given: dict[str, Any] = object_of(flag, text)
    for name, value in given.items():
        if name not in _RANGES:
            near = difflib.get_close_matches(name, RECOMMENDED, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(RECOMMENDED)}"
            raise LowbitError("E0103", f"{flag}: unknown key {printable(name)!r}; {hint}")
        low, high = _RANGES[name]
        number = isinstance(value, int if name == "top_k" else int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            kind = "a whole number" if name == "top_k" else "a number"
            shown = printable(json.dumps(value))
            raise LowbitError("E0103", f"{flag}: {name} must be {kind} from {low} to {high}, got {shown}")
    return given


def load_generation_config(header: CheckpointHeader) -> GenerationConfig:
    """generation_config.json, with the stop ids of config.json; or what a GGUF file has of it."""
    stop: frozenset[int] = frozenset()
    if header.container == "gguf":
        values = {name: header.metadata.get(key) for name, key in _GGUF_KEYS.items()}
    else:
        values = read_json(header, "generation_config.json") or {}
        text = header.config.get("text_config")
        nested = text if isinstance(text, dict) else {}
        stop = _ids(values.get("eos_token_id")) or _ids(
            header.config.get("eos_token_id", nested.get("eos_token_id"))
        )

    def number(name: str) -> float | None:
        value = values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value)

    top_k = number("top_k")
    return GenerationConfig(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        stop_ids=stop,
    )


def _ids(value: object) -> frozenset[int]:
    listed = value if isinstance(value, list) else [value]
    return frozenset(n for n in listed if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
