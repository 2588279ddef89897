"""Rotations in native code: the definition's bits, with signs of a block or of every column."""

from __future__ import annotations

import pytest
import torch

from lowbit.kernels.rotation import Rotator
from lowbit.numerics.rotation import Rotation, sylvester

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_bits_are_the_definitions(size: int, wide: bool, rows: int) -> None:
    width, generator = 3 * size, torch.Generator().manual_seed(size)
    vectors = torch.randn(2, width if wide else size, generator=generator)
    rotation = Rotation(size, vectors[0].clone(), vectors[1].clone(), divisor=size**0.5)
    assert rotation.wide == wide
    x = torch.randn(rows, width + 5, generator=generator)[:, :width]
    before, wanted = x.clone(), rotation(x)
    rotator = Rotator(rotation)
    found = rotator.rotated(x, torch.float32)
    assert torch.equal(found, wanted) and torch.equal(x, before), "x stays"
    assert torch.equal(rotator.rotated(x, torch.bfloat16), wanted.bfloat16())
    rotator.in_place(x)
    assert torch.equal(x, wanted)
    if wide:
        by_blocks = [
            Rotation(size, *vectors[:, i : i + size], divisor=size**0.5)(before[:, i : i + size])
            for i in range(0, width, size)
        ]
        assert torch.equal(wanted, torch.cat(by_blocks, 1)), "each block has its own"


@pytest.mark.parametrize("head", [4, 12, 172])
@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_blocks_are_mixed_by_a_head(head: int, size: int) -> None:
    """The Kronecker product of the head and Hadamard's matrix, between scales; x may be the result."""
    width, generator = head * size, torch.Generator().manual_seed(head + size)
    before, after = torch.randn(2, width, generator=generator).unbind()
    matrix = torch.randint(-1, 2, (head, head), generator=generator).float()
    rotation = Rotation(size, before.clone(), after.clone(), divisor=3.0, head=matrix)
    x = torch.randn(5, width + 3, generator=generator)[:, :width]
    # By a whole matrix this would be most of the time: 11,008 by 11,008 numbers of the largest.
    parts = (x * before).double().view(5, head, size)
    mixed = torch.einsum("hg,rgs,ts->rht", matrix.double(), parts, sylvester(size).double())
    if width < 1000:
        whole = torch.kron(matrix, sylvester(size).float())
        torch.testing.assert_close(mixed.flatten(1), (x * before).double() @ whole.double().T)
    wanted = (mixed.flatten(1) / 3 * after).float()
    largest = wanted.abs().max()
    for found in (rotation(x), Rotator(rotation).rotated(x, torch.float32)):
        assert (found - wanted).abs().max() < 1e-5 * largest
    Rotator(rotation).in_place(x)
    assert torch.equal(x, found), "x and the result may be one"
    assert not rotation.same_as(Rotation(size, before, after, divisor=3.0))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_pairs_have_the_definitions_bits(steps: int) -> None:
    """Of an odd and an even number of steps, in place and beside x."""
    size, blocks = 22, 3
    generator = torch.Generator().manual_seed(steps)
    pairs = torch.stack([torch.randperm(size, generator=generator) for _ in range(steps * blocks)])
    angles = torch.randn(steps, blocks, size // 2, generator=generator)
    scales = torch.randn(size * blocks, generator=generator)
    x = torch.randn(5, size * blocks + 3, generator=generator)[:, : size * blocks]
    for before in (scales, None):
        rotation = Rotation.givens(size, pairs.view(steps, blocks, -1, 2), angles, before)
        wanted = rotation(x)
        rotator = Rotator(rotation)
        assert rotator.native is not None
        assert torch.equal(rotator.rotated(x, torch.float32), wanted)
        assert torch.equal(Rotator(rotation.transposed).rotated(x, torch.float32), rotation.transposed(x))
        turned = x.clone()
        rotator.in_place(turned)
        assert torch.equal(turned, wanted)
