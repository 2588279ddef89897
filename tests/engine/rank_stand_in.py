"""Ranks with what stands in for CUDA graphs, and with faults: ``python -m engine.rank_stand_in`` takes the
place of ``lowbit.engine.rank``.

RANK_ATTENTION: "padded", or "exact" for a kernel that knows no padding rows. RANK_CAPTURES: how the captures
of a rank but the first end, one after another: "ok", "memory", "waits", "late" (the step has run, and there
is no memory for its graph); further ones are "ok".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from engine.graph_stand_in import AsOnADevice, Attention, PaddedAttention, StandInRecorder
from lowbit.kernels import attention, recurrent
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory
from lowbit.models.decoder import Decoder
from lowbit.models.language_model import LanguageModel
from lowbit.models.mixer_model import MixerModel

# A step with six of this token finds no memory, once, on rank 0 or on the others.
STARVES_FIRST, STARVES_OTHERS = 94, 93
BREAKS = 92  # a step with nine of these fails on the others, for another reason


class FaultyRecorder(StandInRecorder):
    """Captures that end as they are told to, in the middle of a step."""

    def __init__(self, outcomes: list[str]) -> None:
        super().__init__()
        self._outcomes = outcomes

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder``."""
        fault["capture"] = self._outcomes.pop(0) if self._outcomes else "ok"
        try:
            replay = super().capture(step)
            if fault["capture"] == "late":
                raise torch.OutOfMemoryError("CUDA out of memory, as asked for")
            return replay
        finally:
            fault["capture"] = "ok"


fault = {"capture": "ok"}


def install(patch: Callable[[Any, str, Any], None], starves: int, captures: str = "") -> None:
    """Put the stand-ins in place in this process."""
    from lowbit.engine import runner

    kernel = Attention() if os.environ.get("RANK_ATTENTION") == "exact" else PaddedAttention()
    outcomes = captures.split()
    left = {"faults": 1}

    def with_faults(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward_block(
            self: LanguageModel,
            layer: int,
            hidden: Tensor,
            residual: Tensor,
            cache: LayerMemory,
            batch: ForwardBatch,
        ) -> Tensor:
            if layer == 1:
                with _disable_current_modes():
                    tokens = batch.tokens.tolist()
                starving = left["faults"] and tokens.count(starves) > 5
                if starving or fault["capture"] == "memory":
                    left["faults"] -= bool(starving)
                    raise torch.OutOfMemoryError("CUDA out of memory, as asked for")
                if tokens.count(BREAKS) > 8 and starves == STARVES_OTHERS:
                    raise RuntimeError("broken, as asked for")
                if fault["capture"] == "waits":
                    hidden.sum().item()
            return original(self, layer, hidden, residual, cache, batch)

        return forward_block

    for family in (Decoder, MixerModel):
        patch(family, "forward_block", with_faults(family.forward_block))
    patch(recurrent, "recurrent_kernels", lambda: [AsOnADevice()])
    patch(attention, "attention_kernels", lambda: [kernel])
    patch(runner, "recorder_for", lambda device: FaultyRecorder(outcomes))


if __name__ == "__main__":
    from lowbit.engine import rank

    install(setattr, STARVES_OTHERS, os.environ.get("RANK_CAPTURES", ""))
    status = rank.main()
    os._exit(status)
