"""What a checkpoint recommends for sampling, and every token id that ends its turns."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader


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


def load_generation_config(header: CheckpointHeader) -> GenerationConfig:
    """generation_config.json, with the stop ids of config.json; GGUF files recommend nothing."""
    if header.container == "gguf":
        return GenerationConfig()
    values = read_json(header, "generation_config.json") or {}
    text = header.config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    stop = _ids(values.get("eos_token_id")) or _ids(
        header.config.get("eos_token_id", nested.get("eos_token_id"))
    )

    def number(name: str) -> float | None:
        value = values.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

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
