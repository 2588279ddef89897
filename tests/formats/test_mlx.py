"""MLX and metal: the tools' own files and values, what is written, and what contradicts itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme, written
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.mlx_writer import MlxWriter as Writer
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert

CASES = fixture_cases("mlx") + fixture_cases("metal")
NAME = "model.layers.0.self_attn.k_proj"


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


def shape_of(folder: Path) -> tuple[int, int]:
    """The shape of the module NAME."""
    return 16, 128 if folder.name == "8_g128" else 64


def dequantized(folder: Path, name: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """The values of a module, or of a stack of experts, and its scheme."""
    if len(shape) == 2:
        found = read(folder, name, (shape[0], shape[1]), strict=True).weight
        return found.dequantize(), str(found.scheme)
    reader = reader_of(folder, strict=True)
    with TensorData(header_of(folder)) as data:
        each = [
            reader.read(StoredModule(name, name, (shape[1], shape[2]), number, shape[0], dotted=True), data)
            for number in range(shape[0])
        ]
    return torch.stack([one.weight.dequantize() for one in each]), str(each[0].weight.scheme)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_tools_own_values(folder: Path) -> None:
    for name, values in expected(folder).items():
        found, told = dequantized(folder, name, tuple(values.shape))
        assert torch.equal(found, values), f"{name}: {told}"


def test_what_the_cases_cover() -> None:
    found = {f"{p.parent.name}/{p.name}": str(read(p, NAME, shape_of(p)).weight.scheme) for p in CASES}
    assert found == {
        "mlx/1_g32": "uint1 1x32 bf16 offset",
        "mlx/2_g32": "uint2 1x32 f16 offset",
        "mlx/3_g64": "uint3 1x64 bf16 offset",
        "mlx/4_g64": "uint4 1x64 bf16 offset",
        "mlx/5_g32": "uint5 1x32 f32 offset",
        "mlx/6_g64": "uint6 1x64 f16 offset",
        "mlx/8_g128": "uint8 1x128 bf16 offset",
        "mlx/experts": "uint4 1x32 bf16 offset",
        "mlx/experts_nvfp4": "e2m1 1x16 e4m3",
        "mlx/mixed": "uint3 1x32 bf16 offset",
        "mlx/mxfp4": "e2m1 1x32 e8m0",
        "mlx/mxfp8": "e4m3 1x32 e8m0",
        "mlx/nvfp4": "e2m1 1x16 e4m3",
        "metal/2_g16": "uint2 1x16 f32 offset",
        "metal/4_g32": "uint4 1x32 f32 offset",
        "metal/8_g32": "uint8 1x32 f32 offset",
    }


@pytest.mark.parametrize("folder", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, shape_of(folder))))
    assert used == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}
    plan = plan_model(header_of(folder), device="cpu", strict=True)
    dense = {module.name for module in plan.modules if module.scheme.is_dense}
    assert "model.embed_tokens" not in dense or folder.parent.name == "metal"


def test_modules_of_their_own() -> None:
    plan = plan_model(header_of(case("mixed")), device="cpu", strict=True)
    found = {module.name.rpartition(".")[2]: str(module.scheme) for module in plan.modules}
    assert found == {
        "embed_tokens": "uint6 1x64 bf16 offset",
        "q_proj": "uint8 1x32 bf16 offset",
        "k_proj": "uint3 1x32 bf16 offset",
        "v_proj": "uint4 1x64 bf16 offset",
        "o_proj": "bf16",
        "gate_proj": "uint4 1x64 bf16 offset",
        "up_proj": "uint4 1x64 bf16 offset",
        "down_proj": "e2m1 1x32 e8m0",
    }


def test_description() -> None:
    assert reader_of(case("4_g64")).describe() == "mlx, affine 4 bits, group 64 in config.json"
    assert reader_of(case("mixed")).describe() == (
        "mlx, affine 4 bits, group 64, 4 modules of their own in config.json"
    )


@pytest.mark.parametrize("name", ["experts", "experts_nvfp4"])
def test_a_mixture_of_experts(name: str, tmp_path: Path) -> None:
    """Stacks under ``switch_mlp``: the logits are those of the plain model, an expert a module."""
    header = open_checkpoint(str(case(name)))
    [found] = prompt_logits(load_model(header, device="cpu", kv_cache_dtype="f32"), [[1, 2, 3, 4]])
    convert(header, "dense", tmp_path / "plain", dtype="f32")
    plain = open_checkpoint(str(tmp_path / "plain"))
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in plain.tensors
    [wanted] = prompt_logits(load_model(plain, device="cpu", kv_cache_dtype="f32"), [[1, 2, 3, 4]])
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


# ---- what is written


def one(*more: object, **named: object) -> dict[str, StoredLinear]:
    weight = cruel(scheme(*more, **named), (48, 128))  # type: ignore[arg-type]
    return {NAME: StoredLinear(weight, torch.randn(48))}


@pytest.mark.parametrize("scales", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine_round_trip(bits: int, group: int, scales: str, tmp_path: Path) -> None:
    round_trip(tmp_path, Writer, one(f"uint{bits}", (1, group), scales=scales, offset=True))


@pytest.mark.parametrize(
    ("codes", "group", "scales"), [("e2m1", 32, "e8m0"), ("e4m3", 32, "e8m0"), ("e2m1", 16, "e4m3")]
)
def test_float_round_trip(codes: str, group: int, scales: str, tmp_path: Path) -> None:
    round_trip(tmp_path, Writer, one(codes, (1, group), scales=scales))


def test_several_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    linears = {
        "model.layers.0.mlp.up_proj": one("uint4", (1, 64), offset=True)[NAME],
        "model.layers.0.mlp.gate_proj": one("uint4", (1, 64), offset=True)[NAME],
        "model.layers.0.mlp.down_proj": one("uint8", (1, 32), offset=True)[NAME],
        "model.embed_tokens": StoredLinear(one("e2m1", (1, 32), scales="e8m0")[NAME].weight),
    }
    round_trip(tmp_path, Writer, linears)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }


@pytest.mark.parametrize("scales", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("codes", "zero"), [("int4", False), ("int8", False), ("uint4", True), ("uint3", True)]
)
def test_zero_points_become_biases(codes: str, zero: bool, scales: str, tmp_path: Path) -> None:
    """The same numbers, if need be with scales and biases in float32."""
    modules = one(codes, (1, 64), scales=scales, zero=zero)
    found = read(written(tmp_path, Writer, modules), NAME, (48, 128), strict=True)
    assert torch.equal(found.weight.dequantize(), modules[NAME].weight.dequantize())
    wide = "f32" if zero else scales
    assert str(found.weight.scheme) == f"u{codes.removeprefix('u')} 1x64 {wide} offset"


def test_a_row_of_one_group(tmp_path: Path) -> None:
    modules = one("uint4", (1, 0), offset=True)
    found = read(written(tmp_path, Writer, modules), NAME, (48, 128), strict=True).weight
    assert str(found.scheme) == "uint4 1x128 f16 offset"
    assert torch.equal(found.dequantize(), modules[NAME].weight.dequantize())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (scheme("uint7", (1, 64), offset=True), "1, 2, 3, 4, 5, 6, 8 bits"),
        (scheme("uint4", (1, 16), offset=True), "groups of 32, 64 or 128"),
        (scheme("uint4", (1, 96), offset=True), "that divides 128 columns"),
        (scheme("int4", (1, 64), offset=True), "unsigned beside offsets"),
        (scheme("int4", (1, 64), scales="f32"), "times a float32 scale is rounded"),
        (scheme("uint4", (1, 64), scales="f32", zero=True), "times a float32 scale is rounded"),
        (scheme("int4", (0, 64)), "covers all rows"),
        (scheme("nf4", (1, 64)), "codes are integers"),
        (scheme("e2m1", (1, 64), scales="e8m0"), "mxfp4 has groups of 32, not 64"),
        (scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32"), "one for a group of columns"),
        (scheme("int4", (1, 64), reordered=True), "no place for"),
    ],
)
def test_what_it_cannot_hold(made: object, words: str) -> None:
    assert words in (Writer.refuses_to_write(made, (48, 128)) or "")  # type: ignore[arg-type]


def test_experts_are_refused_before_anything_is_written() -> None:
    with pytest.raises(LowbitError, match="all experts in one tensor"):
        Writer({"model.layers.0.mlp.experts.3.up_proj": scheme("uint4", (1, 64), offset=True)})


@pytest.mark.parametrize("folder", fixtures_it_takes(Writer, "mlx", "metal"), ids=lambda path: path.name)
def test_fixtures_read_written_and_read_again(folder: Path, tmp_path: Path) -> None:
    if "experts" in folder.name:
        with pytest.raises(LowbitError, match="experts"):
            convert(open_checkpoint(str(folder)), "mlx", tmp_path / "out")
        return
    convert_and_compare(folder, "mlx", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["quantization"] == said["quantization_config"]
    if folder.parent.name == "mlx":
        kept = {k: v for k, v in said["quantization"].items() if v}
        told = json.loads((folder / "config.json").read_text())["quantization"]
        assert set(kept) <= set(told) | {"mode"}


# ---- what is wrong


def changed(name: str, out: Path, said: dict | None = None, tensors: dict | None = None) -> Path:
    """A fixture with more words in its config and other tensors (None: without it)."""
    seed = Seed.of(case(name))
    config = copy.deepcopy(seed.config)
    for key in ("quantization", "quantization_config"):
        config[key] |= said or {}
    found = seed.tensors | (tensors or {})
    return seed.write(out, config, {key: tensor for key, tensor in found.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "said", "code", "words"),
    [
        ("4_g64", {"mode": "nonsense"}, "E0212", "mode must be one of affine, mxfp4"),
        ("4_g64", {"bits": 7}, "E0212", "bits must be 1 or 2 or 3"),
        ("4_g64", {"bits": True}, "E0212", "bits must be"),
        ("4_g64", {"group_size": 16}, "E0212", "group_size must be 32 or 64 or 128"),
        ("4_g64", {"mode": "mxfp4"}, "E0212", "group_size must be 32 in mode mxfp4"),
        ("4_g64", {NAME: {"bits": 4.0}}, "E0212", "k_proj.*bits must be"),
        ("4_g64", {NAME: {"quantize_input": True}}, "E0218", "quantize_input"),
    ],
)
def test_wrong_configs(name: str, said: dict, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=words) as raised:
        plan_model(open_checkpoint(str(changed(name, tmp_path, said))))
    assert raised.value.code == code and "\n" not in str(raised.value)


@pytest.mark.parametrize("said", [{"bits": 8}, {NAME: False}, {NAME: {"group_size": 32, "bits": 8}}])
def test_tensors_win_over_the_config(said: dict, tmp_path: Path) -> None:
    folder = changed("4_g64", tmp_path, said)
    assert str(read(folder, NAME, (16, 64)).weight.scheme) == "uint4 1x64 bf16 offset"
    with pytest.raises(LowbitError, match="reading it as it is stored"):
        read(folder, NAME, (16, 64), strict=True)


U32, BF16 = torch.uint32, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "code", "words"),
    [
        ("4_g64", "weight", torch.zeros(16, 9, dtype=torch.int32).view(U32), "E0213", "no mode of MLX"),
        ("4_g64", "weight", torch.zeros(16, 0, dtype=torch.int32).view(U32), "E0213", "no mode of MLX"),
        ("4_g64", "weight", torch.zeros(15, 8, dtype=torch.int32).view(U32), "E0213", r"\[16, 8\]"),
        ("4_g64", "weight", torch.zeros(16, 8, dtype=torch.int32), "E0213", "stores U32"),
        ("4_g64", "weight", None, "E0209", "weight"),
        ("4_g64", "scales", torch.ones(16, 3, dtype=BF16), "E0213", "no mode of MLX"),
        ("4_g64", "scales", torch.ones(16, 0, dtype=BF16), "E0213", "no mode of MLX"),
        ("4_g64", "scales", torch.ones(15, 1, dtype=BF16), "E0213", r"\[16, 1\]"),
        ("4_g64", "scales", torch.full((16, 1), torch.nan, dtype=BF16), "E0215", "NaN"),
        ("4_g64", "scales", torch.ones(16, 1, dtype=torch.uint8), "E0213", "no mode of MLX"),
        ("4_g64", "biases", torch.ones(16, 1), "E0213", "MLX with BF16 scales stores BF16"),
        ("4_g64", "biases", torch.full((16, 1), torch.inf, dtype=BF16), "E0215", "infinite"),
        ("4_g64", "biases", None, "E0209", "biases"),
        ("4_g64", "global_scale", torch.ones(1), "E0213", "beside weights of mode affine"),
        ("mxfp4", "biases", torch.ones(16, 2), "E0213", "beside weights of mode mxfp4"),
        ("mxfp4", "scales", torch.full((16, 2), 255, dtype=torch.uint8), "E0215", "NaN"),
        ("mxfp8", "weight", torch.full((16, 16), -1, dtype=torch.int32).view(U32), "E0215", "NaN"),
        ("nvfp4", "global_scale", torch.ones(2), "E0213", "global_scale"),
        ("2_g16", "qbiases", None, "E0209", "qbiases"),
        ("2_g16", "scales", torch.ones(16, 5), "E0213", "no mode of metal"),
    ],
)
def test_wrong_tensors(name: str, suffix: str, tensor: object, code: str, words: str, tmp_path: Path) -> None:
    folder = changed(name, tmp_path, tensors={f"{NAME}.{suffix}": tensor}) if name != "2_g16" else metal(
        tmp_path, {f"{NAME}.{suffix}": tensor}
    )  # fmt: skip
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, (16, 64))
    assert raised.value.code == code and NAME in str(raised.value) and "\n" not in str(raised.value)


def metal(out: Path, tensors: dict) -> Path:
    """metal's fixture with other tensors."""
    seed = Seed.of(case("2_g16"))
    found = seed.tensors | tensors
    return seed.write(out, seed.config, {key: tensor for key, tensor in found.items() if tensor is not None})
