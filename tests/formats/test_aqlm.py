"""AQLM: what the tool's layers hold against its own dequantizer; damaged files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, last_bit, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("aqlm")]
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (32, 64)


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("aqlm") if folder.name == name)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    """The tool rounds the sum and the product: one codebook is equal, several within two last bits."""
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight
        assert found.scheme.is_dense and found.codes.dtype == values.dtype
        if folder.name.startswith("1x"):
            assert torch.equal(found.codes, values), name
        else:
            # A sum that cancels is rounded where its terms were: their size counts.
            step = last_bit(values.dtype, values.float().abs() + 0.5)
            assert ((found.codes.float() - values.float()).abs() <= step).all(), name


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_and_the_plan_says_what_it_costs(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu")
    [down] = [module for module in plan.modules if module.name == DOWN]
    assert str(down.scheme) in ("f16", "bf16")
    assert "decoded to 16 bits" in reader_of(folder).describe()
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"codes": torch.zeros(32, 8, 2, dtype=torch.int8)}, "E0213"),
        ({"codes": torch.zeros(32, 8, 1, dtype=torch.int16)}, "E0213"),
        ({"codebooks": torch.zeros(1, 128, 1, 8).half()}, "E0213"),
        ({"codebooks": torch.full((1, 256, 1, 8), float("nan")).half()}, "E0215"),
        ({"scales": torch.zeros(32, 1).half()}, "E0213"),
        ({"scales": torch.full((32, 1, 1, 1), float("inf")).half()}, "E0215"),
        ({"codes": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("1x8_g8"))
    changed = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["in_group_size", "num_codebooks", "nbits_per_codebook"])
@pytest.mark.parametrize("value", [0, -1, 2**40, "8", True, [], 3])
def test_configs_that_cannot_be(key: str, value: object, tmp_path: Path) -> None:
    seed = Seed.of(case("1x8_g8"))
    config = {**seed.config, "quantization_config": {**seed.config["quantization_config"], key: value}}
    folder = seed.write(tmp_path, config, seed.tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code in ("E0212", "E0213")
