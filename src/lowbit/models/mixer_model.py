"""MixerModel: blocks of a norm, what mixes tokens, another norm and an MLP, for families whose mixers differ.

A mixer is a callable that knows its weights and what its layer keeps of a sequence; layers of one model may
have mixers of several kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, LayerSpec
from lowbit.layers.norm import Norm
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.feed_forward import FeedForward, feed_forward
from lowbit.models.language_model import LanguageModel, norm_of


class Mixer(Protocol):
    """The first half of a block."""

    @property
    def spec(self) -> LayerSpec:
        """What the layer keeps of a sequence."""

    def __call__(self, x: Tensor, cache: LayerMemory, batch: ForwardBatch, /) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""


@dataclass(frozen=True)
class MixerBlock:
    """The weights of one layer."""

    mixer_norm: Norm
    mixer: Mixer
    mlp_norm: Norm
    mlp: FeedForward

    @staticmethod
    def of(config: ModelConfig, loader: WeightLoader, layer: int, mixer: Mixer) -> MixerBlock:
        """Norms and MLP under the usual names."""
        prefix = f"model.layers.{layer}"
        return MixerBlock(
            norm_of(config, loader, f"{prefix}.input_layernorm"),
            mixer,
            norm_of(config, loader, f"{prefix}.post_attention_layernorm"),
            feed_forward(config, loader, layer),
        )


class MixerModel(LanguageModel[MixerBlock]):
    """See the module docstring."""

    def cache_specs(self) -> list[LayerSpec]:
        """As the mixers say."""
        return [block.mixer.spec for block in self.blocks]

    def enter(self, layer: int, residual: Tensor) -> Tensor:
        """What a mixer sees of the residual stream."""
        return self.blocks[layer].mixer_norm(residual)

    def forward_block(
        self, layer: int, hidden: Tensor, residual: Tensor, cache: LayerMemory, batch: ForwardBatch
    ) -> Tensor:
        """See ``LanguageModel``."""
        block = self.blocks[layer]
        last = layer + 1 == len(self.blocks)
        next_norm = self.final_norm if last else self.blocks[layer + 1].mixer_norm
        hidden = block.mlp_norm.of_sum(block.mixer(hidden, cache, batch), residual)
        return next_norm.of_sum(block.mlp(hidden), residual)
