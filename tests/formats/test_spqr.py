"""SpQR: what the tool's layers hold against what its own kernels make of them; damaged files refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import check_values, expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.kernels import native, packed_linear
from lowbit.kernels.gpu.weight_layout import layout_of
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.scheme import dense

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("spqr")]
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (64, 96)
STORED = (".dense_weights", ".row_offsets", ".col_vals", ".in_perm")


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("spqr") if folder.name == name)


def changed(seed: Seed, suffix: str, at: int, value: int) -> Tensor:
    """A tensor of the layer with one number changed."""
    tensor = seed.tensors[f"{DOWN}.{suffix}"].clone()
    tensor[at] = value
    return tensor


def refused(seed: Seed, change: dict[str, Tensor | None], folder: Path) -> LowbitError:
    """The error of the layer with its tensors replaced (None: gone)."""
    replaced = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | replaced).items() if value is not None}
    with pytest.raises(LowbitError) as caught:
        read(seed.write(folder, seed.config, tensors), DOWN, SHAPE)
    assert DOWN in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight
        assert values.dtype == torch.float16 and found.codes.max() == 7 and found.outliers is not None
        many = len(found.outliers.entries)
        assert (many == 0) == (folder.name == "no_outliers")
        assert found.scheme.outlier_share * values.numel() >= many  # some only fill rows up


def test_the_fixtures_have_what_they_are_for() -> None:
    """Columns out of order, rows with and without outliers, both forms of their offsets, none at all."""
    rows = {name: Seed.of(case(name)).tensors for name in ("csr_act_order", "ptcsr_act_order", "no_outliers")}
    order = rows["csr_act_order"][f"{DOWN}.in_perm"].view(torch.int16)
    assert not torch.equal(order, torch.arange(96, dtype=torch.int16))
    offsets = {name: tensors[f"{DOWN}.row_offsets"] for name, tensors in rows.items()}
    assert [len(found) for found in offsets.values()] == [65, 5, 65]
    assert (offsets["csr_act_order"].diff() == 0).any() and offsets["csr_act_order"].diff().max() > 1
    assert (rows["ptcsr_act_order"][f"{DOWN}.col_vals"] == 0).any()  # rows filled up to the longest
    assert rows["no_outliers"][f"{DOWN}.col_vals"].shape == (0,) and not offsets["no_outliers"].any()


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_and_the_plan_says_what_it_costs(folder: Path, tmp_path: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu")
    [down] = [module for module in plan.modules if module.name == DOWN]
    order = " act-order" * (f"{DOWN}.in_perm" in header_of(folder).tensors)
    assert str(down.scheme) == f"uint3 1x16 f16 float-zero{order} outliers f16"
    assert "5 bits a weight and 32 an outlier" in reader_of(folder).describe()
    model = load_model(header_of(folder), device="cpu")
    if native.library() is not None:
        assert down.kernel == "cpu_blocks"
        entries = header_of(folder).tensors[f"{DOWN}.col_vals"].shape[0]
        assert down.nbytes * 8 == round(5 * 64 * 96 + 32 * entries + 32 * 65)
    logits = prompt_logits(model, [[1, 2, 3, 4, 5]])[0]
    # The same model of plain matrices.
    seed = Seed.of(folder)
    plain = {name: tensor for name, tensor in seed.tensors.items() if not name.endswith(STORED)}
    plain |= {f"{name}.weight": values for name, values in expected(folder).items()}
    config = {key: value for key, value in seed.config.items() if key != "quantization_config"}
    written = header_of(seed.write(tmp_path, config, plain))
    wanted = prompt_logits(load_model(written, device="cpu"), [[1, 2, 3, 4, 5]])[0]
    # Products leave float16's roundings out, and round x where float16 matrices do not.
    assert logits.isfinite().all() and (logits - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def test_in_files_they_are_decoded(tmp_path: Path) -> None:
    folder = case("csr_act_order")
    assert not convert(header_of(folder), "dense", tmp_path / "out").errors
    written = read(tmp_path / "out", DOWN, SHAPE).weight
    assert written.scheme == dense("f16") and torch.equal(written.codes, expected(folder)[DOWN])


def test_where_no_kernel_runs_them_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = case("csr_act_order")
    wanted = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    scheme = read(folder, DOWN, SHAPE).weight.scheme
    assert layout_of(scheme, SHAPE) == "some weights have outliers", "on a GPU"
    monkeypatch.setattr(packed_linear, "functions", lambda: None)
    [down] = [m for m in plan_model(header_of(folder), device="cpu").modules if m.name == DOWN]
    assert (down.kernel, down.computes, down.nbytes) == ("reference", "f16 copy", 2 * 64 * 96)
    found = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()  # other layers round x no longer


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dense_weights": torch.zeros(383, dtype=torch.int64)}, "E0213"),
        ({"dense_weights": torch.zeros(384, 1, dtype=torch.int64)}, "E0213"),
        ({"dense_weights": torch.zeros(768, dtype=torch.int32)}, "E0213"),
        ({"dense_weights": torch.full((384,), 0xFF << 54)}, "E0215"),  # scales of scales are NaN
        ({"row_offsets": torch.zeros(64, dtype=torch.int32)}, "E0213"),
        ({"row_offsets": torch.zeros(65, dtype=torch.int64)}, "E0213"),
        ({"row_offsets": torch.zeros(65, dtype=torch.int32)}, "E0213"),
        ({"row_offsets": torch.zeros(5, dtype=torch.int32)}, "E0213"),
        ({"col_vals": torch.zeros(488)}, "E0213"),
        ({"col_vals": torch.zeros(0)}, "E0213"),
        ({"col_vals": torch.zeros(487, dtype=torch.int32)}, "E0213"),
        ({"col_vals": torch.zeros(488, 1, dtype=torch.int32)}, "E0213"),
        ({"in_perm": torch.zeros(48, dtype=torch.int32)}, "E0213"),
        ({"in_perm": torch.zeros(96, dtype=torch.int16)}, "E0213"),
        ({"in_perm": torch.zeros(47, dtype=torch.int32)}, "E0213"),
        ({"in_perm": torch.zeros(0, dtype=torch.int32)}, "E0213"),
        ({"in_perm": None}, "E0209"),
        ({"row_offsets": None}, "E0209"),
        ({"col_vals": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    assert refused(Seed.of(case("csr_act_order")), change, tmp_path).code == code


HALF = torch.tensor([0.5, float("inf"), 6e4], dtype=torch.float16).view(torch.int16).tolist()


@pytest.mark.parametrize(
    ("suffix", "at", "value", "code", "said"),
    [
        ("row_offsets", 0, 1, "E0213", "must rise from 0 to the 488 outliers .* holds 1 to 488"),
        ("row_offsets", 64, 489, "E0213", "must rise from 0 to the 488 outliers .* holds 0 to 489"),
        ("row_offsets", 64, 2**31 - 1, "E0213", "holds 0 to 2147483647"),
        ("row_offsets", 30, -5, "E0213", "falls 1 times"),
        ("row_offsets", 30, 10**6, "E0213", "falls 1 times"),
        ("col_vals", 7, HALF[0] << 16 | 96, "E0213", "holds column 96 of 96"),
        ("col_vals", 7, HALF[0] << 16 | 0xFFFF, "E0213", "holds column 65535 of 96"),
        ("col_vals", 7, HALF[1] << 16 | 3, "E0215", "1 infinite of 488"),
        ("dense_weights", 5, 0, "E0213", "rows disagree about the tile's scales"),
        ("dense_weights", 5, -1, "E0213", "rows disagree"),
        ("in_perm", 0, 0, "E0213", "no permutation of 96 columns"),
        ("in_perm", 0, -1, "E0213", "no permutation of 96 columns"),
    ],
)
def test_numbers_that_cannot_be(
    suffix: str, at: int, value: int, code: str, said: str, tmp_path: Path
) -> None:
    seed = Seed.of(case("csr_act_order"))
    error = refused(seed, {suffix: changed(seed, suffix, at, value)}, tmp_path)
    assert error.code == code
    with pytest.raises(LowbitError, match=said):
        raise error


def test_two_outliers_of_one_weight(tmp_path: Path) -> None:
    seed = Seed.of(case("csr_act_order"))
    offsets, entries = seed.tensors[f"{DOWN}.row_offsets"], seed.tensors[f"{DOWN}.col_vals"]
    at = int(offsets[int(offsets.diff().argmax())])  # the first outlier of a row that has more
    error = refused(seed, {"col_vals": changed(seed, "col_vals", at + 1, int(entries[at]))}, tmp_path)
    assert error.code == "E0213" and "two outliers of one weight" in str(error)


@pytest.mark.parametrize("bit", [62, 63])
def test_bits_that_nothing_uses(bit: int, tmp_path: Path) -> None:
    """Set in both rows of a pair, so that they agree."""
    seed = Seed.of(case("csr_act_order"))
    words = seed.tensors[f"{DOWN}.dense_weights"].clone()
    words[4:6] |= -(1 << 63) if bit == 63 else 1 << bit
    error = refused(seed, {"dense_weights": words}, tmp_path)
    assert error.code == "E0213" and "rows disagree" in str(error)


def test_offsets_of_16_rows_are_multiples(tmp_path: Path) -> None:
    seed = Seed.of(case("ptcsr_act_order"))
    offsets = seed.tensors[f"{DOWN}.row_offsets"].tolist()
    at = next(number for number, offset in enumerate(offsets) if offset)
    error = refused(seed, {"row_offsets": changed(seed, "row_offsets", at, offsets[at] - 1)}, tmp_path)
    assert error.code == "E0213" and "multiples of 16" in str(error)


@pytest.mark.parametrize("key", ["bits", "beta1", "beta2"])
@pytest.mark.parametrize("value", [0, -1, 4, 32, 2**40, "3", True, [], None])
def test_configs_that_cannot_be(key: str, value: object, tmp_path: Path) -> None:
    seed = Seed.of(case("csr_identity"))
    config = copy.deepcopy(seed.config)
    config["quantization_config"][key] = value  # type: ignore[index]
    with pytest.raises(LowbitError, match=rf"{key} must be \d+") as caught:
        read(seed.write(tmp_path, config, seed.tensors), DOWN, SHAPE)
    assert caught.value.code == "E0212"


def test_sizes_in_the_config(tmp_path: Path) -> None:
    """What they say must be so; they may say nothing, and a list of one says the same."""
    seed = Seed.of(case("csr_act_order"))
    wanted = expected(case("csr_act_order"))[DOWN]
    config = copy.deepcopy(seed.config)
    quantization: dict[str, object] = config["quantization_config"]  # type: ignore[assignment]
    sizes = quantization["shapes"]
    for number, told in enumerate(({}, None, {key: [size] for key, size in sizes.items()})):  # type: ignore[attr-defined]
        quantization["shapes"] = told
        folder = seed.write(tmp_path / str(number), config, seed.tensors)
        assert torch.equal(read(folder, DOWN, SHAPE).weight.dequantize(), wanted.float())
    for number, told in enumerate(([1], "x", {f"{DOWN}.col_vals.shape": 487})):
        quantization["shapes"] = told
        with pytest.raises(LowbitError, match="shapes") as caught:
            read(seed.write(tmp_path / f"bad{number}", config, seed.tensors), DOWN, SHAPE)
        assert caught.value.code in ("E0212", "E0213")


def test_no_order_is_the_stored_one(tmp_path: Path) -> None:
    """An empty one, as the tool's placeholder writes it, and one that moves nothing."""
    seed = Seed.of(case("csr_identity"))
    wanted = expected(case("csr_identity"))[DOWN]
    config = copy.deepcopy(seed.config)
    config["quantization_config"]["shapes"][f"{DOWN}.in_perm.shape"] = 0  # type: ignore[index]
    tensors = {**seed.tensors, f"{DOWN}.in_perm": torch.zeros(0, dtype=torch.int32)}
    found = read(seed.write(tmp_path, config, tensors), DOWN, SHAPE).weight
    assert torch.equal(found.dequantize(), wanted.float())


def test_layers_that_are_no_whole_tiles(tmp_path: Path) -> None:
    seed = Seed.of(case("csr_identity"))
    with pytest.raises(LowbitError, match=r"63 x 96, no whole number of SpQR's tiles") as caught:
        read(seed.write(tmp_path, seed.config, seed.tensors), DOWN, (63, 96))
    assert caught.value.code == "E0218"


def test_the_converters_config(tmp_path: Path) -> None:
    """It leaves the dtype empty, which is read, and the classes, which must be named."""
    seed = Seed.of(case("csr_act_order"))
    config = {key: value for key, value in seed.config.items() if key != "dtype"} | {"torch_dtype": None}
    folder = seed.write(tmp_path / "dtype", config, seed.tensors)
    assert load_model(header_of(folder), device="cpu")
    folder = seed.write(tmp_path / "classes", config | {"architectures": []}, seed.tensors)
    with pytest.raises(LowbitError, match="'architectures' must list the model's class"):
        plan_model(header_of(folder), device="cpu")
