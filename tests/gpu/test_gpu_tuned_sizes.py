"""Measured sizes: what is read of files and what is not, that products use them, and how they are found."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmark_modules import benchmark_module
from contract.test_linear_kernels import canonical
from gpu.test_gpu_linear import product
from lowbit.kernels.gpu import runtime, tuned_sizes
from lowbit.kernels.gpu.linear import sizes_by_cost
from lowbit.kernels.gpu.tuned_sizes import Product, Sizes
from lowbit.kernels.gpu.weight_layout import Layout, layout_of

GPU = "Some GPU (80 GB)"
ENTRY = {
    "bits": 4,
    "tile": 64,
    "kind": "whole",
    "rows": 37,
    "columns": 384,
    "tokens": 4,
    "height": 64,
    "splits": 3,
    "warps": 2,
    "stages": 3,
}
ONE = {**ENTRY, "tokens": 1, "height": 32, "splits": 2}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file of this device would be, as if it were some GPU."""
    monkeypatch.setattr(tuned_sizes, "_folders", [])
    monkeypatch.setattr(tuned_sizes, "gpu_name", lambda device: GPU)
    tuned_sizes.look_in(tmp_path)
    yield tmp_path / "Some_GPU_80_GB.json"
    tuned_sizes.known_of.cache_clear()


def layout(rows: int = 37) -> Layout:
    weight = canonical("uint4", 128, zero=True, shape=(rows, 384))
    found = layout_of(weight.scheme, weight.shape)
    assert isinstance(found, Layout)
    return found


def put(file: Path, *entries: object, gpu: str = GPU) -> None:
    file.write_text(json.dumps({"gpu": gpu, "products": list(entries)}))


@pytest.mark.parametrize("tokens", [1, 3])
def test_products_are_launched_as_measured(tokens: int, file: Path, device: torch.device) -> None:
    put(file, ENTRY, ONE)
    weight = canonical("uint4", 128, zero=True, shape=(37, 384))
    with runtime.recording() as launches:
        assert product(weight, tokens, device) < 1e-6
    [launch] = [one for one in launches if one.function in ("word_product", "tile_product")]
    constants = dict(launch.constants)
    assert (constants["BN"], launch.num_warps) == ((32, 2) if tokens == 1 else (64, 2))
    assert (constants["STAGES"] if tokens == 1 else launch.num_stages) == 3
    assert constants["SPLIT"] and len(launches) == 1


def test_numbers_of_tokens_that_are_near(file: Path) -> None:
    put(file, ENTRY, ONE)
    device = torch.device("cpu")
    found = {tokens: tuned_sizes.sizes_of(layout(), tokens, device) for tokens in (1, 2, 3, 4, 5)}
    assert found[1] == Sizes(32, 2, 2, 3) and found[3] == found[4] == Sizes(64, 3, 2, 3)
    assert found[2] is None and found[5] is None
    assert tuned_sizes.sizes_of(layout(38), 4, device) is None
    with tuned_sizes.trying(Sizes(128, 1, 4, 4)):
        assert tuned_sizes.sizes_of(layout(38), 7, device) == Sizes(128, 1, 4, 4)


@pytest.mark.parametrize(
    "change",
    [
        *({"bits": bits} for bits in (0, 9, "4", True, 4.0)),
        *({"height": height} for height in (0, 48, 512)),
        *({"splits": 0}, {"warps": 3}, {"stages": 0}, {"tokens": 0}, {"rows": -1}, {"kind": 3}),
        {"stages": 8, "height": 256},  # more than a multiprocessor's shared memory
        {"more": 1},
    ],
    ids=str,
)
def test_entries_without_sense_are_left_out(
    change: dict[str, object], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(file, {**ENTRY, **change}, ONE, "what")
    assert list(tuned_sizes.known_of(GPU).values()) == [{1: Sizes(32, 2, 2, 3)}]
    [line] = caplog.messages
    assert "2 of 3 entries are left out" in line and str(file) in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gpu": "another"}', "[" * 100_000])
def test_files_that_are_none(text: str, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert tuned_sizes.known_of(GPU) == {} and not caplog.messages, "there is no file"
    tuned_sizes.known_of.cache_clear()
    file.write_text(text)
    assert tuned_sizes.known_of(GPU) == {}
    assert "is left out" in caplog.text


def test_what_is_written_joins_what_was_there(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    mine, other = Product.of(layout()), Product.of(layout(64))
    tuned_sizes.write(file, GPU, {mine: {1: Sizes(32, 2, 2, 3), 8: Sizes(64, 1, 4, 4)}})
    tuned_sizes.write(file, GPU, {mine: {8: Sizes(128, 1, 4, 4)}, other: {1: Sizes(64, 1, 4, 2)}})
    assert tuned_sizes.known_of(GPU) == {
        mine: {1: Sizes(32, 2, 2, 3), 8: Sizes(128, 1, 4, 4)},
        other: {1: Sizes(64, 1, 4, 2)},
    }
    assert not caplog.messages


def test_the_fastest_is_found() -> None:
    """By a clock that likes one height, and one number of warps and of stages."""
    for name in ("machine", "linear_formats", "cliffs", "linear"):
        benchmark_module(name)
    tune = benchmark_module("tune_gpu")
    weight = canonical("uint4", 128, zero=True, shape=(4096, 4096))
    found = layout_of(weight.scheme, weight.shape)
    assert isinstance(found, Layout)
    first = sizes_by_cost(found, 8, 132)
    assert first[0] == Sizes(128, 8, 4, 4) and len(set(first)) == len(first) > 6

    class Weight:
        layout = found

    def time(sizes: Sizes | None) -> float:
        if sizes is None:
            return 10.0
        wrong = (sizes.height != first[3].height, sizes.warps != 8, sizes.stages != 3)
        return 8.0 + 0.5 * sum(wrong)

    best, least, default = tune.best(Weight(), 8, time, 132)
    assert (best.height, best.warps, best.stages) == (first[3].height, 8, 3) and (least, default) == (
        8.0,
        10.0,
    )
    assert tune.best(Weight(), 8, lambda sizes: 10.0, 132) == (None, 10.0, 10.0), (
        "what is no faster is not kept"
    )
