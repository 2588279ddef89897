"""One decoder block: its float Linears, what they saw of the calibration text, and how they become quantized.

``quantize_block`` is the method-independent half of calibration. A Linear here may be several modules of the
model below each other (Q, K and V; gate and up): rows are quantized independently of each other, so that they
are rounded together and taken apart afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense
from lowbit.quantize.awq import Fold, clip, search_clip, search_scales
from lowbit.quantize.calibration import (
    CalibratedModule,
    CalibrationOptions,
    ChangedVector,
    InputStatistics,
)
from lowbit.quantize.gptq import gptq
from lowbit.quantize.integer_grid import IntegerGrid, columns_of_group, round_to_nearest

_log = logging.getLogger("lowbit")


@dataclass
class FloatLinear:
    """The Linears called ``modules`` (name, rows), one below another; ``weight`` float32 (out, in), owned.

    ``keep``: stays float (a router), but its columns and rows follow a scale; ``scaled``: they did.
    ``unclipped``: so many first rows whose largest weights AWQ leaves alone: their outputs are multiplied
    with each other (Q and K), where the error of a single output says little.
    """

    name: str
    modules: tuple[tuple[str, int], ...]
    weight: Tensor
    bias: Tensor | None = None
    statistics: InputStatistics | None = None
    keep: bool = False
    unclipped: int = 0
    scaled: bool = False

    def split(self, weight: QuantizedTensor) -> Iterator[CalibratedModule]:
        """The modules of the whole, quantized."""
        start = 0
        for name, rows in self.modules:
            stop = start + rows
            part = weight if rows == weight.shape[0] else weight.rows(start, stop)
            bias = None if self.bias is None else self.bias[start:stop].clone()
            yield CalibratedModule(name, replace(part, origin=name), bias)
            start = stop


@dataclass
class FloatBlock:
    """All a block's Linears and those of its vectors that a scale may be folded into, by name."""

    linears: dict[str, FloatLinear]
    vectors: dict[str, Tensor]
    folds: list[Fold]


def statistics_for(options: CalibrationOptions, columns: int) -> InputStatistics | None:
    """What the method wants to know of a Linear's inputs."""
    if options.method == "rtn":
        return None
    rows = options.sample_rows if options.method == "awq" else 0
    return InputStatistics(columns, gram=options.method == "gptq", sample_rows=rows)


def quantize_block(
    block: FloatBlock, options: CalibrationOptions
) -> Iterator[CalibratedModule | ChangedVector]:
    """Quantize every Linear that is not to be kept, each exactly once, and say what else changed.

    Each Linear's float weight gives way to the dequantized one, for the block to be run with.
    """
    for linear in block.linears.values():
        if linear.statistics is not None:
            linear.statistics.check_finite(linear.name)
    if options.method == "awq":
        yield from _scale(block, options)
    for linear in block.linears.values():
        if linear.keep:
            if linear.scaled:
                whole = QuantizedTensor(dense("f32"), tuple(linear.weight.shape), linear.weight.clone())
                yield from linear.split(whole)
            continue
        quantized = _quantize(linear, options)
        linear.weight, linear.statistics = quantized.dequantize(), None
        yield from linear.split(quantized)


def _quantize(linear: FloatLinear, options: CalibrationOptions) -> QuantizedTensor:
    grid = IntegerGrid(options.bits, options.symmetric)
    group = columns_of_group(options.group_size, linear.weight.shape[1])
    seen = linear.statistics
    if seen is None or not _saw_enough(linear, options):
        return round_to_nearest(linear.weight, grid, group, linear.name)
    if options.method == "awq":
        return round_to_nearest(_clipped(linear, seen, grid, group, options), grid, group, linear.name)
    assert seen.gram is not None, "GPTQ asks for it"
    return gptq(
        linear.weight,
        seen.gram,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=options.symmetric,
        act_order=options.act_order,
        static_groups=options.static_groups,
        damp=options.damp,
        block=options.block,
        origin=linear.name,
    )


def _saw_enough(linear: FloatLinear, options: CalibrationOptions) -> bool:
    """Whether the inputs seen can say anything; where not, it is said aloud."""
    assert linear.statistics is not None, "only asked of a Linear that was watched"
    seen = linear.statistics.tokens
    if seen >= options.minimum_tokens:
        return True
    _log.warning(
        "lowbit: %s saw %d calibration tokens, %s needs %d: it is rounded to nearest; give more text",
        linear.name,
        seen,
        options.method,
        options.minimum_tokens,
    )
    return False


def _clipped(
    linear: FloatLinear, seen: InputStatistics, grid: IntegerGrid, group: int, options: CalibrationOptions
) -> Tensor:
    weight = linear.weight[linear.unclipped :]
    limits = search_clip(weight, seen.sample, grid, group, options.clip_steps, options.clip_shrink)
    return torch.cat((linear.weight[: linear.unclipped], clip(weight, limits, group)))


def _scale(block: FloatBlock, options: CalibrationOptions) -> Iterator[ChangedVector]:
    """Search and fold the scales of every fold; the vectors that took one over."""
    for fold in block.folds:
        scales = _fold_scales(block, fold, options)
        if scales is None or bool((scales == 1).all()):
            continue
        apply_fold(block, fold, scales)
        if fold.rows is None:
            for name in _producing(block, fold):
                yield ChangedVector(name, block.vectors[name].clone())


def bias_of(weight: str) -> str:
    """The name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def _producing(block: FloatBlock, fold: Fold) -> list[str]:
    """The vectors that give a norm's output: its weight, and its bias if it has one."""
    return [name for name in (fold.producer, bias_of(fold.producer)) if name in block.vectors]


def _fold_scales(block: FloatBlock, fold: Fold, options: CalibrationOptions) -> Tensor | None:
    """The scales of one fold; None where its consumers saw nothing to choose by."""
    consumers, tokens, magnitude = [], 0, None
    for name in fold.consumers:
        linear = block.linears[name]
        seen = linear.statistics
        if seen is None or not seen.tokens:
            continue
        weighted = seen.magnitude * seen.tokens
        magnitude = weighted if magnitude is None else magnitude + weighted
        tokens += seen.tokens
        if not linear.keep:
            consumers.append((linear.weight, seen.sample))
    if magnitude is None or tokens < options.minimum_tokens or not consumers:
        return None
    grid = IntegerGrid(options.bits, options.symmetric)
    group = columns_of_group(options.group_size, len(magnitude))
    return search_scales(fold, consumers, magnitude / tokens, grid, group, options.scale_steps)


def apply_fold(block: FloatBlock, fold: Fold, scales: Tensor) -> None:
    """Multiply the consumers' columns, divide the producer: in exact arithmetic nothing else changes."""
    columns = fold.for_consumers(scales)
    for name in fold.consumers:
        linear = block.linears[name]
        linear.weight.mul_(columns)
        linear.scaled = True
        if linear.statistics is not None:
            linear.statistics.divide(columns)
    if fold.rows is None:
        for name in _producing(block, fold):
            block.vectors[name].div_(scales)
        return
    producer, rows = block.linears[fold.producer], slice(*fold.rows)
    producer.scaled = True
    producer.weight[rows].div_(scales.unsqueeze(1))
    if producer.bias is not None:
        producer.bias[rows].div_(scales)
