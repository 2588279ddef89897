"""The largest of each row: against torch, with ties, NaN, infinities, strides and odd widths."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.kernels.row_peaks import row_peaks


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 1000, 49_152])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_like_torch(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width + 5, generator=generator)[:, :width]
    x = (x * 4).round()  # ties
    values, places = row_peaks(x)
    assert values == x.amax(dim=1).tolist()
    assert places == [int((line == line.max()).nonzero()[0]) for line in x]


@pytest.mark.parametrize("width", [5, 16, 40])
def test_what_is_no_number(width: int) -> None:
    x = torch.full((6, width), -3.0)
    x[1, width - 1] = math.nan
    x[2, 0] = math.inf
    x[3] = -math.inf
    x[4, 2] = -math.inf
    x[5, 1], x[5, 3] = math.nan, math.inf
    values, places = row_peaks(x)
    assert values[0] == -3.0 and places[0] == 0
    assert math.isnan(values[1]) and math.isnan(values[5])
    assert values[2] == math.inf and places[2] == 0
    assert values[3] == -math.inf
    assert values[4] == -3.0 and places[4] == 0
