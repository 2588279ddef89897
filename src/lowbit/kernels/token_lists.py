"""What sequences with penalties have said, on a device; logits changed by penalties and biases.

Repetition over prompt and output, presence and frequency over the output, after minimum lengths and biases:
the order and the numbers of the engine's sampler. In Triton's kernels logits change where they lie, and only
those of the tokens concerned (``gpu.penalties``); elsewhere a copy of them does, in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.kernels.device_memory import upload
from lowbit.kernels.gpu import runtime

PROMPT = 1 << 30  # in a table: the token stands in the prompt


@dataclass
class Changes:
    """Of a step's rows, one after another: ``biases`` to add, and of those with penalties ``slots`` (else -1)
    and ``numbers``: repetition, frequency and presence."""

    rows: list[int] = field(default_factory=list)
    biases: list[Mapping[int, float]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    numbers: list[tuple[float, float, float]] = field(default_factory=list)

    def add(
        self,
        row: int,
        biases: Mapping[int, float],
        slot: int = -1,
        numbers: tuple[float, float, float] = (1.0, 0.0, 0.0),
    ) -> None:
        """One row's."""
        self.rows.append(row)
        self.biases.append(biases)
        self.slots.append(slot)
        self.numbers.append(numbers)

    def __bool__(self) -> bool:
        return bool(self.rows)


class TokenLists:
    """A slot for each open sequence.

    ``table``: int32 (slots, vocabulary), how often a token stands in the output, plus ``PROMPT``. In Triton's
    kernels also ``ids``, int32 (slots, vocabulary), the tokens whose entry is not zero, of which
    ``lengths``, int32 (slots,), count.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._kernels = runtime.runs_on(device)
        self._free: list[int] = []
        self._longest: list[int] = []  # of each slot: as long as its list can be by now
        self.table = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self.ids = torch.zeros(0, vocabulary if self._kernels else 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)

    @property
    def _vocabulary(self) -> int:
        return self.table.shape[1]

    def open(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """A slot for a sequence that has said so much."""
        if not self._free:
            held = len(self.table)
            more = max(held, 4)
            self._free = list(range(held, held + more))
            self._longest += [0] * more
            self.table, self.ids, self.lengths = (
                torch.cat([one, one.new_zeros(more, *one.shape[1:])])
                for one in (self.table, self.ids, self.lengths)
            )
        slot = self._free.pop()
        said, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        tokens = np.union1d(said, np.array(prompt, dtype=np.int64))
        entries = np.where(np.isin(tokens, prompt), PROMPT, 0)
        entries[np.searchsorted(tokens, said)] += counts
        self._longest[slot] = len(tokens)
        length = np.array([len(tokens)])
        there, found, count = upload([tokens, entries, length], self._device)
        self.table[slot].zero_()
        self.table[slot].index_copy_(0, there, found.int())
        if self._kernels:
            self.ids[slot, : len(tokens)].copy_(there)
            self.lengths[slot : slot + 1].copy_(count)
        return slot

    def free(self, slot: int) -> None:
        """Its sequence has ended."""
        self._free.append(slot)

    def note(self, tokens: Tensor, rows: list[int], slots: list[int]) -> None:
        """One more token of each of ``slots``: those of ``rows`` of int64 (rows,) ``tokens``."""
        at, into = upload([np.array(numbers, dtype=np.int32) for numbers in (rows, slots)], self._device)
        for slot in slots:
            self._longest[slot] = min(self._longest[slot] + 1, self._vocabulary)
        if self._kernels:
            from lowbit.kernels.gpu.penalties import note_tokens

            note_tokens(tokens, at, into, self.table, self.ids, self.lengths)
            return
        chosen = tokens.index_select(0, at)
        ones = self.table.new_ones(len(slots))
        self.table.index_put_((into.long(), chosen), ones, accumulate=True)

    @contextmanager
    def applied(self, changes: Changes, logits: Tensor) -> Iterator[Tensor]:
        """float32 (rows, vocabulary) with the changes; behind it ``logits`` are what they were."""
        if not changes:
            yield logits
            return
        starts = np.cumsum([0, *(len(biases) for biases in changes.biases)])
        tokens = [token for biases in changes.biases for token in biases]
        whole = [
            np.array(numbers, dtype=np.int32) for numbers in (changes.rows, changes.slots, starts, tokens)
        ]
        amounts = [amount for biases in changes.biases for amount in biases.values()]
        numbers = [
            (repetition, 1 / repetition, frequency, presence)
            for repetition, frequency, presence in changes.numbers
        ]
        rows, slots, first, ids = upload(whole, self._device)
        added, given = upload([np.array(n, dtype=np.float32) for n in (amounts, numbers)], self._device)
        if not self._kernels:
            changed = logits.clone()
            places = rows.long().repeat_interleave(first.diff().long(), output_size=len(amounts))
            changed.index_put_((places, ids.long()), added, accumulate=True)
            self._penalize(changed, rows, slots, given)
            yield changed
            return
        from lowbit.kernels.gpu.penalties import Adjustment

        longest = max((self._longest[slot] for slot in changes.slots if slot >= 0), default=0)
        adjust = Adjustment.of(rows, slots, given, first, ids, added, longest)
        adjust(logits, self.table, self.ids, self.lengths)
        try:
            yield logits
        finally:
            adjust(logits, self.table, self.ids, self.lengths, back=True)

    def _penalize(self, logits: Tensor, rows: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """In torch, all rows at once; a row without penalties has none."""
        if not len(self.table):
            return
        chosen = logits.index_select(0, rows)
        entries = self.table.index_select(0, slots.clamp(min=0))
        entries = torch.where(slots[:, None] >= 0, entries, 0)
        counts = entries % PROMPT
        repetition, less, frequency, presence = (column[:, None] for column in numbers.unbind(1))
        chosen = torch.where(entries != 0, chosen * torch.where(chosen > 0, less, repetition), chosen)
        chosen -= counts * frequency
        chosen -= (counts > 0) * presence
        logits.index_copy_(0, rows.long(), chosen)
