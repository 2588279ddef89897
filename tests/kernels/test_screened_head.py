"""A screened output head beside the whole one: the same first largest logits, to the bit, whatever x is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.kernels.elementwise import affine, softcap
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_layer import NativeLayer
from lowbit.kernels.row_peaks import row_peaks
from lowbit.kernels.screened_head import ScreenedHead, make_screen, nbytes, refuses
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

pytestmark = pytest.mark.skipif(native.library() is None, reason="there are no screens without native code")
CPU = torch.device("cpu")
ROWS, COLUMNS = 1003, 96  # no whole number of blocks
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def packed(matrix: Tensor, kind: str = "bf16") -> PackedWeight:
    weight = QuantizedTensor(dense(kind), tuple(matrix.shape), matrix.to(TYPES[kind]))
    return CpuDense().pack(weight, CPU)


def random_matrix(seed: int = 3, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@dataclass
class Both:
    """A head as it is, and with its screen."""

    whole: NativeLayer
    screened: ScreenedHead

    @staticmethod
    def of(head: PackedWeight, bias: Tensor | None = None, scale: float = 1.0, cap: float = 0.0) -> Both:
        screen = make_screen(head)
        assert screen is not None and screen.nbytes >= nbytes(head.shape)
        whole, screened = (
            NativeLayer.of(head, None, bias),
            ScreenedHead.of(head, bias, screen, scale=scale, cap=cap),
        )
        assert whole is not None and screened is not None
        return Both(whole, screened)

    def finished(self, logits: Tensor) -> Tensor:
        """What a model does with all logits."""
        described = self.screened.description
        if described.scale != 1:
            logits = affine(logits, number=described.scale, out=logits)
        return softcap(logits, described.cap) if described.cap else logits

    def check(self, x: Tensor) -> Tensor:
        """Peaks and their places are equal; so are all logits but those left out. The whole ones."""
        self.screened.description.rest = 0
        expected, found = self.whole(x), self.screened(x)
        left_out = found.isneginf() & ~expected.isneginf()
        torch.testing.assert_close(found[~left_out], expected[~left_out], rtol=0, atol=0, equal_nan=True)
        expected, found = self.finished(expected), self.finished(found)
        (peaks, places), (ours, here) = row_peaks(expected), row_peaks(found)
        numbers = [n for n, peak in enumerate(peaks) if not math.isnan(peak)]
        assert [ours[n] for n in numbers] == [peaks[n] for n in numbers]
        assert [here[n] for n in numbers] == [places[n] for n in numbers]
        assert [math.isnan(peak) for peak in ours] == [math.isnan(peak) for peak in peaks]
        return expected

    def blocks_for(self, x: Tensor) -> int:
        """Blocks of the head that x makes it read; -1: all, for the screen does not hold or is of no use."""
        steps, blocks, _ = self.screened.steps
        self.check(x)
        return self.screened.steps[1] - blocks if self.screened.steps[0] > steps else -1


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
@pytest.mark.parametrize("kind", TYPES)
def test_a_few_blocks_are_read(kind: str, tokens: int) -> None:
    """x near rows of the matrix, one coordinate a hundred times the others, as hidden states have it."""
    matrix = random_matrix()
    both = Both.of(packed(matrix, kind))
    x = matrix[torch.arange(tokens) * 37] * 20 + random_matrix(5, tokens)
    assert tokens <= both.blocks_for(x) <= 8 * tokens
    x[:, 7] = 100.0
    both.check(x)
    wide = torch.randn(tokens, COLUMNS + 3)[:, :COLUMNS]  # a stride of its own
    both.check(wide)


def test_ties_and_what_is_nearly_one() -> None:
    """Of equal rows the first; rows that differ by a last bit of one number, in every order."""
    matrix = random_matrix().bfloat16()
    draw = torch.Generator().manual_seed(1)
    places = torch.randperm(ROWS, generator=draw)[:80]
    near = matrix[places[0]].repeat(80, 1)
    near.view(torch.int16)[torch.arange(80), torch.randint(COLUMNS, (80,), generator=draw)] += torch.randint(
        -1, 2, (80,), generator=draw
    ).short()
    matrix[places] = near
    matrix[[900, 411, 640]] = matrix[5].clone()
    both = Both.of(packed(matrix))
    assert both.blocks_for(matrix[5:6].float() * 50) >= 4
    for scale in (1e-6, 1.0, 333.3):
        x = matrix[places[:6]].float() * scale + torch.randn(6, COLUMNS, generator=draw) * 1e-3 * scale
        both.check(x)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(1, COLUMNS), id="zero"),
        pytest.param(torch.full((1, COLUMNS), 1e-42), id="subnormal"),
        pytest.param(torch.full((1, COLUMNS), 1e-20), id="tiny"),
        pytest.param(torch.full((1, COLUMNS), 3e38), id="huge"),
        pytest.param(torch.eye(1, COLUMNS) * math.inf, id="infinite"),
        pytest.param(torch.eye(1, COLUMNS) * -math.inf, id="minus infinite"),
        pytest.param(torch.eye(1, COLUMNS) * math.nan, id="nan"),
    ],
)
def test_where_bounds_do_not_hold_all_is_read(x: Tensor) -> None:
    matrix = random_matrix()
    both = Both.of(packed(matrix))
    assert both.blocks_for(x) == -1
    assert both.blocks_for(torch.cat([matrix[:2] * 20, x, matrix[9:10]])) == -1


def test_equal_rows_are_all_candidates_and_the_screen_rests() -> None:
    both = Both.of(packed(torch.ones(ROWS, COLUMNS)))
    x = torch.randn(1, COLUMNS)
    assert both.blocks_for(x) == -1
    assert both.screened.description.rest == 15
    for _ in range(15):
        both.screened(x)
    assert both.screened.description.rest == 0 and both.screened.steps == (0, 0, 16)


def test_the_bounds_are_needed_and_attained() -> None:
    """x along what the screen misses of row 0: without the bounds row 500 would win."""
    matrix = torch.zeros(ROWS, COLUMNS)
    scale = 2.0**-6
    matrix[0] = scale * (torch.arange(COLUMNS) % 5 + 0.46875)  # all but the largest of 32 are rounded down
    matrix[0, ::32] = 127 * scale
    both = Both.of(packed(matrix, "f32"))
    screen = both.screened.screen
    missed = matrix[0] - screen.kernel.rows(screen, torch.tensor([0]))[0]
    x = (missed / missed.abs().max() * 127).round()[None]
    approximate = float(screen.kernel.linear(x, screen)[0, 0])
    exact = float(x[0].double() @ matrix[0].double())
    assert exact > approximate + 0.9 * float(missed.norm() * x.norm())
    between = (exact + approximate) / 2
    matrix[500] = x[0] * (between / float(x.norm() ** 2))
    both = Both.of(packed(matrix, "f32"))
    expected = both.check(x)
    assert int(expected.argmax()) == 0
    for name in ("deviation", "norm"):
        both.screened.screen.buffers[name].zero_()
    assert int(both.screened(x).argmax()) == 500


@pytest.mark.parametrize("kind", TYPES)
def test_bounds_hold_for_every_row(kind: str) -> None:
    """Of rows and inputs of all sizes, beside float64."""
    draw = torch.Generator().manual_seed(8)
    sizes = 10 ** torch.empty(ROWS, 1).uniform_(-3, 2, generator=draw)
    matrix = (random_matrix() * sizes).to(TYPES[kind]).float()
    head = packed(matrix, kind)
    screen = make_screen(head)
    assert screen is not None
    stored = screen.kernel.rows(screen, torch.arange(ROWS)).double()
    exact = matrix.double()
    assert bool((screen.buffers["deviation"] >= (exact - stored).norm(dim=1)).all())
    assert bool((screen.buffers["norm"] >= torch.maximum(exact.norm(dim=1), stored.norm(dim=1))).all())
    assert bool((screen.buffers["deviation"] <= 1.01 * (exact - stored).norm(dim=1) + 1e-6).all())
    both = Both.of(head)
    both.check(
        torch.randn(20, COLUMNS, generator=draw) * 10 ** torch.empty(20, 1).uniform_(-6, 6, generator=draw)
    )


def test_a_bias_takes_part() -> None:
    matrix = random_matrix()
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    bias[77] = 30.0
    both = Both.of(packed(matrix), bias)
    x = matrix[100:104] * 5
    assert both.blocks_for(x) == 1
    assert row_peaks(both.whole(x))[1] == [77] * 4
    for size in (1e-3, 1.0, 1e3):
        both.check(torch.randn(9, COLUMNS) * size)
    with_infinity = bias.clone()
    with_infinity[3] = -math.inf
    screen = both.screened.screen
    assert ScreenedHead.of(both.whole.weight, with_infinity, screen) is None


@pytest.mark.parametrize("scale", [1.0, 0.0625, 1 / 3])
@pytest.mark.parametrize("cap", [0.0, 30.0, 0.5])
def test_scaled_and_capped_logits_tie_where_sums_do_not(scale: float, cap: float) -> None:
    """Near the cap many logits round to the same number: the first of them is the token."""
    matrix = random_matrix()
    both = Both.of(packed(matrix), scale=scale, cap=cap)
    read = both.blocks_for(matrix[100:101] * 20 * max(cap, 1.0) / scale)
    if cap != 0.5:
        assert 0 < read < 20
    for size in (0.01, 1.0, 100.0, 1e4):
        both.check(torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(4)) * size)
        both.check(-matrix[:3].abs() * size)


@pytest.mark.parametrize(
    ("spoil", "screened"),
    [
        pytest.param(lambda m: m.fill_(1e-9), True, id="too small for float16 scales"),
        pytest.param(lambda m: m.mul_(1e25), False, id="squares overflow"),
        pytest.param(lambda m: m[5].fill_(1e8), False, id="scales overflow"),
        pytest.param(lambda m: m[-1, -1].fill_(math.nan), False, id="nan"),
        pytest.param(lambda m: m[0, 0].fill_(-math.inf), False, id="infinite"),
    ],
)
def test_weights_of_odd_sizes(spoil: Callable[[Tensor], object], screened: bool) -> None:
    matrix = random_matrix()
    spoil(matrix)
    head = packed(matrix)
    assert (make_screen(head) is not None) == screened
    if screened:
        Both.of(head).check(torch.randn(3, COLUMNS) * 100)


def test_which_heads_can_have_one() -> None:
    assert refuses(dense("bf16"), (100, 64), CPU) is None
    assert refuses(dense("bf16"), (100, 48), CPU) == (
        "the head has 48 columns, a screen takes multiples of 32 up to 32768"
    )
    q8 = Scheme(number_format("int8"), ((1, 32),), (number_format("f16"),))
    assert refuses(q8, (1600, 64), CPU) == "the head has 8.5 bits a weight, a screen would have 9.5"
    assert "the device is cuda" in str(refuses(dense("bf16"), (100, 64), torch.device("cuda")))
    head = packed(random_matrix())
    screen = make_screen(head)
    assert screen is not None
    for wrong in ({"scale": 0.0}, {"scale": -1.0}, {"cap": math.inf}):
        assert ScreenedHead.of(head, None, screen, **wrong) is None
    del screen.buffers["norm"]
    with pytest.raises(ValueError, match="norm is no torch.float32"):
        ScreenedHead.of(head, None, screen)
