"""Decode steps one after another in one native call (``csrc/decode_steps.cpp``): plan, choice, plan …"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Listing
from functools import cache
from typing import NamedTuple

from torch import float32

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.sampling import Draw, rules_of
from lowbit.kernels.step_plan import StepPlan

_NO_MEMORY = -3


class DecodeInputs(NamedTuple):
    """Addresses of a plan's inputs, int32, and the pages that a row of the page table has room for."""

    tokens: int
    positions: int
    write_slots: int
    context_lengths: int
    page_table: int
    pages: int


class DecodedSteps(NamedTuple):
    """By step and sequence: the tokens chosen, and the largest logits. A number that is not finite stands in
    the last step only; its token means nothing."""

    tokens: list[list[int]]
    peaks: list[list[float]]


class _Steps(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in DecodeInputs._fields[:-1]),
        *((name, ctypes.c_int64) for name in ("pages", "page_size", "sequences")),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "width")),
        *((name, ctypes.c_void_p) for name in ("draws", "stops", "stop_ends")),
        ("most", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("chosen", "peaks")),
    )


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "a plan was recorded with it"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_plan_decode.argtypes = (pointer, number, pointer, pointer, pointer)
    library.lowbit_plan_decode.restype = ctypes.c_int64
    return library


def decode_steps(
    plan: StepPlan,
    inputs: DecodeInputs,
    page_size: int,
    draws: list[Draw],
    stops: Listing[Listing[int]],
    most: int,
) -> DecodedSteps:
    """Run the plan of a decode step, whose first inputs are there, up to ``most`` times, each time with the
    tokens chosen before; fewer where a sequence chooses one of its ``stops``, or its logits are not finite.

    ``draws``: one for each sequence, in order; temperature 0 takes the first of the largest. The page table
    holds the pages of all ``most`` tokens.
    """
    logits, count = plan.result, len(draws)
    assert logits.dtype is float32 and logits.stride(1) == 1 and len(logits) == count
    assert [draw.row for draw in draws] == list(range(count)) and len(stops) == count and most > 0
    ends, total = [], 0
    for tokens in stops:
        total += len(tokens)
        ends.append(total)
    number = ctypes.c_int64
    chosen, peaks = (number * (most * count))(), (ctypes.c_float * (most * count))()
    rules, stop_ends = rules_of(draws), (number * count)(*ends)
    listed = (number * total)(*(token for tokens in stops for token in tokens))
    steps = _Steps(
        *inputs,
        *(page_size, count, logits.data_ptr(), logits.stride(0), logits.shape[1]),
        *(ctypes.addressof(rules), ctypes.addressof(listed), ctypes.addressof(stop_ends), most),
        *(ctypes.addressof(chosen), ctypes.addressof(peaks)),
    )
    status, done = ctypes.c_int32(), number()
    failed = _library().lowbit_plan_decode(
        plan.address, len(plan.words), ctypes.byref(status), ctypes.byref(steps), ctypes.byref(done)
    )
    if failed >= 0:
        raise plan.operations[failed].fault(status.value)
    if failed == _NO_MEMORY:
        raise MemoryError(f"no memory to choose {count} tokens")
    if failed != -1:
        raise LowbitError("E0700", f"tokens cannot be chosen from logits of {tuple(logits.shape)}")
    places = [slice(step * count, (step + 1) * count) for step in range(done.value)]
    return DecodedSteps([chosen[place] for place in places], [peaks[place] for place in places])
