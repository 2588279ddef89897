"""compressed-tensors: fixtures of three versions of the tool, hand-made cases, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.compressed_tensors_cases import (
    FP8_TOKEN,
    INT8_TOKEN,
    MX8_INPUT,
    NAME,
    args,
    config,
    fails,
    packed,
)
from formats.helpers import expected, fixture_cases, header_of, last_bit, read, reader_of, write_folder
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, detect
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

CASES = fixture_cases("compressed_tensors")
FOLDERS = {folder.name: folder for folder in CASES}

# What each fixture must be read as, and with which input scheme: (scheme without the input, activation).
SCHEMES: dict[str, tuple[str, ActivationScheme | None]] = {
    "embedding": ("int8 1xall bf16", None),
    "fp8_block_128": ("e4m3 128x128 bf16", ActivationScheme(number_format("e4m3"), (1, 128))),
    "fp8_block_ragged": ("e4m3 48x40 bf16", ActivationScheme(number_format("e4m3"), (1, 128))),
    "fp8_channel_dynamic": ("e4m3 1xall bf16", FP8_TOKEN),
    "fp8_sparse_24": ("e4m3 1xall bf16", FP8_TOKEN),
    "fp8_tensor_static": ("e4m3 allxall bf16", ActivationScheme(number_format("e4m3"), (0, 0), "static")),
    "marlin_24_int4": ("int4 1x128 f16", None),
    "marlin_24_int8": ("int8 1xall f16", None),
    "mxfp4": (
        "e2m1 1x32 e8m0",
        ActivationScheme(number_format("e2m1"), (1, 32), scale=number_format("e8m0"), round_up=1.75),
    ),
    "mxfp6": ("e2m3 1x32 e8m0", MX8_INPUT),
    "mxfp8": ("e4m3 1x32 e8m0", MX8_INPUT),
    "nvfp4": (
        "e2m1 1x16 e4m3 allxall f32",
        ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3")),
    ),
    "sparse_24": ("bf16", None),
    "sparse_bitmask": ("bf16", None),
    "w3a16_asym": ("uint3 1x32 bf16 asym", None),
    "w3a16_padded_asym": ("uint3 1x32 bf16 asym", None),
    "w4a16_actorder": ("int4 1x32 bf16 act-order", None),
    "w4a16_asym": ("uint4 1x32 bf16 asym", None),
    "w4a16_group": ("int4 1x32 bf16", None),
    "w4a8_naive": ("int4 1x32 bf16", FP8_TOKEN),
    "w5a16_padded_channel": ("int5 1xall bf16", None),
    "w7a16_channel_asym": ("uint7 1xall bf16 asym", None),
    "w8a16_channel": ("int8 1xall f16", None),
    "w8a16_tensor_asym": ("uint8 allxall bf16 asym", None),
    "w8a8_dynamic": ("int8 1xall bf16", INT8_TOKEN),
    "w8a8_static_asym": (
        "uint8 1xall f16 asym",
        ActivationScheme(number_format("int8"), (0, 0), "static", symmetric=False),
    ),
}


# ---- what the tools wrote


def test_every_case_is_here() -> None:
    assert set(FOLDERS) == set(SCHEMES) | {"two_groups"}


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_agrees_with_the_tool(folder: Path) -> None:
    """Bit-equal in the dtype the tool computes in; NVFP4, whose scales it divides first, to one f32 bit."""
    for name, wanted in expected(folder).items():
        stored = read(folder, name, tuple(wanted.shape), strict=True)
        found = stored.weight.dequantize()
        assert found.isfinite().all() and bool((found != 0).any())
        if folder.name == "nvfp4":
            assert bool(((found - wanted).abs() <= last_bit(torch.float32, wanted)).all()), name
        else:
            assert torch.equal(found.to(wanted.dtype), wanted), name


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_scheme(name: str) -> None:
    """The header alone gives the scheme that reading gives, and every stored tensor has a reader."""
    folder = FOLDERS[name]
    spelling, activation = SCHEMES[name]
    reader, header = reader_of(folder, strict=True), header_of(folder)
    for module, wanted in expected(folder).items():
        stored = StoredModule(module, module, tuple(wanted.shape))
        scheme = reader.scheme_of(stored)
        assert str(scheme).partition(" (input")[0] == spelling
        assert scheme.activation == activation
        with TensorData(header) as data:
            found = reader.read(stored, data)
        assert found.weight.scheme == scheme
        assert found.weight.codes.dtype in (torch.uint8, torch.bfloat16)
        assert (found.weight.column_order is not None) == scheme.reordered
        assert sorted(reader.tensors_of(stored)) == sorted(
            tensor for tensor in header.tensors if tensor.startswith(f"{module}.")
        )


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_claims(folder: Path) -> None:
    header = header_of(folder)
    evidence = CompressedTensors.claims(header)
    assert evidence is not None and "config.json" in evidence
    assert detect(header) is CompressedTensors
    assert CompressedTensors.name in reader_of(folder).describe()


def test_static_input_scales() -> None:
    stored = load_file(FOLDERS["fp8_tensor_static"] / "model.safetensors")
    rule = read(FOLDERS["fp8_tensor_static"], NAME, (64, 64)).input
    assert rule is not None and rule.static_scale is not None and rule.static_zero is None
    assert torch.equal(rule.static_scale, stored[f"{NAME}.input_scale"].float().reshape(()))
    stored = load_file(FOLDERS["w8a8_static_asym"] / "model.safetensors")
    rule = read(FOLDERS["w8a8_static_asym"], NAME, (64, 64)).input
    assert rule is not None and rule.static_scale is not None and rule.static_zero is not None
    assert torch.equal(rule.static_scale, stored[f"{NAME}.input_scale"].float().reshape(()))
    assert int(rule.static_zero) == int(stored[f"{NAME}.input_zero_point"]) != 0


def test_nvfp4_outer_scales_multiply() -> None:
    """Both global scales are stored as the reciprocal of what multiplies."""
    stored = load_file(FOLDERS["nvfp4"] / "model.safetensors")
    found = read(FOLDERS["nvfp4"], NAME, (64, 64))
    assert found.input is not None and found.input.static_scale is not None
    assert torch.equal(found.input.static_scale, 1 / stored[f"{NAME}.input_global_scale"][0])
    assert torch.equal(found.weight.scales[1], 1 / stored[f"{NAME}.weight_global_scale"].reshape(1, 1))
    assert read(FOLDERS["w8a8_dynamic"], NAME, (64, 64)).input is None


def test_groups_and_ignore() -> None:
    """Two groups, each module by its own; an ignored one plain; the head, ignored by name, too."""
    reader = reader_of(FOLDERS["two_groups"], strict=True)

    def scheme(name: str, shape: tuple[int, int]) -> str:
        return str(reader.scheme_of(StoredModule(name, name, shape)))

    assert scheme("model.layers.0.mlp.up_proj", (64, 64)) == "int4 1x32 bf16"
    assert scheme("model.layers.0.self_attn.q_proj", (32, 64)).startswith("e4m3 1xall bf16 (input e4m3 1xall")
    assert scheme("model.layers.0.self_attn.v_proj", (16, 64)) == "bf16"
    assert scheme("lm_head", (32, 64)) == "bf16"


# ---- hand-made cases


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_both_packings(tmp_path: Path, bits: int, padded: bool, asymmetric: bool) -> None:
    """64 columns tell the packings apart by their shape; the version must not be asked."""
    tensors, weight = packed(bits, padded=padded, asymmetric=asymmetric)
    version = "0.20.0" if padded else "0.1.0"
    write_folder(tmp_path, tensors, config(args(bits, symmetric=not asymmetric), version=version))
    assert torch.equal(read(tmp_path, NAME, (16, 64), strict=True).weight.dequantize(), weight)


@pytest.mark.parametrize(("version", "padded"), [("0.16.0", True), ("0.17.0", False), ("0.5.0.2024", True)])
def test_ambiguous_packing_goes_by_the_version(tmp_path: Path, version: str, padded: bool) -> None:
    """20 columns of 3 bits are two words either way."""
    tensors, weight = packed(3, (16, 20), padded=padded)
    write_folder(tmp_path, tensors, config(args(3), version=version))
    assert torch.equal(read(tmp_path, NAME, (16, 20)).weight.dequantize(), weight)


def test_zero_points_tell_an_ambiguous_packing(tmp_path: Path) -> None:
    """Two words of columns either way, but 64 rows of zero points are 6 words, not 7."""
    tensors, weight = packed(3, (64, 20), padded=False, asymmetric=True)
    write_folder(tmp_path, tensors, config(args(3, symmetric=False), version="0.5.0"))
    assert torch.equal(read(tmp_path, NAME, (64, 20)).weight.dequantize(), weight)


def test_ragged_group(tmp_path: Path) -> None:
    tensors, weight = packed(4, (16, 80), group=32)
    write_folder(tmp_path, tensors, config(args()))
    found = read(tmp_path, NAME, (16, 80)).weight
    assert str(found.scheme) == "int4 1x32 f32"
    assert torch.equal(found.dequantize(), weight)


def test_group_as_wide_as_the_weight(tmp_path: Path) -> None:
    tensors, weight = packed(4, (16, 64), group=128)
    write_folder(tmp_path, tensors, config(args(group=128)))
    found = read(tmp_path, NAME, (16, 64)).weight
    assert str(found.scheme) == "int4 1xall f32"
    assert torch.equal(found.dequantize(), weight)


def test_zero_points_of_a_symmetric_weight(tmp_path: Path) -> None:
    """Old tools wrote zeros that say nothing; others are the data's word against the config's."""
    tensors, weight = packed(asymmetric=True)
    write_folder(tmp_path / "other", tensors, config(args(symmetric=True)))
    found = read(tmp_path / "other", NAME, (16, 64)).weight
    assert found.scheme.zero == "integer" and torch.equal(found.dequantize(), weight)
    with pytest.raises(LowbitError, match="weight_zero_point") as caught:
        read(tmp_path / "other", NAME, (16, 64), strict=True)
    assert caught.value.code == "E0214"
    tensors, weight = packed()
    tensors[f"{NAME}.weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int8)
    write_folder(tmp_path / "zeros", tensors, config(args()))
    found = read(tmp_path / "zeros", NAME, (16, 64), strict=True).weight
    assert found.scheme.zero == "none" and torch.equal(found.dequantize(), weight)


def test_column_groups(tmp_path: Path) -> None:
    """weight_g_idx: columns in the input's order, groups anywhere; -1 and 0 0 … 1 1 … say nothing."""
    tensors, weight = packed()
    scales = tensors[f"{NAME}.weight_scale"]
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32
    codes = weight / scales.repeat_interleave(32, 1)
    for name, values, wanted in (
        ("shuffled", index, codes * scales[:, index]),
        ("ordered", torch.arange(64) // 32, weight),
        ("unset", torch.full((64,), -1), weight),
    ):
        tensors[f"{NAME}.weight_g_idx"] = values.int()
        write_folder(tmp_path / name, tensors, config(args(actorder="group")))
        found = read(tmp_path / name, NAME, (16, 64)).weight
        assert found.scheme.reordered == (name == "shuffled") == (found.column_order is not None)
        assert torch.allclose(found.dequantize(), wanted, rtol=1e-6, atol=0)
    tensors[f"{NAME}.weight_g_idx"] = index.int().clamp(max=0)
    write_folder(tmp_path / "uneven", tensors, config(args(actorder="group")))
    fails(tmp_path / "uneven", "E0213", "weight_g_idx")


def test_stacked_experts(tmp_path: Path) -> None:
    """Each expert is its own slice, unpacked alone."""
    parts = [packed(bits, name="e") for bits in (4, 4)]
    parts[1][0]["e.weight_packed"] = parts[1][0]["e.weight_packed"].flip(0)
    parts[1][0]["e.weight_scale"] = parts[1][0]["e.weight_scale"].flip(0)
    stored = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{stored}_{suffix}": torch.stack([part[0][f"e.weight_{suffix}"] for part in parts])
        for suffix in ("packed", "scale")
    }
    write_folder(tmp_path, tensors, config(args()))
    reader = reader_of(tmp_path)
    with TensorData(header_of(tmp_path)) as data:
        for expert, wanted in enumerate((parts[0][1], parts[1][1].flip(0))):
            module = StoredModule(f"{stored}.{expert}", stored, (16, 64), expert, 2)
            assert reader.tensors_of(module) == [f"{stored}_packed", f"{stored}_scale"]
            assert torch.equal(reader.read(module, data).weight.dequantize(), wanted)
        with pytest.raises(LowbitError, match="3 experts|\\[3, ") as caught:
            reader.scheme_of(StoredModule(f"{stored}.0", stored, (16, 65), 0, 3))
        assert caught.value.code == "E0213"


def test_bias(tmp_path: Path) -> None:
    tensors, _ = packed()
    tensors[f"{NAME}.bias"] = torch.arange(16.0)
    write_folder(tmp_path, tensors, config(args()))
    found = read(tmp_path, NAME, (16, 64))
    assert found.bias is not None and torch.equal(found.bias, torch.arange(16.0))


@pytest.mark.parametrize("status", ["initialized", "calibration", "frozen", "compressed"])
def test_plain_weights_are_read_as_they_are(tmp_path: Path, status: str) -> None:
    weight = torch.randn(16, 64)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": torch.ones(16, 2)}
    write_folder(tmp_path, tensors, config(args(), quantization_status=status))
    found = read(tmp_path, NAME, (16, 64), strict=True).weight
    assert found.scheme.is_dense and torch.equal(found.dequantize(), weight)


def test_packed_weights_may_be_called_frozen(tmp_path: Path) -> None:
    """The files of 2024 say so."""
    tensors, weight = packed()
    write_folder(tmp_path, tensors, config(args(), quantization_status="frozen"))
    assert torch.equal(read(tmp_path, NAME, (16, 64), strict=True).weight.dequantize(), weight)


@pytest.mark.parametrize("place", ["flat", "nested"])
def test_compression_config(tmp_path: Path, place: str) -> None:
    """The key of 2024, flat or around quantization_config and sparsity_config."""
    tensors, weight = packed()
    write_folder(tmp_path, tensors, None)
    inner = config(args())
    if place == "nested":
        del inner["quant_method"]
        inner = {"quantization_config": inner, "sparsity_config": {"format": "dense"}}
    full = {"model_type": "llama", "compression_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(full))
    assert detect(header_of(tmp_path)) is CompressedTensors
    assert torch.equal(read(tmp_path, NAME, (16, 64), strict=True).weight.dequantize(), weight)


# ---- what is wrong with a file


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{NAME}.{name}")


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{NAME}.{name}": value})


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.{name}"][2, 1] = value

    return change


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (without("weight_packed"), "E0209", "weight_packed"),
        (without("weight_scale"), "E0209", "weight_scale"),
        (without("weight_zero_point"), "E0209", "weight_zero_point"),
        (put("weight_packed", torch.zeros(16, 9, dtype=torch.int32)), "E0213", "weight_packed"),
        (put("weight_packed", torch.zeros(8, 16, dtype=torch.int32)), "E0213", "weight_packed"),
        (put("weight_packed", torch.zeros(16, 8, dtype=torch.int64)), "E0213", "weight_packed"),
        (put("weight_packed", torch.zeros(16, 32, dtype=torch.uint8)), "E0213", "weight_packed"),
        (put("weight_scale", torch.ones(16, 4)), "E0213", "weight_scale"),
        (put("weight_scale", torch.ones(16, 1)), "E0213", "weight_scale"),
        (put("weight_scale", torch.ones(2, 16)), "E0213", "weight_scale"),
        (put("weight_scale", torch.ones(16, 2, dtype=torch.uint8)), "E0213", "weight_scale"),
        (put("weight_zero_point", torch.zeros(16, 2, dtype=torch.int32)), "E0213", "weight_zero_point"),
        (put("weight_zero_point", torch.zeros(2, 2)), "E0213", "weight_zero_point"),
        (put("weight_zero_point", torch.full((16, 2), 8, dtype=torch.int8)), "E0213", "zero points"),
        (put("weight_shape", torch.tensor([16, 128])), "E0210", "weight_shape"),
        (put("weight_shape", torch.ones(7)), "E0213", "weight_shape"),
        (poison("weight_scale", float("nan")), "E0215", "first at [2, 1]"),
        (poison("weight_scale", float("inf")), "E0215", "weight_scale"),
        (put("bias", torch.zeros(64)), "E0210", "bias"),
    ],
)
def test_damaged_pack_quantized(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], code: str, words: str
) -> None:
    tensors, weight = packed(asymmetric=True)
    write_folder(tmp_path / "whole", tensors, config(args(symmetric=False)))
    assert torch.equal(read(tmp_path / "whole", NAME, (16, 64)).weight.dequantize(), weight)
    change(tensors)
    write_folder(tmp_path / "changed", tensors, config(args(symmetric=False)))
    fails(tmp_path / "changed", code, words)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_zero_and_negative_scales_are_legal(tmp_path: Path, scale: float) -> None:
    tensors, _ = packed()
    tensors[f"{NAME}.weight_scale"][3, 0] = scale
    write_folder(tmp_path, tensors, config(args()))
    assert read(tmp_path, NAME, (16, 64)).weight.dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        (args(bits=8), "weight_packed"),
        (args(bits=3), "weight_packed"),
        (args(group=16), "weight_scale"),
        (args(strategy="channel", group=None), "weight_scale"),
        (args(strategy="tensor", group=None), "weight_scale"),
        (args(strategy="block", group=None, block_structure=[4, 4]), "weight_scale"),
        (args(bits=4, kind="float"), "weight_packed"),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, weights: dict, word: str) -> None:
    tensors, _ = packed()
    write_folder(tmp_path, tensors, config(weights))
    fails(tmp_path, "E0213", word, NAME)


@pytest.mark.parametrize(
    ("case", "change", "code", "word"),
    [
        ("fp8_tensor_static", without("input_scale"), "E0209", "input_scale"),
        ("fp8_tensor_static", put("input_scale", torch.tensor([float("nan")])), "E0215", "input_scale"),
        ("fp8_tensor_static", put("input_scale", torch.ones(64)), "E0213", "input_scale"),
        ("fp8_tensor_static", put("weight_scale", torch.ones(64)), "E0213", "weight_scale"),
        ("fp8_tensor_static", put("weight", torch.zeros(64, 64, dtype=torch.uint8)), "E0213", "weight"),
        ("w8a8_static_asym", without("input_zero_point"), "E0209", "input_zero_point"),
        ("w8a8_static_asym", without("weight_zero_point"), "E0209", "weight_zero_point"),
        ("w8a8_dynamic", put("weight", torch.zeros(64, 32, dtype=torch.int8)), "E0213", "weight"),
        ("w4a8_naive", put("weight", torch.full((64, 64), 8, dtype=torch.int8)), "E0213", "from 8 to 8"),
        ("nvfp4", without("weight_global_scale"), "E0209", "weight_global_scale"),
        ("nvfp4", without("input_global_scale"), "E0209", "input_global_scale"),
        ("nvfp4", put("weight_global_scale", torch.zeros(1)), "E0215", "weight_global_scale"),
        ("nvfp4", put("input_global_scale", torch.zeros(1)), "E0215", "input_global_scale"),
        ("nvfp4", put("weight_global_scale", torch.ones(2)), "E0213", "weight_global_scale"),
        ("nvfp4", put("weight_scale", torch.ones(64, 2).to(torch.float8_e4m3fn)), "E0213", "weight_scale"),
        (
            "nvfp4",
            put("weight_scale", torch.full((64, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
            "E0215",
            "256 NaN",
        ),
        ("mxfp4", put("weight_scale", torch.full((64, 2), 255, dtype=torch.uint8)), "E0215", "weight_scale"),
        ("mxfp4", put("weight_packed", torch.zeros(64, 31, dtype=torch.uint8)), "E0213", "weight_packed"),
        ("mxfp6", put("weight_packed", torch.zeros(63, 48, dtype=torch.uint8)), "E0213", "weight_packed"),
        ("mxfp6", put("weight_packed", torch.zeros(64, 32, dtype=torch.uint8)), "E0213", "weight_packed"),
        ("fp8_block_128", put("weight_scale", torch.ones(1, 1)), "E0213", "weight_scale"),
        ("sparse_24", put("bitmask", torch.zeros(64, 8, dtype=torch.uint8)), "E0213", "bit mask keeps 0"),
        ("sparse_24", put("bitmask", torch.zeros(64, 7, dtype=torch.uint8)), "E0213", "bitmask"),
        ("sparse_24", put("shape", torch.tensor([64, 128])), "E0210", "shape"),
        ("fp8_sparse_24", without("compressed"), "E0209", "compressed"),
        ("marlin_24_int8", without("meta"), "E0209", "meta"),
        ("marlin_24_int8", put("meta", torch.zeros(2, 64, dtype=torch.int16)), "E0213", "meta"),
        ("marlin_24_int8", put("scale_packed", torch.ones(64, 1)), "E0213", "scale_packed"),
    ],
)
def test_damaged_fixtures(
    tmp_path: Path, case: str, change: Callable[[dict[str, Tensor]], object], code: str, word: str
) -> None:
    """The tool's own files with one tensor changed."""
    shutil.copytree(FOLDERS[case], tmp_path / case)
    shape = (64, 136) if case == "fp8_block_128" else (64, 64)
    assert read(tmp_path / case, NAME, shape).weight.dequantize().isfinite().all()
    tensors = load_file(tmp_path / case / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / case / "model.safetensors")
    fails(tmp_path / case, code, NAME, word, shape=shape)


def test_other_model_s_shape() -> None:
    fails(FOLDERS["w4a16_group"], "E0213", NAME, shape=(64, 128))
    fails(FOLDERS["fp8_channel_dynamic"], "E0213", NAME, shape=(128, 64))


def test_dtype_against_the_config(tmp_path: Path) -> None:
    """I8 and F8_E4M3 cannot be confused: the data win, with a warning."""
    scale = torch.rand(16, 1)
    codes = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    floats = torch.randn(16, 64).to(torch.float8_e4m3fn)
    for name, weight, kind in (("int", codes, "float"), ("float", floats, "int")):
        tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
        values = config(args(8, kind, "channel", None), format="naive-quantized")
        write_folder(tmp_path / name, tensors, values)
        found = read(tmp_path / name, NAME, (16, 64)).weight
        assert torch.equal(found.dequantize(), weight.float() * scale)
        fails(tmp_path / name, "E0214", NAME, strict=True)


def test_format_against_the_tensors(tmp_path: Path) -> None:
    tensors, weight = packed()
    write_folder(tmp_path, tensors, config(args(), format="int-quantized"))
    assert torch.equal(read(tmp_path, NAME, (16, 64)).weight.dequantize(), weight)
    fails(tmp_path, "E0214", "int-quantized", "pack-quantized", strict=True)
