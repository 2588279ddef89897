"""Four Over Six: the tool's own files and values, padded and untiled ones built by hand, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.kernels import native
from lowbit.loading import plan_model

CASES = fixture_cases("fouroversix")
NAME = "model.layers.0.self_attn.k_proj"
SHAPE = (128, 64)
ODD = (72, 48)  # of rows and columns that are padded
LARGEST = {"nvfp4": 6 * 256, "static_6": 6 * 448, "static_4": 4 * 448, "nvint4": 7 * 448}


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    """To the last bit or two: the tool multiplies by amax first and divides then."""
    for name, values in expected(folder).items():
        shape = (values.shape[0], values.shape[1])
        found = read(folder, name, shape, strict=True).weight
        assert found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, shape))
        limit = 0.0 if folder.name == "mxfp4" else 2.0**-22
        assert ((found.dequantize() - values).abs() <= limit * values.abs()).all()


def test_what_the_cases_cover() -> None:
    names = {path.name: tuple(expected(path)[NAME].shape) for path in CASES}
    found = {name: str(read(case(name), NAME, shape).weight.scheme) for name, shape in names.items()}
    nvfp4 = "e2m1 1x16 e4m3 allxall f32"
    assert found == {
        "nvfp4": nvfp4,
        "static_6": nvfp4,
        "static_4": nvfp4,
        "nvint4": nvfp4.replace("e2m1", "int4"),
        "mxfp4": "e2m1 1x32 e8m0",
    }


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_model(header_of(folder), device="cpu").modules
    kernels = {module.kernel for module in plan if not module.scheme.is_dense}
    assert kernels == {"reference" if native.library() is None else "cpu_blocks"}
    assert sum(module.scheme.is_dense for module in plan) == 4  # embedding, head, o_proj, down_proj
    assert "inputs too" in caplog.text


def built(folder: Path, shape: tuple[int, int], tiled: bool, config: dict | None = None) -> tuple[Path, Tensor]:
    """A module, padded where it is tiled, and its scales in rows."""
    rows, columns = (128, 64) if tiled else shape
    random = torch.Generator().manual_seed(4)
    scales = torch.rand(rows, columns // 16, generator=random).to(torch.float8_e4m3fn)
    flat = torch.empty(scales.numel(), dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns // 16):
            place = row * (columns // 16) + column
            if tiled:  # one tile: 32 rows of 16 bytes, four rows that are 32 apart beside one another
                place = row % 32 * 16 + row // 32 * 4 + column
            flat[place] = scales.view(torch.uint8)[row, column]
    stem = f"{NAME}.quantized_weight"
    tensors = {
        f"{stem}_values": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=random),
        f"{stem}_scale_factors": flat.view(torch.float8_e4m3fn),
        f"{stem}_amax": torch.tensor(3.5),
        f"{stem}_metadata": torch.tensor([*shape, rows, columns, 1, int(tiled)]),
    }
    said = {"quant_method": "fouroversix", "dtype": "nvfp4", "scale_rule": "mse", **(config or {})}
    write_folder(folder, tensors, said)
    return folder, scales[: shape[0], : shape[1] // 16].float()


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "rows"])
def test_padding_and_tiles(tiled: bool, tmp_path: Path) -> None:
    folder, scales = built(tmp_path, ODD, tiled)
    found = read(folder, NAME, ODD).weight
    assert torch.equal(found.scales[0].float(), scales)
    assert float(found.scales[1]) == pytest.approx(3.5 / 1536) and found.codes.shape == ODD


def test_a_module_of_its_own(tmp_path: Path) -> None:
    """An override inherits nothing: its rule is mse where the model's is another."""
    config = {"scale_rule": "static_4", "module_config_overrides": {NAME: {"dtype": "nvfp4"}}}
    folder, _ = built(tmp_path / "own", ODD, True, config)
    assert float(read(folder, NAME, ODD).weight.scales[1]) == pytest.approx(3.5 / 1536)
    folder, _ = built(tmp_path / "all", ODD, True, {"scale_rule": "static_4"})
    assert float(read(folder, NAME, ODD).weight.scales[1]) == pytest.approx(3.5 / 1792)


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"dtype": "if4"}, "E0218", "weights in 'if4' are not read"),
        ({"weight_dtype": "nvfp6_e2m3"}, "E0218", "not read"),
        ({"keep_master_weights": True}, "E0218", "master weights"),
        ({"scale_rule": "best"}, "E0212", "scale_rule 'best' is unknown"),
        ({"module_config_overrides": [1]}, "E0212", "object of objects"),
        ({"module_config_overrides": {"x": {"dtype": "if4"}}}, "E0218", "'x': weights in 'if4'"),
        ({"dtype": "mxfp4"}, "E0213", "Four Over Six stores"),
    ],
    ids=["if4", "nvfp6", "masters", "rule", "overrides", "own", "mxfp4"],
)
def test_wrong_configs(config: dict, code: str, words: str, tmp_path: Path) -> None:
    folder, _ = built(tmp_path, ODD, True, config)
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, ODD)
    assert raised.value.code == code and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "code", "words"),
    [
        ({"values": torch.zeros(128, 16, dtype=torch.uint8)}, "E0213", "values"),
        ({"scale_factors": torch.zeros(511).to(torch.float8_e4m3fn)}, "E0213", r"\[512\]"),
        ({"scale_factors": torch.full((512,), float("nan")).to(torch.float8_e4m3fn)}, "E0215", "NaN"),
        ({"amax": torch.tensor([float("inf")])}, "E0215", "infinite"),
        ({"amax": torch.ones(2)}, "E0213", "amax"),
        ({"metadata": torch.tensor([128, 64, 128, 64, 0, 1])}, "E0213", "describes other tensors"),
        ({"metadata": torch.tensor([128, 64, 256, 64, 1, 1])}, "E0213", "describes other tensors"),
        ({"metadata": None}, "E0209", "no file contains"),
    ],
    ids=["values", "scales", "nan", "inf", "amax", "unpacked", "padded", "metadata"],
)
def test_damage(tensors: dict, code: str, words: str, tmp_path: Path) -> None:
    seed = Seed.of(case("nvfp4"))
    found = seed.tensors | {f"{NAME}.quantized_weight_{name}": one for name, one in tensors.items()}
    kept = {name: one for name, one in found.items() if one is not None}
    folder = seed.write(tmp_path, copy.deepcopy(seed.config), kept)
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, SHAPE)
    assert raised.value.code == code


def test_a_whole_model_is_loaded() -> None:
    from forward_helpers import prompt_logits
    from lowbit.loading import load_model

    model = load_model(open_checkpoint(str(case("nvint4"))), device="cpu")
    [logits] = prompt_logits(model, [[1, 5, 9, 3]])
    assert logits.isfinite().all()


def test_largest_numbers_of_the_rules() -> None:
    from lowbit.checkpoint.tensor_data import TensorData

    for name, largest in LARGEST.items():
        folder = case(name)
        with TensorData(header_of(folder)) as data:
            amax = float(data.tensor(f"{NAME}.quantized_weight_amax"))
        assert float(read(folder, NAME, SHAPE).weight.scales[1]) == pytest.approx(amax / largest)
