"""CUDA graphs of decode steps: a few hundred launches become one.

A step of one token a sequence is copied into static tensors and padded to the next of a few sizes, each of
which has a graph; one memory pool serves all graphs, since one of them runs at a time, and what they leave
behind is the logits, in a tensor of their own. A padding row is a sequence of one token whose K and V go
nowhere (write slot -1) and that looks back at nothing (context length 0).

Nothing may be padded where rows depend on each other (``model.spans_tokens``), or where attention does not
know such rows. There a size gets its graph when it has occurred a few times, for exactly so many rows, and
the graphs longest unused go. A kernel that does not know padding also works through as many keys as it is
told there may be: such graphs are made for the next power of two.

All graphs are captured when a server starts, the largest first, so that the smaller ones find their memory in
the pool and no request waits for a capture, which takes a good part of a second; elsewhere (a chat has one
sequence) a size is captured when it occurs. What a graph cannot replay, anything that waits for the device,
turns them off: the log says which layer it was, and all steps run eagerly.

``GraphedSteps`` decides what runs how; ``StepGraphs`` holds the graphs and their tensors. Where ranks share a
model the first one decides, and each captures and replays its own graph of a size when it is told to
(``ranks``). ``Recorder`` is all that is CUDA's own.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from lowbit.engine.static_batch import StaticBatch
from lowbit.errors import LowbitError, printable
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.step_plan import place
from lowbit.settings import Settings

_log = logging.getLogger("lowbit")

MOST_SEQUENCES = 256  # in a graph unless asked otherwise: beyond it launching is no longer what a step costs
OCCURRENCES = 3  # of an exact size before it is worth a graph
GRAPHS = 64  # of exact sizes; the least recently used one goes
LEAST_CONTEXT = 256

Progress = Callable[[int, int, str], None]
Size = tuple[int, int]  # rows, the longest context


class Recorder(Protocol):
    """Makes graphs."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run ``step`` once as it will be replayed, then record it; what replays it.

        A RuntimeError says why it cannot be; torch.OutOfMemoryError that there is no memory for it.
        """


class CudaRecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder``. The first run is on the stream of captures, where libraries set up their memory;
        what would wait for the device raises there, with nothing half captured."""
        self._run_checked(step)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        except BaseException:
            # Where ending the capture is what fails, torch leaves its stream the current one. A half-made
            # graph that the error's frames hold would keep the ranks' group from being left (NCCL).
            torch.cuda.set_stream(current)
            current.wait_stream(self._stream)
            with suppress(RuntimeError):
                graph.reset()
            raise
        return graph.replay

    def _run_checked(self, step: Callable[[], None]) -> None:
        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it does not see all that waits; capturing does
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)


def bucket_sizes(settings: Settings) -> tuple[int, ...]:
    """Sequences of the steps that get graphs, ascending: 1, 2, 4, 8, then every eighth number."""
    most = settings.cuda_graph_max_bs
    if settings.cuda_graph_bs:
        words = settings.cuda_graph_bs.replace(",", " ").split()
        if not words or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
            given = printable(settings.cuda_graph_bs)
            raise LowbitError("E0103", f"--cuda-graph-bs needs whole numbers from 1 on, got {given}")
        sizes = {int(word) for word in words}
        return tuple(sorted(size for size in sizes if most is None or size <= most)) or (most or 1,)
    if most is None:
        most = min(settings.running_limit, MOST_SEQUENCES)
    return tuple(sorted({size for size in (1, 2, 4, 8, *range(16, most, 8)) if size < most} | {most}))


def recorder_for(device: torch.device) -> Recorder | None:
    """What records graphs on a device; None where there are none."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Graphs(Protocol):
    """Graphs by size: those of one process, or of all ranks that share a model."""

    @property
    def sizes(self) -> list[Size]:
        """Sizes with a graph, the least recently used first."""

    def padding(self, size: Size) -> ForwardBatch:
        """A batch of nothing but padding rows."""

    def capture(self, batch: ForwardBatch, size: Size) -> Tensor | None:
        """Make the graph of a size out of a step, which runs by the way; its logits, of all rows of the size.
        None where the step moves states on: that is left to a replay, for a capture may be in vain.

        A RuntimeError says why it cannot be; torch.OutOfMemoryError that there is no memory for it.
        """

    def replay(self, batch: ForwardBatch, size: Size) -> Tensor:
        """The logits of a step, from a graph that there is; the next one overwrites them."""

    def clear(self) -> None:
        """Forget all graphs."""


class StepGraphs:
    """The graphs of one process, and the static tensors that they read and write.

    ``rows``: the largest size; ``context``: tokens of the longest sequence there may be; ``limit``: of
    graphs, the least recently used one goes. ``states``: whether a step moves states of sequences on.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        recorder: Recorder,
        rows: int,
        *,
        context: int,
        page_size: int,
        vocabulary: int,
        device: torch.device,
        limit: int = GRAPHS,
        states: bool = False,
    ) -> None:
        self._forward = forward
        self._recorder = recorder
        self._page_size = page_size
        self._limit = limit
        self._states = states
        pages = -(-context // page_size)
        self._inputs = StaticBatch((rows, rows, pages), device)
        self._logits = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
        self._graphs: OrderedDict[Size, Callable[[], None]] = OrderedDict()

    @property
    def sizes(self) -> list[Size]:
        """See ``Graphs``."""
        return list(self._graphs)

    def padding(self, size: Size) -> ForwardBatch:
        """See ``Graphs``."""
        return self._inputs.pad(0, size[0], self._page_size, size[1])

    def capture(self, batch: ForwardBatch, size: Size) -> Tensor | None:
        """See ``Graphs``."""
        static = self._static(batch, size)
        if self._states and static.state_slots is not None:
            static.state_slots.fill_(-1)  # nobody's: states must not move on twice

        def step() -> None:
            self._logits[: size[0]] = self._forward(static)

        self._graphs[size] = self._recorder.capture(step)
        if len(self._graphs) > self._limit:
            self._graphs.popitem(last=False)
        return None if self._states else self._logits[: size[0]]

    def replay(self, batch: ForwardBatch, size: Size) -> Tensor:
        """See ``Graphs``."""
        self._static(batch, size)
        self._graphs.move_to_end(size)
        self._graphs[size]()
        return self._logits[: size[0]]

    def clear(self) -> None:
        """See ``Graphs``."""
        self._graphs.clear()

    def _static(self, batch: ForwardBatch, size: Size) -> ForwardBatch:
        """The batch in the static tensors, rows that it does not have as padding."""
        self._inputs.fill(batch)
        return self._inputs.pad(len(batch.query_lengths), size[0], self._page_size, size[1])


class GraphedSteps:
    """Runs decode steps, from graphs where there are any. ``replayed`` counts those that were.

    ``forward``: a step without a graph. ``context``: tokens of the longest sequence there may be, whole
    pages. ``padded``: whether padding rows are known.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        graphs: Graphs,
        sizes: tuple[int, ...],
        *,
        context: int,
        padded: bool,
        exact_context: bool = False,
    ) -> None:
        self.graphs = graphs
        self._forward = forward
        self._sizes = sizes
        self._padded = padded
        self._exact_context = exact_context
        self._context = context
        self._occurred: Counter[Size] = Counter()
        self._too_large: set[Size] = set()
        self.refusal = ""  # why no step of this model can be captured
        self.replayed = 0

    @property
    def sizes(self) -> list[Size]:
        """Sizes with a graph, the least recently used first."""
        return self.graphs.sizes

    def run(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step; the next one overwrites them."""
        rows = len(batch.query_lengths)
        size = self._size(batch)
        if self.refusal or size is None or size in self._too_large:
            return self._forward(batch)
        if size in self.sizes:
            logits = self.graphs.replay(batch, size)
            self.replayed += 1
            return logits[:rows]
        self._occurred[size] += 1
        # The first time libraries and tables may be set up, which waits for the device.
        if self._occurred[size] < (2 if self._padded else OCCURRENCES):
            return self._forward(batch)
        captured = self._capture(batch, size)
        if captured is None and size in self.sizes:
            captured = self.graphs.replay(batch, size)
        return self._forward(batch) if captured is None else captured[:rows]

    def capture_all(self, progress: Progress | None = None) -> None:
        """Graphs of all sizes that are padded to, the largest first."""
        if not self._padded:
            return
        for done, rows in enumerate(reversed(self._sizes)):
            size = (rows, self._context)
            batch = self.graphs.padding(size)
            self._forward(batch)
            self._capture(batch, size)
            if self.refusal:
                return
            if progress is not None:
                progress(done + 1, len(self._sizes), "CUDA graphs")
        _log.info("lowbit: CUDA graphs of %d sizes, up to %d sequences", len(self.sizes), self._sizes[-1])

    def _size(self, batch: ForwardBatch) -> Size | None:
        """The graph that can run the batch; None for drafts and for more sequences than any has."""
        rows = len(batch.query_lengths)
        if len(batch.tokens) != rows or rows > self._sizes[-1]:
            return None
        if self._padded:
            return next(size for size in self._sizes if size >= rows), self._context
        if not self._exact_context:
            return rows, self._context
        needed = max(batch.max_context, LEAST_CONTEXT)
        return rows, min(1 << (needed - 1).bit_length(), self._context)

    def _capture(self, batch: ForwardBatch, size: Size) -> Tensor | None:
        """A graph for the size, if it can be made; the step's logits where it was run by the way."""
        try:
            return self.graphs.capture(batch, size)
        except RuntimeError as error:
            # Ending a capture that failed may fail in turn.
            if torch.OutOfMemoryError in (type(error), type(error.__context__)):
                self._too_large.add(size)
                _log.warning("lowbit: no memory for a CUDA graph of %d sequences; those run eagerly", size[0])
                return None
            first = str(error).partition("\n")[0]
            self.refusal = f"{where(error)}: {first}"
            self.graphs.clear()
            _log.warning("lowbit: CUDA graphs off: %s; running eagerly", printable(self.refusal, 300))
            return None


def where(error: BaseException) -> str:
    """The layer and the function of lowbit that an error came out of."""
    return place(_frames(error))


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Of where it was raised, the innermost first."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return reversed(frames)
