"""Triton's rotations beside products with the matrices in float64: every size and type, in place and not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.gpu import rotation as gpu
from lowbit.kernels.gpu import runtime
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme
from numerics.test_rotation import hadamard, random, signs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}
SUMS = 2.0**-22  # of the sum of a block's |x| that an output may be off


def held(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rows in a matrix that is otherwise NaN."""
    rows, width = values.shape
    inside = torch.full((rows + 2, width + 24), torch.nan, dtype=dtype, device=device)[1:-1, 8:-16]
    return inside.copy_(values)


def around(inside: Tensor) -> Tensor:
    """What lies around ``held``'s rows."""
    assert inside._base is not None
    whole = inside._base.clone()
    whole[1:-1, 8:-16] = torch.nan
    return whole


def product(rotation: Rotation, x: Tensor) -> Tensor:
    """x (rows, blocks, size) by the matrix, float64."""
    if rotation.matrix is not None:
        return x @ rotation.matrix.cpu().double()
    if rotation.before is not None:
        x = x * rotation.before.cpu().double()
    inner = min(rotation.size, 256)
    x = x.unflatten(-1, (-1, inner)) @ hadamard(inner).double()
    x = (hadamard(rotation.size // inner).double() @ x).flatten(-2) / rotation.divisor
    return x if rotation.after is None else x * rotation.after.cpu().double()


def bound(rotation: Rotation, x: Tensor) -> Tensor:
    """Of the sums' error: what each output's products would add up to if none had a sign."""
    if rotation.matrix is not None:
        return x.abs() @ rotation.matrix.cpu().double().abs() * SUMS
    ends = [torch.ones(1) if t is None else t.cpu().double().abs() for t in (rotation.before, rotation.after)]
    return (x.abs() * ends[0]).sum(-1, keepdim=True) / rotation.divisor * ends[1] * SUMS


def check(rotation: Rotation, x: Tensor, out: Tensor) -> None:
    """What was made of x."""
    wide = x.cpu().double().unflatten(1, (-1, rotation.size))
    wanted = product(rotation, wide)
    off = bound(rotation, wide) + wanted.abs() * ROUNDING[out.dtype] * 1.01
    worst = float(((out.cpu().double().reshape(wide.shape) - wanted).abs() / off).max())
    assert worst <= 1, f"size {rotation.size}: {worst}"
    assert around(out).isnan().all()


def rotate(rotation: Rotation, values: Tensor, dtypes: tuple, device: torch.device) -> None:
    """Into another matrix, of the second type, and in place."""
    rotator = Rotator(rotation.to(device))
    x = held(values, dtypes[0], device)
    before, out = x.clone(), held(torch.full_like(values, torch.nan), dtypes[1], device)
    assert gpu.takes(rotator.rotation, x, out)
    gpu.rotate(rotator.rotation, x, out, rotator.signs)
    assert torch.equal(x, before)
    check(rotation, before, out)
    rotator.in_place(x)
    check(rotation, before, x)


SIZES = [(1, 19), (2, 3), (8, 5), (16, 3), (32, 3), (64, 2), (128, 2), (256, 2), (512, 1), (1024, 1)]


@pytest.mark.parametrize(("size", "blocks"), SIZES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_hadamard_of_any_size(size: int, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
    rotation = Rotation(size, signs(size, 1), signs(size, 2), None, math.sqrt(size))
    rotate(rotation, random(3, blocks * size, seed=3), (dtype, F32), device)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2048, 4096, 8192])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_largest(size: int, dtype: torch.dtype, device: torch.device) -> None:
    rotation = Rotation(size, signs(size, 1), None, None, math.sqrt(size))
    rotate(rotation, random(2, size, seed=3), (dtype, dtype), device)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(16384, BF16), *(pytest.param(size, F32, marks=pytest.mark.slow) for size in (32768, 65536))],
)
def test_two_passes(size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Signs of all columns before and numbers after; of the smallest two rows of two blocks."""
    rotation = Rotation(size, signs(size, 1), random(size, seed=2), None, math.sqrt(size))
    many = 1 + (size == 16384)
    rotate(rotation, random(many, many * size, seed=3), (dtype, F32), device)
    x = random(1, size, seed=4).to(device, dtype)
    with runtime.recording() as launches:
        made = Rotator(Rotation.hadamard(size).to(device)).rotated(x, F32)
    keep(launches)
    assert [launch.function for launch in launches] == ["hadamard_in_two", "hadamard_across"]
    assert torch.allclose(made, Rotation.hadamard(size).to(device)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [4, 64, 256])
@pytest.mark.parametrize("before", [None, "signs", "numbers"])
@pytest.mark.parametrize("after", [None, "numbers"])
def test_signs_and_numbers_around_it(
    size: int, before: str | None, after: str | None, device: torch.device
) -> None:
    """Numbers before it that a 16-bit type does not hold make x one of 24 bits."""
    given = {None: None, "signs": signs(size, 1), "numbers": random(size, seed=2)}
    rotation = Rotation(size, given[before], given[after], None, 3.0)
    for dtype in (F16, BF16):
        rotate(rotation, random(3, size if size > 64 else 3 * size, seed=4), (dtype, F32), device)


def test_many_blocks_go_together(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of a program, the last one not full; blocks of a row in several programs."""
    monkeypatch.setattr(gpu, "_MANY", 2)
    rotation = Rotation.hadamard(16)
    x = held(random(7, 16 * 11, seed=1), BF16, device)
    out = torch.full_like(x, torch.nan)
    with runtime.recording() as launches:
        gpu.rotate(rotation, x, out, True)
    keep(launches)
    assert [dict(launch.constants)["M"] for launch in launches] == [64]
    assert torch.allclose(out.float(), rotation(x), rtol=2**-8, atol=1e-6)


def keep(launches: list[runtime.Launch]) -> None:
    """For a test that records all launches."""
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)


@pytest.mark.parametrize("size", [1, 12, 16, 80, 130, 200])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_any_matrix(size: int, dtype: torch.dtype, device: torch.device) -> None:
    rotation = Rotation(size, matrix=random(size, size, seed=5))
    rotate(rotation, random(3, 2 * size, seed=6), (dtype, F32 if dtype is F32 else dtype), device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite_stay_in_their_block(device: torch.device) -> None:
    for rotation in (Rotation.hadamard(32), Rotation.hadamard(256), Rotation(12, matrix=random(12, 12))):
        for dtype in (BF16, F32):
            values = random(3, 2 * rotation.size)
            values[0, 1] = torch.nan
            values[2, rotation.size + 3] = torch.inf
            out = Rotator(rotation.to(device)).rotated(values.to(device, dtype), F32)
            wrong = ~torch.isfinite(out.cpu()).unflatten(1, (2, -1))
            assert wrong.all(-1).tolist() == wrong.any(-1).tolist()
            assert wrong.all(-1).tolist() == [[True, False], [False, False], [False, True]]


def test_heads_of_a_fused_projection(device: torch.device) -> None:
    """In place, and what lies beside them stays."""
    rows = random(5, 6 * 32).to(device, BF16)
    before = rows.clone()
    _, k, _ = rows.view(5, 6, 32).split((3, 2, 1), 1)
    rotation = Rotation(32, signs(32, 1), None, None, math.sqrt(32)).to(device)
    Rotator(rotation).in_place(k)
    assert torch.equal(rows[:, : 3 * 32], before[:, : 3 * 32])
    assert torch.equal(rows[:, 5 * 32 :], before[:, 5 * 32 :])
    wanted = rotation(before[:, 3 * 32 : 5 * 32])
    assert torch.allclose(rows[:, 3 * 32 : 5 * 32].float(), wanted, rtol=2**-8, atol=1e-6)


def givens(size: int, blocks: int, steps: int, scaled: bool = True) -> Rotation:
    """Steps of pairs, every block's and step's own."""
    generator = torch.Generator().manual_seed(size + steps)
    pairs = torch.stack([torch.randperm(size, generator=generator) for _ in range(steps * blocks)])
    angles = torch.randn(steps, blocks, size // 2, generator=generator)
    scales = torch.randn(size * blocks, generator=generator) if scaled else None
    return Rotation.givens(size, pairs.view(steps, blocks, -1, 2), angles, scales)


def check_givens(rotation: Rotation, rows: int, dtypes: tuple, device: torch.device) -> None:
    """The definition's bits in the interpreter; on a GPU two roundings of each step may be one."""
    assert rotation.partners is not None
    values = random(rows, rotation.partners.shape[1], seed=rows)
    x = held(values, dtypes[0], device)
    kept = x.clone()
    wanted = rotation(x.cpu().float())
    own, out = rotation.to(device), held(torch.full_like(values, torch.nan), dtypes[1], device)
    assert gpu.takes(own, x, out)
    gpu.rotate(own, x, out, True)
    assert torch.equal(x, kept)
    Rotator(own).in_place(x)
    for found, dtype in ((out, dtypes[1]), (x, dtypes[0])):
        rounded = wanted.to(dtype).float()
        if runtime.INTERPRETED:
            assert torch.equal(found.cpu().float(), rounded)
        else:
            error = len(rotation.partners) * 2.0**-22 * wanted.abs().max()
            assert ((found.cpu().float() - wanted).abs() <= error + wanted.abs() * ROUNDING[dtype]).all()
        assert around(found).isnan().all()


PAIRS = [
    *((2, 70, 3, 1), (6, 3, 3, 2), (32, 5, 17, 3), (128, 3, 1, 8), (128, 2, 35, 8)),
    *((160, 2, 17, 2), (1024, 2, 18, 2), (4096, 1, 2, 1), (8192, 1, 17, 1)),
]


@pytest.mark.parametrize(
    ("size", "blocks", "rows", "steps", "dtype"),
    [*((*shape, BF16) for shape in PAIRS), *((128, 2, 35, 8, dtype) for dtype in (F16, F32))],
)
def test_pairs_of_columns(
    size: int, blocks: int, rows: int, steps: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Blocks smaller than a program, the last one not full, and of sizes that are no power of two."""
    rotation = givens(size, blocks, steps)
    check_givens(rotation, rows, (dtype, F32), device)
    check_givens(replace(rotation.transposed, before=None), min(rows, 3), (dtype, dtype), device)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_pairs_have_the_native_codes_bits(device: torch.device) -> None:
    if not runtime.INTERPRETED:
        pytest.skip("on a GPU two roundings may be one")
    rotator, x = Rotator(givens(128, 3, 8)), random(5, 384)
    out = torch.empty_like(x)
    assert rotator._native(x, out)
    with runtime.recording() as launches:
        found = rotator.rotated(x.to(device), F32)
    keep(launches)
    assert [launch.function for launch in launches] == ["givens"]
    assert torch.equal(found.cpu(), out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite_stay_in_their_pairs(device: torch.device) -> None:
    """Nothing of a neighbour in the same program is multiplied, not even by zero."""
    rotation = givens(32, 4, 3, scaled=False)
    x = random(3, 128)
    x[0, 1], x[2, 40] = torch.nan, torch.inf
    found = Rotator(rotation.to(device)).rotated(x.to(device), F32).cpu()
    assert torch.equal(found.isfinite(), rotation(x).isfinite())
    assert found.isfinite()[:, 64:].all() and not found.isfinite().all()


def test_what_is_too_large_runs_in_torch(device: torch.device) -> None:
    rotation = Rotation.hadamard(2 * gpu.LARGEST).to(device)
    x = random(1, rotation.size).to(device)
    assert not gpu.takes(rotation, x, x)
    assert torch.equal(Rotator(rotation).rotated(x, F32), rotation(x))
    pairs = givens(16384, 1, 1).to(device)
    assert not gpu.takes(pairs, x[:, :16384], x[:, :16384])


SCHEMES = {
    "int8 a token": ActivationScheme(number_format("int8"), block=(1, 0)),
    "int8 asymmetric": ActivationScheme(number_format("int8"), block=(1, 0), symmetric=False),
    "fp8 a token": ActivationScheme(number_format("e4m3"), block=(1, 0)),
    "mxfp4": ActivationScheme(number_format("e2m1"), block=(1, 32), scale=number_format("e8m0")),
    "nvfp4": ActivationScheme(number_format("e2m1"), block=(1, 16), scale=number_format("e4m3")),
    "fp8 in groups": ActivationScheme(number_format("e4m3"), block=(1, 128)),
}
# Columns, a block's, and whether the launch that quantizes rotates them.
CASES = [
    ("int8 a token", 128, 64, False),
    ("int8 a token", 256, 256, True),
    ("int8 asymmetric", 256, 256, False),
    ("fp8 a token", 1024, 1024, True),
    pytest.param("int8 a token", 8192, 8192, True, marks=pytest.mark.slow),
    ("mxfp4", 64 * 5, 64, True),
    ("mxfp4", 48, 16, False),
    ("mxfp4", 256, 256, False),
    ("nvfp4", 128 * 17, 128, True),
    ("nvfp4", 48, 16, True),
    ("fp8 in groups", 256, 128, True),
]


@pytest.mark.parametrize("name", ["int8 a token", "mxfp4"])
def test_quantizing_follows_pairs(name: str, device: torch.device) -> None:
    """In a launch of its own."""
    transform = InputTransform(SCHEMES[name], rotation=Rotator(givens(32, 4, 2).to(device)))
    x = random(5, 128).to(device, BF16)
    with runtime.recording() as launches:
        made, _ = transform(x)
    keep(launches)
    assert [launch.function for launch in launches] == ["givens", "quantize"]
    assert transform.rotation is not None
    wanted, _ = replace(transform, rotation=None).in_torch(transform.rotation.rotated(x, F32))
    assert torch.equal(made, wanted.to(BF16))


@pytest.mark.parametrize(("name", "columns", "size", "fused"), CASES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_quantizing_follows(
    name: str, columns: int, size: int, fused: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """In the same launch or the next one, with the same bits; the result has x's type."""
    rotation = Rotation(size, signs(size, 1), random(size, seed=2), None, math.sqrt(size)).to(device)
    multiplier = (random(columns, seed=7).abs() + 0.5).to(device)
    transform = InputTransform(SCHEMES[name], multiplier, rotation=Rotator(rotation))
    x = held(random(5, columns), dtype, device)
    x[1, 3] = 50.0
    with runtime.recording() as launches:
        made, factor = transform(x)
    keep(launches)
    assert [one.function for one in launches][-1] == "quantize" and (len(launches) == 1) == fused
    turned = Rotator(rotation).rotated(x, F32)
    plain = replace(transform, rotation=None)
    wanted, other = plain.in_torch(turned)
    assert made.dtype is dtype and torch.equal(made, wanted.to(dtype))
    assert (factor is None) == (other is None)
    assert factor is None or other is None or torch.equal(factor, other)
    if SCHEMES[name].number_format.bits == 8:
        assert transform.gpu is not None and plain.gpu is not None
        ours, theirs = transform.gpu.codes(x), plain.gpu.codes(turned)
        assert torch.equal(ours.codes.float(), theirs.codes.float())
        assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_numbers_of_a_rotated_row(device: torch.device) -> None:
    """A row that is rotated where it is quantized is NaN as a whole, and alone."""
    transform = InputTransform(SCHEMES["int8 a token"], rotation=Rotator(Rotation.hadamard(256).to(device)))
    x = random(3, 256).to(device, BF16)
    x[1, 7] = torch.nan
    assert transform.gpu is not None
    made = transform.gpu.codes(x)
    assert made.scales.isnan().tolist() == [False, True, False]
    alone = transform.gpu.codes(x[[0, 2]])
    assert torch.equal(alone.codes, made.codes[[0, 2]]) and torch.equal(alone.scales, made.scales[[0, 2]])


def test_what_only_rotates_has_the_inputs_type(device: torch.device) -> None:
    rotation = Rotation.hadamard(16).to(device)
    x = random(3, 48).to(device, F16)
    made, factor = InputTransform(rotation=Rotator(rotation))(x)
    assert factor is None and made.dtype is F16
    assert torch.allclose(made.float(), rotation(x), rtol=2**-10, atol=1e-6)
