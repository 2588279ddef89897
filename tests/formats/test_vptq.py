"""VPTQ: what the tool's layers hold against its own dequantizer; damaged files refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.kernels import native as native_library
from lowbit.kernels.cpu_row_vectors import CpuRowVectors
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.number_formats import RowVectorLayout

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("vptq")]
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (32, 64)


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("vptq") if folder.name == name)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight
        decoded = found.decoded(found.scheme.decoded)
        assert torch.equal(decoded.codes, values.to(decoded.codes.dtype)), name
        assert found.scheme.weight.vectors is not None, "but it stays packed"


def test_gptqmodels_sizes_are_counted() -> None:
    """One rule for all modules: groups and outliers follow from a module's columns."""
    found = {
        (folder, name.rpartition(".")[2]): str(
            read(case(folder), name, SHAPE if name == DOWN else (32, 32)).weight.scheme
        )
        for folder in ("gptqmodel_outliers", "gptqmodel_groups")
        for name in (DOWN, "model.layers.0.self_attn.k_proj")
    }
    assert found == {
        ("gptqmodel_outliers", "down_proj"): "rvq6_32+8_bf16_2x28_out8 allx1 bf16 offset act-order",
        ("gptqmodel_outliers", "k_proj"): "rvq6_32+8_bf16_2x14_out4 allx1 bf16 offset act-order",
        ("gptqmodel_groups", "down_proj"): "rvq8_32+4_bf16_4x16",
        ("gptqmodel_groups", "k_proj"): "rvq8_32+4_bf16_2x16",
    }


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"npercent": "5"}, "E0212", "npercent must be a number from 0 to 100, found '5'"),
        ({"npercent": 101}, "E0212", "npercent must be a number"),
        ({"group_size": 28}, "E0212", "one of them -1, found 28 and 2"),
        ({"group_num": 0}, "E0212", "found -1 and 0"),
        ({"group_num": "2"}, "E0212", "found -1 and '2'"),
        ({"group_num": 3}, "E0213", "of 32 x 64 by config.json"),
        ({"npercent": 20}, "E0213", "of 32 x 64 by config.json"),
        ({"norm_dim": 1}, "E0218", "scales of rows are not read"),
        ({"vector_lens": None}, "E0212", "vector_lens"),
    ],
)
def test_gptqmodels_sizes_that_cannot_be(change: dict, code: str, words: str, tmp_path: Path) -> None:
    seed = Seed.of(case("gptqmodel_outliers"))
    config = copy.deepcopy(seed.config)
    config["quantization_config"] |= change
    with pytest.raises(LowbitError, match=words) as raised:
        read(seed.write(tmp_path, config, seed.tensors), DOWN, SHAPE)
    assert raised.value.code == code and "\n" not in str(raised.value)


def test_an_index_below_zero(tmp_path: Path) -> None:
    seed = Seed.of(case("gptqmodel_outliers"))
    tensors = dict(seed.tensors)
    tensors[f"{DOWN}.outlier_indices"] = tensors[f"{DOWN}.outlier_indices"].clone()
    tensors[f"{DOWN}.outlier_indices"][0, 1, 2] = -1
    with pytest.raises(LowbitError, match="holds index -1 of a codebook of 16") as raised:
        read(seed.write(tmp_path, seed.config, tensors), DOWN, SHAPE)
    assert raised.value.code == "E0213"


def test_indices_stay_packed() -> None:
    """What the file holds, an index in whole bytes; outliers as numbers."""
    weight = read(case("v8_k256_res16"), DOWN, SHAPE).weight
    layout = RowVectorLayout(8, 256, 16, "bf16")
    assert weight.scheme.weight.vectors == layout
    assert str(weight.scheme) == "rvq8_256+16_bf16 allx1 bf16 offset act-order"
    assert weight.codes.shape == (4, 2 * 64) and weight.nbytes == 4 * 2 * 64 + 2 * 2 * 64
    assert weight.codebooks is not None and weight.codebooks.shape == (1, 272, 8)
    tensors = load_file(case("v8_k256_res16") / "model.safetensors")
    words = tensors[f"{DOWN}.indices"][0].view(torch.uint8).flatten(1)
    bits = (words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, : 12 * 64]
    index = (bits.view(4, 64, 12).long() << torch.arange(12)).sum(-1)
    main, second = layout.indices(weight.codes)
    assert second is not None and torch.equal(main, (index & 255).int()) and torch.equal(second, index >> 8)

    parted = read(case("v6_k64_outliers"), DOWN, SHAPE).weight
    layout = RowVectorLayout(6, 64, 0, "f16", 2, 28, 8)
    assert parted.scheme.weight.vectors == layout
    assert parted.codes.shape == (6, 8 * 6 * 2 + 56)  # 32 rows are 6 vectors, the last one short
    numbers = layout.outlier_numbers(parted.codes).transpose(1, 2).reshape(36, 8)
    tensors = load_file(case("v6_k64_outliers") / "model.safetensors")
    table = tensors[f"{DOWN}.outlier_centroids.weight"].view(16, 4)
    wanted = table[tensors[f"{DOWN}.outlier_indices"][0].long()].transpose(1, 2).reshape(-1, 8)
    assert torch.equal(numbers[:32], wanted)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_and_the_plan_says_what_it_costs(
    folder: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing multiplies vectors of rows they are decoded when they are loaded, to 16 bits a weight."""
    if not native:
        monkeypatch.setattr(CpuRowVectors, "refuses", lambda *_: "not here")
    [down] = [module for module in plan_model(header_of(folder), device="cpu").modules if module.name == DOWN]
    entries = header_of(folder).tensors
    stored = sum(entry.nbytes for name, entry in entries.items() if name.startswith(f"{DOWN}."))
    packed = native and native_library.library() is not None
    assert (down.kernel == "cpu_row_vectors") == packed and str(down.scheme).startswith("rvq")
    assert down.nbytes == (stored if packed else 2 * 32 * 64)
    if not native:
        assert down.computes in ("f16 copy", "bf16 copy") and ("cpu_row_vectors", "not here") in down.refusals
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()
    if not native:
        monkeypatch.undo()
        others = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
        assert (others - logits).abs().max() < 0.02 * logits.abs().max()


def test_what_is_converted_are_the_floats_of_the_codebooks_type(tmp_path: Path) -> None:
    assert not convert(header_of(case("v8_k256_res16")), "dense", tmp_path / "out").errors
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in expected(case("v8_k256_res16")).items():
        found = tensors[f"{name}.weight"]
        assert found.dtype is torch.bfloat16 and torch.equal(found, values.bfloat16()), name


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
    wanted = read(case("v4_k128_plain"), DOWN, SHAPE).weight.dequantize()
    assert torch.equal(read(folder, DOWN, SHAPE).weight.dequantize(), wanted)
    quantization["shared_layer_config"] = {}  # type: ignore[index]
    with pytest.raises(LowbitError, match="has no sizes for"):
        read(seed.write(tmp_path / "b", config, seed.tensors), DOWN, SHAPE)
