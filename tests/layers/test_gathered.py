"""Layers whose products ranks gather: every rank's results are those of one process, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import lattice
from kernels.test_parallel import together
from lowbit.kernels import choose
from lowbit.kernels.native import library
from lowbit.kernels.parallel import Parallel
from lowbit.kernels.rotation import Rotator
from lowbit.layers.cuts import cut_evenly
from lowbit.layers.linear import Columns, Gathered, Linear
from lowbit.numerics.lattice import TILE_ROWS, transform

CPU = torch.device("cpu")
OUT, IN = 112, 192


def packed(weight):  # type: ignore[no-untyped-def]
    return choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU)


@pytest.mark.skipif(library() is None, reason="the native library was not built")
@pytest.mark.parametrize("picked", [None, torch.tensor([5, 0, 111, 64, 63])])
def test_results_are_those_of_one_process(picked: Tensor | None, tmp_path: Path) -> None:
    """Seven tiles of 16 rows for three ranks; inputs that lie on all; a bias of the wanted outputs."""
    weight, generator = lattice(3.45, (OUT, IN)), torch.Generator().manual_seed(7)
    bias, x = torch.randn(OUT, generator=generator), torch.randn(5, IN, generator=generator)
    whole = Linear("whole", [packed(weight)], bias)(x)
    wanted = whole if picked is None else whole[:, picked]
    scheme = replace(weight.scheme, blocks=((0, 1),), scales=weight.scheme.scales[1:])
    half = replace(weight, scheme=scheme, scales=weight.scales[1:])
    own_bias = bias if picked is None else bias[picked]

    def work(p: Parallel) -> tuple[Tensor, ...]:
        rows, inputs = cut_evenly(p, OUT, TILE_ROWS), cut_evenly(p, IN)
        assert rows is not None and rows.widths == (48, 32, 32) and inputs is not None
        after = Rotator(transform(OUT, after=weight.scales[0].flatten()))
        gathered = [Gathered(p, rows.widths, after, picked)]
        part = packed(half.rows(rows.start, rows.stop))
        columns = Columns(p, inputs.widths, sums=False)
        layer = Linear("shared", [part], own_bias, columns=columns, gathered=gathered)
        here = x[:, inputs.slice]
        out = torch.full(wanted.shape, torch.nan)
        assert layer(here, out) is out
        return layer(here), out, layer.in_float32(here), p.sum(layer.partial(here))

    for found in together(tmp_path, 3, work):
        assert all(torch.equal(each, wanted) for each in found)
