"""Ranks that share models, each in a process of its own, started once and given one checkpoint after
another."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.layers.experts import Experts
from lowbit.layers.linear import Linear
from lowbit.loading import load_model
from lowbit.loading.loader import Loader
from lowbit.models.model import Model

SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A checkpoint to load and prompts to run, on the reference kernel or the chosen ones. ``watched``:
    summed layers are written down."""

    path: Path
    prompts: list[list[int]]
    reference: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    watched: bool = False


@dataclass(frozen=True)
class Summed:
    """One call of a layer whose results are summed over ranks: what this rank's part was given (a layer's
    x; experts' arguments) and came to."""

    name: str
    given: tuple[Any, ...]
    result: np.ndarray


@dataclass(frozen=True)
class Answer:
    """``logits``: float32 (tokens, vocabulary) of each prompt; ``weight_bytes``: packed, of this rank."""

    logits: list[Tensor]
    weight_bytes: int
    kernels: frozenset[str]
    summed: list[Summed]


def loaded(job: Job, parallel: Parallel = ALONE) -> Model:
    """The model, or a rank's part of it."""
    options = {"device": "cpu", "kv_cache_dtype": "f32", **job.options}
    if job.reference:
        options["linear_kernel"] = "reference"
    return load_model(open_checkpoint(str(job.path)), parallel=parallel, **options)


def answer(job: Job, parallel: Parallel = ALONE) -> Answer:
    """What a rank makes of a job."""
    model, summed = loaded(job, parallel), []
    with pytest.MonkeyPatch.context() as patch:
        if job.watched:
            for kind in (Linear, Experts):
                patch.setattr(kind, "partial", _watched(kind.partial, summed))
        logits = prompt_logits(model, job.prompts)
    return Answer(logits, model.weight_bytes, model.kernels, summed)


def _watched(method: Callable[..., Tensor], summed: list[Summed]) -> Callable[..., Tensor]:
    """Arrays, not tensors: these go from process to process."""

    def call(layer: Any, *given: Any) -> Tensor:
        arrays = tuple(each.numpy().copy() if isinstance(each, Tensor) else each for each in given)
        result = method(layer, *given)
        summed.append(Summed(layer.name, arrays, result.float().numpy().copy()))
        return result

    return call


def layers_of(job: Job) -> dict[str, Any]:
    """Every ``Linear`` and ``Experts`` of the model in one process, by name."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for made in ("linear", "experts"):
            patch.setattr(Loader, made, _kept(getattr(Loader, made), found))
        loaded(job)
    return found


def _kept(make: Callable[..., Any], found: dict[str, Any]) -> Callable[..., Any]:
    def call(loader: Loader, name: str, *asked: Any) -> Any:
        found[name] = make(loader, name, *asked)
        return found[name]

    return call


def _rank(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    parallel = Parallel.join(rank, size, Path(store), torch.device("cpu"), SECONDS, SECONDS)
    while (job := connection.recv()) is not None:
        try:
            given = answer(job, parallel)
            arrays = [logits.numpy() for logits in given.logits]
            connection.send((arrays, given.weight_bytes, given.kernels, given.summed))
        except LowbitError as error:
            connection.send((error.code, error.message))
        except Exception:
            connection.send(("", traceback.format_exc()))
    parallel.close()


class Ranks:
    """``size`` processes; ``run`` gives each the job."""

    def __init__(self, size: int) -> None:
        self._folder = TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = f"{self._folder.name}/store"
            process = context.Process(target=_rank, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, job: Job) -> list[Answer]:
        """Every rank's answer; its error is raised."""
        for end in self._ends:
            end.send(job)
        answers = []
        for end in self._ends:
            assert end.poll(SECONDS), "a rank hangs"
            answers.append(end.recv())
        for given in answers:
            if len(given) == 2:
                raise LowbitError(*given)
        return [Answer([torch.from_numpy(a) for a in arrays], *rest) for arrays, *rest in answers]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()
