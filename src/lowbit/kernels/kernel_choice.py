"""Which of the kernels that would run a weight does: chosen once, when its layer is loaded, for any batch.

The order of preference decides (``kernels.choose``), and is left for one reason: a kernel that multiplies the
same stored numbers, and whose rows do not depend on each other (``steady``), takes less time by more than it
takes more memory. Time is what a request costs by the timings on disk,

    1,024 prompt tokens in 4 calls of 256, and 256 answered: 128 in calls of their own, and 128 in calls of 32
    that 31 other sequences share

and time times memory must be less by a tenth: so much may be the neighbours' on the machine. Where only one
number of tokens was timed, on a busy machine or of a very slow kernel, it must be less by half. What rounds
weights is only taken by its name, and so is the reference beside a steady kernel. Inputs that are quantized
leave the choice to the order: whole numbers meet packed codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lowbit.errors import LowbitError
from lowbit.kernels import ANY_USE, Choice, LinearKernel, Loser, Use, choose, linear_kernels, refusal
from lowbit.kernels.timing import COPY, SLOWER, Seconds, key_of, times, with_tokens
from lowbit.numerics.scheme import Scheme

_LESS_BY_HALF = 0.5
CALLS = {1: 128.0, 32: 128 / 32, 256: 1024 / 256}  # of a layer by tokens, for the request above

Entry = Callable[[str], Mapping[int, Seconds] | None]  # the timing table's ``entry``


def no_timings(key: str) -> None:
    """A table that knows nothing."""


def chosen(
    scheme: Scheme,
    shape: tuple[int, ...],
    device: torch.device,
    entry: Entry = no_timings,
    use: Use = ANY_USE,
) -> Choice:
    """The kernel for a weight; ``scheme`` with what its layer does to inputs."""
    bare = _bare(scheme)
    choice = choose(bare, shape, device, use)
    known = _timings(scheme, shape, choice.kernel, entry)
    best, least = choice.kernel, 1.0
    others = rivals(scheme, shape, device, choice.kernel)
    for kernel in others:
        cost = _cost(known, kernel, choice.kernel)
        if cost < float("inf"):
            cost *= _growth(bare, shape, kernel, choice.kernel)
        if cost < SLOWER * least:
            best, least = kernel, cost / SLOWER
    losers = _losers(scheme, shape, device, best, known)
    by = "" if best is choice.kernel else "by timing"
    return Choice(best, choice.refusals, losers, by, bool(others))


def named(
    scheme: Scheme,
    shape: tuple[int, ...],
    device: torch.device,
    name: str,
    entry: Entry = no_timings,
    use: Use = ANY_USE,
) -> Choice | str:
    """The same with a kernel named by the user; the reason where that one refuses."""
    bare = _bare(scheme)
    kernel = kernel_called(name)
    if reason := refusal(kernel, bare, shape, device, use):
        return reason
    known = _timings(scheme, shape, choose(bare, shape, device, use).kernel, entry)
    return Choice(kernel, (), _losers(scheme, shape, device, kernel, known), "by --linear-kernel")


def _bare(scheme: Scheme) -> Scheme:
    """Without what is done to inputs: mostly the same one, and a copy costs as much as a kernel's answer."""
    return scheme if scheme.activation is None else replace(scheme, activation=None)


def kernel_called(name: str) -> LinearKernel:
    """The kernel of that name; E0103 for others."""
    kernels = {kernel.name: kernel for kernel in linear_kernels()}
    if name not in kernels:
        known = ", ".join(("auto", *kernels))
        raise LowbitError("E0103", f"--linear-kernel: there is no kernel {name!r}; known: {known}")
    return kernels[name]


def rivals(
    scheme: Scheme, shape: tuple[int, ...], device: torch.device, preferred: LinearKernel
) -> list[LinearKernel]:
    """What timing may choose instead: the same numbers, and no row depends on another."""
    if scheme.activation is not None:
        return []
    return [
        kernel
        for kernel in linear_kernels()
        if kernel is not preferred
        and kernel.steady
        and not kernel.rounds(scheme)
        and kernel.refuses(scheme, shape, device) is None
    ]


Timings = Mapping[str, Mapping[int, float]]  # kernel -> tokens -> seconds


def _timings(scheme: Scheme, shape: tuple[int, ...], preferred: LinearKernel, entry: Entry) -> Timings:
    """What the table knows of the weight on each kernel. A bf16 copy takes what bf16 took beside another."""
    known: dict[str, Mapping[int, float]] = {}
    said = str(scheme)
    for kernel in linear_kernels():
        if found := entry(key_of(kernel.name, said, shape)):
            known[kernel.name] = {tokens: seconds.mine for tokens, seconds in found.items()}
            if scheme.activation is None and kernel is preferred:
                known[COPY] = {tokens: seconds.dense for tokens, seconds in found.items()}
    return known


def _cost(known: Timings, kernel: LinearKernel, preferred: LinearKernel) -> float:
    """Time of a request in those of the preferred kernel, doubtful ones longer; infinite where not known."""
    mine, other = known.get(kernel.name, {}), known.get(preferred.name, {})
    common = mine.keys() & other.keys()
    if not common:
        return float("inf")
    doubt = SLOWER / _LESS_BY_HALF if len(common) == 1 else 1.0
    return doubt * sum(CALLS[n] * mine[n] for n in common) / sum(CALLS[n] * other[n] for n in common)


def _growth(scheme: Scheme, shape: tuple[int, ...], kernel: LinearKernel, chosen: LinearKernel) -> float:
    """How many times the memory."""
    return kernel.nbytes(scheme, shape) / chosen.nbytes(scheme, shape)


def _losers(
    scheme: Scheme, shape: tuple[int, ...], device: torch.device, best: LinearKernel, known: Timings
) -> tuple[Loser, ...]:
    """What else would run the weight, and why it does not."""
    found, bare = [], _bare(scheme)
    for kernel in linear_kernels():
        if kernel is best or kernel.refuses(bare, shape, device) is not None:
            continue
        reasons = []
        if kernel.rounds(bare) and not best.rounds(bare):
            reasons.append("rounds the weights to bfloat16")
        if kernel.name == "reference":
            others = ", and a row's last bit may depend on others" if best.steady else ""
            reasons.append(f"unpacks at every call{others}")
        mine, theirs = known.get(best.name, {}), known.get(kernel.name, {})
        common = sorted(mine.keys() & theirs.keys())
        speeds = [f"{times(mine[n] / theirs[n])} with {n}" for n in common[1:]]
        if common:
            first = times(mine[common[0]] / theirs[common[0]])
            reasons.append(", ".join([f"{first} as fast {with_tokens(common[0])}", *speeds]))
        elif not reasons:
            reasons.append("not timed yet")
        growth = _growth(bare, shape, kernel, best)
        if growth > 1.1:
            reasons.append(f"{times(growth)} the memory")
        found.append(Loser(kernel.name, ", ".join(reasons)))
    return tuple(found)
