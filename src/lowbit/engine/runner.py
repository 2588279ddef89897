"""Runner: a step's chunks as one ForwardBatch, through the model, or through a captured step."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor

from lowbit.engine.cuda_graphs import (
    GRAPHS,
    GraphedSteps,
    Progress,
    Recorder,
    Size,
    StepGraphs,
    bucket_sizes,
    recorder_for,
)
from lowbit.engine.host_batch import HostBatch
from lowbit.engine.scheduler import Chunk
from lowbit.engine.step_capture import StepCapture
from lowbit.kernels import native
from lowbit.kernels.attention import LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, allocate_layer, state_bytes
from lowbit.models.model import Model
from lowbit.settings import Settings

_log = logging.getLogger("lowbit")


class Runner:
    """The model, its KV caches of ``pages`` pages and states of as many sequences as may run; decode steps
    are replayed where they can be.

    ``context``: tokens of the longest sequence there may be.
    """

    def __init__(self, model: Model, pages: int, context: int, settings: Settings) -> None:
        self._model = model
        self._page_size = settings.page_size
        slots, backend = settings.max_running_requests, settings.attention_backend
        specs = model.cache_specs()
        self._has_states = state_bytes(specs) > 0
        self._is_screened = getattr(model, "screened", None) is not None
        self._caches: list[LayerMemory] = [
            allocate_layer(spec, pages, slots, settings.page_size, model.device, backend) for spec in specs
        ]
        self._capture: StepCapture | GraphedSteps | None = None
        if settings.disable_cuda_graph:
            return
        recorder = recorder_for(model.device)
        if recorder is not None and self._has_states and model.spans_tokens:
            _log.warning("lowbit: CUDA graphs off: capturing would count a step's largest inputs twice")
        elif recorder is not None:
            self._capture = self.graphs(recorder, bucket_sizes(settings), context)
        elif model.device.type == "cpu" and native.library() is not None and settings.tp_size == 1:
            self._capture = StepCapture(self._run)  # sums between ranks are no native calls

    def graphs(self, recorder: Recorder, sizes: tuple[int, ...], context: int) -> GraphedSteps:
        """Decode steps as graphs of such sizes."""
        takes_padding = all(cache.kernel.takes_padding for cache in self._paged)
        part = getattr(self._model, "part", self._model)  # of a shared model: what this rank computes
        context = -(-context // self._page_size) * self._page_size
        own = StepGraphs(
            lambda batch: part.forward(batch, self._caches),
            recorder,
            sizes[-1],
            context=context,
            page_size=self._page_size,
            vocabulary=self._model.vocab_size,
            device=self._model.device,
            limit=max(GRAPHS, len(sizes)),
            states=self._has_states,
        )
        share = getattr(self._model, "share_graphs", None)
        return GraphedSteps(
            self._run,
            own if share is None else share(own),
            sizes,
            context=context,
            padded=takes_padding and not self._model.spans_tokens,
            exact_context=not takes_padding,
        )

    def follow(self, batch: ForwardBatch, size: Size | None, capture: bool) -> None:
        """On a rank but the first: a step as rank 0 runs it, eagerly or by the graph of a size."""
        if size is None:
            self._run(batch)
            return
        assert isinstance(self._capture, GraphedSteps), "as on rank 0"
        graphs = self._capture.graphs
        (graphs.capture if capture else graphs.replay)(batch, size)

    def forget_graphs(self) -> None:
        """What they exchange with other ranks goes to a group that is no more."""
        if isinstance(self._capture, GraphedSteps):
            self._capture.graphs.clear()

    def prepare(self, progress: Progress | None = None) -> None:
        """Capture what can be before there are any requests."""
        if isinstance(self._capture, GraphedSteps):
            self._capture.capture_all(progress)

    @property
    def _paged(self) -> list[LayerCache]:
        return [cache for cache in self._caches if isinstance(cache, LayerCache)]

    @property
    def page_bytes(self) -> int:
        """Of a page, all layers together."""
        return sum(cache.page_bytes for cache in self._paged)

    def populate(self, first: int, last: int) -> Iterator[None]:
        """Have the memory of pages ``first`` to ``last`` there, a moment's work a step."""
        for cache in self._paged:
            yield from cache.populate(first, last)

    @property
    def captured_steps(self) -> int:
        """Steps that were replayed."""
        return self._capture.replayed if self._capture else 0

    def forward(
        self, chunks: list[Chunk], rows: list[int], chosen: Tensor | None = None, *, greedy: bool = False
    ) -> Tensor:
        """float32 (len(rows), vocabulary): the logits of token rows ``rows`` of the batch; the next call may
        overwrite them.

        ``chosen``: int64, the tokens that the step in flight chooses, where chunks compute any of them.
        ``greedy``: see ``ForwardBatch``.
        """
        greedy = greedy and self._is_screened
        host = HostBatch.of(chunks, self._page_size, states=self._has_states, greedy=greedy)
        # A decode step: the newest token of every sequence, with drafts or none, and all rows wanted.
        decodes = all(c.count == 1 for c in chunks) and rows == list(range(len(host.tokens)))
        if decodes and isinstance(self._capture, StepCapture) and not len(host.sources):
            logits = self._capture.replay(host)
            if logits is not None:
                return logits
        batch = host.to(self._model.device, rows, chosen)
        if decodes and self._capture is not None:
            return self._capture.run(batch)
        return self._run(batch)

    def _run(self, batch: ForwardBatch) -> Tensor:
        return self._model.forward(batch, self._caches)
