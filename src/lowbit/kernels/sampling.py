"""Tokens drawn from rows of logits, and log-probabilities, on the CPU (``csrc/sampling.cpp``).

None of it answers where there is no native library, or the logits are not float32 in this machine's memory:
``engine.sampler`` then computes the same with torch. What rounding may change between the two is a draw that
lies within 1e-7 of the border between two tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
from torch import Tensor, float32

from lowbit.kernels import native


class LogitChanges(NamedTuple):
    """What is done to a row's logits first: ``bias`` is added, then penalties go to tokens that occur.

    ``biased`` (n,) int64 and ``said`` (m,) int64: tokens, none twice; ``bias`` (n,) float32; ``counts`` (m,)
    int32: how often each stands in the output. ``repetition``: what logits of ``said`` are divided by, or
    multiplied with where they are not above 0.
    """

    biased: np.ndarray
    bias: np.ndarray
    said: np.ndarray
    counts: np.ndarray
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


class Draw(NamedTuple):
    """How a token is chosen from row ``row`` of the logits.

    ``seed`` and ``position``: key and counter of the Philox generator whose first number decides. ``top_k``:
    none where it is not between 1 and the vocabulary. ``temperature``: 0 takes the first of the largest.
    """

    row: int
    seed: int
    position: int
    top_p: float
    min_p: float
    temperature: float
    top_k: int
    changes: LogitChanges | None = None


class _Changes(ctypes.Structure):
    _fields_ = (
        ("biased", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("biases", ctypes.c_int64),
        ("said", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("said_count", ctypes.c_int64),
        ("repetition", ctypes.c_double),
        ("frequency", ctypes.c_double),
        ("presence", ctypes.c_double),
    )

    @classmethod
    def of(cls, changes: LogitChanges) -> _Changes:
        """It holds addresses: the arrays must live as long."""
        biased, bias, said, counts, *numbers = changes
        kinds = ((biased, np.int64), (bias, np.float32), (said, np.int64), (counts, np.int32))
        assert all(array.dtype == kind and array.flags.c_contiguous for array, kind in kinds)
        assert len(biased) == len(bias) and len(said) == len(counts), "one number a token"
        first, second = (biased.ctypes.data, bias.ctypes.data), (said.ctypes.data, counts.ctypes.data)
        return cls(*first, len(biased), *second, len(said), *numbers)


class _Draw(ctypes.Structure):
    _fields_ = (
        ("row", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("changes", ctypes.POINTER(_Changes)),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_draw_tokens.argtypes = (pointer, number, number, pointer, pointer, number, pointer)
    library.lowbit_draw_tokens.restype = ctypes.c_int32
    library.lowbit_rate_row.argtypes = (pointer, number, ctypes.c_float, number, pointer, pointer)
    library.lowbit_rate_row.restype = ctypes.c_int32
    return library


def _takes(logits: Tensor) -> bool:
    return logits.is_cpu and logits.dtype is float32 and logits.stride(-1) == 1


def rules_of(draws: list[Draw]) -> ctypes.Array[_Draw]:
    """As native functions read them; changed rows' arrays must live as long."""
    rules = (_Draw * len(draws))()
    for rule, draw in zip(rules, draws, strict=True):
        rule.row, rule.seed, rule.position, rule.top_p, rule.min_p = draw[:5]
        rule.temperature, rule.top_k = draw.temperature, draw.top_k
        if draw.changes is not None:
            rule.changes = ctypes.pointer(_Changes.of(draw.changes))
    return rules


def draw_tokens(logits: Tensor, peaks: list[float], draws: list[Draw]) -> list[int] | None:
    """A token for each draw from float32 (rows, vocabulary) logits, all threads at work; None: see above.

    ``peaks``: the largest logit of each row; finite where anybody draws. A row that is changed is drawn from
    once only, and is afterwards what it was.
    """
    library = _library()
    if library is None or not _takes(logits):
        return None
    count, (rows, width) = len(draws), logits.shape
    assert all(0 <= draw.row < rows for draw in draws) and len(peaks) == rows, "rows of the logits"
    tokens = (ctypes.c_int64 * count)()
    largest, rules = (ctypes.c_float * rows)(*peaks), rules_of(draws)
    status = library.lowbit_draw_tokens(
        logits.data_ptr(), logits.stride(0), width, largest, rules, count, tokens
    )
    if status == 2:
        raise MemoryError(f"no memory to draw tokens from {width} logits")
    return None if status else list(tokens)


def rate_row(row: Tensor, peak: float, alternatives: int) -> tuple[float, list[int]] | None:
    """Of float32 (vocabulary,) logits, ``peak`` the largest and finite: the logarithm of the sum of their
    exponentials, and the places of the ``alternatives`` largest, of equal ones the first; None: see above."""
    library = _library()
    if library is None or not _takes(row):
        return None
    normalizer, tokens = ctypes.c_double(), (ctypes.c_int64 * alternatives)()
    status = library.lowbit_rate_row(
        row.data_ptr(), len(row), peak, alternatives, ctypes.byref(normalizer), tokens
    )
    if status == 2:
        raise MemoryError(f"no memory to rate {len(row)} logits")
    return None if status else (normalizer.value, list(tokens))
