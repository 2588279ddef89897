"""Trellises: how such weights are cut, and what the pieces mean. Values: formats/test_exl3.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.numerics.cutting import column_unit, cut_columns, cut_rows, parted_scheme, row_unit
from lowbit.numerics.number_formats import number_format, trellis_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import MULTIPLIERS, TrellisLayout

OUT, IN = 384, 256
HALF = number_format("f16")


def weight_of(bits: int = 3, book: str = "mcg") -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    fmt = trellis_format(bits, book)
    assert fmt.trellis is not None
    tiles = torch.randint(-32768, 32768, (IN // 16, OUT // 16, 16 * bits), generator=generator).short()
    return QuantizedTensor(
        Scheme(fmt, ((1, 0), (0, 1)), (HALF, HALF)),
        (OUT, IN),
        fmt.trellis.codes(tiles),
        (torch.rand(OUT, 1, generator=generator).half(), torch.rand(1, IN, generator=generator).half()),
        origin="test",
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_tiles_in_rows(bits: int) -> None:
    weight = weight_of(bits)
    layout = weight.scheme.weight.trellis
    assert layout is not None and weight.codes.shape == (OUT, IN // 16 * 2 * bits)
    tiles = layout.tiles(weight.codes)
    assert tiles.shape == (IN // 16, OUT // 16, 16 * bits) and torch.equal(layout.codes(tiles), weight.codes)
    piece = weight.codes[16:32, 2 * bits : 4 * bits].contiguous().view(torch.int16).flatten()
    assert torch.equal(piece, tiles[1, 1])


def test_blocks_of_rows_and_columns_are_those_of_the_matrix() -> None:
    weight = weight_of()
    whole = weight.dequantize()
    assert column_unit(weight.scheme, IN) == row_unit(weight.scheme) == 128
    # Sums of float32 may be made in another order in another shape: a last bit of float16.
    near = {"rtol": 2.0**-10, "atol": 1e-6}
    torch.testing.assert_close(cut_columns(weight, 128, 256).dequantize(), whole[:, 128:], **near)
    torch.testing.assert_close(weight.rows(128, 384).dequantize(), whole[128:], **near)
    runs = [(0, 128), (256, 384)]
    cut = cut_rows(weight, runs)
    assert cut.scheme == weight.scheme == parted_scheme(weight.scheme, weight.shape, runs)
    torch.testing.assert_close(cut.dequantize(), torch.cat([whole[:128], whole[256:]]), **near)
    with pytest.raises(LowbitError, match="cut a group of 128"):
        cut_columns(weight, 16, 256)
    with pytest.raises(LowbitError, match="cannot reorder"):
        weight.permute_rows(torch.arange(OUT))
    assert concatenate([weight, weight]) is None, "each has scales of its own for all columns"


def test_rows_that_end_inside_a_block_lie_in_whole_ones() -> None:
    weight = weight_of()
    whole, near = weight.dequantize(), {"rtol": 2.0**-10, "atol": 1e-6}
    part = weight.rows(100, 140)
    assert part.scheme.weight.name == "trellis3_mcg_from100" and part.codes.shape[0] == 256
    torch.testing.assert_close(part.dequantize(), whole[100:140], **near)
    again = part.rows(10, 40)
    assert again.scheme.weight.name == "trellis3_mcg_from110" and again.codes.shape[0] == 256
    torch.testing.assert_close(again.dequantize(), whole[110:140], **near)
    assert part.rows(28, 40).scheme == weight.scheme and part.rows(28, 40).codes.shape[0] == 128
    torch.testing.assert_close(part.rows(28, 40).dequantize(), whole[128:140], **near)
    assert cut_rows(weight, [(100, 140)]).scheme == part.scheme
    assert parted_scheme(weight.scheme, weight.shape, [(100, 140)]) == part.scheme
    assert part.nbytes == 256 * IN * 3 // 8 + 2 * (256 + IN)
    cut = cut_rows(part, [(0, 20), (30, 40)])
    assert cut.scheme == parted_scheme(part.scheme, part.shape, [(0, 20), (30, 40)]) == part.scheme.decoded
    torch.testing.assert_close(cut.dequantize(), torch.cat([whole[100:120], whole[130:140]]), **near)


def test_sizes_that_128_does_not_divide() -> None:
    """Codes and scales of whole blocks; what lies behind the weight's own is in none of its parts."""
    whole = weight_of()
    weight = replace(whole, shape=(OUT - 50, IN - 30))
    matrix, near = weight.dequantize(), {"rtol": 2.0**-10, "atol": 1e-6}
    torch.testing.assert_close(matrix, whole.dequantize()[: OUT - 50, : IN - 30], **near)
    assert weight.nbytes == whole.nbytes
    last = cut_columns(weight, 128, IN - 30)
    assert last.shape == (OUT - 50, IN - 158) and last.scales[1].shape == (1, IN - 128)
    torch.testing.assert_close(last.dequantize(), matrix[:, 128:], **near)
    torch.testing.assert_close(cut_columns(weight, 0, 128).dequantize(), matrix[:, :128], **near)
    torch.testing.assert_close(weight.rows(128, OUT - 50).dequantize(), matrix[128:], **near)
    runs = [(0, 128), (256, OUT - 50)]
    cut = cut_rows(weight, runs)
    assert cut.scheme == weight.scheme == parted_scheme(weight.scheme, weight.shape, runs)
    torch.testing.assert_close(cut.dequantize(), torch.cat([matrix[:128], matrix[256:]]), **near)
    decoded = weight.decoded(weight.scheme.decoded)
    assert decoded.shape == weight.shape
    torch.testing.assert_close(decoded.dequantize(), matrix, **near)


def test_several_runs_inside_blocks_are_floats() -> None:
    weight = weight_of()
    whole, near = weight.dequantize(), {"rtol": 2.0**-10, "atol": 1e-6}
    runs = [(0, 64), (128, 192)]
    cut = cut_rows(weight, runs)
    assert cut.scheme == parted_scheme(weight.scheme, weight.shape, runs)
    assert cut.scheme.weight.name == "f16" and cut.codes.dtype == torch.float16
    torch.testing.assert_close(cut.dequantize(), torch.cat([whole[:64], whole[128:192]]), **near)


def test_names_and_sizes() -> None:
    weight = weight_of(4, "mul1")
    assert str(weight.scheme) == "trellis4_mul1 1xall f16 allx1 f16"
    assert weight.nbytes == OUT * IN // 2 + 2 * (OUT + IN)
    for book in MULTIPLIERS:
        assert number_format(f"trellis2_{book}").trellis == TrellisLayout(2, book)
    assert number_format("trellis2_mcg_from127").trellis == TrellisLayout(2, "mcg", 127)
    others = ("trellis4_mcg_from0", "trellis4_mcg_from128", "trellis4_mcg_from01")
    for name in ("trellis0_mcg", "trellis9_mcg", "trellis4", "trellis4_other", *others):
        with pytest.raises(LowbitError, match="unknown number format"):
            number_format(name)
