"""cpu_columns: what it takes and refuses, buffers it is restored from, steps, and every width of HQQ's codes.

Its products are in contract/test_linear_kernels.py, with those of all kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import CPU, by_columns, canonical, in_tiles, needs_native, rounded
from lowbit.errors import LowbitError
from lowbit.kernels import choose, native
from lowbit.kernels.cpu_columns import ColumnsWeight, CpuColumns
from lowbit.kernels.prompt_rows import prompt_rows, rounding
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.layers.linear import Linear
from lowbit.loading.self_check import check_packed
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import ActivationScheme

pytestmark = [needs_native, pytest.mark.usefixtures("poisoned")]
KERNEL = CpuColumns()


def refusal(weight: QuantizedTensor) -> str:
    return str(KERNEL.refuses(weight.scheme, weight.shape, CPU))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("height", [0, 16, 24])
def test_every_width(bits: int, height: int) -> None:
    """72 rows and 100 columns; rows of a group apart where there are several groups. One token and 70."""
    weight = by_columns(f"uint{bits}", height, shape=(72, 100), apart=height > 0)
    assert choose(weight.scheme, weight.shape, CPU).kernel.name == "cpu_columns"
    packed = KERNEL.pack(weight, CPU)
    check_packed(weight, packed)
    x = torch.randn(70, 100, generator=torch.Generator().manual_seed(bits))
    expected, scale = rounded(weight, packed, x)
    together = KERNEL.linear(x, packed)
    assert ((together.double() - expected).abs() / scale.clamp(min=1e-30)).max() < 3e-6
    for row in (0, 63, 69):
        assert torch.equal(KERNEL.linear(x[row : row + 1], packed)[0], together[row])


def test_inputs_are_as_exact_as_other_kernels() -> None:
    """Beside x in bfloat16 under a weight without columns' scales: the same number of roundings."""
    weight = by_columns("uint4", 16, "f32", shape=(64, 1024), apart=True)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(1))
    exact = weight.dequantize().double()
    wanted = x.double() @ exact.T
    found = KERNEL.linear(x, KERNEL.pack(weight, CPU)).double()
    plain = x.bfloat16().double() @ exact.T
    assert (found - wanted).norm() < 1.3 * (plain - wanted).norm()


def test_a_wide_input_is_laid_out_for_fewer_tokens_at_a_time() -> None:
    weight = by_columns("uint4", 16, shape=(32, 8224), apart=True)
    packed = KERNEL.pack(weight, CPU)
    x = torch.randn(130, 8224, generator=torch.Generator().manual_seed(1))
    together = KERNEL.linear(x, packed)
    expected, scale = rounded(weight, packed, x)
    assert ((together.double() - expected).abs() / scale).max() < 3e-6
    for tokens in (1, 15, 16, 17, 33, 65):
        assert torch.equal(KERNEL.linear(x[:tokens], packed), together[:tokens])


def test_threads_share_one_group_and_many() -> None:
    for weight in (
        by_columns("uint4", 0, shape=(700, 96)),
        by_columns("uint4", 16, shape=(704, 96), apart=True),
        by_columns("uint4", 304, shape=(700, 96)),
    ):
        packed = KERNEL.pack(weight, CPU)
        x = torch.randn(67, 96, generator=torch.Generator().manual_seed(1))
        try:
            native.set_threads(1)
            alone = KERNEL.linear(x, packed)
            for threads in (2, 5):
                native.set_threads(threads)
                assert torch.equal(KERNEL.linear(x, packed), alone)
                assert torch.equal(KERNEL.linear(x[:1], packed), alone[:1])
        finally:
            native.set_threads(2)


def test_faults_end_their_own_row() -> None:
    weight = by_columns("uint4", 16, shape=(48, 96), apart=True)
    packed = KERNEL.pack(weight, CPU)
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    clean = KERNEL.linear(x, packed)
    for fault in (float("nan"), float("inf")):
        bad = x.clone()
        bad[3, 90] = fault
        found = KERNEL.linear(bad, packed)
        rest = [row for row in range(9) if row != 3]
        assert not found[3].isfinite().any() and torch.equal(found[rest], clean[rest])


PROMPTED = {
    "all rows": lambda: by_columns("uint4", 0, shape=(72, 100)),
    "rows apart, no whole blocks": lambda: by_columns("uint3", 24, "f32", shape=(70, 300), apart=True),
    "neighbours": lambda: by_columns("uint8", 64, "bf16", shape=(250, 160)),
    "of 20 rows": lambda: by_columns("uint2", 20, shape=(70, 96)),
    "8-bit floats, no zero points": lambda: by_columns("e4m3", 16, zero=False, shape=(64, 96)),
    "tiles": lambda: in_tiles("uint4", 64, 48, (128, 256)),
}


@pytest.mark.skipif(not rounding("cpu"), reason="no kernel rounds here")
@pytest.mark.parametrize("name", PROMPTED)
def test_prompts_meet_weights_with_their_columns_scales(name: str) -> None:
    """Rounded as other weights are; a row in any company, on any number of threads, a NaN in its own row."""
    weight = PROMPTED[name]()
    packed = KERNEL.pack(weight, CPU)
    x = torch.randn(70, weight.shape[1], generator=torch.Generator().manual_seed(2))
    stored, wanted = KERNEL.linear(x, packed), x.double() @ weight.dequantize().double().T
    with prompt_rows(0, 70):
        found = KERNEL.linear(x, packed)
    off = float((found - wanted).norm() / wanted.norm())
    assert off < 4e-3 and not torch.equal(found, stored), off
    try:
        for threads in (1, 3):
            native.set_threads(threads)
            for count in (1, 15, 33):
                with prompt_rows(0, count):
                    assert torch.equal(KERNEL.linear(x[:count], packed), found[:count]), (threads, count)
            with prompt_rows(40, 70):
                assert torch.equal(KERNEL.linear(x, packed), torch.cat((stored[:40], found[40:]))), threads
    finally:
        native.set_threads(2)
    x[60, 3] = float("nan")
    with prompt_rows(0, 70):
        damaged = KERNEL.linear(x, packed)
    assert damaged[60].isnan().all() and torch.equal(damaged[61:], found[61:])


def test_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias and a gate, which follow in calls of their own."""
    monkeypatch.undo()  # poison is written by torch
    weight = by_columns("uint4", 16, shape=(64, 96), apart=True)
    layer = Linear("bench", [KERNEL.pack(weight, CPU)], torch.randn(64))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    recorder = Recorder(Arena(1 << 22))
    first, plan = recorder.record(lambda: layer.gated(x, "silu"))
    assert plan is not None, recorder.reason
    names = [operation.name for operation in plan.operations]
    assert names == ["linear_columns", "affine", "gated_activation"]
    first = first.clone()
    x.mul_(-0.5)
    assert torch.equal(plan.run(), layer.gated(x, "silu")) and not torch.equal(plan.run(), first)


def test_neighbours_become_one_weight() -> None:
    """Q, K and V of unlike heights: each keeps its groups. Whole columns stay apart."""
    parts = [by_columns("uint4", 16, shape=(rows, 96), apart=True) for rows in (64, 32, 16)]
    joined = concatenate(parts)
    assert joined is not None and joined.scheme == parts[0].scheme and refusal(joined) == "None"
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    each = torch.cat([KERNEL.linear(x, KERNEL.pack(part, CPU)) for part in parts], 1)
    assert torch.equal(KERNEL.linear(x, KERNEL.pack(joined, CPU)), each)
    whole = by_columns("uint4", 0, shape=(32, 96))
    assert concatenate([whole, whole]) is None


def test_groups_of_unlike_heights_and_none() -> None:
    """Rows that were picked: some groups keep one row, some 20, some none."""
    weight = by_columns("uint4", 16, shape=(96, 64), apart=True)
    order = torch.tensor([0, 6, 12, 5, *range(2, 96, 6), 2, 8, 14, 20])
    part = weight.permute_rows(order)
    assert part.row_groups is not None and part.row_groups.bincount(minlength=6).tolist() == [
        3,
        0,
        20,
        0,
        0,
        1,
    ]
    packed = KERNEL.pack(part, CPU)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected, scale = rounded(part, packed, x)
    assert ((KERNEL.linear(x, packed).double() - expected).abs() / scale.clamp(min=1e-30)).max() < 3e-6
    assert torch.equal(KERNEL.unpack(packed).dequantize(), part.dequantize())
    assert torch.equal(KERNEL.rows(packed, torch.arange(24)), part.dequantize())


def test_refusals() -> None:
    sound = by_columns("uint4", 16, shape=(64, 96), apart=True)
    assert refusal(sound) == "None"
    scheme = sound.scheme
    assert "column of several rows" in refusal(canonical("uint4", 32, zero=True))
    assert "column of several rows" in refusal(canonical("uint4", 1, zero=True))
    assert "offsets" in refusal(replace(sound, scheme=replace(scheme, zero="none", offset=True)))
    assert "act-order" in refusal(replace(sound, scheme=replace(scheme, reordered=True)))
    e8m0 = replace(sound, scheme=replace(scheme, scales=(number_format("e8m0"),)))
    assert "scales are e8m0" in refusal(e8m0)
    two = in_tiles("uint4", 32, 16).scheme
    three = replace(two, blocks=((1, 32), *two.blocks), scales=(two.scales[0], *two.scales))
    assert "3 levels" in str(KERNEL.refuses(three, (64, 96), CPU))
    assert "would take" in refusal(by_columns("uint8", 2, shape=(64, 96), apart=True))
    assert "2 levels" not in refusal(in_tiles("uint4", 32, 16))
    assert "experts" in str(KERNEL.refuses(scheme, (2, 64, 96), CPU))
    inputs = ActivationScheme(number_format("int8"), (1, 0))
    assert "quantizes its input" in str(KERNEL.refuses(replace(scheme, activation=inputs), (64, 96), CPU))
    assert "cuda" in str(KERNEL.refuses(scheme, (64, 96), torch.device("cuda")))
    other = choose(scheme, (64, 96), CPU)
    assert dict(other.refusals)["cpu_blocks"] == "the rows of a block lie apart"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("row_groups", lambda t: t[:-1], "no groups of 64 rows"),
        ("row_groups", lambda t: t + 1, "rows of other than 4 groups"),
        ("row_groups", lambda t: t - 1, "rows of other than 4 groups"),
        ("column_scale", lambda t: t[:, :-1], "column_scale is no torch.float16"),
        ("column_scale", lambda t: t.float(), "column_scale is no torch.float16"),
        ("column_zero", lambda t: t[:-1], "column_zero is no torch.float16"),
        ("data", lambda t: t[:-1], "packed bytes"),
    ],
)
def test_damaged_buffers(name: str, damage: object, words: str) -> None:
    weight = by_columns("uint4", 16, shape=(64, 96), apart=True)
    buffers = dict(KERNEL.pack(weight, CPU).buffers)
    buffers[name] = damage(buffers[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"^here: .*{words}"):
        KERNEL.restore(weight.scheme, weight.shape, buffers, "here")


def test_wrong_inputs_are_named() -> None:
    packed = KERNEL.pack(by_columns("uint4", 16, shape=(64, 96), apart=True), CPU)
    assert isinstance(packed, ColumnsWeight)
    with pytest.raises(LowbitError, match="95 columns, weight 96"):
        KERNEL.linear(torch.ones(1, 95), packed)
    for row in (64, -1):
        with pytest.raises(LowbitError, match=r"outside 0\.\.63"):
            KERNEL.rows(packed, torch.tensor([row]))
    assert KERNEL.rows(packed, torch.tensor([], dtype=torch.int32)).shape == (0, 96)
    assert KERNEL.linear(torch.empty(0, 96), packed).shape == (0, 64)
