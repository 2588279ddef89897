"""Which rows of a step are prompts' tokens: for these alone a kernel may round weights.

A token's bits must not depend on who else is in its step. So what may differ for speed's sake hangs on what
the token is, part of a prompt or generated, and never on how many there are. On x86 processors a layer with
a scale for every few columns takes up to twice as long for many tokens where its sums are scaled one by one
(csrc/linear_panels.cpp).

A step says which rows they are (``ForwardBatch.prompt_row``) while its blocks run. Layers that are given
other rows than the step's, an expert's tokens for one, run inside ``as_stored``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from lowbit.kernels import native


class _Step(threading.local):
    """Of this thread's step: its rows, and from which on they are prompts' tokens."""

    rows = 0
    first: int | None = None


_step = _Step()
_ROUNDING = ("amx", "avx512", "avx512_vnni", "avx2")


def rounding(device: str) -> bool:
    """Whether any kernel on such a device ("cpu", "cuda") rounds weights for prompts."""
    return device == "cpu" and native.base_isa() in _ROUNDING and native.library() is not None


def rounded_weights() -> str:
    """What such kernels do for these rows, in words."""
    if native.base_isa() in ("amx", "avx512"):
        return "weights with a scale for every few columns are rounded to bfloat16 for them"
    return "weights are rounded to 12 bits for them (but int8 that meets int8 inputs)"


@contextmanager
def prompt_rows(first: int | None, rows: int) -> Iterator[None]:
    """Inside, layers are given the ``rows`` rows of a step, which from ``first`` on are prompts' tokens;
    None: none of them is."""
    before = _step.rows, _step.first
    _step.rows, _step.first = rows, first
    try:
        yield
    finally:
        _step.rows, _step.first = before


def as_stored() -> AbstractContextManager[None]:
    """Inside, weights are what is stored, for all rows."""
    return prompt_rows(None, 0)


def first_prompt_row(rows: int) -> int:
    """Of the ``rows`` of a layer's input the first that is of a prompt; ``rows`` where none is."""
    if _step.first is None:
        return rows
    assert rows == _step.rows, "layers of other rows than the step's run inside as_stored()"
    return _step.first
