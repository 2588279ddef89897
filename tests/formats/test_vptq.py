"""VPTQ: what the tool's layers hold against its own dequantizer; damaged files refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("vptq")]
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (32, 64)


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("vptq") if folder.name == name)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight
        assert found.scheme.is_dense and torch.equal(found.codes, values.to(found.codes.dtype)), name


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
        ({"indices": torch.zeros(2, 6, 5, dtype=torch.int32)}, "E0213"),
        ({"indices": torch.zeros(2, 6, 6, dtype=torch.int16)}, "E0213"),
        ({"centroids.weight": torch.zeros(2, 380).half()}, "E0213"),
        ({"centroids.weight": torch.full((2, 384), float("nan")).half()}, "E0215"),
        ({"outlier_indices": torch.full((1, 8, 8), 16, dtype=torch.int16)}, "E0213"),
        ({"outlier_indices": torch.full((1, 8, 8), -1, dtype=torch.int16)}, "E0213"),
        ({"perm": torch.zeros(64, dtype=torch.int16)}, "E0213"),
        ({"perm": torch.arange(63, dtype=torch.int16)}, "E0213"),
        ({"weight_scale": torch.full((64,), float("inf")).half()}, "E0215"),
        ({"weight_bias": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("v6_k64_outliers"))
    changed = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vector_lens", "num_centroids", "group_num", "group_size", "outlier_size"])
@pytest.mark.parametrize("value", [0, -1, 2**40, "8", True, [], [1], [-1, 0], None])
def test_configs_that_cannot_be(key: str, value: object, tmp_path: Path) -> None:
    seed = Seed.of(case("v8_k256_res16"))
    config = copy.deepcopy(seed.config)
    rule = config["quantization_config"]["config_for_layers"][DOWN]  # type: ignore[index]
    if rule[key] == value:
        pytest.skip("what it says")
    rule[key] = value
    folder = seed.write(tmp_path, config, seed.tensors)
    if key == "outlier_size":  # without outliers it says nothing
        return
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code in ("E0212", "E0213")


def test_sizes_shared_by_kind_and_missing(tmp_path: Path) -> None:
    seed = Seed.of(case("v4_k128_plain"))
    config = copy.deepcopy(seed.config)
    quantization = config["quantization_config"]
    rules = quantization.pop("config_for_layers")  # type: ignore[union-attr]
    quantization["shared_layer_config"] = {"down_proj": rules[DOWN]}  # type: ignore[index]
    folder = seed.write(tmp_path / "a", config, seed.tensors)
    wanted = read(case("v4_k128_plain"), DOWN, SHAPE).weight.codes
    assert torch.equal(read(folder, DOWN, SHAPE).weight.codes, wanted)
    quantization["shared_layer_config"] = {}  # type: ignore[index]
    with pytest.raises(LowbitError, match="has no sizes for"):
        read(seed.write(tmp_path / "b", config, seed.tensors), DOWN, SHAPE)
