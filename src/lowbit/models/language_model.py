"""LanguageModel: what every family has around its blocks, and the walk through them.

An embedding (and vectors of positions), blocks over a residual stream, a norm, a head, what scales and caps
the logits, and how ranks share all of it: these are asked for and run here, by what ``ModelConfig`` says of
them. A family gives the blocks and says what one does (``decoder``, ``mixer_model``). The residual stream is
float32 on every device, and so are norms that only it sees; what goes into matrix products and comes out of
them has the loader's ``activation_dtype``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.elementwise import RotaryTable, add, affine, gather_rows, softcap
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.parallel import Parallel
from lowbit.kernels.prompt_rows import prompt_rows
from lowbit.kernels.recurrent import LayerMemory, LayerSpec
from lowbit.kernels.screened_head import ScreenedHead
from lowbit.layers.cuts import Cut, cut_evenly, cut_heads
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.layers.norm import Norm
from lowbit.layers.rotary import rotary_frequencies
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig

BlockT = TypeVar("BlockT")


@dataclass(frozen=True)
class Cuts:
    """What a rank has of a model that several share."""

    heads: Cut
    kv_heads: Cut
    vocabulary: Cut

    @staticmethod
    def of(config: ModelConfig, parallel: Parallel, kv_heads: int) -> Cuts | None:
        """None in one process. ``kv_heads``: that ranks share; as many as heads where none of them has K/V
        heads of its own."""
        found = cut_heads(parallel, config.heads, kv_heads)
        return None if found is None else Cuts(*found, _vocabulary_cut(config, parallel))


def _vocabulary_cut(config: ModelConfig, parallel: Parallel) -> Cut:
    """Rows of the embedding and of the output head: in 64s, as kernels like them."""
    cut = cut_evenly(parallel, config.vocab_size, 64) or cut_evenly(parallel, config.vocab_size)
    if cut is None:
        raise LowbitError(
            "E0430", f"--tp-size {parallel.size}: the vocabulary has {config.vocab_size} tokens"
        )
    return cut


class LanguageModel(ABC, Generic[BlockT]):
    """A loaded model (``models.model.Model``), of which a family says what its blocks do."""

    def __init__(
        self,
        config: ModelConfig,
        loader: WeightLoader,
        block: Callable[[int], BlockT],
        cuts: Cuts | None = None,
    ) -> None:
        """Ask ``loader`` for every weight, in the order of the layers. ``block``: asks for those of a layer;
        ``cuts``: what is here of a model that several ranks share."""
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.device = loader.device
        self.activation_dtype = loader.activation_dtype
        self.kernels: frozenset[str] = frozenset()
        self.quantization = ""
        self.blocks_done = 0  # over all steps, but those that are replayed
        self.weight_bytes = 0
        self.mapped_bytes = 0
        self.others: Sequence[Any] = ()
        self.spans_tokens = False
        self.states = ActivationStates()
        self.parallel = loader.parallel
        self.cuts = cuts
        self.heads = config.heads if cuts is None else cuts.heads.size
        self.kv_heads = config.kv_heads if cuts is None else cuts.kv_heads.size
        vocabulary, matrix = (
            None if cuts is None else cuts.vocabulary,
            (config.vocab_size, config.hidden_size),
        )
        self.embedding = loader.embedding(Part("model.embed_tokens", matrix, rows=vocabulary))
        self.blocks = [block(layer) for layer in range(config.layers)]
        self.final_norm = norm_of(config, loader, "model.norm")
        self.head = self._head(loader, vocabulary)
        self.screened: ScreenedHead | None = None
        self.head_scale: Tensor | None = None  # float32 (vocabulary,), on the logits
        if config.norm_head:
            scale = 1 / loader.row_norms(Part("lm_head", matrix))
            self.head_scale = scale if vocabulary is None else scale[vocabulary.slice]
        self.positions: Embedding | None = None  # added to the embedding
        if config.learned_positions:
            shape = (config.context_length, config.hidden_size)
            self.positions = loader.embedding(Part("model.embed_positions", shape))

    def _head(self, loader: WeightLoader, vocabulary: Cut | None) -> Linear:
        config = self.config
        if config.tied_head:
            return self.embedding.as_head()
        matrix = (config.vocab_size, config.hidden_size)
        return loader.linear("lm_head", [Part("lm_head", matrix, bias=config.head_bias, rows=vocabulary)])

    @abstractmethod
    def cache_specs(self) -> Sequence[LayerSpec]:
        """What each layer keeps of a sequence, in order."""

    @abstractmethod
    def enter(self, layer: int, residual: Tensor) -> Tensor:
        """What the first half of a block sees of the residual stream."""

    @abstractmethod
    def forward_block(
        self, layer: int, hidden: Tensor, residual: Tensor, cache: LayerMemory, batch: ForwardBatch
    ) -> Tensor:
        """One block: ``hidden`` is what ``enter`` makes of ``residual``.

        Adds to ``residual`` in place and gives what the next block, or the head, sees of it.
        """

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """float32 (sample rows, vocabulary)."""
        config = self.config
        residual = self.embed(batch)
        hidden = self.enter(0, residual)
        with prompt_rows(batch.prompt_row, len(batch.tokens)):
            for layer, cache in zip(range(len(self.blocks)), caches, strict=True):
                hidden = self.forward_block(layer, hidden, residual, cache, batch)
                self.blocks_done += 1
        rows = gather_rows(hidden, batch.sample_rows)
        if batch.greedy and self.screened is not None:
            logits = self.screened(rows)
        else:
            logits = self.head.in_float32(rows)
        if config.logit_scale != 1.0 or self.head_scale is not None:
            logits = affine(logits, column=self.head_scale, number=config.logit_scale, out=logits)
        if config.logit_softcap:
            logits = softcap(logits, config.logit_softcap)
        if self.cuts is not None:
            logits = self.parallel.columns(logits, self.cuts.vocabulary.widths)
        self.states.update()
        return logits

    def embed(self, batch: ForwardBatch) -> Tensor:
        """float32 (tokens, hidden): the residual stream before the first block.

        A residual multiplier m on all that is added to the stream is left out and the stream divided by it: a
        norm of x / m is that of x when its epsilon is divided by m squared (``norm_of``).
        """
        residual = self.embedding(batch.tokens)
        scale = self.config.embedding_scale / self.config.residual_scale
        if scale != 1.0:
            affine(residual, number=scale, out=residual)
        return residual if self.positions is None else add(self.positions(batch.positions), residual)


def norm_of(config: ModelConfig, loader: WeightLoader, name: str, dtype: torch.dtype | None = None) -> Norm:
    """A norm of the residual stream, or of what is added to it; ``dtype``: None: what products take."""
    size = config.hidden_size
    bias = loader.vector(f"{name}.bias", size) if config.norm_bias else None
    weight = loader.vector(f"{name}.weight", size) + config.norm_offset
    eps = config.norm_eps / config.residual_scale**2
    return Norm(weight, eps, config.layer_norm, bias, dtype or loader.activation_dtype)


def rotary_tables(config: ModelConfig, loader: WeightLoader) -> tuple[RotaryTable, RotaryTable]:
    """The tables of layers without and with a window."""
    divisors = None
    if config.rope_scaling.kind == "table":
        divisors = loader.vector(config.rope_scaling.tensor, config.rotary_dim // 2)
    frequencies, magnitude = rotary_frequencies(
        config.rotary_dim, config.rope_theta, config.rope_scaling, divisors
    )
    table = RotaryTable.build(frequencies, config.context_length, magnitude, loader.device)
    if config.local_rope_theta is None:
        return table, table
    local, magnitude = rotary_frequencies(
        config.rotary_dim, config.local_rope_theta, config.local_rope_scaling
    )
    return table, RotaryTable.build(local, config.context_length, magnitude, loader.device)
