"""gpu_vectors: codebooks of every length beside their definition.

Outputs are NaN before a call and wider than the result. For one token nothing is rounded but float32 x, to
float16; for more, sums of several codebooks are float16: of 24 bits and 12 with bfloat16 x.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical, vectors
from gpu.coded_products import inputs, no_tokens_and_no_rows, product
from lowbit.kernels import LinearKernel, choose
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.programs import Cut
from lowbit.kernels.gpu.vectors import GpuVectors
from lowbit.numerics.number_formats import number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor

KERNEL = GpuVectors()
KINDS = {
    "1x16 g8": lambda: vectors(1, 16, 8, shape=(37, 256)),
    "2x8 g8 bf16": lambda: vectors(2, 8, 8, "bf16", (37, 200)),
    "1x8 g8, one scale": lambda: vectors(1, 8, 8, "f32", (37, 136), rows=0),
    "3x10 g16 act-order": lambda: vectors(3, 10, 16, "f16", (37, 272), order=True),
    "1x5 g32": lambda: vectors(1, 5, 32, "f32", (37, 96)),
    "8x4 g4": lambda: vectors(8, 4, 4, "f16", (5, 68)),
    "1x12 g64": lambda: vectors(1, 12, 64, "bf16", (70, 192)),
    "1x12 g2x4": lambda: vectors(1, 12, 4, shape=(38, 136), height=2),
    "2x8 g3x8, one scale": lambda: vectors(2, 8, 8, "bf16", (39, 200), rows=0, height=3),
    "3x9 g16x2 act-order": lambda: vectors(3, 9, 2, "f16", (80, 70), order=True, height=16),
}


def error(kernel: LinearKernel, weight: QuantizedTensor, x: Tensor, device: torch.device) -> float:
    """The largest error of a product, in |x| @ |w|."""
    exact = weight.dequantize().double()
    scale = (x.double().abs() @ exact.abs().T).clamp(min=1e-30)
    return float(((product(kernel, weight, x, device) - x.double() @ exact.T).abs() / scale).max())


@pytest.mark.parametrize("name", KINDS)
def test_unpack_restore_and_rows(name: str, device: torch.device) -> None:
    weight = KINDS[name]()
    packed = KERNEL.pack(weight, device)
    uncounted = sum(
        packed.buffers[key].nbytes for key in ("codebooks", "column_order") if key in packed.buffers
    )
    assert packed.nbytes - uncounted == KERNEL.nbytes(weight.scheme, weight.shape)
    again = KERNEL.unpack(KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test"))
    assert torch.equal(again.codes.cpu(), weight.codes)
    assert torch.equal(again.dequantize().cpu(), weight.dequantize())
    ids = torch.tensor([0, weight.shape[0] - 1, 3, 3], dtype=torch.int32, device=device)
    assert torch.equal(KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_few_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-11
    if tokens == 1:
        assert error(KERNEL, weight, inputs(1, weight.shape[1]), device) < 1e-6


def test_one_codebook_of_float16_is_exact(device: torch.device) -> None:
    """Also where its numbers are float16's smallest and largest."""
    weight = KINDS["1x16 g8"]()
    assert weight.codebooks is not None
    for size in (1.0, 2.0**8, 2.0**-20):
        scaled = replace(weight, codebooks=weight.codebooks * size)
        assert error(KERNEL, scaled, inputs(3, 256), device) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < (1e-6 if tokens == 1 else 2**-11)


@pytest.mark.parametrize("tokens", [17, 64, 130])
def test_more_tokens(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, KINDS["1x16 g8"](), inputs(tokens, 256), device) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_other_types_of_x(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = KINDS["1x5 g32"]()
    x = inputs(tokens, 96, dtype) * (1.0 if dtype is torch.float16 else 1e12)
    assert error(KERNEL, weight, x, device) < 2**-11
    assert KERNEL.linear(x.to(device), KERNEL.pack(weight, device)).dtype is dtype


@pytest.mark.parametrize(("tokens", "height"), [(1, 64), (1, 16), (3, 32)])
def test_heights_and_splits(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.gpu_kernel.cut", lambda *_: Cut(height, 3, 2))
    weight = KINDS["3x10 g16 act-order"]()
    assert error(KERNEL, weight, inputs(tokens, 272), device) < 2**-11
    packed, x = KERNEL.pack(weight, device), inputs(tokens, 272).to(device)
    assert torch.equal(KERNEL.linear(x, packed), KERNEL.linear(x, packed))


def test_an_index_past_a_codebook_reads_no_other_memory(device: torch.device) -> None:
    weight = vectors(1, 5, 32, "f32", (37, 96))
    damaged = replace(weight, codes=weight.codes | 224)
    packed = KERNEL.pack(damaged, device)
    clamped = replace(weight, codes=torch.full_like(weight.codes, 31))
    x = inputs(2, 96).to(device)
    torch.testing.assert_close(KERNEL.linear(x, packed), KERNEL.linear(x, KERNEL.pack(clamped, device)))


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    no_tokens_and_no_rows(KERNEL, KINDS["1x5 g32"](), device)


def test_refusals_and_damage(device: torch.device) -> None:
    weight = KINDS["3x10 g16 act-order"]()
    scheme = weight.scheme
    assert choose(scheme, weight.shape, device).kernel.name == "gpu_vectors"
    assert KERNEL.refuses(canonical("int4", 32).scheme, (37, 256), device) == (
        "weights are no vectors of codebooks"
    )
    odd = replace(scheme, weight=vector_format(1, 8, 12))
    assert KERNEL.refuses(odd, (37, 240), device) == "1 codebooks of 8 bits and vectors of 12"
    assert "no whole vectors of 1 x 16" in str(KERNEL.refuses(scheme, (37, 264), device))
    tall = replace(scheme, weight=vector_format(1, 8, 8, 4), blocks=((4, 0),))
    assert KERNEL.refuses(tall, (40, 80), device) is None
    assert KERNEL.refuses(tall, (38, 80), device) == "38 x 80 are no whole vectors of 4 x 8"
    taller = replace(tall, weight=vector_format(1, 8, 8, 17))
    assert KERNEL.refuses(taller, (34, 80), device) == "vectors of 17 rows"
    by_rows = replace(tall, blocks=((1, 0),))
    assert "one scale for a vector's rows" in str(KERNEL.refuses(by_rows, (40, 80), device))
    grouped = replace(scheme, blocks=((1, 64),))
    assert "one scale for a vector's rows" in str(KERNEL.refuses(grouped, (37, 256), device))
    coarse = replace(scheme, scales=(number_format("e8m0"),))
    assert KERNEL.refuses(coarse, weight.shape, device) == "scales are e8m0"
    packed = KERNEL.pack(weight, device)
    for name in packed.buffers:
        damaged = packed.buffers | {name: packed.buffers[name][:0]}
        with pytest.raises(ValueError, match=rf"^test: no {name} of "):
            KERNEL.restore(scheme, weight.shape, damaged, "test")
    with pytest.raises(ValueError, match="no order of 272 columns"):
        twice = packed.buffers | {"column_order": torch.zeros(272, dtype=torch.int64, device=device)}
        KERNEL.restore(scheme, weight.shape, twice, "test")
    runtime._state["interpreting"] = False
    if device.type == "cpu":
        assert KERNEL.refuses(scheme, weight.shape, device) == "needs an NVIDIA GPU, got cpu"
