"""gpu_columns: scales of one column of several rows (HQQ, SINQ) beside their definition.

Zero points of columns are large beside codes, so errors are measured in |x| |w| of a row. One token meets
float32 arithmetic; of more x times a scale is float16, 2^-12 of each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import by_columns, canonical, in_tiles
from gpu.coded_products import error, inputs, no_tokens_and_no_rows
from lowbit.kernels import choose
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.columns import ColumnsWeight, GpuColumns
from lowbit.kernels.gpu.programs import Cut
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

KERNEL = GpuColumns()
KINDS = {
    "uint4 all rows": lambda: by_columns("uint4", 0, shape=(37, 80)),
    "uint3 16 rows bf16": lambda: by_columns("uint3", 16, "bf16", shape=(37, 200)),
    "uint8 13 rows apart": lambda: by_columns("uint8", 13, shape=(37, 72), apart=True),
    "uint1 32 rows apart f32": lambda: by_columns("uint1", 32, "f32", shape=(93, 136), apart=True),
    "int5 32 rows, no zero": lambda: by_columns("int5", 32, "bf16", zero=False, shape=(64, 48)),
    "nf4 16 rows, whole zero": lambda: canonical("nf4", 1, "f32", zero=True, shape=(37, 64), block_rows=16),
    "e4m3 20 rows": lambda: by_columns("e4m3", 20, zero=False, shape=(37, 64)),
    "uint4 tiles of 32 x 16": lambda: in_tiles("uint4", 32, 16, shape=(37, 64)),
    "uint2 tiles of 64 x 64": lambda: in_tiles("uint2", 64, 64, shape=(120, 192)),
}
UNITS = {
    "uint4 all rows": 16,
    "uint1 32 rows apart f32": 32,
    "int5 32 rows, no zero": 32,
    "uint2 tiles of 64 x 64": 64,
}


@pytest.mark.parametrize("name", KINDS)
def test_unpack_restore_and_rows(name: str, device: torch.device) -> None:
    weight = KINDS[name]()
    packed = KERNEL.pack(weight, device)
    uncounted = [packed.buffers[key].nbytes for key in ("row_groups", "table") if key in packed.buffers]
    assert packed.nbytes - sum(uncounted) == KERNEL.nbytes(weight.scheme, weight.shape)
    packed = KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test")
    assert isinstance(packed, ColumnsWeight) and packed.groups.unit == UNITS.get(name, packed.groups.unit)
    again = KERNEL.unpack(packed)
    assert again.scheme == weight.scheme and torch.equal(again.codes.cpu(), weight.codes)
    assert torch.equal(again.dequantize().cpu(), weight.dequantize())
    ids = torch.tensor([0, weight.shape[0] - 1, 3, 3], dtype=torch.int32, device=device)
    found, wanted = KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()]
    # Two scales are multiplied one after the other here, beforehand there.
    torch.testing.assert_close(found, wanted, rtol=1e-6 if len(weight.scales) > 1 else 0, atol=0)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_few_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    limit = 1e-6 if tokens == 1 else 2**-12
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < limit


@pytest.mark.parametrize("tokens", [17, 130])
def test_more_tokens(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, KINDS["uint8 13 rows apart"](), inputs(tokens, 72), device) < 2**-12


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_of_x(dtype: torch.dtype, device: torch.device) -> None:
    weight = KINDS["uint4 all rows"]()
    for tokens in (1, 2):
        assert error(KERNEL, weight, inputs(tokens, 80, dtype), device) < 2**-12
    assert KERNEL.linear(inputs(2, 80, dtype).to(device), KERNEL.pack(weight, device)).dtype is dtype


@pytest.mark.parametrize(("tokens", "height"), [(1, 32), (1, 16), (3, 32), (3, 16)])
def test_heights_and_splits(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.gpu_kernel.cut", lambda *_: Cut(height, 2, 1))
    weight = KINDS["uint1 32 rows apart f32"]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 2**-12


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_scales_far_from_one(scale: float, device: torch.device) -> None:
    """Their products with x are no float16's without a factor."""
    weight = KINDS["nf4 16 rows, whole zero"]()
    weight = replace(weight, scales=(weight.scales[0] * scale,))
    assert error(KERNEL, weight, inputs(3, 64), device) < 2**-12


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    no_tokens_and_no_rows(KERNEL, KINDS["uint4 all rows"](), device)


def test_refusals_and_damage(device: torch.device) -> None:
    weight = KINDS["uint8 13 rows apart"]()
    scheme, shape = weight.scheme, weight.shape
    assert choose(scheme, shape, device).kernel.name == "gpu_columns"
    two = in_tiles("uint4", 32, 16)
    assert choose(two.scheme, two.shape, device).kernel.name == "gpu_columns"
    assert "no scale is that of a column" in str(
        KERNEL.refuses(canonical("int4", 32).scheme, (37, 256), device)
    )
    assert "beside offsets" in str(KERNEL.refuses(replace(scheme, offset=True), shape, device))
    narrow = in_tiles("uint4", 8, 16)
    assert "multiple of 16 columns, got 8" in str(KERNEL.refuses(narrow.scheme, narrow.shape, device))
    quantized = replace(scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "quantizes its input" in str(KERNEL.refuses(quantized, shape, device))
    packed = KERNEL.pack(weight, device)

    def damaged(name: str, buffer: torch.Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            KERNEL.restore(scheme, shape, packed.buffers | {name: buffer}, "test")

    damaged("column_scale", packed.buffers["column_scale"][:, :0], r"^test: no column_scale of torch")
    damaged("column_zero", packed.buffers["column_zero"][:-1], r"^test: no column_zero of torch")
    damaged("codes", packed.buffers["codes"][:-1], r"^test: codes has \d+ numbers instead of")
    damaged("row_groups", packed.buffers["row_groups"][:-1], "^test: no groups of 37 rows")
    damaged("row_groups", packed.buffers["row_groups"] + 1, "^test: rows of other than 3 groups")
    whole = KERNEL.pack(KINDS["uint4 all rows"](), device)
    twice = {name: whole.buffers[name].repeat(2, 1) for name in ("column_scale", "column_zero")}
    with pytest.raises(ValueError, match="^test: 2 groups of 37 rows, 37 each"):
        KERNEL.restore(whole.scheme, whole.shape, whole.buffers | twice, "test")
    runtime._state["interpreting"] = False
    if device.type == "cpu":
        assert KERNEL.refuses(scheme, shape, device) == "needs an NVIDIA GPU, got cpu"
