"""auto: the quantization with the least loss among those that are fast here and fit a memory budget.

Decoding reads every weight for every token, so on a CPU its speed is memory bandwidth divided by bytes: fewer
bits are faster as long as a native kernel runs them. 8 bits lose next to nothing against bf16 and halve the
bytes; below that each bit costs more quality than the one before. So the ladder begins at 8 bits and goes
down only as far as the budget forces it:

    int8     symmetric, groups of 128                8.1 bits a weight, scales and zero points included
    int6     with zero points, groups of 128         6.3
    int5                                             5.3
    int4     groups of 32, then 64, then 128         5.0, 4.5, 4.3
    int3     groups of 64, then 128                  3.5, 3.3

Groups are smaller where 128 does not divide a layer's columns. On CUDA the ladder is fp8 and then int4; it is
untried there. Where no native kernel runs any of them, smaller weights are slower: the model stays as it is
stored if it fits, and only else becomes what fits. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lowbit.errors import LowbitError, printable

LADDERS: dict[str, tuple[str, ...]] = {  # device -> methods, best first
    "cpu": (
        "int8:symmetric=true",
        "int6",
        "int5",
        "int4:group_size=32",
        "int4:group_size=64",
        "int4",
        "int3:group_size=64",
        "int3",
    ),
    "cuda": ("fp8", "int4:group_size=32", "int4"),
}
FREE_SHARE = 0.8  # of the free memory; the rest is for activations and for loading
KV_TOKENS = 8192  # of KV cache that is left room for where nobody says how many

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_budget(text: str) -> int:
    """``500M``, ``8G``, ``8GB`` (powers of 1000), ``8GiB`` (of 1024), ``1.5G`` or bytes; E0402 else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)(?:([KMGT])(i?B)?)?", text, re.ASCII)
    if found is not None:
        number, unit, suffix = found.groups()
        size = _BINARY[unit] if suffix == "iB" else _UNITS[unit or ""]
        if (unit or "." not in number) and (budget := int(float(number) * size)) > 0:
            return budget
    raise LowbitError(
        "E0402",
        f"--quantization auto: budget {printable(repr(text))} is no size; write 500M, 8G (powers of 1000), "
        "8GiB (of 1024) or a number of bytes",
    )


@dataclass(frozen=True)
class Budget:
    """Bytes that weights may take, and where the number comes from."""

    nbytes: int
    origin: str

    @classmethod
    def of_free(cls, free: int, kv_bytes: int, tokens: int) -> Budget:
        """What is free, less a margin and the KV cache of so many tokens."""
        origin = (
            f"{FREE_SHARE:g} x {size_text(free)} free - {size_text(kv_bytes)} KV cache of {tokens} tokens"
        )
        return cls(int(free * FREE_SHARE) - kv_bytes, origin)


@dataclass(frozen=True)
class Sized:
    """What a model becomes with a method. ``native``: no quantized layer runs on the reference kernel."""

    nbytes: int
    native: bool = True


@dataclass(frozen=True)
class Pick:
    """The method, None for as stored, and why in one line."""

    method: str | None
    reason: str


def pick(device: str, size_of: Callable[[str | None], Sized | None], budget: Budget) -> Pick:
    """The first rung of the device's ladder that is native and fits; E0501 where even the last does not.

    ``size_of``: a method's outcome (None: as stored), or None where it cannot be had; asked no more often
    than needed, a large model takes a while to plan.
    """
    stored = size_of(None)
    assert stored is not None, "as stored is always possible"
    within = f"of {size_text(budget.nbytes)} for weights ({budget.origin})"
    above, slow = ("as stored", stored.nbytes), ("as stored", stored.nbytes)
    fallback: Pick | None = None
    for method in LADDERS[device]:
        sized = size_of(method)
        if sized is None:
            continue
        fits = sized.nbytes <= budget.nbytes
        what, beside = (method, above) if sized.native else (f"{method}, on the slow reference kernel", slow)
        if fits and (sized.native or fallback is None):
            why = f"{beside[0]} needs {size_text(beside[1])}"
            if beside[0] == "as stored" and stored.nbytes <= budget.nbytes:
                why += " and reads more bytes a token"
            found = Pick(method, f"auto: {what}: {size_text(sized.nbytes)} {within}; {why}")
            if sized.native:
                return found
            fallback = found
        if sized.native:
            above = (method, sized.nbytes)
        else:
            slow = (method, sized.nbytes)
    if above[0] == "as stored":  # no rung is native
        if stored.nbytes <= budget.nbytes:
            return Pick(
                None,
                f"auto: as stored: {size_text(stored.nbytes)} {within}; smaller weights would be slower "
                "here, no native kernel runs them",
            )
        if fallback is not None:
            return fallback
        above = slow
    smallest, least = above
    raise LowbitError(
        "E0501",
        f"--quantization auto: {smallest} needs {size_text(least)} for weights, the most that may be used "
        f"is {size_text(max(budget.nbytes, 0))} ({budget.origin}); free {size_text(least - budget.nbytes)} "
        "more, lower --context-length, or use a smaller model",
    )


def size_text(nbytes: int) -> str:
    """Bytes in the unit a person would say: 1.5 GiB."""
    size = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes everything")
