"""Formats of codebooks: what indices of vectors mean, and how such weights are cut and joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.numerics.cutting import column_unit, cut_columns, cut_rows, parted_scheme, row_unit
from lowbit.numerics.number_formats import RowVectorLayout, VectorLayout, number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme, dense

OUT, IN = 6, 48
SIZES = [(1, 16, 8), (2, 8, 8), (3, 5, 16), (2, 12, 4)]


def weight_of(books: int, bits: int, length: int, seed: int = 1) -> tuple[QuantizedTensor, torch.Tensor]:
    """A weight, and its indices (out, vectors, books)."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(1 << bits, (OUT, IN // length, books), generator=generator)
    small = indices.to(torch.uint8 if bits <= 8 else torch.int16)
    weight = QuantizedTensor(
        Scheme(vector_format(books, bits, length), ((1, 0),), (number_format("f16"),)),
        (OUT, IN),
        small.view(torch.uint8).flatten(1),
        (torch.rand(OUT, 1, generator=generator).half(),),
        origin="test",
        codebooks=torch.randn(books, 1 << bits, length, generator=generator).half(),
    )
    return weight, indices


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_weight_is_the_sum_of_what_its_indices_say(size: tuple[int, int, int]) -> None:
    weight, indices = weight_of(*size)
    assert weight.codebooks is not None
    found, length = weight.dequantize(), size[2]
    for row in range(OUT):
        for column in range(IN):
            value = torch.zeros(())
            for book in range(size[0]):
                index = int(indices[row, column // length, book])
                value = value + weight.codebooks[book, index, column % length].float()
            assert found[row, column] == value * weight.scales[0][row, 0].float()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_and_columns_are_those_of_the_matrix(size: tuple[int, int, int]) -> None:
    weight, _ = weight_of(*size)
    whole, length = weight.dequantize(), size[2]
    assert column_unit(weight.scheme, IN) == length
    assert torch.equal(cut_columns(weight, 16, 48).dequantize(), whole[:, 16:])
    assert torch.equal(cut_rows(weight, [(1, 2), (4, 6)]).dequantize(), whole[[1, 4, 5]])
    assert torch.equal(weight.permute_rows(torch.tensor([5, 0])).dequantize(), whole[[5, 0]])
    with pytest.raises(LowbitError, match=f"cut a group of {length}"):
        cut_columns(weight, 2, 48)


def test_weights_are_joined_under_one_codebook_only() -> None:
    weight, _ = weight_of(2, 8, 8)
    other, _ = weight_of(2, 8, 8, seed=2)
    assert concatenate([weight, other]) is None
    joined = concatenate([weight.rows(0, 2), weight.rows(2, 6)])
    assert joined is not None and torch.equal(joined.dequantize(), weight.dequantize())


def row_weight(layout: RowVectorLayout, out: int, columns: int) -> tuple[QuantizedTensor, list[torch.Tensor]]:
    """Scales, offsets and an order of columns; and its indices (vectors, columns) into each codebook."""
    generator = torch.Generator().manual_seed(1)
    vectors, indexed = -(-out // layout.length), columns - layout.outliers
    indices, cells = [], []
    for count, size in zip((layout.centroids, layout.residual), layout.index_bytes, strict=True):
        if size:
            indices.append(torch.randint(count, (vectors, indexed), generator=generator))
            cells += [indices[-1] >> 8 * byte & 0xFF for byte in range(size)]
    outliers = torch.randn(vectors, layout.outliers * layout.length, generator=generator).half()
    codes = torch.stack(cells, -1).flatten(1).to(torch.uint8)
    entries = (layout.books, layout.centroids + layout.residual, layout.length)
    weight = QuantizedTensor(
        Scheme(number_format(layout.name), ((0, 1),), (number_format("f16"),), offset=True, reordered=True),
        (out, columns),
        torch.cat((outliers.view(torch.uint8), codes), 1),
        (torch.rand(1, columns, generator=generator).half(),),
        offsets=(torch.randn(1, columns, generator=generator).half(),),
        column_order=torch.randperm(columns, generator=generator),
        origin="test",
        codebooks=torch.randn(entries, generator=generator).half(),
    )
    return weight, indices


ROWS_TOGETHER = [
    (RowVectorLayout(8, 65536, 256), 24, 10),
    (RowVectorLayout(3, 7, 300, "f16", 2, 4, 5), 10, 13),
    (RowVectorLayout(4, 70_000), 9, 6),
]


@pytest.mark.parametrize(("layout", "out", "columns"), ROWS_TOGETHER, ids=str)
def test_vectors_of_rows_run_down_a_column(layout: RowVectorLayout, out: int, columns: int) -> None:
    weight, indices = row_weight(layout, out, columns)
    assert weight.codebooks is not None and weight.column_order is not None
    found, numbers = weight.dequantize(), layout.outlier_numbers(weight.codes)
    for row in range(out):
        vector, inside = divmod(row, layout.length)
        for stored in range(columns):
            column = stored - layout.outliers
            if column < 0:
                value = numbers[vector, stored, inside].float()
            else:
                book = weight.codebooks[column // layout.width if layout.width else 0].float()
                value = book[indices[0][vector, column], inside]
                if layout.residual:
                    value = value + book[layout.centroids + indices[1][vector, column], inside]
            wanted = value * weight.scales[0][0, stored].float() + weight.offsets[0][0, stored].float()
            assert found[row, weight.column_order[stored]] == wanted


@pytest.mark.parametrize(("layout", "out", "columns"), ROWS_TOGETHER, ids=str)
def test_vectors_of_rows_stay_whole(layout: RowVectorLayout, out: int, columns: int) -> None:
    weight, _ = row_weight(layout, out, columns)
    whole, length = weight.dequantize(), layout.length
    assert not weight.scheme.rows_move and row_unit(weight.scheme) == length
    assert column_unit(weight.scheme, columns) == (columns if layout.width else 1)
    assert torch.equal(weight.rows(length, out).dequantize(), whole[length:])
    assert torch.equal(weight.rows(0, length + 1, ragged=True).dequantize(), whole[: length + 1])
    for start, stop in ((1, out), (0, length + 1)):
        with pytest.raises(LowbitError, match=f"cut a vector of {length} rows"):
            weight.rows(start, stop)
    with pytest.raises(LowbitError, match="cannot reorder"):
        weight.permute_rows(torch.arange(out))
    decoded = weight.decoded(weight.scheme.decoded)
    assert decoded.scheme == dense("f16") and torch.equal(decoded.codes, whole.half())
    assert weight.nbytes == weight.codes.numel() + 4 * columns


@pytest.mark.parametrize(("layout", "out", "columns"), ROWS_TOGETHER, ids=str)
def test_rows_are_cut_between_vectors_and_decoded_where_they_end_inside(
    layout: RowVectorLayout, out: int, columns: int
) -> None:
    weight, _ = row_weight(layout, out, columns)
    whole, length = weight.dequantize(), layout.length
    for runs in ([(length, out)], [(0, length), (length, out)], [(length, 2 * length), (0, length)]):
        part = cut_rows(weight, runs)
        assert part.scheme == weight.scheme == parted_scheme(weight.scheme, (out, columns), runs)
        assert torch.equal(part.dequantize(), torch.cat([whole[start:stop] for start, stop in runs]))
    for runs in ([(1, length)], [(0, length + 1)], [(length, out), (0, length)], [(0, 1), (2, out)]):
        part = cut_rows(weight, runs)
        assert part.scheme == parted_scheme(weight.scheme, (out, columns), runs)
        wanted = torch.cat([whole[start:stop] for start, stop in runs])
        if part.scheme.is_dense:
            wanted = wanted.half().float()
        assert part.scheme.is_dense == any(start % length or stop % length for start, stop in runs)
        assert torch.equal(part.dequantize(), wanted)


def test_columns_of_one_codebook_can_be_cut() -> None:
    weight, _ = row_weight(*ROWS_TOGETHER[0])
    plain = replace(weight, column_order=None, scheme=replace(weight.scheme, reordered=False))
    assert torch.equal(cut_columns(plain, 3, 9).dequantize(), plain.dequantize()[:, 3:9])


def test_sizes_are_what_is_stored() -> None:
    weight, _ = weight_of(2, 12, 4)
    assert weight.scheme.weight.bits == 8 and weight.codes.shape == (OUT, IN)
    assert weight.nbytes == OUT * IN + 2 * OUT
    assert str(weight.scheme) == "vq2x12_4 1xall f16"


def test_names_are_the_whole_format() -> None:
    assert number_format("vq1x16_8").vectors == VectorLayout(1, 16, 8)
    assert number_format("vq1x16_8") == vector_format(1, 16, 8)
    assert number_format("vq1x12_2x4") == vector_format(1, 12, 4, 2) != vector_format(1, 12, 4)
    for layout, _, _ in ROWS_TOGETHER:
        assert number_format(layout.name).vectors == layout
    assert RowVectorLayout(8, 65536, 256, "bf16").name == "rvq8_65536+256_bf16"
    for name in (
        "rvq0_8_f16",
        "rvq8_8_e4m3",
        "rvq8_8",
        "rvq8_8+0_f16",
        "rvq8_8_f16_out0",
        "vq0x8_8",
        "vq1x17_8",
        "vq1x8",
        "vq1x8_0",
        "vq1x8_1x8",
    ):
        with pytest.raises(LowbitError, match="unknown number format"):
            number_format(name)
    with pytest.raises(LowbitError, match="vq1x16_8 has no table of scalar values"):
        number_format("vq1x16_8").table()
