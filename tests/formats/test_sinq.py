"""SINQ: what the tool saved against what it dequantizes; damaged files refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats.sinq import SIDECAR
from lowbit.kernels import choose, native
from lowbit.loading import load_model, plan_model

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("sinq")]
DOWN = "model.layers.0.mlp.down_proj"


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("sinq") if folder.name == name)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1]))
        weight = found.weight.dequantize()
        if found.input is not None:
            assert found.input.multiplier is not None
            weight = weight * found.input.multiplier
        assert torch.equal(weight, values), f"{name}: {found.weight.scheme}"


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu")
    kernels = {module.kernel for module in plan.modules if not module.scheme.is_dense}
    if native.library() is not None:
        assert kernels <= {"cpu_blocks", "cpu_columns"} or folder.name == "4_nf4"
        assert ("cpu_columns" in kernels) == (folder.name == "4_tiles")
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


def test_a_table_with_zero_points_is_multiplied_as_stored() -> None:
    weight = read(case("4_nf4"), DOWN, (32, 64)).weight
    assert str(weight.scheme) == "nf4 1x32 f16 float-zero" and weight.zeros is not None and weight.zeros.any()
    kernel = choose(weight.scheme, weight.shape, torch.device("cpu")).kernel
    assert kernel.name == ("cpu_blocks" if native.library() is not None else "reference")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ weight.dequantize().double().T
    found = kernel.linear(x, kernel.pack(weight, torch.device("cpu"))).double()
    assert (found - wanted).norm() < 2e-4 * wanted.norm()


def test_column_scales_multiply_the_input() -> None:
    found = read(case("4_g32"), DOWN, (32, 64))
    assert found.input is not None and found.input.multiplier is not None
    assert found.input.multiplier.shape == (64,) and len(found.input.multiplier.unique()) > 8
    assert str(found.weight.scheme) == "uint4 1x32 f16 float-zero" and found.bias is not None
    assert str(read(case("4_tiles"), DOWN, (32, 64)).weight.scheme) == "uint4 1x32 f16 32x1 f16 float-zero"


@pytest.mark.skipif(native.library() is None, reason="no native library")
def test_tiles_run_native() -> None:
    for name, values in expected(case("4_tiles")).items():
        weight = read(case("4_tiles"), name, (values.shape[0], values.shape[1])).weight
        kernel = choose(weight.scheme, weight.shape, torch.device("cpu")).kernel
        assert kernel.name == "cpu_columns"
        packed = kernel.pack(weight, torch.device("cpu"))
        assert torch.equal(kernel.unpack(packed).dequantize(), values)
        x = torch.randn(5, values.shape[1], generator=torch.Generator().manual_seed(2))
        wanted = x @ values.T
        assert (kernel.linear(x, packed) - wanted).norm() < 4e-3 * wanted.norm()


def written(folder: Path, name: str, change: dict[str, Tensor | None]) -> Path:
    seed = Seed.of(case(name))
    tensors = {key: value for key, value in seed.tensors.items() if change.get(key, 0) is not None}
    tensors |= {key: value for key, value in change.items() if value is not None}
    seed.write(folder, seed.config, tensors)
    (folder / SIDECAR).write_text((case(name) / SIDECAR).read_text())
    return folder


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"W_q": torch.zeros(63, 32, dtype=torch.uint8)}, "E0213"),
        ({"W_q": torch.zeros(32, 32, dtype=torch.int32)}, "E0213"),
        ({"meta.scale.x": torch.zeros(31, 2, dtype=torch.uint8)}, "E0213"),
        ({"meta.scale.s": torch.ones(1, 3).half()}, "E0213"),
        ({"meta.scale.s": torch.full((1, 2), float("nan")).half()}, "E0215"),
        ({"meta.scale.m": torch.ones(1, 2)}, "E0213"),
        ({"meta.zero.x": None}, "E0209"),
        ({"meta.scale2": torch.ones(1, 32).half()}, "E0213"),
        ({"meta.scale2": None}, "E0209"),
        ({"meta.scale2": torch.full((1, 64), float("inf")).half()}, "E0215"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    folder = written(tmp_path, "4_g32", {f"{DOWN}.{key}": value for key, value in change.items()})
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, (32, 64))
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("nbits", [0, 7, "4", True, None, 3, 8])
def test_bits_of_the_sidecar_that_cannot_be(nbits: object, tmp_path: Path) -> None:
    folder = written(tmp_path, "4_g32", {})
    told = json.loads((folder / SIDECAR).read_text())
    told[DOWN]["meta"]["nbits"] = nbits
    (folder / SIDECAR).write_text(json.dumps(told))
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, (32, 64))
    assert caught.value.code in ("E0212", "E0213")


def test_without_the_sidecar_the_config_says_it(tmp_path: Path) -> None:
    folder = written(tmp_path, "4_g32", {})
    (folder / SIDECAR).unlink()
    wanted = read(case("4_g32"), DOWN, (32, 64)).weight.dequantize()
    assert torch.equal(read(folder, DOWN, (32, 64)).weight.dequantize(), wanted)


def test_its_own_config_without_a_method(tmp_path: Path) -> None:
    folder = written(tmp_path, "4_g32", {})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"sinq": True, "backend": "sinq", "quantization_method": "sinq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert reader_of(folder).name == "sinq"


def test_a_table_of_three_bits_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "3_g32", {})
    told = json.loads((folder / SIDECAR).read_text())
    told[DOWN]["meta"]["method"] = "sinq_nf3"
    (folder / SIDECAR).write_text(json.dumps(told))
    with pytest.raises(LowbitError, match="sinq_nf3") as caught:
        read(folder, DOWN, (32, 64))
    assert caught.value.code == "E0218"
