"""calibrate: walk a float model block by block over calibration text and quantize it on the way.

    residual ─▶ block with float weights, inputs of each Linear watched ─▶ quantize ─▶ block again ─▶ residual

Every block's inputs come from the quantized blocks before it, so that errors are not added up blindly (GPTQ:
Frantar et al., 2022, section 4); for GPTQ also every Linear's from the quantized ones before it in its block
(``true_sequential`` in files), which then runs once for each of four stages, as far as that. In memory are
one block of float32 weights, the residual stream of all sequences, and what is remembered of the inputs:
never the whole model. Weights are read from the mapped checkpoint when their block's turn comes
(``HeldLinear``) and dropped after it.

The result is a stream, for a writer of checkpoints or for ``quantized_model``: modules quantized, and vectors
that took over a scale, under the model's canonical names; whatever is not in it stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.kv_scales import KvScales
from lowbit.kernels.attention import PAGE_SIZE, LayerCache, choose_attention
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.layers.mlp import GatedMlp, MixtureOfExperts, PlainMlp
from lowbit.loading.asker import Asker
from lowbit.loading.loader import Loader, Progress, ReadPart
from lowbit.loading.names import Placed, row_order
from lowbit.loading.opened import Opened, Target
from lowbit.models import decoder
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import Block, Decoder
from lowbit.models.feed_forward import down_norm_name
from lowbit.models.model import Model
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.quantized_tensor import concatenate
from lowbit.quantize.awq import Fold
from lowbit.quantize.block import FloatBlock, FloatLinear, bias_of, quantize_block, statistics_for
from lowbit.quantize.calibration import CalibratedModule, CalibrationOptions, ChangedVector
from lowbit.quantize.recipe import Asked

_log = logging.getLogger("lowbit")

Calibrated = CalibratedModule | ChangedVector
CHUNK_TOKENS = 2048  # tokens that go through a block at once


def calibrate(
    header: CheckpointHeader,
    sequences: Sequence[list[int]],
    options: CalibrationOptions,
    *,
    keep: Callable[[str], bool] = lambda name: False,
    on_progress: Progress | None = None,
) -> Iterator[Calibrated]:
    """Quantize every Linear of every decoder block; embedding and head stay float, and what ``keep`` names.

    ``sequences``: token ids (``calibration.token_sequences``). The checkpoint is checked before this returns;
    the work is done as the stream is read, block after block. ``on_progress``: (blocks done, blocks, what).
    """
    opened = Opened.of(header, Asked(), strict=False)
    if opened.family.build is not decoder.build:
        raise LowbitError(
            "E0440",
            f"{header.root.name}: {opened.config.architecture} cannot be calibrated: its attention folds "
            "weights into each other, and calibration walks plain decoder blocks only; choose a method that "
            "needs no data",
        )
    if options.method != "rtn":
        _check_tokens(sequences, opened.config)
    loader = _HoldingLoader(opened, TensorData(header), options)
    model = opened.family.build(opened.config, loader)
    loader.refuse_leftovers()
    assert isinstance(model, Decoder), "decoder.build builds decoders"
    walk = _Walk(model, loader, options, keep)
    walk.check_kept()
    return walk.run(sequences, on_progress or (lambda done, total, what: None))


def quantized_model(
    header: CheckpointHeader,
    stream: Iterable[Calibrated],
    *,
    device: str = "auto",
    kv_cache_dtype: str = "auto",
) -> Model:
    """The checkpoint as ``load_model`` gives it, with what the stream holds in place of its own."""
    opened = Opened.of(header, Asked(), strict=False)
    modules, vectors = {}, {}
    for found in stream:
        if isinstance(found, CalibratedModule):
            modules[found.name] = found
        else:
            vectors[found.name] = found.tensor
    with TensorData(header) as data:
        target = Target.resolve(header, device, "auto", kv_cache_dtype)
        loader = _CalibratedLoader(opened, target, data, KvScales(header))
        loader.calibrated_modules, loader.calibrated_vectors = modules, vectors
        model = opened.family.build(opened.config, loader)
        loader.refuse_leftovers()
    if modules or vectors:
        raise LowbitError(
            "E0217",
            f"{header.root.name}: calibration gave {next(iter((*modules, *vectors)))!r}, for which the model "
            "has no place; it was made from another checkpoint",
        )
    model.kernels = frozenset(loader.kernels)
    return model


def _check_tokens(sequences: Sequence[list[int]], config: ModelConfig) -> None:
    if not sequences:
        raise LowbitError("E0441", "there is no calibration text; GPTQ and AWQ need some")
    for sequence in sequences:
        worst = max(sequence, default=-1)
        if not 0 <= worst < config.vocab_size or min(sequence) < 0 or len(sequence) > config.context_length:
            raise LowbitError(
                "E0441",
                f"a calibration sequence of {len(sequence)} tokens up to {worst} does not fit the model: "
                f"context {config.context_length}, vocabulary {config.vocab_size}; the tokenizer belongs to "
                "another model, or sequences are too long",
            )


class _SeenEnough(Exception):  # noqa: N818 - a signal
    """What comes behind in this block needs no computing."""


class HeldLinear(Linear):
    """A Linear's place in the model: it has weights between ``load`` and ``drop`` only.

    ``modules``: the names and rows of what it is made of. Inputs are watched while there are statistics;
    ``is_last``: nothing else is.
    """

    is_last = False

    def __init__(
        self,
        name: str,
        modules: tuple[tuple[str, int], ...],
        read: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> None:
        super().__init__(name, [], None)
        self.modules = modules
        self.held: FloatLinear | None = None
        self._read = read

    def load(self) -> FloatLinear:
        """Read the float32 weights."""
        weight, bias = self._read()
        self.held = FloatLinear(self.name, self.modules, weight, bias)
        return self.held

    def drop(self) -> None:
        """Let go of the weights."""
        self.held = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out) in float32."""
        assert self.held is not None, f"{self.name} runs outside its block's turn"
        if self.held.statistics is not None:
            self.held.statistics.add(x)
            if self.is_last:
                raise _SeenEnough
        return functional.linear(x, self.held.weight, self.held.bias)


class _HeldEmbedding(Embedding):
    """Rows of the stored matrix, read when looked up."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        self._rows = rows

    def __call__(self, tokens: Tensor) -> Tensor:
        """int32 (tokens,) -> float32 (tokens, hidden)."""
        return self._rows(tokens)

    def as_head(self) -> Linear:
        """A head nobody runs."""
        return Linear("lm_head", [], None)


class _HoldingLoader(Asker):
    """``WeightLoader`` whose Linears know where their weights are, and read them later."""

    def __init__(self, opened: Opened, data: TensorData, options: CalibrationOptions) -> None:
        float32 = torch.float32
        super().__init__(opened, Target(torch.device("cpu"), float32, KvDtype.of("f32"), None))
        self.data = data
        self._options = options
        self._kv_tensors = KvScales(self.header)

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear that can read its parts, in the modules they are stored in."""
        places = self._float(self.placed(name, parts))
        return self._held(name, places, [(place.part.name, place.part.shape[0]) for place in places])

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts' Linears, as modules of their own however they are stored."""
        gate_up: list[Linear] = []
        down: list[Linear] = []
        for number in range(spec.count):
            stem = f"{name}.{number}"
            first, last = (self._float(places) for places in self.placed_expert(name, spec, number))
            halves = [(f"{stem}.{leaf}", spec.intermediate) for leaf in ("gate_proj", "up_proj")]
            gate_up.append(self._held(f"{stem}.gate_up_proj", first, halves))
            down.append(self._held(f"{stem}.down_proj", last, [(f"{stem}.down_proj", spec.hidden)]))
        return Experts(name, gate_up, down)

    def embedding(self, part: Part) -> Embedding:
        """An embedding that reads single rows."""
        [place] = self.placed(part.name, [part])

        def rows(tokens: Tensor) -> Tensor:
            weight = self.form.read(place.module, self.data).weight.permute_rows(tokens.long())
            return replace(weight, shape=(len(tokens), part.shape[1])).dequantize()

        return _HeldEmbedding(rows)

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """Nothing is rounded in the cache."""
        return self.cache_dtype

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """Only families that are refused ask for them."""
        raise AssertionError("no decoder family folds matrices")

    def vector(self, name: str, *shape: int) -> Tensor:
        """A float32 copy of a small tensor."""
        return self.data.tensor(self.check_vector(name, *shape)).to(torch.float32, copy=True)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """The cache is float32 here: their tensors have a place, their values none."""
        self._kv_tensors.find(self.names, attention)
        return 1.0, 1.0

    def _float(self, places: list[Placed]) -> list[Placed]:
        """E0401 where the checkpoint is quantized already and nobody asked for that."""
        for place in places:
            scheme = self.form.scheme_of(place.module)
            if (
                scheme.activation is not None
                or scheme.rotated
                or not (scheme.is_dense or self._options.requantize)
            ):
                raise LowbitError(
                    "E0401",
                    f"{self.header.root.name}: {place.part.name} is quantized already ({scheme}); pass the "
                    "original float model to quantize it with calibration",
                )
        return places

    def _held(self, name: str, places: list[Placed], modules: list[tuple[str, int]]) -> HeldLinear:
        return HeldLinear(name, tuple(modules), lambda: self._read_rows(places))

    def _read_rows(self, places: list[Placed]) -> tuple[Tensor, Tensor | None]:
        """float32 (out, in) and perhaps (out,), the places below each other; no views of the file."""
        rows = sum(place.part.shape[0] for place in places)
        weight = torch.empty(rows, places[0].part.shape[1])
        biases, start = torch.zeros(rows), 0
        any_bias = False
        for place in places:
            stored = self.form.read(place.module, self.data)
            if stored.input is not None:
                raise LowbitError(
                    "E0401",
                    f"{stored.weight.origin}: the checkpoint changes this layer's inputs and cannot be "
                    "quantized again; pass the original float model",
                )
            order, stop = row_order(place, self.header), start + place.part.shape[0]
            matrix = stored.weight.dequantize()
            weight[start:stop] = matrix if order is None else matrix[order]
            if stored.bias is not None:
                any_bias = True
                biases[start:stop] = stored.bias if order is None else stored.bias[order]
            start = stop
        return weight, biases if any_bias else None


@dataclass
class _Chunk:
    """Some sequences on their way through the blocks. ``residual``: float32 (tokens, hidden)."""

    batch: ForwardBatch
    residual: Tensor


class _Walk:
    """The walk over the blocks of one model."""

    def __init__(
        self,
        model: Decoder,
        loader: _HoldingLoader,
        options: CalibrationOptions,
        keep: Callable[[str], bool],
    ) -> None:
        self.model, self.loader, self.options, self.keep = model, loader, options, keep

    def check_kept(self) -> None:
        """E0405 where of modules that run as one some are to be kept: before hours of work, not after."""
        for block in self.model.blocks:
            for linear in (linear for stage in _linears(block) for linear in stage):
                self._stays_float(block, linear)

    def run(self, sequences: Sequence[list[int]], on_progress: Progress) -> Iterator[Calibrated]:
        """The stream."""
        model, layers = self.model, len(self.model.blocks)
        with self.loader.data:
            chunks = []
            if self.options.method != "rtn":
                chunks = [_Chunk(batch, model.embed(batch)) for batch in _batches(sequences)]
            for layer in range(layers):
                on_progress(layer, layers, f"model.layers.{layer}")
                yield from self._block(layer, chunks)
            on_progress(layers, layers, f"{self.options.method}: all blocks")

    def _block(self, layer: int, chunks: list[_Chunk]) -> Iterator[Calibrated]:
        block = self.model.blocks[layer]
        stages = _linears(block)
        linears = [linear for stage in stages for linear in stage]
        for linear in linears:
            linear.load().keep = self._stays_float(block, linear)
        for together in stages if self.options.method == "gptq" else [linears]:
            yield from self._stage(layer, linears, together, chunks)
        if layer + 1 < len(self.model.blocks):
            self._forward(layer, chunks, advance=True)
        for linear in linears:
            linear.drop()

    def _stage(
        self, layer: int, linears: list[HeldLinear], together: list[HeldLinear], chunks: list[_Chunk]
    ) -> Iterator[Calibrated]:
        """Watch some of a block's Linears at work, then quantize them."""
        whole = _float_block(self.model, layer, linears)
        watched = {linear.name: whole.linears[linear.name] for linear in together}
        for held in watched.values():
            if not held.keep or self.options.method == "awq":
                held.statistics = statistics_for(self.options, held.weight.shape[1])
        together[0].is_last = len(together) == 1  # experts have no last one
        self._forward(layer, chunks, advance=False)
        for found in quantize_block(replace(whole, linears=watched), self.options):
            if isinstance(found, ChangedVector) and found.name.endswith(".weight"):
                found = replace(found, tensor=found.tensor - self.model.config.norm_offset)
            yield found
        for held in watched.values():
            held.statistics = None

    def _stays_float(self, block: Block, linear: HeldLinear) -> bool:
        """Routers, a shared expert's gate, what the recipe keeps: all modules that run as one, or none."""
        mlp = block.mlp
        if isinstance(mlp, MixtureOfExperts) and (linear is mlp.router or linear is mlp.shared_gate):
            return True
        kept = [name for name, _ in linear.modules if self.keep(name)]
        if kept and len(kept) != len(linear.modules):
            others = ", ".join(name for name, _ in linear.modules if name not in kept)
            raise LowbitError(
                "E0405",
                f"{kept[0]} is to be quantized otherwise than {others}, with which it runs as one layer; "
                "calibrated methods take all of them or none",
            )
        return bool(kept)

    def _forward(self, layer: int, chunks: list[_Chunk], advance: bool) -> None:
        """Every sequence through one block; ``advance``: its output is the next block's input."""
        if not chunks:
            return
        cache = self._cache(layer, max(int(chunk.batch.page_table.numel()) for chunk in chunks))
        for chunk in chunks:
            residual = chunk.residual if advance else chunk.residual.clone()
            with suppress(_SeenEnough):
                self.model.forward_block(
                    layer, self.model.enter(layer, residual), residual, cache, chunk.batch
                )

    def _cache(self, layer: int, pages: int) -> LayerCache:
        spec = self.model.cache_specs()[layer]
        return choose_attention(spec, self.model.device).allocate(spec, pages, PAGE_SIZE, self.model.device)


def _linears(block: Block) -> list[list[HeldLinear]]:
    """The block's Linears in the order they run; those of a list see nothing of each other's outputs."""
    mlp = block.mlp
    up: list[Linear]
    down: list[Linear]
    if isinstance(mlp, MixtureOfExperts):
        up, down = [mlp.router, *mlp.experts.gate_up], [*mlp.experts.down]
        if mlp.shared is not None:
            up.append(mlp.shared.gate_up)
            down.append(mlp.shared.down)
        if mlp.shared_gate is not None:
            up.append(mlp.shared_gate)
    elif isinstance(mlp, PlainMlp):
        up, down = [mlp.up], [mlp.down]
    else:
        up, down = [mlp.gate_up], [mlp.down]
    stages: list[list[HeldLinear]] = []
    for found in ([block.qkv], [block.output], up, down):
        stages.append([linear for linear in found if isinstance(linear, HeldLinear)])
        assert len(stages[-1]) == len(found), "the loader holds every Linear"
    return stages


def _float_block(model: Decoder, layer: int, linears: list[HeldLinear]) -> FloatBlock:
    """The loaded Linears and norms of a block, and the folds its shape allows."""
    config, block = model.config, model.blocks[layer]
    loaded = {linear.name: linear.held for linear in linears if linear.held is not None}
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    loaded[block.qkv.name].unclipped = q_rows + kv_rows
    mlp = block.mlp
    if isinstance(mlp, MixtureOfExperts):
        pairs = list(zip(mlp.experts.gate_up, mlp.experts.down, strict=True))
        if mlp.shared is not None:
            pairs.append((mlp.shared.gate_up, mlp.shared.down))
        rows = [mlp.router] if mlp.shared_gate is None else [mlp.router, mlp.shared_gate]
        behind = tuple(linear.name for linear in (*rows, *(gate_up for gate_up, _ in pairs)))
    elif isinstance(mlp, PlainMlp):  # what follows its up projection is not linear
        pairs, behind = [], (mlp.up.name,)
    else:
        pairs = [(mlp.gate_up, mlp.down)]
        behind = (mlp.gate_up.name,)
    attention_norm, mlp_norm = (
        decoder.attention_norm_name(config, layer),
        decoder.mlp_norm_name(config, layer),
    )
    by_norm = [(attention_norm, (block.qkv.name,)), (mlp_norm, behind)]
    if config.parallel and not mlp_norm:
        by_norm = [(attention_norm, (block.qkv.name, *behind))]
    norms = [(attention_norm, block.attention_norm), (mlp_norm, block.mlp_norm)]
    if isinstance(mlp, GatedMlp) and config.sub_norms:  # they come between the other pairs of layers
        output_norm, down_norm = decoder.output_norm_name(layer), down_norm_name(layer)
        by_norm += [(output_norm, (block.output.name,)), (down_norm, (mlp.down.name,))]
        norms += [(output_norm, block.output_norm), (down_norm, mlp.norm)]
        pairs = []
    folds = [Fold(consumers, norm) for norm, consumers in by_norm if norm]
    if not config.sub_norms:
        folds.append(
            Fold(
                (block.output.name,),
                block.qkv.name,
                (q_rows + kv_rows, q_rows + 2 * kv_rows),
                repeat=config.heads // config.kv_heads,
                head_dim=config.head_dim,
            )
        )
    if config.activation != "swiglu_clamped":  # there the up projection's output is not just multiplied
        for gate_up, down in pairs:
            inner = loaded[down.name].weight.shape[1]
            folds.append(Fold((down.name,), gate_up.name, (inner, 2 * inner)))
    vectors = {}
    for name, norm in norms:
        if norm is not None:
            vectors[name] = norm.weight
            if norm.bias is not None:
                vectors[bias_of(name)] = norm.bias
    return FloatBlock(loaded, vectors, folds)


def _batches(sequences: Sequence[list[int]]) -> Iterator[ForwardBatch]:
    """The sequences whole, some at a time, each on pages of its own."""
    waiting: list[list[int]] = []
    for sequence in sequences:
        if waiting and sum(map(len, waiting)) + len(sequence) > CHUNK_TOKENS:
            yield _batch(waiting)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield _batch(waiting)


def _batch(sequences: list[list[int]]) -> ForwardBatch:
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    longest = int(lengths.max())
    width = -(-longest // PAGE_SIZE)  # pages a sequence
    owners = torch.arange(len(sequences)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    return ForwardBatch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32),
        positions=positions.int(),
        write_slots=(owners * width * PAGE_SIZE + positions).int(),
        query_lengths=lengths,
        context_lengths=lengths.clone(),
        page_table=torch.arange(len(sequences) * width, dtype=torch.int32).view(-1, width),
        sample_rows=torch.empty(0, dtype=torch.int64),
        page_size=PAGE_SIZE,
        max_query=longest,
        max_context=longest,
    )


class _CalibratedLoader(Loader):
    """``WeightLoader`` that prefers what calibration gave; what it used is taken out."""

    calibrated_modules: dict[str, CalibratedModule]
    calibrated_vectors: dict[str, Tensor]

    def vector(self, name: str, *shape: int) -> Tensor:
        """The changed vector, or the checkpoint's."""
        stored = super().vector(name, *shape)
        changed = self.calibrated_vectors.pop(name, None)
        return stored if changed is None else changed.to(self.device)

    def _read(self, place: Placed, as_stored: bool = False, largest: float = 0.0) -> ReadPart:
        name = place.part.name
        names = [name]
        if name not in self.calibrated_modules and name.endswith(".gate_up_proj"):
            names = [name.replace("gate_up_proj", leaf) for leaf in ("gate_proj", "up_proj")]
        found = [self.calibrated_modules.pop(name) for name in names if name in self.calibrated_modules]
        if not found:
            return super()._read(place, as_stored)
        weight = concatenate([module.weight for module in found])
        assert weight is not None, "modules rounded together have one scheme"
        biases = [module.bias for module in found if module.bias is not None]
        return ReadPart(weight, torch.cat(biases) if biases else None, None, self.wanted_kernel(place))
