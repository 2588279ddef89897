"""QuantizedTensor against naive loops: every group has numbers of its own, widths are odd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.numerics.number_formats import NUMBER_FORMATS, nearest_code, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense

OUT, IN = 13, 70


def make(
    name: str = "uint4",
    blocks: tuple[tuple[int, int], ...] = ((1, 32),),
    zero: str = "none",
    offset: bool = False,
    flattened: bool = False,
    order: bool = False,
    shape: tuple[int, int] = (OUT, IN),
    seed: int = 0,
    apart: bool = False,
) -> QuantizedTensor:
    """A random weight with unlike numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    fmt = number_format(name)
    out, columns = shape

    def level(block: tuple[int, int]) -> torch.Tensor:
        rows, cols = block[0] or out, block[1] or columns
        size = (-(-out * columns // cols),) if flattened else (-(-out // rows), -(-columns // cols))
        return torch.randn(size, generator=generator)

    f32 = number_format("f32")
    scheme = Scheme(
        fmt,
        blocks,
        (f32,) * len(blocks),
        zero,
        offset,
        flattened,
        order,
        scattered=apart,  # type: ignore[arg-type]
    )
    finite = torch.isfinite(fmt.table()).nonzero().flatten()
    codes = finite[torch.randint(0, len(finite), shape, generator=generator)].to(torch.uint8)
    zeros = None
    if zero == "integer":
        zeros = torch.randint(0, 16, level(blocks[0]).shape, generator=generator).to(torch.uint8)
    if zero == "float":
        zeros = level(blocks[0]) * 5
    return QuantizedTensor(
        scheme,
        shape,
        codes,
        tuple(level(block) for block in blocks),
        zeros,
        tuple(level(block) for block in blocks) if offset else (),
        torch.randperm(columns, generator=generator) if order else None,
        "test: module",
        torch.arange(out) * 5 % -(-out // blocks[-1][0]) if apart else None,
    )


def naive(weight: QuantizedTensor) -> np.ndarray:
    """The one equation, a weight at a time, in float64."""
    out, columns = weight.shape
    values = weight.scheme.weight.table().double().numpy()
    result = np.zeros((out, columns))
    for row, column in itertools.product(range(out), range(columns)):

        def at(tensor: torch.Tensor, level: int, row: int = row, column: int = column) -> float:
            rows, cols = weight.scheme.blocks[level]
            if weight.scheme.flattened:
                return float(tensor[(row * columns + column) // cols])
            if weight.row_groups is not None and rows > 1:
                return float(tensor[weight.row_groups[row], column // (cols or columns)])
            return float(tensor[row // (rows or out), column // (cols or columns)])

        value = values[int(weight.codes[row, column])]
        if weight.zeros is not None:
            value -= at(weight.zeros, 0)
        value *= math.prod(at(scale, level) for level, scale in enumerate(weight.scales))
        if weight.offsets:
            value += math.prod(at(offset, level) for level, offset in enumerate(weight.offsets))
        target = column if weight.column_order is None else int(weight.column_order[column])
        result[row, target] = value
    return result


VARIANTS: dict[str, dict[str, Any]] = {
    "groups": {},
    "ragged groups": {"blocks": ((1, 48),)},
    "per channel": {"blocks": ((1, 0),)},
    "per tensor": {"blocks": ((0, 0),), "name": "e4m3"},
    "square blocks": {"blocks": ((4, 32),), "name": "e4m3"},
    "two levels": {"blocks": ((1, 16), (0, 0)), "name": "e2m1"},
    "two levels with offsets": {"blocks": ((1, 16), (1, 64)), "offset": True},
    "integer zero": {"zero": "integer"},
    "float zero": {"zero": "float"},
    "offset": {"offset": True},
    "act-order": {"order": True, "zero": "integer"},
    "flattened": {"blocks": ((1, 64),), "flattened": True, "name": "nf4"},
    "signed": {"name": "int3"},
    "rows apart": {"blocks": ((4, 1),), "zero": "float", "apart": True},
    "groups under rows apart": {"blocks": ((1, 32), (3, 1)), "zero": "float", "apart": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dequantize_is_the_equation(variant: str) -> None:
    weight = make(**VARIANTS[variant])
    np.testing.assert_allclose(weight.dequantize().numpy(), naive(weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("flattened", "square blocks")])
def test_rows_and_permutation(variant: str) -> None:
    weight = make(**VARIANTS[variant])
    whole = weight.dequantize()
    assert torch.equal(weight.rows(3, 9).dequantize(), whole[3:9])
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(5))
    assert torch.equal(weight.permute_rows(order).dequantize(), whole[order])


def test_rows_on_block_borders_only() -> None:
    blocks = make(**VARIANTS["square blocks"])
    assert torch.equal(blocks.rows(4, 12).dequantize(), blocks.dequantize()[4:12])
    assert torch.equal(blocks.rows(8, OUT).dequantize(), blocks.dequantize()[8:])
    with pytest.raises(LowbitError, match="cut a block of 4 rows"):
        blocks.rows(2, 8)
    with pytest.raises(LowbitError, match="cut a block of 4 rows"):
        blocks.rows(4, 10)
    assert torch.equal(blocks.rows(4, 10, ragged=True).dequantize(), blocks.dequantize()[4:10])
    with pytest.raises(LowbitError, match="blocks of rows"):
        blocks.permute_rows(torch.arange(OUT))
    flat = make(blocks=((1, 64),), flattened=True, name="nf4", shape=(8, 96))
    assert torch.equal(flat.rows(2, 4).dequantize(), flat.dequantize()[2:4])
    with pytest.raises(LowbitError, match="inside a block of 64"):
        flat.rows(1, 2)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "act-order"])
def test_concatenate(variant: str) -> None:
    more: dict[str, Any] = {**VARIANTS[variant], "shape": (16, 64)}
    parts = [make(**more, seed=seed) for seed in (1, 2, 3)]
    whole = concatenate(parts)
    assert whole is not None
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_concatenate_refuses_what_differs() -> None:
    first = make()
    assert concatenate([first, make("uint5")]) is None
    assert concatenate([first, make(shape=(OUT, 64))]) is None
    assert concatenate([make(order=True, seed=1), make(order=True, seed=2)]) is None
    same = make(order=True, seed=1)
    joined = concatenate([same, same])
    assert joined is not None and torch.equal(joined.dequantize()[:OUT], same.dequantize())
    ragged = make("e4m3", ((4, 32),))
    assert concatenate([ragged, ragged]) is None  # 13 rows do not end on a block of 4


def test_dense_and_sizes() -> None:
    weight = QuantizedTensor(dense("bf16"), (4, 8), torch.randn(4, 8).bfloat16())
    assert torch.equal(weight.dequantize(), weight.codes.float())
    assert weight.nbytes == 64
    assert make("uint4", ((1, 32),), "integer", shape=(4, 64)).nbytes == (4 * 64 * 4 + 8 * (32 + 4)) // 8
    assert Scheme(number_format("gguf_q4_1")).bits_per_weight((16, 64)) == 5.0


def test_schemes_are_values_with_a_short_spelling() -> None:
    f16 = number_format("f16")
    scheme = Scheme(number_format("int4"), ((1, 128),), (f16,), "integer", reordered=True)
    assert str(scheme) == "int4 1x128 f16 asym act-order"
    assert hash(scheme) == hash(Scheme(number_format("int4"), ((1, 128),), (f16,), "integer", reordered=True))
    activation = ActivationScheme(number_format("int8"), (1, 0))
    assert str(activation) == "int8 1xall dynamic"


def by_definition(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A sign, an exponent and a mantissa, as the OCP formats without specials have them."""
    sign = -1 if code >> exponent_bits + mantissa_bits & 1 else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(("name", "fields"), [("e2m1", (2, 1, 1)), ("e2m3", (2, 3, 1)), ("e3m2", (3, 2, 3))])
def test_small_floats_by_definition(name: str, fields: tuple[int, int, int]) -> None:
    table = number_format(name).table().tolist()
    assert table == [by_definition(code, *fields) for code in range(len(table))]


TORCH_FLOATS = {
    "e4m3": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "e8m0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_byte_floats_equal_torch(name: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(TORCH_FLOATS[name]).float()
    assert torch.equal(number_format(name).table().nan_to_num(7e30), theirs.nan_to_num(7e30))


def nearest_by_hand(value: float, table: list[float]) -> float:
    """The nearest finite value; of two at the same distance the one with the even code; saturating."""
    codes = [code for code, worth in enumerate(table) if math.isfinite(worth)]
    distance = min(abs(table[code] - value) for code in codes)
    near = [code for code in codes if abs(table[code] - value) == distance]
    return table[min(near, key=lambda code: code % 2)]


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3", "e4m3fnuz", "e5m2", "e5m2fnuz"])
def test_nearest_code_of_a_float_format(name: str) -> None:
    """Every value, every tie between two neighbours, a little beside each tie, and far outside."""
    table = [float(value) for value in number_format(name).table()]
    finite = sorted({value for value in table if math.isfinite(value)})
    ties = [(low + high) / 2 for low, high in itertools.pairwise(finite)]
    beside = [tie * factor for tie in ties for factor in (0.999, 1.001)]
    values = [*finite, *ties, *beside, 2 * finite[-1], 2 * finite[0], math.inf, -math.inf]
    codes = nearest_code(torch.tensor(values, dtype=torch.float32), number_format(name)).tolist()
    clipped = [min(max(value, finite[0]), finite[-1]) for value in values]
    assert [table[code] for code in codes] == [nearest_by_hand(value, table) for value in clipped]


def test_nearest_integer_codes_round_half_to_even() -> None:
    values = torch.tensor([-9.0, -8.0, -0.5, 0.5, 1.5, 2.5, 6.9, 7.0, 99.0])
    codes = nearest_code(values, number_format("int4"))
    assert (codes.int() - 8).tolist() == [-8, -8, 0, 0, 2, 2, 7, 7, 7]
    assert nearest_code(torch.tensor([-3.0, 2.5, 300.0]), number_format("uint8")).tolist() == [0, 2, 255]


def test_nf4_ties_take_the_lower_value() -> None:
    table = number_format("nf4").table().double()
    middles = (table[1:] + table[:-1]) / 2
    assert nearest_code(middles, number_format("nf4")).tolist() == list(range(15))


@pytest.mark.parametrize("name", sorted(name for name, fmt in NUMBER_FORMATS.items() if fmt.values))
def test_every_code_is_its_own_nearest(name: str) -> None:
    fmt = number_format(name)
    table = fmt.table()
    finite = table[torch.isfinite(table)]
    assert torch.equal(table[nearest_code(finite, fmt).long()], finite)


def test_unknown_number_format_is_named() -> None:
    with pytest.raises(LowbitError, match="int99"):
        number_format("int99")
