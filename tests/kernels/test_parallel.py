"""What ranks tell each other, with as many threads as ranks; gloo, as on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels.activation_native import NativeQuantizer
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.native import library
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
    "per tensor, bf16": ActivationScheme(
        number_format("e4m3"), (0, 0), limit=448.0, input="bf16", scale=number_format("bf16"), reciprocal=True
    ),
    "outliers": ActivationScheme(INT8, (1, 0), outliers=3.0),
    "delayed": ActivationScheme(number_format("e4m3"), (0, 0), mode="delayed", limit=448.0, delay=Delay(4)),
}


class Counted(Parallel):
    """A rank that counts what it asks the others."""

    asked = 0

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        type(self).asked += self.rank == 0
        return super().largest(x)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("rule", RULES)
def test_input_scales_are_those_of_whole_rows(
    tmp_path: Path, rule: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one exchange: native code, or the definition, on both sides of it."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)) * 2
    x[2, 60], x[3, 1], x[4], x[5, 2] = 50.0, torch.nan, 0.0, -torch.inf
    scheme, multiplier = RULES[rule], torch.linspace(0.5, 2.0, 64)
    if not native:
        monkeypatch.setattr(NativeQuantizer, "of", lambda *described: None)
    elif library() is None:
        pytest.skip("no native library")

    def transform(across: Parallel, here: slice) -> tuple[InputTransform, ActivationStates]:
        states, state = ActivationStates(), None
        if scheme.delay is not None:
            state = states.add("layer", scheme, CPU, across)
        return InputTransform(scheme, multiplier[here].clone(), state=state, across=across), states

    Counted.asked = 0

    def work(p: Parallel) -> tuple[torch.Tensor, torch.Tensor | None, ActivationStates]:
        here = slice(0, 40) if p.rank == 0 else slice(40, 64)
        run, states = transform(Counted(p.rank, p.size, p._group), here)
        assert run.native is None or scheme.delay is not None, "native code sees this rank's columns only"
        assert ((run.native or run.halves) is not None) == native
        given = x[:, here].clone()
        made = run(given)
        assert torch.equal(given.nan_to_num(9.0), x[:, here].nan_to_num(9.0)), "x is left alone"
        states.update()
        return *made, states

    whole, whole_states = transform(ALONE, slice(0, 64))
    values, factor = whole.in_torch(x)
    whole_states.update()
    found = together(tmp_path, 2, work)
    assert Counted.asked == 1
    parts = torch.cat([part for part, _, _ in found], 1)
    assert torch.equal(parts.nan_to_num(123.0), values.nan_to_num(123.0))
    for _, their, states in found:
        assert (factor is None) == (their is None)
        assert factor is None or torch.equal(factor.nan_to_num(9.0), their.nan_to_num(9.0))
        for name, state in states.state_dict().items():
            assert torch.equal(whole_states.state_dict()[name].nan_to_num(9.0), state.nan_to_num(9.0))


def test_delayed_scales_of_all_layers_are_one_exchange(tmp_path: Path) -> None:
    """Steps in which only some layers are used; one of them has whole rows everywhere."""
    scheme = RULES["delayed"]
    generator = torch.Generator().manual_seed(6)
    steps = [torch.randn(3, 64, generator=generator) * 3.0**n for n in range(6)]

    def run(p: Parallel) -> dict[str, torch.Tensor]:
        here = slice(0, 64) if p.size == 1 else slice(0, 24) if p.rank == 0 else slice(24, 64)
        states = ActivationStates()
        layers = [InputTransform(scheme, state=states.add("cut", scheme, CPU, p), across=p) for _ in range(3)]
        whole = InputTransform(scheme, state=states.add("whole", scheme, CPU))
        for number, x in enumerate(steps):
            for layer in layers[: 1 + number % 3]:
                layer(x[:, here])
            whole(x)
            states.update()
        return states.state_dict()

    Counted.asked = 0
    wanted = run(ALONE)
    for found in together(tmp_path, 2, lambda p: run(Counted(p.rank, p.size, p._group))):
        assert found.keys() == wanted.keys() and len(found) == 8
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert Counted.asked == len(steps)


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
