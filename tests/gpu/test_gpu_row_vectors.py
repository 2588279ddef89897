"""gpu_row_vectors: vectors that run down a column beside their definition; what its launches share with
``gpu_vectors`` is tried there.

Offsets of columns are large beside what they are added to, so errors are measured in |x| |w| of a row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import canonical, row_vectors
from gpu.coded_products import error, inputs, no_tokens_and_no_rows
from lowbit.kernels import choose
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.programs import Cut
from lowbit.kernels.gpu.row_vectors import GpuRowVectors
from lowbit.numerics.number_formats import RowVectorLayout, number_format

KERNEL = GpuRowVectors()
KINDS = {
    "8 rows, 65536": lambda: row_vectors(8, 65536, shape=(37, 200)),
    "8 rows, 256 + 16, scales": lambda: row_vectors(8, 256, 16, shape=(37, 192), scale="f16"),
    "12 rows, 4096 + 300 bf16, order": lambda: row_vectors(
        12, 4096, 300, "bf16", (40, 130), scale="bf16", order=True
    ),
    "6 rows, outliers, 3 books": lambda: row_vectors(
        6, 64, shape=(37, 216), books=3, outliers=6, scale="f32", order=True
    ),
    "2 rows, outliers": lambda: row_vectors(2, 300, shape=(9, 72), outliers=8),
    "16 rows f32": lambda: row_vectors(16, 100, 1000, "f32", (70, 96)),
    "3 rows": lambda: row_vectors(3, 32, 32, shape=(20, 64), scale="f16"),
}


@pytest.mark.parametrize("name", KINDS)
def test_unpack_restore_and_rows(name: str, device: torch.device) -> None:
    weight = KINDS[name]()
    packed = KERNEL.pack(weight, device)
    uncounted = [packed.buffers[key].nbytes for key in ("codebooks", "column_order") if key in packed.buffers]
    assert packed.nbytes - sum(uncounted) == KERNEL.nbytes(weight.scheme, weight.shape)
    again = KERNEL.unpack(KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test"))
    assert torch.equal(again.codes.cpu(), weight.codes)
    assert torch.equal(again.dequantize().cpu(), weight.dequantize())
    ids = torch.tensor([0, weight.shape[0] - 1, 3, 3], dtype=torch.int32, device=device)
    found, wanted = KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()]
    # A GPU may add an offset without rounding the product.
    torch.testing.assert_close(found, wanted, rtol=0 if device.type == "cpu" else 1e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_few_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-12


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-12


@pytest.mark.parametrize("tokens", [17, 130])
def test_more_tokens(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, KINDS["6 rows, outliers, 3 books"](), inputs(tokens, 216), device) < 2**-12


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_codebook_of_float16_is_exact(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, KINDS["8 rows, 65536"](), inputs(tokens, 200), device) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_of_x(dtype: torch.dtype, device: torch.device) -> None:
    weight = KINDS["6 rows, outliers, 3 books"]()
    assert error(KERNEL, weight, inputs(2, 216, dtype), device) < 2**-12
    assert KERNEL.linear(inputs(2, 216, dtype).to(device), KERNEL.pack(weight, device)).dtype is dtype


@pytest.mark.parametrize(("tokens", "height"), [(1, 64), (1, 16), (3, 32)])
def test_heights_and_splits(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.gpu_kernel.cut", lambda *_: Cut(height, 3, 2))
    for name in ("6 rows, outliers, 3 books", "16 rows f32"):
        weight = KINDS[name]()
        assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-12


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    no_tokens_and_no_rows(KERNEL, KINDS["3 rows"](), device)


def test_refusals_and_damage(device: torch.device) -> None:
    weight = KINDS["6 rows, outliers, 3 books"]()
    scheme = weight.scheme
    assert choose(scheme, weight.shape, device).kernel.name == "gpu_row_vectors"
    other = canonical("int4", 32).scheme
    assert KERNEL.refuses(other, (37, 256), device) == "weights are no vectors of rows"

    def reason(layout: RowVectorLayout) -> str | None:
        return KERNEL.refuses(replace(scheme, weight=number_format(layout.name)), (37, 216), device)

    assert reason(RowVectorLayout(17, 64)) == "vectors of 17 rows"
    assert reason(RowVectorLayout(8, 65537)) == "codebooks of 65537 vectors"
    assert reason(RowVectorLayout(8, 64, books=2, width=100)) == "216 columns of 200"
    assert "one scale for all rows" in str(
        KERNEL.refuses(replace(scheme, blocks=((1, 0),)), (37, 216), device)
    )
    packed = KERNEL.pack(weight, device)
    for name in packed.buffers:
        damaged = packed.buffers | {name: packed.buffers[name][:0]}
        with pytest.raises(ValueError, match=rf"^test: no {name} of "):
            KERNEL.restore(scheme, weight.shape, damaged, "test")
    with pytest.raises(ValueError, match="no order of 216 columns"):
        twice = packed.buffers | {"column_order": torch.zeros(216, dtype=torch.int64, device=device)}
        KERNEL.restore(scheme, weight.shape, twice, "test")
    runtime._state["interpreting"] = False
    if device.type == "cpu":
        assert KERNEL.refuses(scheme, weight.shape, device) == "needs an NVIDIA GPU, got cpu"
