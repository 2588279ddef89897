"""Runner: a step's chunks as one ForwardBatch, through the model, or through a captured step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listing

import torch
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
from lowbit.engine.prompts import rounds_prompts
from lowbit.engine.scheduler import PROMPT_LOGPROB_ROWS, Chunk
from lowbit.engine.step_capture import StepCapture
from lowbit.errors import printable
from lowbit.kernels import native
from lowbit.kernels.attention import LayerCache
from lowbit.kernels.decode_steps import DecodedSteps
from lowbit.kernels.device_memory import release_memory
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, allocate_layer, state_bytes
from lowbit.kernels.sampling import Draw
from lowbit.models.model import Model
from lowbit.settings import Settings

_log = logging.getLogger("lowbit")

# A Triton kernel is compiled, for a second or more, when it is first launched with tiles of a size, which no
# request should wait for. Tokens of prompts that meet all of them: of linear layers, of attention where a
# group has one query head to many, and of attention to prompts among other sequences.
WARM_TOKENS = (1, 3, 5, 9, 17, 33, 65, 128, 129, 257, 385, 512, 1024, 2048, 4096)
WARM_LONGEST = (1, 17, 33, 65)
WARM_SEQUENCES = (2, 17, 65, 257)


def warm_sizes(largest: int, sequences: int) -> list[tuple[int, int]]:
    """(tokens, sequences) of steps that launch all that steps of up to so many tokens and sequences do."""
    alone = [(tokens, 1) for tokens in sorted({*WARM_TOKENS, largest}) if tokens <= largest]
    beside = [
        (longest + count - 1, count)
        for count in WARM_SEQUENCES
        for longest in WARM_LONGEST
        if count <= sequences and longest < largest
    ]
    return alone + beside


class Runner:
    """The model, its KV caches of ``pages`` pages and states of as many sequences as may run; decode steps
    are replayed where they can be.

    ``context``: tokens of the longest sequence there may be.
    """

    def __init__(self, model: Model, pages: int, context: int, settings: Settings) -> None:
        self._model = model
        self._page_size = settings.page_size
        self._context = context
        self._most_sequences = settings.running_limit
        slots, backend = settings.running_limit, settings.attention_backend
        specs = model.cache_specs()
        self._has_states = state_bytes(specs) > 0
        self._prompts_apart = rounds_prompts(settings, model.device.type)
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

    @property
    def progress(self) -> int:
        """Blocks computed so far: whether a long step gets on."""
        part = getattr(self._model, "part", self._model)
        return getattr(part, "blocks_done", 0)

    def forget_graphs(self) -> None:
        """What they exchange with other ranks goes to a group that is no more."""
        if isinstance(self._capture, GraphedSteps):
            self._capture.graphs.clear()

    def prepare(self, largest: int, progress: Progress | None = None) -> None:
        """What can be done before there are any requests: on a GPU kernels are compiled, by steps of up to
        ``largest`` prompt tokens and one of that size, which also shows whether there is memory for it; and
        graphs captured."""
        if self._model.device.type == "cuda":
            self.warm_up(warm_sizes(largest, self._most_sequences), progress)
        if isinstance(self._capture, GraphedSteps):
            self._capture.capture_all(progress)

    def warm_up(self, sizes: Iterable[tuple[int, int]], progress: Progress | None = None) -> None:
        """Steps of so many tokens of so many sequences, the first of which has what the others leave; they
        are nobody's: nothing is stored, and states of delayed scales are afterwards what they were, on all
        ranks. Nothing is done where that would not be so."""
        if not all(cache.kernel.takes_padding for cache in self._paged):
            return
        with getattr(self._model, "kept_states", self._model.states.kept_as_they_are)():
            self._launch_all(list(sizes), progress)

    def _launch_all(self, planned: list[tuple[int, int]], progress: Progress | None) -> None:
        for done, (tokens, sequences) in enumerate(planned):
            try:
                for context in (tokens, self._context):  # of few keys and of many
                    self._run(self._nobodys(tokens, sequences, context))
            except torch.OutOfMemoryError as error:
                release_memory(self._model.device)
                _log.warning(
                    "lowbit: no memory for a step of %d tokens (%s); such prompts will be cut: start with a "
                    "lower --mem-fraction-static or --chunked-prefill-size",
                    tokens,
                    printable(str(error).partition("\n")[0], 200),
                )
            if progress is not None:
                progress(done + 1, len(planned), "kernels")

    def _nobodys(self, tokens: int, sequences: int, context: int) -> ForwardBatch:
        """A batch that writes nowhere and looks back at nothing; kernels hear of ``context`` tokens."""

        def filled(count: int, value: int) -> Tensor:
            return torch.full((count,), value, dtype=torch.int32, device=self._model.device)

        lengths = filled(sequences, 1)
        longest = tokens - sequences + 1
        lengths[:1] = longest
        sampled = filled(sequences, tokens - 1).long()
        if sequences == 1 and tokens <= PROMPT_LOGPROB_ROWS:  # the head's kernels of as many rows, too
            sampled = torch.arange(tokens, device=self._model.device)
        return ForwardBatch(
            tokens=filled(tokens, 0),
            positions=filled(tokens, 0),
            write_slots=filled(tokens, -1),
            query_lengths=lengths,
            context_lengths=filled(sequences, 0),
            page_table=filled(sequences, 0)[:, None],
            sample_rows=sampled,
            page_size=self._page_size,
            max_query=longest,
            max_context=max(context, longest),
            state_slots=filled(sequences, -1) if self._has_states else None,
        )

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
    def replays_on_host(self) -> bool:
        """Whether steps are replayed by this machine's own processors."""
        return isinstance(self._capture, StepCapture)

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
        host = HostBatch.of(
            chunks,
            self._page_size,
            states=self._has_states,
            greedy=greedy,
            prompts_apart=self._prompts_apart,
        )
        # A decode step: the newest token of every sequence, with drafts or none, and all rows wanted.
        decodes = all(c.count == 1 for c in chunks) and rows == list(range(len(host.tokens)))
        decodes = decodes and host.prompt_row is None
        if decodes and isinstance(self._capture, StepCapture) and not len(host.sources):
            logits = self._capture.replay(host)
            if logits is not None:
                return logits
        batch = host.to(self._model.device, rows, chosen)
        if decodes and self._capture is not None:
            return self._capture.run(batch)
        if isinstance(self._capture, StepCapture):
            return self._capture.run_prompts(batch)
        return self._run(batch)

    def decode(
        self, chunks: list[Chunk], draws: list[Draw], stops: Listing[Listing[int]], most: int, *, greedy: bool
    ) -> tuple[DecodedSteps, Tensor] | None:
        """Up to ``most`` decode steps one after another (``kernels.decode_steps``), and the last one's
        logits; None where they are not captured. Each chunk is one generated token, and its sequence has
        pages for all steps."""
        if not isinstance(self._capture, StepCapture):
            return None
        greedy = greedy and self._is_screened
        host = HostBatch.of(chunks, self._page_size, states=self._has_states, greedy=greedy, room=most - 1)
        return self._capture.decode(host, draws, stops, most)

    def _run(self, batch: ForwardBatch) -> Tensor:
        return self._model.forward(batch, self._caches)
