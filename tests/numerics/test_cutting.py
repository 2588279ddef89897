"""Cut weights against cut matrices: every scheme's columns and rows, between blocks and inside them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.numerics.cutting import (
    column_borders,
    column_unit,
    columns_scheme,
    cut_columns,
    cut_rows,
    in_rows,
    parted_scheme,
    pick_rows,
    scheme_in_rows,
)
from lowbit.numerics.number_formats import RowVectorLayout, number_format
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

OUT, IN = 24, 96


def random_weight(scheme: Scheme, out: int = OUT, columns: int = IN, seed: int = 1) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)

    def per_block(level: int) -> torch.Tensor:
        rows, width = scheme.blocks[level]
        if scheme.flattened:
            return torch.rand(-(-out * columns // width), generator=generator) + 0.1
        shape = (-(-out // (rows or out)), -(-columns // (width or columns)))
        return torch.rand(shape, generator=generator) + 0.1

    if scheme.is_dense:
        codes = torch.randn(out, columns, generator=generator)
    else:
        high = 2 ** int(scheme.weight.bits)
        codes = torch.randint(0, high, (out, columns), generator=generator, dtype=torch.uint8)
    levels, outliers = range(len(scheme.blocks)), None
    if scheme.outliers is not None:
        at = (torch.rand(out, columns, generator=generator) < 0.1).nonzero()
        values = torch.randn(len(at), generator=generator).half()
        outliers = Outliers.of(at[:, 0], at[:, 1], values, out)
    return QuantizedTensor(
        scheme,
        (out, columns),
        codes,
        tuple(per_block(i) for i in levels),
        per_block(0).mul(8).round() if scheme.zero != "none" else None,
        tuple(per_block(i) for i in levels) if scheme.offset else (),
        torch.randperm(columns, generator=generator) if scheme.reordered else None,
        "a weight",
        torch.arange(out) % -(-out // scheme.blocks[-1][0]) if scheme.scattered else None,
        outliers=outliers,
    )


def scheme(name: str, *blocks: tuple[int, int], **more: object) -> Scheme:
    return Scheme(number_format(name), blocks, (number_format("f32"),) * len(blocks), **more)


SCHEMES = {
    "dense": Scheme(number_format("f32")),
    "groups": scheme("uint4", (1, 32), zero="integer"),
    "two levels": scheme("e2m1", (1, 16), (0, 0)),
    "blocks": scheme("int8", (8, 32)),
    "rows": scheme("int8", (1, 0)),
    "tensor": scheme("int8", (0, 0)),
    "offsets": scheme("uint4", (1, 16), (4, 48), offset=True),
    "act-order": scheme("uint4", (1, 32), zero="integer", reordered=True),
    "whole columns": scheme("uint4", (0, 1), zero="float"),
    "rows apart": scheme("uint4", (8, 1), zero="float", scattered=True),
    "outliers": scheme("uint3", (1, 16), zero="float", outliers=number_format("f16")),
    "outliers act-order": scheme(
        "uint3", (1, 16), zero="float", outliers=number_format("f16"), reordered=True
    ),
    "groups under rows apart": scheme("uint4", (1, 32), (6, 1), scattered=True),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_columns_are_those_of_the_matrix(name: str) -> None:
    weight = random_weight(SCHEMES[name])
    whole, unit = weight.dequantize(), column_unit(weight.scheme, IN)
    narrow = {"two levels": 16, "outliers": 16, "outliers act-order": 16, "whole columns": 1, "rows apart": 1}
    assert unit == {**narrow, "offsets": 48}.get(
        name, 32 if weight.scheme.blocks[:1] and weight.scheme.blocks[0][1] else 1
    )
    for start, stop in ((0, 48), (48, 96)) if unit == 48 else ((0, 32), (32, 96)):
        part = cut_columns(weight, start, stop)
        assert part.shape == (OUT, stop - start) and part.codes.data_ptr() >= weight.codes.data_ptr()
        inputs = torch.arange(start, stop) if part.column_order is None else part.column_order
        assert torch.equal(replace(part, column_order=None).dequantize(), whole[:, inputs])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "runs", [[(0, 8)], [(8, 24)], [(3, 10)], [(0, 6), (18, 24)], [(4, 8), (8, 10), (20, 24)]]
)
def test_rows_are_those_of_the_matrix_also_inside_blocks(name: str, runs: list[tuple[int, int]]) -> None:
    weight = random_weight(SCHEMES[name])
    part = cut_rows(weight, runs)
    wanted = torch.cat([weight.dequantize()[start:stop] for start, stop in runs])
    assert torch.equal(part.dequantize(), wanted)
    assert part.scheme == parted_scheme(weight.scheme, (OUT, IN), runs), "what a plan says"


def test_rows_of_blocks_that_run_over_row_ends() -> None:
    weight = random_weight(scheme("nf4", (1, 64), flattened=True), columns=40)
    for runs in ([(0, 9)], [(9, 24)], [(8, 16)]):
        wanted = torch.cat([weight.dequantize()[start:stop] for start, stop in runs])
        assert torch.equal(cut_rows(weight, runs).dequantize(), wanted)
    with pytest.raises(LowbitError, match="cut a group of 40"):
        cut_columns(weight, 0, 20)


@pytest.mark.parametrize(("columns", "unit"), [(96, 32), (80, 16), (72, 72)], ids=str)
def test_columns_of_blocks_that_run_over_row_ends(columns: int, unit: int) -> None:
    """They are those of smaller blocks, unless these were of 8 columns."""
    flat = scheme("nf4", (1, 64), flattened=True)
    weight = random_weight(flat, columns=columns)
    assert column_unit(flat, columns) == unit
    for start in range(0, columns, unit):
        part = cut_columns(weight, start, start + unit)
        assert torch.equal(part.dequantize(), weight.dequantize()[:, start : start + unit])
        assert part.scheme == (flat if unit == columns else scheme_in_rows(flat, columns))


def test_rows_apart_are_shared_evenly() -> None:
    """Two ranks have half of each block's rows, and its numbers; a plan counts them so."""
    weight = random_weight(SCHEMES["rows apart"])
    half = cut_rows(weight, [(0, 12)])
    assert half.scheme.blocks == ((4, 1),) and torch.equal(half.scales[0], weight.scales[0])
    assert half.nbytes == 12 * IN // 2 + 2 * 3 * IN * 4
    ends = cut_rows(weight, [(0, 3), (21, 24)])
    assert ends.scheme.blocks == ((2, 1),) and len(ends.scales[0]) == 6
    whole = random_weight(SCHEMES["whole columns"])
    assert cut_rows(whole, [(0, 3), (21, 24)]).scheme == whole.scheme


@pytest.mark.parametrize("name", ["groups", "outliers", "rows apart", "groups under rows apart"])
def test_picked_rows_may_repeat(name: str) -> None:
    weight = random_weight(SCHEMES[name])
    order = torch.tensor([5, 5, 0])
    assert torch.equal(pick_rows(weight, order).dequantize(), weight.dequantize()[order])


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_columns_of_gguf_blocks(kind: str) -> None:
    fmt = number_format(f"gguf_{kind}")
    assert fmt.block is not None
    count, blocks = fmt.block.weights, 3
    codes = torch.randint(0, 120, (4, blocks * fmt.block.bytes), dtype=torch.uint8)
    weight = QuantizedTensor(Scheme(fmt), (4, blocks * count), codes, origin="blocks")
    part = cut_columns(weight, count, 3 * count)
    assert torch.equal(part.dequantize(), weight.dequantize()[:, count:])
    assert part.codes.untyped_storage().data_ptr() == codes.untyped_storage().data_ptr(), "nothing is copied"
    with pytest.raises(LowbitError, match=f"group of {count}"):
        cut_columns(weight, 0, count // 2)


@pytest.mark.parametrize(
    ("layout", "ranks", "borders"),
    [
        (RowVectorLayout(4, 300, 0, "f16", 3, 20), 2, [0, 40, 60]),
        (RowVectorLayout(4, 300, 20, "bf16", 3, 20, 7), 3, [0, 27, 47, 67]),
        (RowVectorLayout(4, 16, 0, "f16", 1, 96, 5), 2, [0, 5 + 32, 101]),
        (RowVectorLayout(4, 16, 9, "f32", 2, 30), 4, [0, 15, 30, 45, 60]),
        (RowVectorLayout(4, 16, 9, "f32", 2, 30, 2), 3, [0, 17, 32, 62]),
        (RowVectorLayout(4, 16, 9, "f32", 2, 2), 6, None),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_columns_of_several_codebooks(layout: RowVectorLayout, ranks: int, borders: list[int] | None) -> None:
    """Whole codebooks, or where there are more ranks than codebooks some columns of one; outliers come
    with the first of them."""
    f16, out, columns = number_format("f16"), 22, layout.columns
    scheme = Scheme(number_format(layout.name), ((0, 1),), (f16,), offset=True, reordered=True)
    assert column_borders(scheme, columns, ranks) == borders
    assert column_borders(SCHEMES["groups"], IN, ranks) is None
    if borders is None:
        return
    generator = torch.Generator().manual_seed(ranks)
    main, second = layout.index_bytes
    vectors = -(-out // layout.length)
    outliers = torch.randn(vectors, layout.outliers * layout.length, generator=generator)
    numbers = outliers.to(number_format(layout.dtype).dtype).view(torch.uint8)
    places = torch.zeros(vectors, columns - layout.outliers, main + second, dtype=torch.uint8)
    places[..., 0] = torch.randint(16, places.shape[:2], generator=generator)
    places[..., main:] = torch.randint(9, (*places.shape[:2], second), generator=generator)
    books = torch.randn(layout.books, layout.centroids + layout.residual, layout.length, generator=generator)
    weight = QuantizedTensor(
        scheme,
        (out, columns),
        torch.cat((numbers, places.flatten(1)), 1),
        (torch.rand(1, columns, generator=generator).half(),),
        offsets=(torch.rand(1, columns, generator=generator).half(),),
        column_order=torch.randperm(columns, generator=generator),
        origin="a weight",
        codebooks=books,
    )
    for start, stop in pairwise(borders):
        part = cut_columns(weight, start, stop)
        assert part.scheme == columns_scheme(scheme, columns, start, stop)
        assert part.column_order is not None and part.codebooks is not None
        assert len(part.codebooks) == part.scheme.weight.vectors.books  # type: ignore[union-attr]
        found = replace(part, column_order=None).dequantize()
        assert torch.equal(found, weight.dequantize()[:, part.column_order])
    if layout.books > 1:
        with pytest.raises(LowbitError, match=f"cut a group of {columns}"):
            cut_columns(weight, layout.outliers + 1, layout.outliers + layout.width + 1)


def test_a_group_of_inputs_stays_together() -> None:
    asked = ActivationScheme(number_format("int8"), (1, 48))
    assert column_unit(scheme("int8", (1, 32), activation=asked), IN) == math.lcm(48, 32)
    with pytest.raises(LowbitError, match="cut a group of 32"):
        cut_columns(random_weight(SCHEMES["groups"]), 0, 40)


@pytest.mark.parametrize("columns", [96, 64, 40, 33, 7])
@pytest.mark.parametrize("width", [64, 24, 8])
def test_blocks_over_row_ends_in_rows(columns: int, width: int) -> None:
    """The same numbers in blocks of a row: as wide as divides block and row, be it one column."""
    flat = scheme("uint4", (1, width), zero="float", flattened=True)
    weight = random_weight(flat, out=11, columns=columns)
    found = in_rows(weight)
    assert found.scheme == scheme_in_rows(flat, columns) and not found.scheme.flattened
    assert found.scheme.blocks == ((1, math.gcd(width, columns)),)
    assert torch.equal(found.dequantize(), weight.dequantize())
    rows = scheme("uint4", (1, 32))
    assert scheme_in_rows(rows, columns) == rows
