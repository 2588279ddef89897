"""Native codes against ``nearest_code``, bit for bit: every float, ties, zeros, odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from guard_page import at_guard_page, rows_at_guard_page
from lowbit.kernels import native
from lowbit.kernels.encode import _function, encode
from lowbit.numerics.number_formats import nearest_code, number_format
from sparse_memory import far_apart

pytestmark = pytest.mark.usefixtures("poisoned")

FORMATS = (
    *("int2", "int3", "int4", "int8", "uint2", "uint4", "uint8"),
    *("e2m1", "e2m3", "e3m2", "e4m3", "nf4", "fp4_bnb", "iq4_nl_codes", "e5m2"),
)


def test_the_native_function_is_there() -> None:
    if native.library() is None:
        pytest.skip("no native library")
    assert _function() is not None


@pytest.mark.parametrize("name", FORMATS)
def test_values_ties_and_their_neighbours(name: str) -> None:
    fmt = number_format(name)
    values = sorted({v for v in fmt.values or () if math.isfinite(v)})
    table = torch.tensor(values)
    middles = (table[1:] + table[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    exact = torch.cat([table, middles, torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 447.9, 464.0])])
    x = torch.cat([exact, torch.nextafter(exact, up), torch.nextafter(exact, down)]).unsqueeze(0)
    codes = encode(x, torch.ones(1, 1), 0, fmt)
    assert torch.equal(codes, nearest_code(x, fmt))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 0), (7, 100, 32), (33, 257, 64), (300, 160, 16)]
)
def test_scaled_rows(name: str, rows: int, columns: int, group: int) -> None:
    fmt = number_format(name)
    generator = torch.Generator().manual_seed(rows * columns)
    groups = -(-columns // (group or columns))
    scale = torch.rand(rows, groups, generator=generator) * torch.logspace(-4, 2, rows).unsqueeze(1)
    scale[torch.rand(rows, groups, generator=generator) < 0.1] = 0
    wide = torch.randn(rows, columns + 3, generator=generator) * 4 * torch.logspace(-4, 2, rows).unsqueeze(1)
    x = wide[:, :columns]  # rows further apart than they are long
    spread = scale.repeat_interleave(group or columns, 1)[:, :columns]
    expected = nearest_code(torch.where(spread == 0, 0.0, x / spread), fmt)
    assert torch.equal(encode(x, scale, group, fmt), expected)


def test_every_sixteenth_bit_pattern_of_e4m3() -> None:
    """All exponents and many mantissas, both signs."""
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).unsqueeze(0)
    x = x[~x.isnan()].unsqueeze(0)
    fmt = number_format("e4m3")
    assert torch.equal(encode(x, torch.ones(1, 1), 0, fmt), nearest_code(x, fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_past_the_end_is_touched(name: str) -> None:
    fmt = number_format(name)
    for columns in range(1, 40):
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)) * 4
        scale = torch.linspace(0.5, 2, 3 * -(-columns // 16)).view(3, -1)
        found = encode(rows_at_guard_page(x, columns + 7), at_guard_page(scale), 16, fmt)
        assert torch.equal(found, nearest_code(x / scale.repeat_interleave(16, 1)[:, :columns], fmt))


def test_rows_past_two_to_the_31() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 4
    fmt = number_format("int8")
    assert torch.equal(encode(far_apart(x), torch.ones(1, 1), 0, fmt), nearest_code(x, fmt))
