"""What ranks tell each other, with as many threads as ranks; gloo, as on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState
from lowbit.kernels.parallel import _SHARED_SUM, ALONE, Parallel
from lowbit.layers.norm import Norm
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay

Result = TypeVar("Result")
CPU = torch.device("cpu")


def together(folder: Path, size: int, work: Callable[[Parallel], Result]) -> list[Result]:
    """What each rank's ``work`` gives."""

    def run(rank: int) -> Result:
        parallel = Parallel.join(rank, size, folder / "store", CPU, 30.0, 30.0)
        return work(parallel)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_have_the_order_of_the_ranks_whatever_their_size(tmp_path: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # Sums of three and more depend on their order; the last shapes are summed in shares.
    shapes = [(1, 7), (5, 64), (3, _SHARED_SUM // 3 + 5), (7, _SHARED_SUM // 4)]
    parts = [torch.randn(size, *shape, generator=generator) * 1e3 for shape in shapes]
    found = together(tmp_path, size, lambda p: [p.sum(part[p.rank]) for part in parts])
    for number, part in enumerate(parts):
        wanted = part[0].clone()
        for other in part[1:]:
            wanted += other
        for rank in range(size):
            assert torch.equal(found[rank][number], wanted)


def test_an_element_has_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    rows = torch.randn(3, 40, 2048, generator=torch.Generator().manual_seed(1))
    assert rows[0].numel() > _SHARED_SUM > 2048
    together_, alone = zip(
        *together(tmp_path, 3, lambda p: (p.sum(rows[p.rank]), p.sum(rows[p.rank, 5:6]))), strict=True
    )
    assert torch.equal(together_[0][5:6], alone[0]) and torch.equal(together_[1], together_[2])


def test_columns_of_unequal_width_and_a_broadcast(tmp_path: Path) -> None:
    x, widths = torch.arange(12.0).view(2, 6), (3, 1, 2)
    starts = (0, 3, 4)

    def work(p: Parallel) -> tuple[torch.Tensor, torch.Tensor]:
        mine = x[:, starts[p.rank] : starts[p.rank] + widths[p.rank]]
        return p.columns(mine, widths), p.broadcast(torch.full((3,), p.rank + 7, dtype=torch.int32))

    for gathered, said in together(tmp_path, 3, work):
        assert torch.equal(gathered, x) and said.tolist() == [7, 7, 7]


def test_a_rank_that_stays_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="rank 0 of 2 found no others") as caught:
        Parallel.join(0, 2, tmp_path / "store", CPU, 0.5, 0.5)
    assert caught.value.code == "E0713"


INT8 = number_format("int8")
RULES = {
    "per token": ActivationScheme(INT8, (1, 0)),
    "per token, fp8": ActivationScheme(number_format("e4m3"), (1, 0), upper_bound=2.0),
    "asymmetric": ActivationScheme(INT8, (1, 0), symmetric=False),
    "per tensor": ActivationScheme(INT8, (0, 0)),
    "outliers": ActivationScheme(INT8, (1, 0), outliers=3.0),
    "delayed": ActivationScheme(number_format("e4m3"), (0, 0), mode="delayed", limit=448.0, delay=Delay(4)),
}


@pytest.mark.parametrize("rule", RULES)
def test_input_scales_are_those_of_whole_rows(tmp_path: Path, rule: str) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)) * 2
    x[2, 60], x[3, 1], x[4] = 50.0, torch.nan, 0.0

    def transform(across: Parallel) -> InputTransform:
        scheme = RULES[rule]
        state = None if scheme.delay is None else ActivationState.fresh(scheme.delay, scheme.limit)
        return InputTransform(scheme, state=state, across=across)

    def work(p: Parallel) -> tuple[torch.Tensor, torch.Tensor | None, InputTransform]:
        run = transform(p)
        assert run.native is None, "native code sees this rank's columns only"
        return *run(x[:, :40] if p.rank == 0 else x[:, 40:]), run

    whole = transform(ALONE)
    values, factor = whole.in_torch(x)
    found = together(tmp_path, 2, work)
    parts = torch.cat([part for part, _, _ in found], 1)
    assert torch.equal(parts.nan_to_num(123.0), values.nan_to_num(123.0))
    for _, their, run in found:
        assert (factor is None) == (their is None)
        assert factor is None or torch.equal(factor.nan_to_num(9.0), their.nan_to_num(9.0))
        if whole.state is not None and run.state is not None:
            assert torch.equal(
                whole.state.amax_history.nan_to_num(9.0), run.state.amax_history.nan_to_num(9.0)
            )


def test_a_norm_of_rows_on_several_ranks_some_of_them_twice(tmp_path: Path) -> None:
    x, weight = torch.randn(4, 96), torch.rand(96)
    wanted = Norm(weight, 1e-5)(x)
    # Ranks 1 and 2 both have the second part.
    parts = [slice(0, 64), slice(64, 96), slice(64, 96)]

    def work(p: Parallel) -> torch.Tensor:
        here = parts[p.rank]
        norm = Norm(weight[here], 1e-5, parallel=p, whole=96, counts=p.rank < 2)
        mine = x[:, here].clone()
        norm.of_heads(mine.view(4, -1, 16))
        assert torch.equal(mine, norm(x[:, here]))
        return mine

    for part, here in zip(together(tmp_path, 3, work), parts, strict=True):
        torch.testing.assert_close(part, wanted[:, here])
