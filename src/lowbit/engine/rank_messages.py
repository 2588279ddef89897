"""What rank 0 (``ranks``) and the others (``rank``) tell each other, and a batch on its way between them.

rank 0 ──▶ StartRank, Allocate, KeepStates, Step, Regroup     over a socket, framed as ``wire`` does
others ──▶ RankReady, StepDone, RankFailed
a batch's index tensors: one int32 tensor over the group, whose shapes its Step has
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from lowbit.engine.cuda_graphs import Size
from lowbit.errors import printable
from lowbit.kernels.forward_batch import ForwardBatch

MEETING_SECONDS = 120.0  # for all processes to have started
STEP_SECONDS = 300.0  # that one rank waits for another inside a step
_ARRAYS = (  # state_slots: where a model has states
    *("tokens", "positions", "write_slots", "query_lengths", "context_lengths", "page_table"),
    *("state_slots", "sample_rows"),
)


class StartRank(msgspec.Struct, frozen=True, tag="start"):
    """The first message to a rank. ``store``: the file over which all meet."""

    settings: dict[str, str | int | float | bool | None]
    rank: int
    store: str


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Make the KV caches, for sequences of up to ``context`` tokens: answered by a second ``RankReady``."""

    pages: int
    context: int


class KeepStates(msgspec.Struct, frozen=True, tag="keep"):
    """``begin``: remember the states of delayed scales; else put back what they were, for the steps between
    are nobody's. Not answered: it is taken between the steps that it stands between."""

    begin: bool


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A ``ForwardBatch``: the shapes of its index tensors by name, which come over the group as one int32
    tensor. Answered by ``StepDone``.

    ``lengths``: its ``host_lengths``, so that no rank waits for its device to know them. ``graph``: the size
    of the graph that runs it, or that is captured from it; None: eagerly.
    """

    shapes: dict[str, tuple[int, ...]]
    page_size: int
    max_query: int
    max_context: int
    lengths: tuple[list[int], list[int]] | None = None
    graph: tuple[int, int] | None = None
    capture: bool = False
    prompt_row: int | None = None


class StepDone(msgspec.Struct, frozen=True, tag="done"):
    """All of a step is queued, or ``error`` says why it is not; this rank has left the group then."""

    error: str = ""
    out_of_memory: bool = False


class Regroup(msgspec.Struct, frozen=True, tag="regroup"):
    """Leave the group, give memory back, meet the others over a new file: answered by ``RankReady``."""

    store: str


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """A rank has loaded its part, or made its caches. ``token_bytes``: of a token in its KV cache;
    ``state_bytes``: of a sequence's states; ``free``: memory left."""

    token_bytes: int
    state_bytes: int
    free: int
    weight_bytes: int


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A rank ends; a LowbitError's code and message."""

    code: str
    message: str


ToRank = StartRank | Allocate | KeepStates | Step | Regroup
FromRank = RankReady | RankFailed | StepDone


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return printable(str(error).partition("\n")[0], 120)


def step_of(batch: ForwardBatch, graph: Size | None = None, capture: bool = False) -> Step:
    """What the other ranks are told of a batch."""
    found = {name: getattr(batch, name) for name in _ARRAYS}
    shapes = {name: tuple(array.shape) for name, array in found.items() if array is not None}
    lengths = None
    if batch.host_lengths is not None:
        queries, contexts = batch.host_lengths
        lengths = queries.tolist(), contexts.tolist()
    return Step(
        shapes,
        batch.page_size,
        batch.max_query,
        batch.max_context,
        lengths,
        graph,
        capture,
        batch.prompt_row,
    )


def packed(step: Step, batch: ForwardBatch) -> Tensor:
    """int32: all index tensors of a batch, one behind another."""
    return torch.cat([getattr(batch, name).reshape(-1).int() for name in step.shapes])


def batch_of(step: Step, sent: Tensor) -> ForwardBatch:
    """The batch again, from ``packed``'s numbers on another rank's device."""
    sizes = [torch.Size(shape).numel() for shape in step.shapes.values()]
    # Each in memory of its own, as the kernels are given it elsewhere.
    parts = {
        name: part.view(shape).clone()
        for (name, shape), part in zip(step.shapes.items(), sent.split(sizes), strict=True)
    }
    lengths = None
    if step.lengths is not None:
        queries, contexts = (np.array(of, dtype=np.int32) for of in step.lengths)
        lengths = queries, contexts
    return ForwardBatch(
        sample_rows=parts.pop("sample_rows").long(),
        **parts,
        page_size=step.page_size,
        max_query=step.max_query,
        max_context=step.max_context,
        host_lengths=lengths,
        prompt_row=step.prompt_row,
    )


def numbers_of(step: Step) -> int:
    """How many numbers ``packed`` has."""
    return sum(torch.Size(shape).numel() for shape in step.shapes.values())
