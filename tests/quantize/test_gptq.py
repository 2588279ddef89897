"""GPTQ against a naive oracle: one column after another, the inverse of what is left taken anew each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.quantize.gptq import gptq, inverse_factor
from lowbit.quantize.integer_grid import IntegerGrid, columns_of_group, round_to_nearest


def problem(out: int, columns: int, seed: int, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Rows of very different size, correlated inputs of very different size, one input that never is."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) * (10.0 ** (torch.arange(out) % 5 - 2))[:, None]
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x *= torch.rand(columns, generator=generator) * 3
    x[:, columns // 3] = 0
    return weight, x.T @ x


def naive(
    weight: np.ndarray, hessian: np.ndarray, bits: int, group: int, symmetric: bool, act: bool, static: bool
) -> np.ndarray:
    """The dequantized result, float64."""
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    out, columns = weight.shape
    diagonal = np.diag(hessian).copy()
    dead = diagonal == 0
    hessian[dead, dead] = diagonal[~dead].mean()
    hessian += 0.05 * diagonal[~dead].mean() * np.eye(columns)
    order = np.argsort(-diagonal, kind="stable") if act else np.arange(columns)
    top, group = 2**bits - 1, columns if group == -1 else group

    def fit(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        reach = 2 * np.maximum(-low, high) if symmetric else high - low
        scale = (reach / top).astype(np.float16).astype(np.float64)
        scale[reach == 0] = 1
        zero = np.full(out, 2 ** (bits - 1)) if symmetric else np.clip(np.round(-low / scale), 0, top)
        return scale, zero

    fixed = [fit(weight[:, start : start + group]) for start in range(0, columns, group)]
    left, result = list(order), np.zeros_like(weight)
    scale, zero = fixed[0]
    for number, column in enumerate(order):
        if static:
            scale, zero = fixed[column // group]
        elif number % group == 0:
            scale, zero = fit(weight[:, order[number : number + group]])
        codes = np.clip(np.round(weight[:, column] / scale) + zero, 0, top)
        result[:, column] = (codes - zero) * scale
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        left = left[1:]
        weight[:, left] -= np.outer(error, inverse[0, 1:])
    return result


CASES = [  # out, columns, bits, group, symmetric, act_order, static_groups, block
    (5, 24, 4, 8, True, False, False, 128),
    (5, 24, 4, 8, False, True, False, 4),
    (7, 37, 3, 8, False, True, True, 16),
    (7, 37, 3, 16, True, True, False, 6),
    (6, 37, 4, 5, False, False, True, 12),
    (4, 30, 2, -1, False, True, False, 7),
    (4, 30, 8, -1, True, False, False, 7),
    (1, 33, 5, 32, False, True, False, 1),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_oracle(case: tuple[int, int, int, int, bool, bool, bool, int]) -> None:
    out, columns, bits, group, symmetric, act, static, block = case
    weight, hessian = problem(out, columns, seed=columns + bits)
    kept = weight.clone(), hessian.clone()
    found = gptq(
        weight,
        hessian,
        bits=bits,
        group_size=group,
        symmetric=symmetric,
        act_order=act,
        static_groups=static,
        block=block,
    )
    expected = naive(weight.numpy(), hessian.numpy(), bits, group, symmetric, act, static)
    assert np.array_equal(found.dequantize().numpy(), expected.astype(np.float32))
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])
    assert (found.column_order is not None) == found.scheme.reordered == (act and not static and group != -1)


@pytest.mark.parametrize("case", CASES)
def test_with_equal_independent_inputs_it_is_rounding_to_nearest(
    case: tuple[int, int, int, int, bool, bool, bool, int],
) -> None:
    out, columns, bits, group, symmetric, act, static, block = case
    weight, _ = problem(out, columns, seed=1)
    for hessian in (torch.eye(columns), 1e-12 * torch.eye(columns, dtype=torch.float64)):
        found = gptq(
            weight,
            hessian,
            bits=bits,
            group_size=group,
            symmetric=symmetric,
            act_order=act,
            static_groups=static,
            block=block,
        )
        nearest = round_to_nearest(weight, IntegerGrid(bits, symmetric), columns_of_group(group, columns))
        assert_same(found, nearest)


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.scheme == expected.scheme
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales[0], expected.scales[0])
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or torch.equal(found.zeros, expected.zeros)
    assert (found.column_order is None) == (expected.column_order is None)


@pytest.mark.parametrize("seed", range(12))
def test_costs_less_than_rounding_to_nearest_on_every_matrix(seed: int) -> None:
    bits, group = (2, 3, 4, 8)[seed % 4], (16, 32, -1)[seed % 3]
    weight, hessian = problem(3 + seed, 32 + 8 * seed, seed, tokens=(20, 2000)[seed % 2])
    for symmetric in (True, False):
        nearest = round_to_nearest(
            weight, IntegerGrid(bits, symmetric), columns_of_group(group, weight.shape[1])
        )
        for act, static in ((False, False), (True, False), (False, True), (True, True)):
            found = gptq(
                weight,
                hessian,
                bits=bits,
                group_size=group,
                symmetric=symmetric,
                act_order=act,
                static_groups=static,
            )
            assert (cost(found, weight, hessian) < cost(nearest, weight, hessian)).all(), (act, static)


def cost(found: QuantizedTensor, weight: Tensor, hessian: Tensor) -> float:
    """The change of the output over all inputs, rows weighed equally whatever their size."""
    change = ((found.dequantize() - weight) / weight.abs().amax(1, keepdim=True)).double()
    return ((change @ hessian.double()) * change).sum()


def test_only_the_proportions_of_the_hessian_count() -> None:
    weight, hessian = problem(6, 40, 3)
    for factor in (2.0**-20, 2.0**10):
        found = gptq(weight, hessian * factor, group_size=8, act_order=True)
        assert torch.equal(found.codes, gptq(weight, hessian, group_size=8, act_order=True).codes)


def test_act_order_is_in_the_order_a_reader_of_g_idx_restores() -> None:
    """Groups hold the columns by falling diagonal; within each they ascend, as stable sorting gives them."""
    weight, hessian = problem(4, 40, 8)
    found = gptq(weight, hessian, group_size=8, act_order=True)
    assert found.column_order is not None
    groups = hessian.diagonal().argsort(descending=True, stable=True).view(5, 8)
    assert torch.equal(found.column_order.view(5, 8), groups.sort(1).values)
    g_idx = torch.empty(40, dtype=torch.int64)
    g_idx[found.column_order] = torch.arange(40) // 8
    assert torch.equal(g_idx.argsort(stable=True), found.column_order)


def test_an_input_that_never_is_leaves_its_column_rounded_to_nearest() -> None:
    weight, hessian = problem(6, 30, 4)
    found = gptq(weight, hessian, group_size=10, static_groups=True, act_order=True)
    nearest = round_to_nearest(weight, IntegerGrid(4, True), 10)
    assert hessian[10, 10] == 0
    assert torch.equal(found.codes[:, 10], nearest.codes[:, 10])
    assert not torch.equal(found.codes, nearest.codes)


def test_no_inputs_at_all() -> None:
    weight, _ = problem(3, 16, 1)
    found = gptq(weight, torch.zeros(16, 16), group_size=8)
    assert_same(found, round_to_nearest(weight, IntegerGrid(4, True), 8))


def test_damping_grows_until_there_is_a_factor() -> None:
    """Two equal inputs and no damping: singular, and singular again with 0."""
    hessian = torch.ones(2, 2, dtype=torch.float64)
    factor = inverse_factor(hessian, damp=0.0).double()
    damped = torch.linalg.inv(factor.T @ factor)
    assert torch.allclose(damped, hessian + 1e-4 * torch.eye(2), atol=1e-6)
    # 0.01 is not enough for this one, ten times that is.
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    factor = inverse_factor(indefinite, damp=0.01).double()
    assert torch.allclose(torch.linalg.inv(factor.T @ factor), indefinite + 0.1 * torch.eye(2), atol=1e-4)


def test_what_cannot_be_factored_is_an_error() -> None:
    weight = torch.ones(2, 2)
    for hessian in (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), -torch.eye(2)):
        with pytest.raises(LowbitError, match="layer seven") as caught:
            gptq(weight, hessian, origin="layer seven")
        assert caught.value.code == "E0442"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_damaged_weights_are_named(bad: float) -> None:
    weight = torch.ones(2, 16)
    weight[1, 3] = bad
    for act in (
        lambda: gptq(weight, torch.eye(16), origin="layer seven"),
        lambda: round_to_nearest(weight, IntegerGrid(4, True), 16, "layer seven"),
    ):
        with pytest.raises(LowbitError, match="layer seven") as caught:
            act()
        assert caught.value.code == "E0215"


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_tiny_groups_keep_a_scale(symmetric: bool) -> None:
    weight = torch.zeros(2, 48)
    weight[0, 16:32] = 1e-9  # below the smallest f16 scale
    weight[1, 32:] = torch.linspace(0.25, 1, 16)  # no negative weight: 0 is on the grid all the same
    found = round_to_nearest(weight, IntegerGrid(4, symmetric), 16)
    assert (found.scales[0] > 0).all()
    assert torch.equal(found.dequantize()[:, :16], torch.zeros(2, 16))
    assert (found.dequantize() - weight).abs().max() <= 1.01 * 0.5 / 7.5


def test_the_usual_group() -> None:
    sizes = {576: 64, 1536: 128, 4096: 128, 96: 32, 100: 100, 48: 16, 97: 97}
    assert {columns: columns_of_group(None, columns) for columns in sizes} == sizes
    assert columns_of_group(-1, 100) == 100 and columns_of_group(128, 100) == 100
