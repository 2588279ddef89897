"""Vectors of the lattice E8 between transforms: what can be cut. Values: formats/test_quip_sharp.py."""

from __future__ import annotations

import pytest
import torch

from contract.test_linear_kernels import lattice
from lowbit.errors import LowbitError
from lowbit.numerics.cutting import column_unit, cut_columns
from lowbit.numerics.lattice import LatticeLayout
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import concatenate


@pytest.mark.parametrize(
    ("divisor", "second", "bits"), [(0.0, 16, 2), (3.45, 16, 4), (1e-05, 16, 4), (2.04, 8, 3)]
)
def test_names_and_sizes(divisor: float, second: int, bits: int) -> None:
    weight = lattice(divisor, (48, 128), second)
    layout = LatticeLayout(divisor, second)
    assert layout.bits == bits and weight.codes.shape == (48, 16 * bits)
    assert number_format(layout.name).lattice == layout
    assert weight.nbytes == 48 * 128 * layout.bits // 8 + 4 * (48 + 128)
    words = layout.words(weight.codes)
    assert [part.shape for part in words] == [(48, 16)] * layout.books
    assert torch.equal(layout.codes(words), weight.codes)
    for name in ("e8p+e8p", "e8p+e8p/", "e8p2", "e8p+e8", "e8/2.04"):
        with pytest.raises(LowbitError, match="unknown number format"):
            number_format(name)


def test_nothing_of_it_moves_or_is_cut() -> None:
    weight = lattice(shape=(48, 128))
    whole = weight.dequantize()
    assert column_unit(weight.scheme, 128) == 128 and weight.scheme.weight.is_tall
    assert weight.rows(0, 48) is weight
    assert concatenate([weight, weight]) is None, "each has scales of its own for all columns"
    with pytest.raises(LowbitError, match="cut a group of 128"):
        cut_columns(weight, 64, 128)
    with pytest.raises(LowbitError, match="cannot reorder"):
        weight.permute_rows(torch.arange(48))
    decoded = weight.decoded(weight.scheme.decoded)
    assert decoded.scheme.weight.name == "f16" and torch.equal(decoded.dequantize(), whole)


def test_the_weight_is_the_product_of_the_matrices() -> None:
    """Hadamard's matrix has -1 where an odd count of bits is set in both indices."""
    weight = lattice(shape=(16, 64))
    u = LatticeLayout().vectors(weight.codes)
    ones = torch.ones(16, 16)
    for step in (1, 2, 4, 8):
        signs = torch.arange(16) & step > 0
        ones[signs[:, None] & signs] *= -1
    assert torch.equal(ones @ ones, 16 * torch.eye(16))
    wide = torch.kron(ones[:4, :4], ones)
    wanted = (ones @ u @ wide.T) * weight.scales[0] * weight.scales[1]
    assert torch.allclose(weight.dequantize(), wanted, rtol=2.0**-10, atol=1e-6)
