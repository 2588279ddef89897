"""Calibration: text as token sequences, what is remembered of a layer's inputs, and what comes out.

Nothing here knows a model: ``loading.calibrate`` runs one, ``block`` quantizes what it has seen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError, printable
from lowbit.numerics.quantized_tensor import QuantizedTensor

_log = logging.getLogger("lowbit")

# Beginnings of chapters of Python's language reference, which every installation carries, behind lowbit's own
# text: enough words for many sequences, without a download and without one chapter outweighing the rest.
_TOPICS = (
    *("assignment", "async", "attribute-access", "augassign", "binary", "bitwise", "bltin-type-objects"),
    *("booleans", "break", "callable-types", "calls", "class", "comparisons", "compound", "context-managers"),
    *("continue", "customization", "del", "dict", "dynamic-features", "exceptions", "exprlists", "floating"),
    *("for", "formatstrings", "function", "global", "id-classes", "identifiers", "if", "imaginary", "in"),
    *("integers", "lambda", "lists", "nonlocal", "numbers", "numeric-types", "operator-summary", "pass"),
    *("power", "raise", "return", "sequence-types", "shifting", "slicings", "specialattrs", "specialnames"),
    *("string-methods", "strings", "subscriptions", "truth", "try", "typesfunctions", "typesmapping"),
    *("typesmethods", "typesmodules", "typesseq", "typesseq-mutable", "unary", "while", "with", "yield"),
)
_TOPIC_CHARACTERS = 4000

Method = Literal["gptq", "awq", "rtn"]


@dataclass(frozen=True)
class Calibration:
    """What calibrated methods look at. ``file``: text of the user's; ``tokenizer``: where its own is not."""

    file: Path | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class CalibrationOptions:
    """How to quantize.

    ``group_size``: -1 the whole row, None the largest power of two up to 128 that divides it. ``act_order``
    with ``static_groups`` rounds the columns with the largest inputs first and leaves every group where it
    is, so that a file needs no g_idx. ``rtn`` is rounding to nearest: no data is used. ``minimum_tokens``: an
    expert that saw fewer is rounded to nearest. ``sample_rows``: inputs AWQ keeps of each layer.
    ``requantize``: take a checkpoint that is quantized already for the float model.
    """

    method: Method = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.05
    block: int = 128
    scale_steps: int = 20
    clip_steps: int = 10
    clip_shrink: float = 0.5
    sample_rows: int = 512
    minimum_tokens: int = 64
    requantize: bool = False


@dataclass(frozen=True)
class CalibratedModule:
    """A Linear of the model quantized, by its canonical name; its bias float32 (out,), changed or not.

    A router whose inputs were scaled comes as a dense f32 weight.
    """

    name: str
    weight: QuantizedTensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class ChangedVector:
    """A small tensor that took over a scale, as it is to be stored; ``name`` ends in ``.weight``."""

    name: str
    tensor: Tensor


class InputStatistics:
    """What is remembered of the inputs x (tokens, in) of one Linear.

    ``gram``: the sum of x xᵀ, float32 (in, in), where asked for (GPTQ's Hessian). ``sample``: at most
    ``sample_rows`` of the inputs, evenly over all seen, however many there will be: every 2^n-th.
    """

    def __init__(self, columns: int, *, gram: bool, sample_rows: int) -> None:
        self.tokens = 0
        self.gram = torch.zeros(columns, columns) if gram else None
        self._magnitudes = torch.zeros(columns, dtype=torch.float64)
        self._rows = torch.empty(0, columns)
        self._limit, self._stride = sample_rows, 1

    def add(self, x: Tensor) -> None:
        """Some more inputs."""
        x = x.float()
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        self._magnitudes += x.abs().sum(0)
        if self._limit:
            new = x[-self.tokens % self._stride :: self._stride]
            self._rows = torch.cat((self._rows, new))
            while len(self._rows) > self._limit:
                self._rows = self._rows[::2].clone()
                self._stride *= 2
        self.tokens += len(x)

    @property
    def magnitude(self) -> Tensor:
        """float32 (in,): mean |x|."""
        return (self._magnitudes / max(self.tokens, 1)).float()

    @property
    def sample(self) -> Tensor:
        """float32 (rows, in)."""
        return self._rows

    def check_finite(self, name: str) -> None:
        """E0442 where an input of the Linear called ``name`` was NaN or infinite."""
        if not bool(self._magnitudes.isfinite().all()):
            raise LowbitError(
                "E0442",
                f"{name}: its inputs became NaN or infinite on the calibration text; the float model "
                "is damaged or overflows (lowbit check shows damaged weights)",
            )

    def divide(self, scales: Tensor) -> None:
        """The inputs will come divided by ``scales`` (in,)."""
        self._rows = self._rows / scales
        self._magnitudes /= scales
        if self.gram is not None:
            self.gram /= scales * scales[:, None]


def built_in_texts() -> list[str]:
    """lowbit's own calibration text, then chapters of the running Python's language reference."""
    own = resources.files("lowbit.quantize").joinpath("calibration_text.txt").read_text("utf-8")
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python without its documentation
        return [own]
    return [own, *(topics[name][:_TOPIC_CHARACTERS] for name in _TOPICS if name in topics)]


def read_texts(path: Path) -> list[str]:
    """The documents of a file: all of a .txt, the ``text`` of every line of a .jsonl."""
    try:
        whole = path.read_text("utf-8")
    except OSError as error:
        raise LowbitError("E0441", f"{path}: calibration data cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LowbitError(
            "E0441", f"{path}: calibration data is not UTF-8 (byte {error.start}); convert it"
        ) from None
    if path.suffix == ".txt":
        return [whole]
    if path.suffix != ".jsonl":
        raise LowbitError("E0441", f"{path}: calibration data must be .txt or .jsonl, by its name")
    texts = []
    for number, line in enumerate(whole.splitlines(), 1):
        if line.strip():
            texts.append(_text_of(line, f"{path}: line {number}"))
    return texts


def _text_of(line: str, place: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise LowbitError("E0441", f"{place} is not JSON; a .jsonl has one object a line") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise LowbitError(
            "E0441", f"{place} has no string under 'text': {printable(line, 60)}; name the key 'text'"
        )
    text: str = found["text"]
    return text


def calibration_sequences(
    encode: Callable[[str], list[int]],
    file: Path | None = None,
    *,
    count: int = 64,
    length: int = 512,
    context_length: int = 1 << 30,
    first: int | None = None,
) -> list[list[int]]:
    """Sequences of the file's text, or of the built-in one, no longer than the model's context."""
    texts = built_in_texts() if file is None else read_texts(file)
    return token_sequences(encode, texts, count, min(length, context_length), first)


def token_sequences(
    encode: Callable[[str], list[int]],
    texts: Iterable[str],
    count: int = 64,
    length: int = 512,
    first: int | None = None,
) -> list[list[int]]:
    """At most ``count`` sequences of ``length`` tokens, evenly over all the texts; always the same ones.

    ``encode``: text to ids, without special tokens. ``first``: the token that a model expects at the start of
    any text (BOS), and without which some give very different activations; each sequence begins with it.
    Sequences overlap nowhere: short data give fewer.
    """
    start = [] if first is None or length == 1 else [first]
    length -= len(start)
    tokens = [token for text in texts for token in encode(text)]
    whole = len(tokens) // length
    if not whole:
        raise LowbitError(
            "E0441",
            f"the calibration data are {len(tokens)} tokens, one sequence is {length}; give more text",
        )
    if whole < count:
        _log.warning(
            "lowbit: calibration data give %d sequences of %d tokens, %d were asked for", whole, length, count
        )
        count = whole
    spare = len(tokens) - count * length
    starts = [number * length + spare * number // count for number in range(count)]
    return [start + tokens[at : at + length] for at in starts]
