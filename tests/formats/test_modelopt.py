"""ModelOpt: its own exports and values; blocks, MX and mixed files from their description; damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, expected, fixture_cases, header_of, read, reader_of, write_folder
from forward_helpers import differences, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.kv_scales import wants_fp8_cache
from lowbit.formats.modelopt import ModelOpt
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model
from oracles import mxfp4 as mx
from oracles import w8a8 as oracle

CASES = fixture_cases("modelopt")
NAME = "model.layers.0.mlp.up_proj"
SHAPE = (140, 288)
STACK = "model.layers.0.mlp.experts"


def module_of(folder: Path, name: str, shape: tuple[int, int]) -> StoredModule:
    """The module of an expected weight; gpt-oss keeps its experts in stacks (experts, in, out)."""
    if folder.name != "nvfp4_gpt_oss":
        return StoredModule(name, name, shape)
    stack, number, leaf = name.rsplit(".", 2)
    return StoredModule(name, f"{stack}.{leaf}", shape, int(number), 2, transposed=True)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    reader = reader_of(folder, strict=True)
    for name, values in expected(folder).items():
        module = module_of(folder, name, (values.shape[0], values.shape[1]))
        with TensorData(header_of(folder)) as data:
            found = reader.read(module, data).weight
        if folder.name in ("int4_awq", "w4a8_awq"):
            # The tool's quantizer divides by 7 / largest where the file's scale is largest / 7.
            assert ((found.dequantize() - values).abs() <= 1e-6 * found.scales[0]).all()
        else:
            assert torch.equal(found.dequantize(), values), name
        assert found.scheme == reader.scheme_of(module)
        apart = "_" if module.expert is not None else "."
        stored = [tensor for tensor in header_of(folder).tensors if tensor.startswith(module.stored)]
        mine = {tensor for tensor in stored if tensor[len(module.stored) :][:1] in ("", apart)}
        assert mine - {f"{name}.k_scale"} == set(reader.tensors_of(module))


def test_what_the_cases_ask_of_their_inputs() -> None:
    inputs = {}
    for folder in CASES:
        for name, values in expected(folder).items():
            module = module_of(folder, name, (values.shape[0], values.shape[1]))
            with TensorData(header_of(folder)) as data:
                found = reader_of(folder).read(module, data)
            scheme = str(found.weight.scheme).partition(" (input ")
            parts = [] if found.input is None else [found.input.multiplier, found.input.static_scale]
            have = " ".join(n for n, p in zip(("multiplier", "scale"), parts, strict=False) if p is not None)
            inputs[f"{folder.name} {name.rpartition('.')[2]}"] = (scheme[0], scheme[2].rstrip(")"), have)
    fp4, inner = "e2m1 1x16 e4m3 allxall f32", "e2m1 1x16 dynamic e4m3"
    assert inputs == {
        "fp8 k_proj": ("e4m3 allxall f32", "e4m3 allxall static", "scale"),
        "fp8 down_proj": ("e4m3 allxall f32", "e4m3 allxall static", "scale"),
        "fp8_pb_wo gate_proj": ("e4m3 128x128 f32", "", ""),
        "fp8_pb_wo down_proj": ("e4m3 128x128 f32", "", ""),
        "int4_awq k_proj": ("int4 1xall f32", "", ""),
        "int8_sq k_proj": ("int8 1xall f32", "int8 allxall static", "multiplier scale"),
        "mixed k_proj": (fp4, inner, "scale"),
        "mixed o_proj": (fp4, "", ""),
        "mixed up_proj": ("e4m3 1xall f32", "e4m3 1xall dynamic", ""),
        "mixed down_proj": ("int8 1xall f32", "", ""),
        "mxfp8 k_proj": ("e4m3 1x32 e8m0", "e4m3 1x32 dynamic e8m0", ""),
        "nvfp4 k_proj": (fp4, inner, "scale"),
        "nvfp4_awq o_proj": (fp4, inner, "multiplier scale"),
        "nvfp4_experts down_proj": (fp4, inner, "scale"),
        "nvfp4_gpt_oss gate_up_proj": (fp4, inner, "scale"),
        "nvfp4_gpt_oss down_proj": (fp4, inner, "scale"),
        "w4a8_awq k_proj": ("int4 1xall f32", "e4m3 allxall static", "scale"),
        "w4a8_mxfp4_fp8 k_proj": ("e2m1 1x32 e8m0", "e4m3 1xall dynamic", ""),
        "w4a8_nvfp4_fp8 k_proj": ("e2m1 1x32 e4m3 allxall f32", "e4m3 allxall static", "scale"),
    }


def test_dense_modules_of_the_cases() -> None:
    """Modules the tool left out are plain, whether the config lists them or not."""
    for case, name, shape in (("mixed", "v_proj", (16, 64)), ("int4_awq", "o_proj", (128, 16))):
        folder = FIXTURES / "modelopt" / case
        stem = f"model.layers.0.self_attn.{name}"
        stored = load_file(folder / "model.safetensors")[f"{stem}.weight"]
        found = read(folder, stem, shape, strict=True)
        assert found.weight.scheme.is_dense and torch.equal(found.weight.codes, stored)


@pytest.mark.parametrize("case", ["nvfp4_experts", "nvfp4_gpt_oss"])
def test_whole_mixtures(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits against transformers with the tool's weights in its experts; inputs are left alone in both."""
    source = FIXTURES / "modelopt" / case
    folder = Path(shutil.copytree(source, tmp_path / case))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    (folder / "config.json").write_text(json.dumps(config))
    del config["quantization_config"]
    settings = transformers.AutoConfig.for_model(**{**config, "dtype": "float32"})
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    reader = reader_of(folder, strict=True)
    with TensorData(header_of(folder)) as data, torch.no_grad():

        def weight(stem: str, shape: tuple[int, ...]) -> Tensor:
            return reader.read(module_of(folder, stem, (shape[0], shape[1])), data).weight.dequantize()

        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            if parameter.ndim == 3:  # experts: gpt-oss (in, out), Qwen3 (out, in) with gate above up
                stack, _, leaf = name.rpartition(".")
                for number, own in enumerate(parameter):
                    if case == "nvfp4_gpt_oss":
                        own.copy_(weight(f"{stack}.{number}.{leaf}", own.T.shape).T)
                        continue
                    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                    shape = (own.shape[0] // len(parts), own.shape[1])
                    own.copy_(torch.cat([weight(f"{stack}.{number}.{part}", shape) for part in parts]))
            elif name.endswith(".weight") and parameter.ndim == 2:
                parameter.copy_(
                    reader.read(StoredModule(stem, stem, tuple(parameter.shape)), data).weight.dequantize()
                )
            else:
                parameter.copy_(data.tensor(name).float())
        tokens = torch.randint(6, 16, (20,), generator=torch.Generator().manual_seed(8)).tolist()
        wanted = model(torch.tensor([tokens])).logits[0]
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
    [logits] = prompt_logits(loaded, [tokens])
    assert differences(logits, wanted).max() <= 1e-3


@pytest.mark.parametrize("algorithm", ["MXFP8", "W4A8_MXFP4_MXFP8"])
def test_scales_of_mx_inputs_round_up(algorithm: str, tmp_path: Path) -> None:
    """2^ceil(log2(amax / 448)), as the tool quantizes to MX; OCP's scale would saturate 460."""
    weight = CODES if algorithm == "MXFP8" else PACKED
    folder = made(tmp_path, algorithm, {"weight": weight, "weight_scale": POWERS})
    activation = read(folder, NAME, SHAPE).weight.scheme.activation
    amax = np.float32([448 * 1.03, 448, 448 * 0.3, 448 * 40, 0, 2e-38, 9, 1.25, 7.5])
    x = torch.from_numpy(np.linspace(-1, 0.97, 32, dtype=np.float32) * amax[:, None]).reshape(1, -1)
    quantized, factor = InputTransform(activation)(x)
    exponent = np.ceil(np.log2(np.maximum(amax, np.float32(2.0**-126)) / np.float64(448)))
    scale = np.exp2(np.maximum(exponent, -127)).astype(np.float32)[:, None]
    steps = x.view(9, 32).numpy() / scale
    codes = torch.from_numpy(steps).to(E4M3).float().numpy()
    assert factor is None and np.array_equal(quantized.view(9, 32).numpy(), codes * scale)
    assert np.abs(steps).max() <= 448


@pytest.mark.parametrize("algorithm", ["mxfp4", "W4A16_MXFP4"])
def test_mxfp4_leaves_inputs_as_they_are(
    algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tool writes "mxfp4" for weights alone and for inputs too; gpt-oss' weights are alone."""
    folder = made(tmp_path, algorithm, {"weight": PACKED, "weight_scale": POWERS})
    assert read(folder, NAME, SHAPE, strict=True).weight.scheme.activation is None
    assert ("left as they are" in caplog.text) == (algorithm == "mxfp4")


E4M3 = torch.float8_e4m3fn
FP8 = (np.arange(SHAPE[0] * SHAPE[1]) * 31 % 127).astype(np.uint8).reshape(SHAPE)
CODES = torch.from_numpy(FP8).view(E4M3)
PACKED = torch.randint(
    0, 256, (SHAPE[0], SHAPE[1] // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)
)
ONE = torch.ones(())


def nibbles() -> np.ndarray:
    raw = PACKED.numpy()
    return mx.E2M1[np.stack((raw & 15, raw >> 4), -1).reshape(SHAPE)]


def made(folder: Path, algorithm: str, tensors: dict[str, Tensor], **more: object) -> Path:
    """A folder as ModelOpt wrote it before 2025: the config in a file of its own."""
    write_folder(folder, {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}, None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, **more}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    return folder


def test_blocks(tmp_path: Path) -> None:
    scales = torch.rand(2, 1, 3, 1)
    found = read(made(tmp_path, "FP8_PB_WO", {"weight": CODES, "weight_scale": scales}), NAME, SHAPE).weight
    wanted = oracle.e4m3(FP8) * oracle.spread(scales.view(2, 3).numpy(), (128, 128), SHAPE)
    assert np.array_equal(found.dequantize().numpy(), wanted)


def test_nvfp4_inputs(tmp_path: Path) -> None:
    tensors = {
        "weight": PACKED,
        "weight_scale": torch.rand(140, 18).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.3),
        "input_scale": torch.tensor(0.01),
    }
    found = read(made(tmp_path, "NVFP4", tensors), NAME, SHAPE)
    inner = oracle.spread(tensors["weight_scale"].float().numpy(), (1, 16), SHAPE)
    assert np.array_equal(found.weight.dequantize().numpy(), nibbles() * (inner * np.float32(0.3)))
    activation = found.weight.scheme.activation
    assert activation is not None and activation.block == (1, 16) and activation.scale.name == "e4m3"
    assert found.input is not None and float(found.input.static_scale) == pytest.approx(0.01)


@pytest.mark.parametrize("algorithm", ["MXFP4", "MXFP8"])
def test_mx(algorithm: str, tmp_path: Path) -> None:
    exponents = torch.randint(110, 130, (140, 9), dtype=torch.uint8)
    weight = PACKED if algorithm == "MXFP4" else CODES
    values = nibbles() if algorithm == "MXFP4" else oracle.e4m3(FP8)
    found = read(made(tmp_path, algorithm, {"weight": weight, "weight_scale": exponents}), NAME, SHAPE).weight
    powers = np.exp2(exponents.float().numpy() - 127)
    assert np.array_equal(found.dequantize().numpy(), values * oracle.spread(powers, (1, 32), SHAPE))


def test_int4_in_groups(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, SHAPE, generator=torch.Generator().manual_seed(1))
    packed = (codes[0::2] & 15 | (codes[1::2] & 15) << 4).to(torch.uint8)
    scales = torch.rand(140, 9) - 0.3  # a scale may be negative
    tensors = {"weight": packed, "weight_scale": scales, "pre_quant_scale": torch.rand(288).half()}
    found = read(made(tmp_path, "W4A16_AWQ", tensors, group_size=32), NAME, SHAPE)
    wanted = codes.float().numpy() * oracle.spread(scales.numpy(), (1, 32), SHAPE)
    assert np.array_equal(found.weight.dequantize().numpy(), wanted)
    assert found.input is not None and torch.equal(found.input.multiplier, tensors["pre_quant_scale"])


def stack(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Stacked experts of an FP8 gpt-oss, under the names the tool gives them."""
    write_folder(folder, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    return folder


@pytest.mark.parametrize("scales", [torch.tensor(0.25), torch.tensor([0.5, 0.25]), torch.rand(2, 140)])
def test_stacked_fp8_experts(scales: Tensor, tmp_path: Path) -> None:
    stacked = torch.stack((CODES, CODES.flip(0))).transpose(1, 2)
    name = f"{STACK}.down_proj"
    input_scale = torch.tensor([0.1, 0.2])
    folder = stack(
        tmp_path,
        {name: stacked, f"{name}_weight_scale": scales, f"{name}_input_scale": input_scale},
    )
    module = StoredModule(f"{STACK}.1.down_proj", name, SHAPE, 1, 2, transposed=True)
    with TensorData(header_of(folder)) as data:
        found = reader_of(folder).read(module, data)
    mine = scales[1] if scales.ndim else scales
    assert torch.equal(found.weight.dequantize(), CODES.flip(0).float() * mine.reshape(-1, 1))
    assert found.input is not None and float(found.input.static_scale) == pytest.approx(0.2)
    module = StoredModule(module.name, name, SHAPE, 1, 2, transposed=False)
    with TensorData(header_of(folder)) as data, pytest.raises(LowbitError) as caught:
        reader_of(folder).read(module, data)
    assert caught.value.code == "E0213" and name in str(caught.value)


def test_stacked_experts_with_groups_across_outputs(tmp_path: Path) -> None:
    name = f"{STACK}.down_proj"
    tensors = {name: torch.stack((CODES, CODES)), f"{name}_weight_scale": torch.zeros(2, dtype=torch.uint8)}
    module = StoredModule(f"{STACK}.1.down_proj", name, SHAPE, 1, 2, transposed=True)
    with TensorData(header_of(stack(tmp_path, tensors))) as data, pytest.raises(LowbitError) as caught:
        reader_of(tmp_path).read(module, data)
    assert caught.value.code == "E0218" and name in str(caught.value)


STATIC = {"weight": CODES, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}


def mode(folder: Path, name: str = NAME) -> str:
    activation = read(folder, name, SHAPE).weight.scheme.activation
    return "none" if activation is None else activation.mode


def test_mixed_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = {NAME: {"quant_algo": "FP8"}, "other": {"quant_algo": "NVFP4"}}
    assert mode(made(tmp_path / "a", "MIXED_PRECISION", STATIC, quantized_layers=layers)) == "static"
    layers[NAME] = {"quant_algo": "FP8_PB_WO"}
    assert mode(made(tmp_path / "b", "MIXED_PRECISION", STATIC, quantized_layers=layers)) == "none"
    assert "E0214" not in caplog.text
    del layers[NAME]  # the config forgot it
    assert mode(made(tmp_path / "c", "MIXED_PRECISION", STATIC, quantized_layers=layers)) == "static"
    assert "E0214" in caplog.text and NAME in caplog.text


def test_mixed_experts_are_named_together(tmp_path: Path) -> None:
    """The tool lists ``mlp.experts`` and stores its experts one by one."""
    name = f"{STACK}.1.up_proj"
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in STATIC.items()}
    layers = {STACK: {"quant_algo": "FP8"}, "model.layers.0": {"quant_algo": "NVFP4"}}
    values = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder = write_folder(tmp_path, tensors, values)
    assert reader_of(folder, strict=True).scheme_of(StoredModule(name, name, SHAPE)).activation is not None


def test_config_in_config_json(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": CODES, f"{NAME}.weight_scale": torch.tensor(0.5)}
    folder = write_folder(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert reader_of(folder).name == "modelopt"
    assert mode(folder) == "dynamic"  # no input_scale in the file


@pytest.mark.parametrize("method", ["modelopt_fp4", "modelopt_mixed", "modelopt"])
def test_claims(method: str, tmp_path: Path) -> None:
    tensors = {f"{NAME}.{suffix}": tensor for suffix, tensor in STATIC.items()}
    folder = write_folder(tmp_path, tensors, {"quant_method": method, "quant_algo": "fp8"})
    assert reader_of(folder).name == "modelopt" and mode(folder) == "static"
    assert ModelOpt.claims(header_of(folder)) == f"config.json: quantization_config says {method}"
    other = write_folder(tmp_path / "other", tensors, {"quant_method": "fp8"})
    assert ModelOpt.claims(header_of(other)) is None


@pytest.mark.parametrize(
    ("algorithm", "more", "wanted"),
    [
        ("NVFP4", {}, "static"),  # its input_scale has another meaning there
        ("W8A16", {}, "static"),
        ("FP8", {"exclude_modules": ["lm_head", "model.layers.0.mlp*"]}, "static"),
        ("FP8", {"exclude_modules": ["up_pro?"]}, "static"),
    ],
)
def test_tensors_win(
    algorithm: str, more: dict[str, list[str]], wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, algorithm, STATIC, **more)
    assert mode(folder) == wanted
    assert "E0214" in caplog.text and NAME in caplog.text
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE, strict=True)
    assert caught.value.code == "E0214"


@pytest.mark.parametrize(
    ("said", "stored", "agrees"),
    [
        (32, 32, True),
        (128, 32, False),
        (None, 32, True),
        (288, 288, True),
        (300, 288, True),
        (64, 288, False),
    ],
)
def test_columns_under_a_scale(said: int | None, stored: int, agrees: bool, tmp_path: Path) -> None:
    scales = torch.rand(140, 288 // stored)
    folder = made(tmp_path, "W4A16_AWQ", {"weight": INT4, "weight_scale": scales}, group_size=said)
    if agrees:
        assert read(folder, NAME, SHAPE, strict=True).weight.scheme.blocks[0] == (1, stored % 288)
        return
    with pytest.raises(LowbitError, match=f"a scale for {stored} columns .* group_size {said}") as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == "E0213" and f"{NAME}.weight_scale" in str(caught.value)


def test_columns_under_a_scale_of_one_layer(tmp_path: Path) -> None:
    layers = {NAME: {"quant_algo": "W4A16_AWQ", "group_size": 96}, "other": {"quant_algo": "FP8"}}
    tensors = {"weight": INT4, "weight_scale": torch.rand(140, 3)}
    folder = made(tmp_path, "MIXED_PRECISION", tensors, quantized_layers=layers, group_size=16)
    assert read(folder, NAME, SHAPE, strict=True).weight.scheme.blocks[0] == (1, 96)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_2", "input_scale"])
def test_a_plain_weight_beside_scales(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = CODES.to(torch.bfloat16)
    folder = made(tmp_path, "FP8", {"weight": plain, suffix: torch.tensor(0.5), "x.weight_scale": ONE})
    assert torch.equal(read(folder, NAME, SHAPE).weight.codes, plain)
    assert "E0214" in caplog.text and f"{NAME}.{suffix}" in caplog.text
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE, strict=True)
    assert caught.value.code == "E0214"


def test_only_the_cache_is_quantized(tmp_path: Path) -> None:
    values = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}, "ignore": []}
    folder = write_folder(tmp_path, {f"{NAME}.weight": torch.rand(SHAPE)}, values)
    assert read(folder, NAME, SHAPE, strict=True).weight.scheme.is_dense
    assert wants_fp8_cache(header_of(folder))


def test_lists_of_other_modules_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, "FP8", STATIC, exclude_modules=["lm_head", "model.layers.1*", "*router*", "up"])
    read(folder, NAME, SHAPE, strict=True)
    assert not caplog.text


def test_nvfp4_without_input_scale(tmp_path: Path) -> None:
    tensors = {
        "weight": PACKED,
        "weight_scale": torch.ones(140, 18).to(E4M3),
        "weight_scale_2": ONE,
    }
    assert mode(made(tmp_path, "NVFP4", tensors)) == "none"


@pytest.mark.parametrize("algorithm", ["NVFP4_SVD", "nvfp4_svdquant"])
def test_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=algorithm.upper()) as caught:
        reader_of(made(tmp_path, algorithm, {"weight_scale": torch.ones(1)}))
    assert caught.value.code == "E0218"


@pytest.mark.parametrize("key", ["kv_cache_quant_algo", "kv_cache_scheme"])
def test_kv_cache_with_zero_points(key: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="NVFP4_AFFINE") as caught:
        reader_of(made(tmp_path, "FP8", {"weight_scale": torch.ones(1)}, **{key: "NVFP4_AFFINE"}))
    assert caught.value.code == "E0218"


INNER = torch.ones(140, 18).to(E4M3)
POWERS = torch.full((140, 9), 120, dtype=torch.uint8)
INT8 = torch.zeros(SHAPE, dtype=torch.int8)
INT4 = torch.zeros(70, 288, dtype=torch.uint8)
NAN = float("nan")


@pytest.mark.parametrize(
    ("algorithm", "tensors", "code", "said"),
    [
        ("FP9", {"weight": CODES, "weight_scale": ONE}, "E0212", "FP9"),
        ("FP8", {"weight": CODES[:1], "weight_scale": ONE}, "E0213", "up_proj.weight"),
        ("FP8", {"weight": CODES.T, "weight_scale": ONE}, "E0213", "up_proj.weight"),
        ("FP8", {"weight": CODES.float().short(), "weight_scale": ONE}, "E0213", "I16"),
        ("FP8", {"weight": CODES, "weight_scale": torch.ones(139)}, "E0213", "weight_scale"),
        ("FP8", {"weight": CODES, "weight_scale": torch.ones(3, 2)}, "E0213", "weight_scale"),
        ("FP8", {"weight": CODES, "weight_scale": torch.tensor(NAN)}, "E0215", "weight_scale"),
        ("FP8", {"weight": CODES, "weight_scale": torch.tensor(1)}, "E0213", "I64"),
        ("FP8", {"weight": CODES, "weight_scale": ONE.to(E4M3)}, "E0213", "no such pair"),
        ("FP8", {"weight": CODES, "x.weight_scale": ONE}, "E0209", "up_proj.weight_scale"),
        ("FP8", {"weight_scale": ONE}, "E0209", "up_proj.weight"),
        ("FP8", {**STATIC, "input_scale": torch.ones(2)}, "E0213", "input_scale"),
        ("FP8", {**STATIC, "input_scale": torch.tensor(NAN)}, "E0215", "input_scale"),
        ("FP8", {**STATIC, "weight_scale_2": ONE}, "E0213", "weight_scale_2"),
        ("FP8", {**STATIC, "pre_quant_scale": torch.ones(9)}, "E0213", "pre_quant_scale"),
        ("FP8", {**STATIC, "pre_quant_scale": torch.full((288,), NAN)}, "E0215", "pre_quant_scale"),
        ("FP8", {**STATIC, "bias": torch.ones(9)}, "E0210", "bias"),
        (
            "FP8",
            {"weight": torch.ones(SHAPE), "weight_scale": ONE, "pre_quant_scale": torch.ones(288)},
            "E0213",
            "pre_quant_scale",
        ),
        ("FP8", {"weight": torch.ones(SHAPE)}, "E0213", "remove the quantization config"),
        ("NVFP4", {"weight": PACKED, "weight_scale": INNER}, "E0209", "weight_scale_2"),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": INNER, "weight_scale_2": torch.ones(2)},
            "E0213",
            "weight_scale_2",
        ),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": INNER[:, :17], "weight_scale_2": ONE},
            "E0213",
            "weight_scale",
        ),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": INNER[:, :6], "weight_scale_2": ONE},
            "E0213",
            "weight_scale",
        ),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": INNER.flatten(), "weight_scale_2": ONE},
            "E0213",
            "weight_scale",
        ),
        (
            "NVFP4",
            {"weight": PACKED[:, 1:], "weight_scale": INNER, "weight_scale_2": ONE},
            "E0213",
            "up_proj.weight",
        ),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": torch.full((140, 18), NAN).to(E4M3), "weight_scale_2": ONE},
            "E0215",
            "weight_scale",
        ),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": INNER, "weight_scale_2": ONE, "svdquant_lora_a": ONE.clone()},
            "E0218",
            "low-rank",
        ),
        ("MXFP8", {"weight": CODES, "weight_scale": POWERS[:, 1:]}, "E0213", "weight_scale"),
        (
            "MXFP8",
            {"weight": CODES, "weight_scale": torch.full((140, 9), 255, dtype=torch.uint8)},
            "E0215",
            "weight_scale",
        ),
        ("MXFP4", {"weight": PACKED, "weight_scale": POWERS.repeat(1, 2)}, "E0213", "weight_scale"),
        ("W8A16", {"weight": INT8, "weight_scale": torch.ones(140, 9)}, "E0213", "weight_scale"),
        ("W4A16_AWQ", {"weight": INT4, "weight_scale": torch.ones(140, 7)}, "E0213", "weight_scale"),
        ("W4A16_AWQ", {"weight": PACKED, "weight_scale": torch.ones(140, 9)}, "E0213", "up_proj.weight"),
    ],
)
def test_damaged(algorithm: str, tensors: dict[str, Tensor], code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        read(made(tmp_path, algorithm, tensors), NAME, SHAPE)
    assert caught.value.code == code and said in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("algorithm", "weight", "scale", "shape"),
    [
        ("W4A16_AWQ", INT4, torch.ones(141, 9), (141, 288)),
        ("MXFP4", PACKED, POWERS, (140, 289)),
    ],
)
def test_half_a_byte_over(
    algorithm: str, weight: Tensor, scale: Tensor, shape: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(LowbitError) as caught:
        read(made(tmp_path, algorithm, {"weight": weight, "weight_scale": scale}), NAME, shape)
    assert caught.value.code == "E0213" and f"{NAME}.weight" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"quant_algo": 5},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {NAME: {"quant_algo": "FP9"}}},
        {"quant_algo": "FP8", "exclude_modules": {"a": 1}},
        {"quant_algo": "FP8", "ignore": [1]},
        {"quant_algo": "NVFP4", "group_size": -2},
        {"quant_algo": "NVFP4", "group_size": "16"},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {NAME: {"group_size": True}}},
    ],
)
def test_wrong_config(values: dict[str, object], tmp_path: Path) -> None:
    tensors = {f"{NAME}.{suffix}": tensor for suffix, tensor in STATIC.items()}
    with pytest.raises(LowbitError) as caught:
        reader_of(write_folder(tmp_path, tensors, {"quant_method": "modelopt", **values}))
    assert caught.value.code == "E0212"
