"""Model: what the engine asks of any model family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, LayerSpec
from lowbit.models.config import ModelConfig


class Model(Protocol):
    """A loaded model. Plain objects: nothing here trains."""

    config: ModelConfig
    vocab_size: int  # rows of the logits
    context_length: int  # the longest sequence it was made for, in tokens
    device: torch.device
    # Set by load_model: the linear kernels its weights were packed for, how they are quantized, their bytes.
    kernels: frozenset[str]
    quantization: str
    weight_bytes: int
    mapped_bytes: int  # of them, those that are mapped from a file and no memory of this process
    spans_tokens: bool  # some layer's input has a scale of a whole step's tokens, or of earlier steps'
    states: ActivationStates  # of inputs with delayed scales; set by load_model, updated by every forward

    @property
    def others(self) -> Sequence[Any]:
        """What the other ranks said of their parts, where several share the model."""

    def cache_specs(self) -> Sequence[LayerSpec]:
        """What each layer keeps of a sequence, in order."""

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """float32 (len(batch.sample_rows), vocab_size): logits of the wanted rows.

        Writes the new tokens' K and V, or the states behind them, into ``caches``. Raises ``NumericalError``
        never: the engine checks the logits it samples from for NaN.
        """
