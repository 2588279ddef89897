"""ForwardBatch: the shape of one step, as attention and the models see it.

A step runs a ragged batch: sequence s contributes ``query_lengths[s]`` consecutive new tokens and may
look back at ``context_lengths[s]`` tokens in all (new ones included) through its row of ``page_table``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class ForwardBatch:
    """All index tensors are int32, contiguous and on the model's device.

    ``tokens``, ``positions``, ``write_slots``: (tokens,), sequences one after another; a slot is
    ``page * page_size + offset``. ``query_lengths``, ``context_lengths``: (sequences,).
    ``page_table``: (sequences, pages), entries beyond a sequence's own pages are undefined.
    ``sample_rows``: int64 (rows,): the token rows whose logits are wanted.
    ``state_slots``: (sequences,), where recurrent layers keep each sequence's state; None: no layer has any.
    A sequence whose context is its query begins here, with a state of zeros.
    ``greedy``: of each row of logits only the first of the largest is asked for, and whether any is NaN: what
    is certainly smaller may be minus infinity.
    ``prompt_row``: from which row on tokens are prompts' (``prompt_rows``); None: none is, or it matters not.
    ``max_query`` and ``max_context`` repeat the maxima, so that nobody asks the device for them;
    ``host_lengths`` query_lengths and context_lengths, int32, of a step that is not to be recorded.
    """

    tokens: Tensor
    positions: Tensor
    write_slots: Tensor
    query_lengths: Tensor
    context_lengths: Tensor
    page_table: Tensor
    sample_rows: Tensor
    page_size: int
    max_query: int
    max_context: int
    host_lengths: tuple[np.ndarray, np.ndarray] | None = None
    state_slots: Tensor | None = None
    greedy: bool = False
    prompt_row: int | None = None

    def to(self, device: torch.device) -> ForwardBatch:
        """The same batch with its tensors there."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
