"""How a product of a packed weight is cut among a GPU's programs: rows of each, and parts of the columns.

What a cut costs is estimated in bytes that one multiprocessor (SM) reads at its share of the bandwidth:

    computing   the rows that the busiest SM's programs decode, and 16 more a program for what it does with
                x: decoding takes nearly as long as reading, so that an SM with two programs beside one with
                one is what all wait for
    reading     its bytes, times how much fewer its programs have under way than latency times bandwidth asks
                for
    start       a latency for each round of programs: the first loads of one have nothing to hide behind
    joining     where columns are split: a latency for whoever adds (the last program, or a second kernel),
                and each split's float32 sums written and read, which stay in the L2 cache (twice the rate)

The longer of the first two counts, a quarter of the other, and the rest. The cheapest of all heights and
splits is taken; it follows from shapes and the number of SMs alone. A microsecond of latency is 25 KiB of an
H100's 3.35 TB/s over 132 SMs, 19 of an A100's 2.0 over 108, 36 of an H200's 4.8, 54 of a B200's 8 over 148;
one number, 32 KiB, stands for all. Nothing of this has been timed.

What comes of it for 4-bit weights of an 8B model and one token: programs, their height, and how much of all
SMs' time they have work for, were computing all there is. Where two programs of 128 rows lie on an SM 48 KiB
are under way; of one token's four may.

    rows x columns    108 SMs           132 SMs           148 SMs
    4096 x 4096       512 * 64, 95 %    256 * 128, 97 %   256 * 128, 86 %
    6144 x 4096       192 * 128, 89 %   384 * 128, 97 %   288 * 128, 86 %
    14336 x 4096      896 * 128, 92 %   896 * 64, 97 %    560 * 128, 86 %
    28672 x 4096      896 * 128, 92 %   896 * 128, 97 %   672 * 128, 88 %
    4096 x 14336      320 * 128, 92 %   256 * 128, 97 %   288 * 128, 93 %
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

LATENCY = 32 << 10  # bytes of an SM in the time that a load takes
_SHARED_ROWS = 16  # what a program does with x, whatever its height, takes as long as so many rows


@dataclass(frozen=True)
class Shape:
    """What is multiplied: ``run_bytes`` of a row in ``run_columns`` columns, ``runs`` of them a row.

    ``least``: runs of a split.
    """

    rows: int
    runs: int
    run_bytes: int
    run_columns: int
    least: int


@dataclass(frozen=True)
class Cut:
    """``height`` rows a program, ``splits`` of the columns, ``each`` runs of one."""

    height: int
    splits: int
    each: int


@dataclass(frozen=True)
class Tokens:
    """``each`` tokens meet a program's rows; there are ``blocks`` as many."""

    each: int
    blocks: int = 1

    @staticmethod
    def of(tokens: int, most: int) -> Tokens:
        """So many, up to ``most`` a program; numbers near each other are cut alike."""
        return Tokens(min(1 << (tokens - 1).bit_length(), most), -(-tokens // most))


@lru_cache(maxsize=4096)
def cut(
    shape: Shape, tokens: Tokens, heights: tuple[int, ...], resident: int, stages: int, processors: int
) -> Cut:
    """The cheapest cut. ``resident``: programs of the first of ``heights`` that an SM holds at one time."""
    return cuts(shape, tokens, heights, resident, stages, processors)[0]


def cuts(
    shape: Shape, tokens: Tokens, heights: tuple[int, ...], resident: int, stages: int, processors: int
) -> list[Cut]:
    """All of them, the cheapest first."""
    most = max(shape.runs // shape.least, 1)
    found = {
        Cut(height, -(-shape.runs // each), each)
        for height in heights
        for each in {-(-shape.runs // splits) for splits in range(1, most + 1)}
    }
    return sorted(
        found,
        key=lambda one: (
            _cost(one, shape, tokens, resident * heights[0] // one.height, stages, processors),
            one.splits,
        ),
    )


def _cost(one: Cut, shape: Shape, tokens: Tokens, resident: int, stages: int, processors: int) -> float:
    """See the module docstring."""
    step = one.height * shape.run_bytes + tokens.each * shape.run_columns  # x: 2 bytes at twice the rate
    programs = -(-shape.rows // one.height) * tokens.blocks * one.splits
    busiest = -(-programs // processors) * one.each
    together = min(max(programs / processors, 1.0), resident)
    flying = together * min(stages - 1, one.each) * step
    reading = busiest * step * max(LATENCY / flying, 1.0)
    computing = busiest * (one.height + _SHARED_ROWS) * shape.run_bytes
    time = max(reading, computing) + min(reading, computing) / 4
    time += LATENCY * -(-programs // (processors * resident))
    if one.splits > 1:
        sums = one.splits * tokens.each * tokens.blocks * shape.rows
        time += LATENCY + sums * 8 / 2 / processors
    return time
