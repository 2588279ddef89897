"""GpuKernel: what linear kernels in Triton say alike; see ``LinearKernel``. And what their hosts share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.programs import Cut, Shape, Tokens, cut
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

SPLIT_COLUMNS = 512  # a split of the columns has at least as many
_SCALED = 16  # blocks of x that a program of ``halves_of`` scales


class GpuKernel:
    """A kernel of this base has a name, and says what it refuses, how it packs and how it multiplies
    (``multiply``, or all of ``linear``)."""

    computes = "as stored"
    layout = 1
    steady = False
    runs = "quantized"

    def serves(self, device: torch.device) -> bool:
        """GPUs, and whatever else Triton kernels run on."""
        return device.type == "cuda" or runtime.runs_on(device)

    def rounds(self, scheme: Scheme) -> bool:
        """Never, but to x's type as every kernel here does."""
        return False

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Never: x stays a float."""
        return False

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) of float32, bfloat16 or float16 -> (tokens, out) of x's type, or ``out``'s."""
        x, out = checked(x, packed), output(x, packed, out)
        if len(x):
            self.multiply(x if x.stride(1) == 1 else x.contiguous(), packed, out)
        return out

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        raise NotImplementedError


def unfit(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Why no kernel of quantized weights can run it here, whatever its codes are; or None."""
    if reason := runtime.refuses(device):
        return reason
    if scheme.activation is not None:
        return f"the scheme quantizes its input ({scheme.activation})"
    if len(shape) != 2:
        return "stacked experts"
    if scheme.outliers is not None:
        return "some weights have outliers"
    return "weights are not quantized" if scheme.is_dense else None


def checked(x: Tensor, packed: PackedWeight) -> Tensor:
    """x, or E0703 where it has another width than the weight."""
    if x.shape[1] != packed.shape[1]:
        raise LowbitError(
            "E0703", f"{packed.origin}: input has {x.shape[1]} columns, weight {packed.shape[1]}"
        )
    return x


def output(x: Tensor, packed: PackedWeight, out: Tensor | None) -> Tensor:
    """Where a product goes: ``out``, or memory of x's type."""
    size = (x.shape[0], packed.shape[0])
    if out is None:
        return x.new_empty(size)
    assert out.shape == size and out.stride(1) == 1, "rows of the output lie whole"
    return out


@dataclass(frozen=True)
class Blocks:
    """How up to ``tokens`` are multiplied: ``BM`` of them times one of ``heights`` of rows a program.

    ``programs``: of the highest, that an SM holds at one time.
    """

    tokens: int
    BM: int
    heights: tuple[int, ...]
    num_warps: int
    num_stages: int
    programs: int


# Of x in float16 with scales (``half_inputs``). There are two float32 sums, of a run and of all: with more
# than 64 rows beside 128 tokens they would not fit in registers. One token: 16 or 32 numbers a thread.
HALF_BLOCKS = (
    Blocks(1, 1, (64, 32, 16), 4, 3, 2),
    Blocks(16, 16, (64, 32), 4, 3, 2),
    Blocks(32, 32, (64, 32), 4, 3, 2),
    Blocks(64, 64, (64,), 4, 3, 2),
    Blocks(1 << 31, 128, (64,), 8, 2, 2),
)


def half_blocks(
    shape: Shape, tokens: int, device: torch.device, tallest: int = 1 << 31
) -> tuple[Blocks, Cut]:
    """The row of ``HALF_BLOCKS`` for so many tokens, and how rows and columns are cut.

    ``tallest``: rows of a program at most, a power of two.
    """
    chosen = next(one for one in HALF_BLOCKS if tokens <= one.tokens)
    count = Tokens.of(tokens, chosen.BM)
    heights = tuple(height for height in chosen.heights if height <= tallest) or (tallest,)
    programs = chosen.programs * chosen.heights[0] // heights[0]
    processors = multiprocessors(device)
    return chosen, cut(shape, count, heights, programs, chosen.num_stages, processors)


def halves_of(
    x: Tensor,
    blocks: int,
    order: Tensor | None = None,
    multiplier: Tensor | None = None,
    chosen: Tensor | None = None,
    same: int = 1,
) -> tuple[Tensor, Tensor]:
    """x in float16 (tokens, blocks * 128), and what 128 columns of it are worth: float32 (tokens, blocks).

    ``order``, ``multiplier``: as ``scaled_halves`` reads them. ``chosen``: int64 (tokens,), the expert of
    each, of which ``same`` have one row of x; order and multiplier are then (experts, blocks * 128).
    """
    from lowbit.kernels.gpu.half_inputs import BLOCK, scaled_halves

    tokens, columns = len(x) if chosen is None else len(chosen), x.shape[1]
    of_experts = next((each for each in (order, multiplier) if each is not None), None)
    experts = 1 if chosen is None or of_experts is None else len(of_experts)
    halves = torch.empty(tokens, blocks * BLOCK, dtype=torch.float16, device=x.device)
    scale = torch.empty(tokens, blocks, device=x.device)
    runtime.launch(
        scaled_halves,
        (-(-tokens * blocks // _SCALED),),
        *(x, x.stride(0), halves, scale, order, multiplier, chosen, tokens, columns, blocks, experts),
        SAME=same,
        M=_SCALED,
    )
    return halves, scale


def expert_blocks(sorted_: SortedPairs, rows: int, steps: int, device: torch.device) -> tuple[Blocks, Cut]:
    """The same of all experts at once (``expert_rows``), each with whole columns of ``steps`` steps.

    Heights are halved while there is less than a program for each place; there are as many blocks of pairs as
    the host knows.
    """
    chosen = next(one for one in HALF_BLOCKS[1:] if sorted_.block_m <= one.BM)
    places = chosen.programs * multiprocessors(device)
    fits = (height for height in chosen.heights if sorted_.blocks * (rows // height) >= places)
    return chosen, Cut(next(fits, chosen.heights[-1]), 1, steps)


class Split(NamedTuple):
    """Where programs that share a tile of the output leave their sums, float32 (splits, tokens, rows), and
    count themselves, int32, a zero for each tile; neither where none do."""

    parts: Tensor | None
    arrived: Tensor | None

    @staticmethod
    def of(out: Tensor, splits: int, tiles: int) -> Split:
        """For that many splits of a product into ``out`` (tokens, rows)."""
        if splits == 1:
            return Split(None, None)
        return Split(torch.empty(splits, *out.shape, device=out.device), _counts(out.device, tiles))


_MOST_TILES = 1 << 14  # counted in the one tensor that all launches share


def _counts(device: torch.device, tiles: int) -> Tensor:
    return torch.zeros(tiles, dtype=torch.int32, device=device) if tiles > _MOST_TILES else _zeros(device)


@cache
def _zeros(device: torch.device) -> Tensor:
    """Zeros that every launch leaves as it found them; launches follow one another."""
    return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def add(parts: Tensor, out: Tensor) -> None:
    """The sums of all splits, float32 (splits, tokens, rows), into ``out``."""
    from lowbit.kernels.gpu.products import add_splits

    splits, tokens, rows = parts.shape
    runtime.launch(
        add_splits, (tokens, -(-rows // 512)), parts, out, tokens, rows, out.stride(0), splits, BLOCK=512
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; the interpreter runs programs one after the other, and has few for its own sake."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
