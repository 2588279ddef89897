"""Ranks that share models, each in a process of its own, started once and given one checkpoint after
another."""

from __future__ import annotations

import multiprocessing
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.loading import load_model

SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A checkpoint to load and prompts to run, on the reference kernel or the chosen ones."""

    path: Path
    prompts: list[list[int]]
    reference: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """``logits``: float32 (tokens, vocabulary) of each prompt; ``weight_bytes``: packed, of this rank."""

    logits: list[Tensor]
    weight_bytes: int
    kernels: frozenset[str]


def answer(job: Job, parallel: Parallel = ALONE) -> Answer:
    """What a rank makes of a job."""
    options = {"device": "cpu", "kv_cache_dtype": "f32", **job.options}
    if job.reference:
        options["linear_kernel"] = "reference"
    model = load_model(open_checkpoint(str(job.path)), parallel=parallel, **options)
    return Answer(prompt_logits(model, job.prompts), model.weight_bytes, model.kernels)


def _rank(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    parallel = Parallel.join(rank, size, Path(store), torch.device("cpu"), SECONDS, SECONDS)
    while (job := connection.recv()) is not None:
        try:
            given = answer(job, parallel)
            arrays = [logits.numpy() for logits in given.logits]
            connection.send((arrays, given.weight_bytes, given.kernels))
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
