"""Run a model's forward on whole prompts, for tests: pages handed out in a scrambled order."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, allocate_layer
from lowbit.models.model import Model

PAGE = 16
SLOTS = 16


def allocate(model: Model, pages: int) -> list[LayerMemory]:
    """A cache of ``pages`` pages, or a few states, for every layer."""
    return [allocate_layer(spec, pages, SLOTS, PAGE, model.device) for spec in model.cache_specs()]


def chunk_batch(
    sequences: list[tuple[list[int], int, list[int]]],
    sample_all: bool = True,
    state_slots: list[int] | None = None,
) -> ForwardBatch:
    """A batch of (new tokens, tokens already cached, page numbers) sequences. ``state_slots``: of models
    with recurrent layers."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    queries, contexts, rows = [], [], []
    for new, cached, pages in sequences:
        for offset, token in enumerate(new):
            position = cached + offset
            tokens.append(token)
            positions.append(position)
            slots.append(pages[position // PAGE] * PAGE + position % PAGE)
        queries.append(len(new))
        contexts.append(cached + len(new))
        rows.append(len(tokens) - 1)
    width = max(len(pages) for _, _, pages in sequences)
    table = [pages + [2**30] * (width - len(pages)) for _, _, pages in sequences]

    def int32(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    wanted = torch.arange(len(tokens)) if sample_all else torch.tensor(rows)
    return ForwardBatch(
        tokens=int32(tokens),
        positions=int32(positions),
        write_slots=int32(slots),
        query_lengths=int32(queries),
        context_lengths=int32(contexts),
        page_table=int32(table),
        sample_rows=wanted.long(),
        page_size=PAGE,
        max_query=max(queries),
        max_context=max(contexts),
        state_slots=None if state_slots is None else int32(state_slots),
    )


def prompt_logits(model: Model, prompts: list[list[int]]) -> list[Tensor]:
    """float32 (len(prompt), vocabulary) for each prompt, all in one batch."""
    counts = [-(-len(prompt) // PAGE) for prompt in prompts]
    shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = []
    for prompt, count in zip(prompts, counts, strict=True):
        sequences.append((prompt, 0, [shuffled.pop() for _ in range(count)]))
    batch = chunk_batch(sequences, state_slots=list(range(len(prompts))))
    logits = model.forward(batch, allocate(model, sum(counts)))
    return list(logits.split([len(prompt) for prompt in prompts]))


def differences(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of logits (tokens, vocabulary): each token's largest difference, as a part of its largest logit."""
    return (logits - wanted).abs().amax(1) / wanted.abs().amax(1)
