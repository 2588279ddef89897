"""HostBatch: a step's chunks as the index numbers of a ``ForwardBatch``, in NumPy arrays.

A decode step is short lists: NumPy's calls, each dearer than a list of a few numbers, would take a tenth of
the time of a small model's step. Replayed steps (``StepCapture``) take the arrays as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.engine.scheduler import Chunk
from lowbit.kernels.device_memory import upload
from lowbit.kernels.forward_batch import ForwardBatch


@dataclass(frozen=True)
class HostBatch:
    """int32 arrays, shaped as ``ForwardBatch`` says.

    ``sources``: (n, 2), the token rows that a step in flight chooses, each with the row of its choices.
    """

    tokens: np.ndarray
    positions: np.ndarray
    write_slots: np.ndarray
    query_lengths: np.ndarray
    context_lengths: np.ndarray
    page_table: np.ndarray
    page_size: int
    state_slots: np.ndarray | None
    sources: np.ndarray
    greedy: bool
    prompt_row: int | None

    @classmethod
    def of(
        cls,
        chunks: list[Chunk],
        page_size: int,
        *,
        states: bool,
        greedy: bool = False,
        prompts_apart: bool = False,
        room: int = 0,
    ) -> HostBatch:
        """``states``: whether recurrent layers keep a state of each sequence. ``prompts_apart``: whether
        prompts' chunks stand behind all others, and are to be told from them. ``room``: tokens behind each
        chunk whose pages the table holds too."""
        parts = [chunk.tokens for chunk in chunks]
        counts = [len(part) for part in parts]
        starts = [chunk.sequence.computed for chunk in chunks]
        contexts = [start + count for start, count in zip(starts, counts, strict=True)]
        table = np.zeros((len(chunks), -(-(max(contexts) + room) // page_size)), dtype=np.int32)
        for row, (chunk, context) in enumerate(zip(chunks, contexts, strict=True)):
            width = -(-(context + room) // page_size)
            table[row, :width] = chunk.sequence.pages[:width]
        if max(counts) == 1:
            firsts = list(range(len(chunks)))
            tokens, positions = _numbers([part[0] for part in parts]), _numbers(starts)
            slots = _numbers(
                [
                    chunk.sequence.pages[start // page_size] * page_size + start % page_size
                    for chunk, start in zip(chunks, starts, strict=True)
                ]
            )
        else:
            queries = np.array(counts)
            begins = np.cumsum(queries) - queries
            firsts = begins.tolist()
            owners = np.repeat(np.arange(len(chunks)), queries)
            tokens = np.concatenate([_numbers(part) for part in parts])
            wide = np.arange(len(tokens)) - begins[owners] + np.array(starts)[owners]
            positions = wide.astype(np.int32)
            slots = (table[owners, wide // page_size] * page_size + wide % page_size).astype(np.int32)
        sources = [
            (first, chunk.source) for first, chunk in zip(firsts, chunks, strict=True) if chunk.source >= 0
        ]
        return cls(
            tokens=tokens,
            positions=positions,
            write_slots=slots,
            query_lengths=_numbers(counts),
            context_lengths=_numbers(contexts),
            page_table=table,
            page_size=page_size,
            state_slots=_numbers([chunk.sequence.slot for chunk in chunks]) if states else None,
            sources=np.array(sources, dtype=np.int32).reshape(-1, 2),
            greedy=greedy,
            prompt_row=_prompt_row(chunks, counts) if prompts_apart else None,
        )

    def to(self, device: torch.device, rows: list[int], chosen: Tensor | None = None) -> ForwardBatch:
        """On the device, where the logits of token rows ``rows`` are wanted.

        ``chosen``: int64, the tokens that the step in flight chooses, where there are ``sources``.
        """
        arrays = [
            self.tokens,
            self.positions,
            self.write_slots,
            self.query_lengths,
            self.context_lengths,
            self.page_table,
            _numbers(rows),
        ]
        if self.state_slots is not None:
            arrays.append(self.state_slots)
        if len(self.sources):
            arrays += [self.sources[:, 0].copy(), self.sources[:, 1].copy()]
        there = upload(arrays, device)
        if len(self.sources):
            assert chosen is not None, "a step in flight chooses them"
            there[0].index_copy_(0, there[-2].long(), chosen.index_select(0, there[-1]).int())
        return ForwardBatch(
            tokens=there[0],
            positions=there[1],
            write_slots=there[2],
            query_lengths=there[3],
            context_lengths=there[4],
            page_table=there[5],
            sample_rows=there[6].long(),
            page_size=self.page_size,
            max_query=int(self.query_lengths.max()),
            max_context=int(self.context_lengths.max()),
            host_lengths=(self.query_lengths, self.context_lengths),
            state_slots=None if self.state_slots is None else there[7],
            greedy=self.greedy,
            prompt_row=self.prompt_row,
        )


def _prompt_row(chunks: list[Chunk], counts: list[int]) -> int | None:
    """The first row of a prompt's token."""
    generated = sum(count for chunk, count in zip(chunks, counts, strict=True) if not chunk.of_prompt)
    return None if generated == sum(counts) else generated


def _numbers(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)
