"""Rotations: the transform beside the matrix it stands for, native bits beside torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme


def hadamard(size: int) -> Tensor:
    """Entry (i, j) is 1 or -1 as the bits that i and j share are even or odd in number."""
    rows = [[1.0 - 2.0 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(rows)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(size: int, seed: int) -> Tensor:
    return random(size, seed=seed).sign()


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 128])
@pytest.mark.parametrize("kind", ["plain", "before", "after", "both", "scaled"])
def test_a_hadamard_matrix_is_recognized(size: int, kind: str) -> None:
    """And applied without a product, to what the product with it gives."""
    matrix = hadamard(size)
    if kind in ("before", "both"):
        matrix = signs(size, 1).unsqueeze(1) * matrix
    if kind in ("after", "both"):
        matrix = matrix * signs(size, 2)
    if kind == "scaled":
        matrix = matrix * 0.17675781
    rotation = Rotation.of(matrix, math.sqrt(size))
    assert rotation.matrix is None
    x = random(3, 2 * size)
    wanted = (x.view(3, 2, size).double() @ matrix.double() / math.sqrt(size)).view(3, -1)
    assert torch.allclose(rotation(x).double(), wanted, atol=1e-5)
    back = rotation.transposed(rotation(x)) / (0.17675781**2 if kind == "scaled" else 1.0)
    assert torch.allclose(back, x, atol=1e-4)


def test_other_matrices_are_products() -> None:
    almost = hadamard(16)
    almost[3, 5] *= -1
    for matrix in (
        almost,
        random(16, 16),
        random(12, 12),
        torch.zeros(4, 4),
        hadamard(16)[:, torch.randperm(16)],
    ):
        rotation = Rotation.of(matrix, 4.0)
        x = random(5, 2 * len(matrix))
        wanted = (x.view(5, 2, -1) @ matrix / 4.0).view(5, -1)
        assert torch.allclose(rotation(x), wanted, atol=1e-5)
    assert Rotation.of(almost).matrix is not None
    with_nan = hadamard(4)
    with_nan[0, 0] = math.nan
    assert Rotation.of(with_nan).matrix is not None


@pytest.mark.parametrize("size", [1, 4, 16, 64, 512])
def test_native_code_has_the_bits_of_torch(size: int) -> None:
    if native.library() is None:
        pytest.skip("no native library")
    x = torch.cat((random(7, 3 * size), torch.zeros(1, 3 * size)))
    x[2, size // 2] = math.inf
    x[4, 0] = -math.nan
    for before, after in ((None, None), (signs(size, 3), None), (None, signs(size, 4) * 0.3)):
        rotation = Rotation(size, before, after, None, math.sqrt(size))
        wide = torch.zeros(8, 3 * size + 5)
        wide[:, : 3 * size] = x
        Rotator(rotation).in_place(wide[:, : 3 * size])
        assert torch.equal(wide[:, : 3 * size].nan_to_num(7.0), rotation(x).nan_to_num(7.0))
        assert not wide[:, 3 * size :].any()
        moved, factor = InputTransform(rotation=Rotator(rotation))(x)
        assert factor is None and torch.equal(moved.nan_to_num(7.0), rotation(x).nan_to_num(7.0))


@pytest.mark.parametrize("size", [5, 16, 70, 192])
def test_native_products(size: int) -> None:
    """In place and beside, whole vectors and rests; a row alone has the bits it has among others."""
    if native.library() is None:
        pytest.skip("no native library")
    rotator = Rotator(Rotation.of(random(size, size)))
    x = random(9, 2 * size, seed=5)
    moved, _ = InputTransform(rotation=rotator)(x)
    assert torch.allclose(moved, rotator.rotation(x), atol=1e-4)
    turned = x.clone()
    rotator.in_place(turned)
    alone, _ = InputTransform(rotation=rotator)(x[4:5])
    assert torch.equal(turned, moved) and torch.equal(alone[0], moved[4])


def test_heads_that_lie_between_others() -> None:
    qkv = random(4, 6, 32)
    before, rotation = qkv.clone(), Rotation.hadamard(16)
    Rotator(rotation).in_place(qkv[:, 2:4])
    assert torch.equal(qkv[:, 2:4], rotation(before[:, 2:4]))
    assert torch.equal(qkv[:, :2], before[:, :2]) and torch.equal(qkv[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    "scheme",
    [
        ActivationScheme(number_format("int8"), (1, 0)),
        ActivationScheme(number_format("e4m3"), (1, 32)),
        ActivationScheme(number_format("e2m1"), (1, 32), scale=number_format("e8m0")),
        ActivationScheme(number_format("int8"), (0, 0)),
    ],
    ids=str,
)
def test_x_is_rotated_before_it_is_quantized(scheme: ActivationScheme) -> None:
    """The native rule beside torch's; and not the other way round."""
    rotator = Rotator(Rotation(64, signs(64, 1), None, None, 8.0))
    x = random(6, 128)
    transform = InputTransform(scheme, rotation=rotator)
    (codes, factor), (wanted, others) = transform(x), transform.in_torch(x)
    assert torch.equal(codes, wanted)
    assert (factor is None and others is None) or torch.equal(factor, others)
    first, _ = InputTransform(scheme).in_torch(rotator.rotation(x))
    assert torch.equal(first, wanted)
    assert not transform.same_as(InputTransform(scheme))
    assert transform.same_as(
        InputTransform(scheme, rotation=Rotator(Rotation(64, signs(64, 1), None, None, 8.0)))
    )


def test_a_step_with_rotations_is_replayed() -> None:
    if native.library() is None:
        pytest.skip("no native library: nothing to record")
    x, rotator = random(2, 4, 32), Rotator(Rotation.hadamard(32))
    transform = InputTransform(ActivationScheme(number_format("int8"), (1, 0)), rotation=rotator)

    def step() -> Tensor:
        rotator.in_place(x)
        return transform(x.flatten(1))[0]

    _, plan = Recorder(Arena(1 << 20)).record(step)
    assert plan is not None and [one.name for one in plan.operations] == ["rotate", "quantize_input"]
    x.copy_(random(2, 4, 32, seed=9))
    found = plan.run().clone()
    x.copy_(random(2, 4, 32, seed=9))
    assert torch.equal(found, step())
