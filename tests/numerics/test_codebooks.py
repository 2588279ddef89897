"""Formats of codebooks: what indices of vectors mean, and how such weights are cut and joined."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.numerics.cutting import column_unit, cut_columns, cut_rows
from lowbit.numerics.number_formats import VectorLayout, number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme

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


def test_sizes_are_what_is_stored() -> None:
    weight, _ = weight_of(2, 12, 4)
    assert weight.scheme.weight.bits == 8 and weight.codes.shape == (OUT, IN)
    assert weight.nbytes == OUT * IN + 2 * OUT
    assert str(weight.scheme) == "vq2x12_4 1xall f16"


def test_names_are_the_whole_format() -> None:
    assert number_format("vq1x16_8").vectors == VectorLayout(1, 16, 8)
    assert number_format("vq1x16_8") == vector_format(1, 16, 8)
    for name in ("vq0x8_8", "vq1x17_8", "vq1x8", "vq1x8_0"):
        with pytest.raises(LowbitError, match="unknown number format"):
            number_format(name)
    with pytest.raises(LowbitError, match="vq1x16_8 has no table of scalar values"):
        number_format("vq1x16_8").table()
