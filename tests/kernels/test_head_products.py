"""Products of each head with its own matrix, against float64 and row by row."""

from __future__ import annotations

import pytest
import torch

from guard_page import at_guard_page, rows_at_guard_page
from lowbit.kernels import head_products, native
from lowbit.kernels.head_products import HeadMatrices
from sparse_memory import far_apart

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1, 1), (3, 16, 512), (4, 128, 20), (2, 5, 64), (5, 24, 37), (2, 512, 128)]


def draw(heads: int, inputs: int, outputs: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * inputs + outputs)
    matrices = torch.randn(heads, inputs, outputs, generator=generator)
    return matrices, torch.randn(tokens, heads, inputs, generator=generator)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ["native", "torch"])
def test_equals_float64(
    path: str, shape: tuple[int, int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch":
        monkeypatch.setattr(head_products, "_native", lambda: None)
    matrices, x = draw(*shape, tokens=15)
    if exact:
        matrices = matrices.bfloat16().float()
    packed = HeadMatrices.pack(matrices)
    assert (packed.weights.dtype is torch.bfloat16) == exact
    found = packed(x)
    wanted = torch.einsum("thi,hio->tho", x.double(), matrices.double())
    sizes = torch.einsum("thi,hio->tho", x.double().abs(), matrices.double().abs())
    assert found.shape == wanted.shape and found.dtype is torch.float32
    assert ((found - wanted).abs() <= 4e-7 * shape[1] ** 0.5 * sizes + 1e-30).all()


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_alone_and_in_threads(shape: tuple[int, int, int]) -> None:
    matrices, x = draw(*shape, tokens=29)
    packed = HeadMatrices.pack(matrices)
    together = packed(x)
    try:
        for threads in (1, 2):
            native.set_threads(threads)
            for first, end in ((0, 1), (1, 3), (3, 8), (8, 29), (0, 29)):
                assert packed(x[first:end]).equal(together[first:end])
    finally:
        native.set_threads(2)


def test_reads_and_writes_views() -> None:
    matrices, x = draw(3, 20, 37, tokens=8)
    packed = HeadMatrices.pack(matrices)
    wide, target = torch.cat([x, x], 2), torch.full((8, 3, 50), 7.0)
    result = packed(wide[..., :20], out=target[..., 4:41])
    assert result.equal(packed(x)) and result.data_ptr() == target[0, 0, 4:].data_ptr()
    assert (target[..., :4] == 7).all() and (target[..., 41:] == 7).all()
    assert packed(x.double()).dtype is torch.float64
    assert packed(x[:0]).shape == (0, 3, 37)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 37), (3, 16, 15), (1, 33, 70)])
def test_nothing_past_the_end_is_touched(shape: tuple[int, int, int], exact: bool) -> None:
    heads, inputs, outputs = shape
    for tokens in range(1, 12):
        matrices, x = draw(*shape, tokens=tokens)
        packed = HeadMatrices.pack(matrices.bfloat16().float() if exact else matrices)
        guarded = HeadMatrices(at_guard_page(packed.weights), packed.outputs)
        wide = rows_at_guard_page(x.flatten(1), heads * inputs + 3).view(x.shape)
        out = rows_at_guard_page(torch.zeros(tokens, heads * outputs), heads * outputs + 5)
        assert guarded(wide, out=out.view(tokens, heads, outputs)).equal(packed(x))
        between = out.as_strided(
            (tokens - 1, 5), (heads * outputs + 5, 1), out.storage_offset() + out.shape[1]
        )
        assert between.isnan().all(), "what lies between two rows of the output is not its"


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_tokens_past_two_to_the_31() -> None:
    matrices, x = draw(2, 20, 37, tokens=3)
    packed = HeadMatrices.pack(matrices)
    out = far_apart(torch.full((3, 2, 37), torch.nan))
    assert packed(far_apart(x), out=out).equal(packed(x))


def test_a_result_of_another_shape_is_not_written() -> None:
    matrices, out = HeadMatrices.pack(torch.ones(2, 16, 40)), torch.zeros(3, 2, 32)
    with pytest.raises(AssertionError):
        matrices(torch.ones(3, 2, 16), out)
    assert not out.any()
