"""quanto: the tool's own files and values, and maps and tensors that contradict each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import check_values, expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel

CASES = fixture_cases("quanto")
NAME = "model.layers.0.self_attn.k_proj"
MAP = "quanto_qmap.json"


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


def shape_of(folder: Path) -> tuple[int, int]:
    """The shape of the module NAME."""
    values = expected(folder)[NAME]
    return values.shape[0], values.shape[1]


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)


def test_what_the_cases_cover() -> None:
    found = {path.name: str(read(path, NAME, shape_of(path)).weight.scheme) for path in CASES}
    assert found == {
        "int8": "int8 1xall bf16",
        "float8": "e4m3 1xall bf16",
        "float8_e5m2": "e5m2 1xall f16",
        "int4_row": "uint4 1xall bf16 offset",
        "int4_g96": "uint4 1x96 f16 offset",
        "int2_g96": "uint2 1x96 bf16 offset",
        "int4_zeros": "uint4 1xall bf16 asym",
        "int8_one_row": "int8 1xall f16",
        "int8_inputs": f"int8 1xall f32 {both('int8')}",
        "float8_inputs": f"e4m3 1xall f32 {both('e4m3')}",
        "int4_inputs": f"uint4 1xall f32 offset {both('e5m2')}",
        "int2_inputs": f"uint2 1xall f32 offset {both('e4m3fnuz')}",
    }


def both(kind: str) -> str:
    return f"(input {kind} allxall static) (output {kind} allxall static)"


ROUNDED = ("int8_inputs", "float8_inputs", "int4_inputs", "int2_inputs")
TOKENS = [[1, 5, 9, 3, 7, 2, 0, 14, 8, 8, 4]]


@pytest.mark.parametrize("name", ROUNDED)
def test_the_tools_own_logits(name: str) -> None:
    """Inputs and outputs of all layers rounded, the head's too: nearly all logits to the last bits."""
    wanted = load_file(case(name) / "outputs.safetensors")["logits"]
    for options in ({"linear_kernel": "reference", "dtype": "float32"}, {}):
        model = load_model(header_of(case(name)), device="cpu", kv_cache_dtype="f32", **options)
        assert (prompt_logits(model, TOKENS)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("suffix", ["input_scale", "output_scale"])
def test_each_scale_is_used(suffix: str, tmp_path: Path) -> None:
    """Of every module: with three times its scale the logits are others."""
    stored = load_file(case("int8_inputs") / "model.safetensors")
    wanted = load_file(case("int8_inputs") / "outputs.safetensors")["logits"]
    names = [name for name in stored if name.endswith(suffix)]
    assert len(names) == 8
    for name in names:
        folder = changed("int8_inputs", tmp_path / name, {name: stored[name] * 3})
        model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32")
        assert (prompt_logits(model, TOKENS)[0] - wanted).abs().max() > 0.01, name


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, shape_of(folder))))
    assert used == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}
    assert {module.scheme.is_dense for module in plan_model(header_of(folder)).modules} == {True, False}


def test_converted_without_the_rounding_of_outputs(tmp_path: Path) -> None:
    """What no other format can say is left out and said; weights and inputs stay as they are."""
    done = convert(header_of(case("int8_inputs")), "compressed-tensors", tmp_path / "out")
    assert "outputs are no longer rounded (they were: int8 allxall static)" in done.notes
    kept = read(tmp_path / "out", NAME, (32, 64))
    stored = read(case("int8_inputs"), NAME, (32, 64))
    assert kept.weight.scheme == replace(stored.weight.scheme, output=None) and kept.input is not None
    assert torch.equal(kept.weight.dequantize(), stored.weight.dequantize())
    assert kept.input.static_scale == stored.input.static_scale


def test_ranks_do_not_sum_what_is_rounded() -> None:
    with pytest.raises(LowbitError, match="o_proj are rounded.* use --tp-size 1") as caught:
        plan_model(header_of(case("int8_inputs")), tp_size=2)
    assert caught.value.code == "E0431"


def test_scales_before_calibration(tmp_path: Path) -> None:
    """1 is what they start from: quanto rounds to whole numbers then, and so does lowbit, saying it."""
    one_ = {f"{NAME}.input_scale": torch.tensor(1.0)}
    folder = changed("int8_inputs", tmp_path, one_)
    assert float(read(folder, NAME, (32, 64)).input.static_scale) == 1.0
    with pytest.raises(LowbitError, match="as before any calibration"):
        read(folder, NAME, (32, 64), strict=True)


def test_description() -> None:
    assert reader_of(case("int4_g96")).describe() == "quanto, uint4 in quanto_qmap.json"


def changed(
    name: str, out: Path, tensors: dict | None = None, said: object = "kept", config: dict | None = None
) -> Path:
    """A fixture with another map (None: without one), config and tensors (None: without it)."""
    seed = Seed.of(case(name))
    seed.documents = {MAP: (case(name) / MAP).read_text() if said == "kept" else json.dumps(said)}
    if said is None:
        seed.documents = {}
    found = seed.tensors | (tensors or {})
    return seed.write(
        out,
        seed.config | (config or {}),
        {key: tensor for key, tensor in found.items() if tensor is not None},
    )


@pytest.mark.parametrize("name", ["int8", "int4_g96", "int2_g96"])
def test_other_places_for_the_map(name: str, tmp_path: Path) -> None:
    """Without a map, and with transformers' words in config.json, the same weights."""
    shape, wanted = shape_of(case(name)), read(case(name), NAME, shape_of(case(name))).weight.dequantize()
    kind = name.partition("_")[0]
    for number, config in enumerate(
        ({}, {"quantization_config": {"quant_method": "quanto", "weights": kind, "activations": None}})
    ):
        folder = changed(name, tmp_path / str(number), said=None, config=config)
        assert torch.equal(read(folder, NAME, shape, strict=True).weight.dequantize(), wanted)
        assert not plan_model(open_checkpoint(str(folder))).modules[1].scheme.is_dense


def one(**said: object) -> dict:
    return {NAME: said}


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (one(weights="qint3", activations="none"), "E0212", "weights must be one of qint8, qint4"),
        (one(weights=["qint8"], activations="none"), "E0212", "weights must be one of"),
        ({NAME: "qint8"}, "E0212", "must have weights and activations"),
        (one(weights="none", activations="qint8"), "E0218", "exclude its norms"),
        (one(weights="qint8", activations=7), "E0212", "must be one of qint8, qfloat8"),
        (one(weights="qint8", activations="qint4"), "E0212", "or none, found 'qint4'"),
    ],
)
def test_wrong_maps(said: dict, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=words) as raised:
        plan_model(open_checkpoint(str(changed("int8", tmp_path, said=said))))
    assert raised.value.code == code and "\n" not in str(raised.value)


def test_tensors_win_over_the_map(tmp_path: Path) -> None:
    folder = changed("int8", tmp_path, said=one(weights="qint4", activations="none"))
    assert str(read(folder, NAME, (16, 64)).weight.scheme) == "int8 1xall bf16"
    with pytest.raises(LowbitError, match="is stored as int8"):
        read(folder, NAME, (16, 64), strict=True)


def test_transformers_words_without_quantized_tensors(tmp_path: Path) -> None:
    """transformers never saves quanto's tensors: the config of a plain model says so."""
    seed = Seed.of(case("int8"))
    plain = {key: value for key, value in seed.tensors.items() if "._" not in key}
    seed.documents = {}
    config = seed.config | {"quantization_config": {"quant_method": "quanto", "weights": "int8"}}
    with pytest.raises(LowbitError, match=r"no tensor ends in weight\._data"):
        plan_model(open_checkpoint(str(seed.write(tmp_path, config, plain))))


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "code", "words"),
    [
        ("int8", "weight._data", torch.zeros(16, 63, dtype=torch.int8), "E0213", r"\[16, 64\]"),
        ("int8", "weight._data", torch.zeros(16, 64, dtype=torch.int32), "E0213", "stores I8 or F8_E4M3"),
        ("int8", "weight._scale", torch.ones(1, 16), "E0213", r"\[16, 1\]"),
        ("int8", "weight._scale", None, "E0209", "weight._scale"),
        ("int8", "weight._scale", torch.full((16, 1), torch.inf), "E0215", "infinite"),
        ("float8", "weight._data", torch.full((32, 64), torch.nan).to(torch.float8_e4m3fn), "E0215", "NaN"),
        ("int4_g96", "weight._data._data", torch.zeros(16, 95, dtype=torch.uint8), "E0213", "divide a row"),
        ("int4_g96", "weight._scale", torch.ones(0, 1, dtype=torch.float16), "E0213", "divide a row"),
        ("int4_g96", "weight._shift", torch.ones(31, 1, dtype=torch.float16), "E0213", r"\[32, 1\]"),
        ("int4_g96", "weight._shift", torch.ones(32, 1), "E0213", "stores F16 or I8 or U8"),
        ("int4_g96", "weight._shift", None, "E0209", "weight._shift"),
        ("int4_zeros", "weight._shift", torch.full((16, 1), 16, dtype=torch.uint8), "E0213", "0 to 15"),
        ("int4_zeros", "weight._shift", torch.full((16, 1), -1, dtype=torch.int8), "E0213", "0 to 15"),
        ("int8_inputs", "input_scale", None, "E0209", "input_scale"),
        ("int8_inputs", "output_scale", torch.ones(32), "E0213", r"\[32\]"),
        ("int8_inputs", "output_scale", torch.tensor(torch.nan), "E0215", "NaN"),
        ("int8_inputs", "input_scale", torch.tensor(0.0), "E0215", "is 0, and activations are divided by it"),
        ("int8_inputs", "output_scale", torch.tensor(-0.5), "E0215", "is -0.5, .* expected more than 0"),
    ],
)
def test_wrong_tensors(name: str, suffix: str, tensor: object, code: str, words: str, tmp_path: Path) -> None:
    folder = changed(name, tmp_path, {f"{NAME}.{suffix}": tensor})
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, shape_of(case(name)))
    assert raised.value.code == code and NAME in str(raised.value) and "\n" not in str(raised.value)


def test_scales_of_activations_without_a_map(tmp_path: Path) -> None:
    folder = changed("int8", tmp_path, {f"{NAME}.input_scale": torch.tensor(0.5)}, said=None)
    with pytest.raises(LowbitError, match="only a map says to what"):
        read(folder, NAME, (16, 64))


def test_output_scales_are_none_of_the_cache() -> None:
    """Every layer has one, 1 where nothing was calibrated; elsewhere K's and V's would be the cache's."""
    header = header_of(case("int4_zeros"))
    assert any(name.endswith("k_proj.output_scale") for name in header.tensors)
    assert not SourceModel(header, strict=True).has_kv_scales
