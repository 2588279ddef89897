"""gpu_trellis: trellises of every width and code book beside their definition.

Outputs are NaN before a call and wider than the result. x is float16 between the transforms, 2^-12 of each
number, and the definition's weights are float16, rounded once more: both are far below bfloat16's own 2^-9.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import canonical, trellis
from gpu.coded_products import error, inputs
from lowbit.errors import LowbitError
from lowbit.kernels import choose
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.linear import GpuBlocks
from lowbit.kernels.gpu.programs import Cut
from lowbit.kernels.gpu.trellis import GpuTrellis
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme
from lowbit.numerics.trellis import MULTIPLIERS

KERNEL = GpuTrellis()
KINDS = [(bits, "mcg") for bits in range(1, 9)] + [(2, "3inst"), (4, "mul1")]


@pytest.mark.parametrize(("bits", "book"), KINDS)
def test_unpack_restore_and_rows(bits: int, book: str, device: torch.device) -> None:
    weight = trellis(bits, book, (256, 128))
    packed = KERNEL.pack(weight, device)
    assert packed.nbytes == KERNEL.nbytes(weight.scheme, weight.shape)
    again = KERNEL.unpack(KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test"))
    assert torch.equal(again.codes.cpu(), weight.codes)
    for one, other in zip(again.scales, weight.scales, strict=True):
        assert torch.equal(one.cpu(), other)
    ids = torch.tensor([0, 255, 130], dtype=torch.int32, device=device)
    found, wanted = KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()]
    torch.testing.assert_close(found, wanted, rtol=2**-10, atol=float(wanted.abs().max()) * 1e-5)
    assert torch.equal(found, found.half().float())


@pytest.mark.parametrize("skip", [0, 100])
@pytest.mark.parametrize("tokens", [1, 3])
def test_sizes_that_128_does_not_divide(tokens: int, skip: int, device: torch.device) -> None:
    """In whole blocks, of the first of which some rows may be another rank's."""
    weight = trellis(3, "mcg", (130, 200), skip)
    assert weight.codes.shape[0] == 256
    assert error(KERNEL, weight, inputs(tokens, 200), device) < 2**-12
    packed = KERNEL.pack(weight, device)
    assert packed.nbytes == KERNEL.nbytes(weight.scheme, weight.shape)
    again = KERNEL.unpack(KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test"))
    assert torch.equal(again.codes.cpu(), weight.codes)
    ids = torch.tensor([0, 129, 28], dtype=torch.int32, device=device)
    found, wanted = KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()]
    torch.testing.assert_close(found, wanted, rtol=2**-10, atol=float(wanted.abs().max()) * 1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("bits", "book"), KINDS)
def test_a_few_tokens(bits: int, book: str, tokens: int, device: torch.device) -> None:
    assert error(KERNEL, trellis(bits, book, (128, 128)), inputs(tokens, 128), device) < 2**-12


@pytest.mark.slow
@pytest.mark.parametrize("book", MULTIPLIERS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
def test_any_number_of_tokens(tokens: int, bits: int, book: str, device: torch.device) -> None:
    assert error(KERNEL, trellis(bits, book, (256, 384)), inputs(tokens, 384), device) < 2**-12


@pytest.mark.parametrize("tokens", [17, 64, 130])
def test_more_tokens(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, trellis(3, "mcg", (128, 128)), inputs(tokens, 128), device) < 2**-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_other_types_of_x(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    assert error(KERNEL, trellis(4, "mcg"), inputs(tokens, 256, dtype), device) < 2**-12
    packed = KERNEL.pack(trellis(4, "mcg"), device)
    assert KERNEL.linear(inputs(tokens, 256, dtype).to(device), packed).dtype is dtype


@pytest.mark.parametrize("tokens", [1, 3])
def test_inputs_beyond_float16(tokens: int, device: torch.device) -> None:
    """Some columns of a token a million times the others, and all of it past float16's largest number."""
    x = inputs(tokens, 256).clone()
    x[:, 5] *= 1e6
    assert error(KERNEL, trellis(4, "mcg"), x, device) < 2**-12
    assert error(KERNEL, trellis(4, "mcg"), x * 1e20, device) < 2**-12
    assert error(KERNEL, trellis(4, "mcg"), x * 1e-20, device) < 2**-12


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")
@pytest.mark.parametrize("tokens", [1, 2])
def test_faults_end_their_own_row(tokens: int, device: torch.device) -> None:
    packed, x = KERNEL.pack(trellis(4, "mcg"), device), inputs(tokens + 2, 256).clone().to(device)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    found = KERNEL.linear(x, packed)
    assert not found[:2].isfinite().any() and found[2:].isfinite().all()
    torch.testing.assert_close(found[2:], KERNEL.linear(x[2:], packed), rtol=2**-6, atol=2**-8)
    assert not KERNEL.linear(x[:1], packed).isfinite().any()
    assert (KERNEL.linear(torch.zeros_like(x), packed) == 0).all()


@pytest.mark.parametrize(("tokens", "height"), [(1, 64), (1, 16), (3, 32), (70, 64)])
def test_heights_and_splits(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.gpu_kernel.cut", lambda *_: Cut(height, 2, 2))
    weight = trellis(4, "mcg", (128, 384))
    assert error(KERNEL, weight, inputs(tokens, 384), device) < 2**-12
    packed, x = KERNEL.pack(weight, device), inputs(tokens, 384).to(device)
    assert torch.equal(KERNEL.linear(x, packed), KERNEL.linear(x, packed))


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    packed = KERNEL.pack(trellis(2, "mcg"), device)
    assert KERNEL.linear(torch.empty(0, 256, device=device), packed).shape == (0, 128)
    assert KERNEL.rows(packed, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 256)
    with pytest.raises(LowbitError, match="255 columns, weight 256"):
        KERNEL.linear(torch.ones(1, 255, device=device), packed)


def test_refusals_and_damage(device: torch.device) -> None:
    weight = trellis(2, "mcg")
    scheme = weight.scheme
    assert choose(scheme, weight.shape, device).kernel.name == "gpu_trellis"
    assert "no packed form" in str(GpuBlocks().refuses(scheme, weight.shape, device))
    blocks = canonical("int4", 32).scheme
    assert KERNEL.refuses(blocks, (37, 256), device) == "weights are no trellis"
    assert KERNEL.refuses(scheme, (100, 192), device) is None, "blocks are padded"
    assert "experts" in str(KERNEL.refuses(scheme, (2, 128, 128), device))
    bfloat = replace(scheme, scales=(number_format("bf16"),) * 2)
    assert "needs a float16 scale" in str(KERNEL.refuses(bfloat, weight.shape, device))
    quantized = replace(scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "quantizes its input" in str(KERNEL.refuses(quantized, weight.shape, device))
    packed = KERNEL.pack(weight, device)
    for name in packed.buffers:
        damaged = packed.buffers | {name: packed.buffers[name][:, :0]}
        with pytest.raises(ValueError, match=rf"^test: no {name} of torch"):
            KERNEL.restore(scheme, weight.shape, damaged, "test")
    runtime._state["interpreting"] = False
    if device.type == "cpu":
        assert KERNEL.refuses(scheme, weight.shape, device) == "needs an NVIDIA GPU, got cpu"
