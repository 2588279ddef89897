"""StaticBatch: a step's inputs at fixed addresses, for steps that are recorded once and replayed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit.engine.host_batch import HostBatch
from lowbit.kernels.decode_steps import DecodeInputs
from lowbit.kernels.forward_batch import ForwardBatch

# What a row that belongs to no sequence holds: its token is not stored, and it looks back at nothing.
_PADDING = {
    "tokens": 0,
    "positions": 0,
    "write_slots": -1,
    "query_lengths": 1,
    "context_lengths": 0,
    "state_slots": -1,
}
_OF_SEQUENCES = ("query_lengths", "context_lengths", "state_slots")


class StaticBatch:
    """The inputs of steps up to a size; rows that no step has filled in are padding."""

    def __init__(self, limits: tuple[int, int, int], device: torch.device) -> None:
        """``limits``: sequences, tokens and pages of a sequence."""
        self.limits = sequences, tokens, pages = limits
        counts = dict.fromkeys(_OF_SEQUENCES, sequences)
        self._rows = {
            name: torch.full((counts.get(name, tokens),), value, dtype=torch.int32, device=device)
            for name, value in _PADDING.items()
        }
        self._page_table = torch.zeros(sequences, pages, dtype=torch.int32, device=device)
        self._sample_rows = torch.arange(tokens, device=device)
        self._picked = torch.zeros(tokens, dtype=torch.int64, device=device)
        # On a CPU written as arrays of the same memory, which takes a fifth of a tensor's time.
        on_cpu = device.type == "cpu"
        self._written: dict[str, Any] = {n: t.numpy() if on_cpu else t for n, t in self._rows.items()}
        self._written_pages: Any = self._page_table.numpy() if on_cpu else self._page_table
        self._used = 0  # rows that hold no padding

    def fill(self, batch: HostBatch | ForwardBatch) -> None:
        """Copy a batch in."""
        for name, rows in self._written.items():
            given = getattr(batch, name)
            if given is not None:  # models without states have no slots
                rows[: given.shape[0]] = given
        sequences, pages = batch.page_table.shape
        self._written_pages[:sequences, :pages] = batch.page_table
        if isinstance(batch, ForwardBatch):
            self._picked[: len(batch.sample_rows)] = batch.sample_rows
        self._used = max(self._used, batch.tokens.shape[0])

    @cached_property
    def decode_inputs(self) -> DecodeInputs:
        """Where a decode step's inputs lie, on a CPU."""

        def at(name: str) -> int:
            return self._rows[name].data_ptr()

        return DecodeInputs(
            tokens=at("tokens"),
            positions=at("positions"),
            write_slots=at("write_slots"),
            context_lengths=at("context_lengths"),
            page_table=self._page_table.data_ptr(),
            pages=self.limits[2],
        )

    def picked(self, rows: int) -> Tensor:
        """``sample_rows`` of the batch that was copied in, where those are not all rows."""
        return self._picked[:rows]

    def pad(self, rows: int, size: int, page_size: int, max_context: int) -> ForwardBatch:
        """``size`` sequences of one token, of which the first ``rows`` have been filled in."""
        if self._used > rows:
            for name, values in self._rows.items():
                values[rows : self._used] = _PADDING[name]
            self._used = rows
        return self.view(size, size, page_size, max_context)

    def view(
        self, sequences: int, tokens: int, page_size: int, max_context: int, greedy: bool = False
    ) -> ForwardBatch:
        """The static tensors of a step of so many sequences and tokens."""
        return ForwardBatch(
            tokens=self._rows["tokens"][:tokens],
            positions=self._rows["positions"][:tokens],
            write_slots=self._rows["write_slots"][:tokens],
            query_lengths=self._rows["query_lengths"][:sequences],
            context_lengths=self._rows["context_lengths"][:sequences],
            page_table=self._page_table[:sequences],
            sample_rows=self._sample_rows[:tokens],
            state_slots=self._rows["state_slots"][:sequences],
            page_size=page_size,
            # The most that any step of this size has: a kernel must not rely on this one's own.
            max_query=tokens - sequences + 1,
            max_context=max_context,
            greedy=greedy,
        )
