"""FP-Quant: what its own layers answer, and damaged files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.loading.source_modules import SourceModel

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("fp_quant")]
DOWN = "model.layers.0.mlp.down_proj"


def case(name: str) -> Path:
    return FIXTURES / "fp_quant" / name


def logits(folder: Path, tokens: list[list[int]], **options: Any) -> Tensor:
    model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32", **options)
    return prompt_logits(model, tokens)[0]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_weights(folder: Path) -> None:
    """NVFP4: the tool divides by the outer scale, here its reciprocal multiplies."""
    for name, values in load_file(folder / "expected.safetensors").items():
        if name != "logits":
            found = read(folder, name.removesuffix(".weight"), (values.shape[0], values.shape[1])).weight
            near = 2.0**-23 * values.abs() * (folder.name == "nvfp4")
            assert ((found.dequantize() - values).abs() <= near).all(), name


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_logits(folder: Path) -> None:
    wanted = load_file(folder / "expected.safetensors")["logits"]
    tokens = json.loads((folder / "about.json").read_text())["tokens"]
    assert (logits(folder, tokens) - wanted).abs().max() <= 0.02  # x is bfloat16 before plain matrices
    exact = logits(folder, tokens, linear_kernel="reference", dtype="float32")
    assert (exact - wanted).abs().max() <= 1e-5


def test_the_plan_says_what_is_rotated() -> None:
    plan = plan_model(header_of(case("mxfp4")), device="cpu")
    [down] = [module for module in plan.modules if module.name == DOWN]
    assert str(down.scheme) == (
        "e2m1 1x32 e8m0 allxall f32 (input rotated by hadamard 32) (input e2m1 1x32 dynamic e8m0)"
    )
    assert down.kernel == "cpu_blocks"
    assert reader_of(case("mxfp4")).describe() == "fp_quant, mxfp4 by abs_max, hadamard 32 in config.json"
    with pytest.raises(LowbitError) as caught:
        SourceModel(header_of(case("mxfp4")))
    assert caught.value.code == "E0450"


def test_the_stored_matrix_counts() -> None:
    """What is a multiple of Hadamard's is no product; another order of its columns is; none is none."""
    rule = read(case("mxfp4_pseudo"), DOWN, (64, 64)).input
    assert rule is not None and rule.rotation is not None and rule.rotation.matrix is None
    rule = read(case("nvfp4_gsr_pseudo"), DOWN, (64, 64)).input
    assert rule is not None and rule.rotation is not None and rule.rotation.matrix is not None


def test_an_identity_is_left_out(tmp_path: Path) -> None:
    seed = Seed.of(case("mxfp4_pseudo"))
    identity = {f"{DOWN}.forward_hadamard_matrix": torch.eye(32).bfloat16()}
    folder = seed.write(tmp_path, seed.config, seed.tensors | identity)
    rule = read(folder, DOWN, (64, 64)).input
    assert rule is not None and rule.rotation is None


def test_empty_tensors_are_passed_over(tmp_path: Path) -> None:
    """transformers leaves parameters of no size where a layer has none."""
    seed = Seed.of(case("mxfp4"))
    empty = {f"{DOWN}.{key}": torch.zeros(0) for key in ("weight", "dqweight")}
    folder = seed.write(tmp_path, seed.config, seed.tensors | empty)
    assert torch.equal(
        read(folder, DOWN, (128, 128)).weight.codes, read(case("mxfp4"), DOWN, (128, 128)).weight.codes
    )
    load_model(header_of(folder), device="cpu")


def test_scales_without_padding(tmp_path: Path) -> None:
    seed = Seed.of(case("mxfp4"))
    key = "model.layers.0.self_attn.k_proj"
    assert seed.tensors[f"{key}.scales"].shape == (128, 4)
    folder = seed.write(
        tmp_path, seed.config, seed.tensors | {f"{key}.scales": seed.tensors[f"{key}.scales"][:64]}
    )
    assert torch.equal(
        read(folder, key, (64, 128)).weight.dequantize(),
        read(case("mxfp4"), key, (64, 128)).weight.dequantize(),
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"qweight": torch.zeros(128, 32, dtype=torch.uint8)}, "E0213"),
        ({"qweight": torch.zeros(128, 64)}, "E0213"),
        ({"scales": torch.zeros(128, 5, dtype=torch.uint8)}, "E0213"),
        ({"scales": None}, "E0209"),
        ({"scales": torch.full((128, 4), 255, dtype=torch.uint8)}, "E0215"),
        ({"forward_hadamard_matrix": torch.zeros(64, 64)}, "E0213"),
        ({"forward_hadamard_matrix": torch.full((32, 32), float("nan"))}, "E0215"),
        ({"forward_hadamard_matrix": None}, "E0209"),
        ({"act_global_scale": torch.zeros(1)}, "E0215"),
        ({"weight_global_scale": torch.full((1,), float("inf"))}, "E0215"),
        ({"weight_global_scale": torch.ones(2)}, "E0213"),
        ({"qweight": None, "weight": torch.zeros(128, 128)}, "E0218"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("mxfp4"))
    changed = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, (128, 128))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_rows_of_scales_that_cannot_be_told(tmp_path: Path) -> None:
    """128 columns of nvfp4 have 8 scales; 96 of mxfp4 would have 3, stored as 4."""
    seed = Seed.of(case("mxfp4_quest"))
    changed = {
        f"{DOWN}.qweight": torch.zeros(128, 48, dtype=torch.uint8),
        f"{DOWN}.scales": torch.zeros(128, 4, dtype=torch.uint8),
    }
    folder = seed.write(tmp_path, seed.config, seed.tensors | changed)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, (128, 96))
    assert caught.value.code == "E0218" and "not known" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("forward_dtype", "mxfp8", "E0212"),
        ("forward_dtype", [], "E0212"),
        ("forward_dtype", None, "E0212"),
        ("forward_method", None, "E0212"),
        ("forward_method", "mean", "E0212"),
        ("hadamard_group_size", 48, "E0212"),
        ("hadamard_group_size", True, "E0212"),
        ("hadamard_group_size", 64, "E0213"),
        ("store_master_weights", True, "E0218"),
    ],
)
def test_configs_that_cannot_be(key: str, value: object, code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("mxfp4"))
    config = copy.deepcopy(seed.config)
    config["quantization_config"][key] = value
    folder = seed.write(tmp_path, config, seed.tensors)
    with pytest.raises(LowbitError) as caught:
        load_model(header_of(folder), device="cpu")
    assert caught.value.code == code and "\n" not in str(caught.value)
