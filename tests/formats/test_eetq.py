"""EETQ: what the tool's own layout functions made, against the numbers that went in; damage refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.eetq import in_order, in_order_of_volta
from lowbit.loading import load_model, plan_model

FOLDER, VOLTA = fixture_cases("eetq")
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (64, 128)


@pytest.mark.parametrize("folder", [FOLDER, VOLTA], ids=lambda folder: folder.name)
def test_the_numbers_before_its_layout(folder: Path) -> None:
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1]))
        assert torch.equal(found.weight.dequantize(), values) and found.input is None, name


def test_layouts_are_told_apart() -> None:
    """In the other layout many rows have no largest code: a decision without doubt, of every module."""
    assert (FOLDER.name, VOLTA.name) == ("int8", "volta")
    for folder, wrong in ((FOLDER, in_order_of_volta), (VOLTA, in_order)):
        header = header_of(folder)
        with TensorData(header) as data:
            weights = [name for name, entry in header.tensors.items() if entry.dtype == "I8"]
            assert len(weights) == 7
            for name in weights:
                columns, out = header.tensors[name].shape
                codes = wrong(data.raw(name), (out, columns))
                none = (codes.amin(1) > 0) & (codes.amax(1) < 255)
                assert none.float().mean() > 0.15, name


def test_neither_layout_is_read_as_the_usual_one(tmp_path: Path) -> None:
    """Another tool's scales, say: no row reaches the end in either."""
    seed = Seed.of(FOLDER)
    weight = seed.tensors[f"{DOWN}.weight"].view(torch.uint8)
    small = (weight.to(torch.int16) - 128) // 2 + 128
    folder = seed.write(
        tmp_path, seed.config, seed.tensors | {f"{DOWN}.weight": small.to(torch.uint8).view(torch.int8)}
    )
    codes = read(folder, DOWN, SHAPE).weight.codes
    assert torch.equal(codes, in_order(small.to(torch.uint8).flatten(), SHAPE))


def test_a_model_answers() -> None:
    assert torch.equal(
        *(
            prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
            for folder in (FOLDER, VOLTA)
        )
    )
    plan = plan_model(header_of(FOLDER), device="cpu")
    quantized = [module for module in plan.modules if not module.scheme.is_dense]
    assert {str(module.scheme) for module in quantized} == {"int8 1xall f16"}
    logits = prompt_logits(load_model(header_of(FOLDER), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


def test_its_own_name_of_the_weight(tmp_path: Path) -> None:
    seed = Seed.of(FOLDER)
    tensors = {
        f"{DOWN}.qweight": seed.tensors[f"{DOWN}.weight"],
        f"{DOWN}.weight_scales": seed.tensors[f"{DOWN}.weight_scales"],
    }
    folder = write_folder(tmp_path, tensors, {"quant_method": "eetq"})
    assert torch.equal(read(folder, DOWN, SHAPE).weight.dequantize(), expected(FOLDER)[DOWN])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weight": torch.zeros(64, 128, dtype=torch.int8)}, "E0213"),
        ({"weight": torch.zeros(128, 64, dtype=torch.uint8)}, "E0213"),
        ({"weight_scales": torch.zeros(63).half()}, "E0213"),
        ({"weight_scales": torch.full((64,), float("nan")).half()}, "E0215"),
        ({"weight": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(FOLDER)
    changed = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_and_configs_that_cannot_be(tmp_path: Path) -> None:
    tensors = {
        f"{DOWN}.weight": torch.zeros(96, 64, dtype=torch.int8),
        f"{DOWN}.weight_scales": torch.ones(64),
    }
    with pytest.raises(LowbitError, match="tiles of 64 x 64"):
        read(write_folder(tmp_path / "a", tensors, {"quant_method": "eetq"}), DOWN, (64, 96))
    with pytest.raises(LowbitError, match="weights must be int8"):
        reader_of(write_folder(tmp_path / "b", tensors, {"quant_method": "eetq", "weights": "int4"}))
