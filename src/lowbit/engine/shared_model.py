"""SharedModel: rank 0's part of a model as the whole ``Model``, and its graphs as those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from lowbit.engine.cuda_graphs import Graphs, Size, StepGraphs
from lowbit.engine.rank_messages import KeepStates, RankReady, packed, step_of
from lowbit.engine.ranks import Ranks
from lowbit.errors import LowbitError
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, LayerSpec
from lowbit.models.model import Model

Result = TypeVar("Result")


class SharedModel:
    """Rank 0's part as the whole ``Model``: every batch is computed by all ranks."""

    def __init__(self, model: Model, ranks: Ranks, others: list[RankReady]) -> None:
        """``others``: what the other ranks said of their parts."""
        self._model = model
        self.ranks = ranks
        self.others = others
        self._graphs: list[StepGraphs] = []
        self.weight_bytes = model.weight_bytes + sum(other.weight_bytes for other in others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def cache_specs(self) -> Sequence[LayerSpec]:
        """This rank's."""
        return self._model.cache_specs()

    @property
    def part(self) -> Model:
        """What this rank computes; all of them have to."""
        return self._model

    def share_graphs(self, own: StepGraphs) -> Graphs:
        """This rank's graphs as those of all ranks."""
        self._graphs.append(own)
        return SharedGraphs(own, self)

    @contextmanager
    def kept_states(self) -> Iterator[None]:
        """What steps inside this block make of delayed scales is undone behind it, on every rank."""
        if not len(self._model.states):
            yield
            return
        self.ranks.send(KeepStates(begin=True))
        with self._model.states.kept_as_they_are():
            yield
        self.ranks.send(KeepStates(begin=False))

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """As one model's."""
        return self.together(batch, lambda: self._model.forward(batch, caches))

    def together(
        self,
        batch: ForwardBatch,
        compute: Callable[[], Result],
        graph: Size | None = None,
        capture: bool = False,
    ) -> Result:
        """What ``compute`` makes of this rank's part of a step, while the others do theirs; ``graph``,
        ``capture``: as of ``Step``."""
        step = step_of(batch, graph, capture)
        failed: Exception | None = None
        results: list[Result] = []
        sent = packed(step, batch)
        self.ranks.begin(step)
        try:
            self.ranks.parallel.broadcast(sent)
            results.append(compute())
        except (RuntimeError, OSError, LowbitError) as error:
            failed = error
        try:
            self.ranks.finish(step, failed, self._forget_graphs)
        finally:
            failed = None  # its frames hold the step's tensors
        [result] = results  # nothing failed
        return result

    def _forget_graphs(self) -> None:
        for graphs in self._graphs:
            graphs.clear()


class SharedGraphs:
    """``Graphs`` of all ranks: each captures and replays its own of a size when rank 0 does."""

    def __init__(self, own: StepGraphs, model: SharedModel) -> None:
        self._own = own
        self._model = model

    @property
    def sizes(self) -> list[Size]:
        """See ``Graphs``; every rank has the same."""
        return self._own.sizes

    def padding(self, size: Size) -> ForwardBatch:
        """See ``Graphs``."""
        return self._own.padding(size)

    def capture(self, batch: ForwardBatch, size: Size) -> Tensor | None:
        """See ``Graphs``; where one rank cannot, none has it."""
        return self._model.together(batch, lambda: self._own.capture(batch, size), size, capture=True)

    def replay(self, batch: ForwardBatch, size: Size) -> Tensor:
        """See ``Graphs``."""
        return self._model.together(batch, lambda: self._own.replay(batch, size), size)

    def clear(self) -> None:
        """See ``Graphs``: rank 0 asks for none of them again."""
        self._own.clear()
