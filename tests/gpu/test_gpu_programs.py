"""How products are cut among programs: whole columns, equal work, enough bytes under way."""

from __future__ import annotations

import pytest

from lowbit.kernels.gpu.linear import _BLOCKS, _WORDS
from lowbit.kernels.gpu.programs import LATENCY, Cut, Shape, Tokens, cut

EIGHT_B = [(4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
# Programs and their height: the module's table.
ONE_TOKEN = {
    108: [(512, 64), (192, 128), (896, 128), (896, 128), (320, 128)],
    132: [(256, 128), (384, 128), (896, 64), (896, 128), (256, 128)],
    148: [(256, 128), (288, 128), (560, 128), (672, 128), (288, 128)],
}


def shape(rows: int, columns: int, bits: int) -> Shape:
    run = 128 if bits == 4 else 64
    return Shape(rows, columns // run, run * bits // 8, run, 512 // run)


def chosen(given: Shape, tokens: int, processors: int) -> Cut:
    blocks = _WORDS[64] if tokens == 1 else next(one for one in _BLOCKS if tokens <= one.tokens)
    heights, resident, stages = blocks.heights, blocks.programs, blocks.num_stages
    return cut(given, Tokens.of(tokens, 16), heights, resident, stages, processors)


@pytest.mark.parametrize("processors", ONE_TOKEN)
def test_the_table_of_an_8b_model(processors: int) -> None:
    found = []
    for rows, columns in EIGHT_B:
        one = chosen(shape(rows, columns, 4), 1, processors)
        found.append((rows // one.height * one.splits, one.height))
    assert found == ONE_TOKEN[processors]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
@pytest.mark.parametrize("processors", ONE_TOKEN)
@pytest.mark.parametrize("size", EIGHT_B, ids=str)
def test_no_processor_is_idle_for_long(
    size: tuple[int, int], processors: int, tokens: int, bits: int
) -> None:
    given = shape(*size, bits)
    one = chosen(given, tokens, processors)
    assert one.splits * one.each >= given.runs > (one.splits - 1) * one.each, "all columns, no empty split"
    programs = -(-size[0] // one.height) * one.splits
    busiest = -(-programs // processors) * one.each * one.height
    assert size[0] * given.runs / (busiest * processors) >= 0.75
    resident = (_WORDS[64].programs if tokens == 1 else 2) * 128 / one.height
    flying = min(programs / processors, resident) * 3 * one.height * given.run_bytes
    assert flying + 3 * tokens * given.run_columns * 2 >= 0.7 * LATENCY


def test_narrow_weights_and_few_columns() -> None:
    """Nothing to split, and fewer rows than a program has."""
    assert chosen(Shape(16, 1, 64, 128, 4), 1, 132).splits == 1
    assert chosen(Shape(1024, 32, 64, 128, 4), 1, 132) == Cut(64, 8, 4), "every processor has a program"
    assert Tokens.of(3, 16) == Tokens.of(4, 16) and Tokens.of(300, 128) == Tokens(128, 3)
