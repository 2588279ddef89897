"""AutoRound's FP8, MX and NVFP4 exports, and rules of single modules; its other packings are tried with the
formats that they are spelled like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.helpers import FIXTURES, check_values, fixture_cases, read, reader_of
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.kernels.activation_quant import grouped_codes
from lowbit.loading import plan_model
from lowbit.numerics.scheme import Scheme


def changed(folder: Path, to: Path, change: dict) -> Path:
    """A copy with other keys in its quantization config."""
    shutil.copytree(folder, to)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_static_export_that_does_not_say_so_again(tmp_path: Path) -> None:
    """Its packing's name tells that inputs have a stored scale."""
    folder, copied = FIXTURES / "auto_round" / "fp8_static", tmp_path / "model"
    shutil.copytree(folder, copied)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["act_dynamic"]
    (copied / "config.json").write_text(json.dumps(config))
    plans = [plan_model(open_checkpoint(str(path)), device="cpu") for path in (folder, copied)]
    told, silent = ([str(module.scheme) for module in plan.modules] for plan in plans)
    assert told == silent and any("static" in scheme for scheme in told)


# Without what it exported as GPTQ's own.
OWN = [folder for folder in fixture_cases("auto_round") if folder.name != "gptq_mixed"]


@pytest.mark.parametrize("folder", OWN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("key", ["rotation_config", "spinquant_config"])
def test_rotated_exports_are_refused_in_every_packing(key: str, folder: Path, tmp_path: Path) -> None:
    rotation = {"block_size": 32, "hadamard_type": "hadamard"}
    with pytest.raises(LowbitError, match=f"{key}: inputs that AutoRound rotates at run time") as caught:
        reader_of(changed(folder, tmp_path / "rotated", {key: rotation}))
    assert caught.value.code == "E0218"
    assert reader_of(changed(folder, tmp_path / "none", {key: None}), strict=True)


Q, K, V, DOWN = (
    *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"),
    "model.layers.0.mlp.down_proj",
)
SHAPES = {Q: (64, 64), K: (32, 64), V: (32, 64), DOWN: (64, 96)}


def schemes(folder: Path) -> dict[str, Scheme]:
    """What is planned for some modules; and read, which is the same."""
    reader = reader_of(folder, strict=True)
    found = {name: reader.scheme_of(StoredModule(name, name, shape)) for name, shape in SHAPES.items()}
    for name, shape in SHAPES.items():
        assert read(folder, name, shape, strict=True).weight.scheme == found[name]
    return found


@pytest.mark.parametrize("folder", ["mxfp4", "nvfp4"])
def test_rules_of_modules_say_what_becomes_of_inputs(folder: str, tmp_path: Path) -> None:
    """The module's own name goes before patterns, of which the first that says something counts."""
    rules = {"k_proj": {}, "[kv]_proj": {"act_bits": 16}, "v_p": {"bits": 3}, "mlp": {"bits": 3}, DOWN: {}}
    found = schemes(changed(FIXTURES / "auto_round" / folder, tmp_path / "model", {"extra_config": rules}))
    plain = schemes(FIXTURES / "auto_round" / folder)
    assert found[Q] == plain[Q] and found[DOWN] == plain[DOWN] and plain[K].activation is not None
    assert found[K] == plain[K].weight_alone and found[V] == plain[V].weight_alone


@pytest.mark.parametrize("name", [V, "v_proj$", "model.language_model.layers.0.self_attn.v_proj"])
def test_layers_of_eight_bits_among_those_of_four(name: str, tmp_path: Path) -> None:
    rules = {name: {"bits": 8, "act_bits": 8}}
    folder = changed(FIXTURES / "auto_round" / "mxfp4", tmp_path / "model", {"extra_config": rules})
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{V}.weight_packed"]
    codes = torch.linspace(-448, 448, 32 * 64).view(32, 64).to(torch.float8_e4m3fn)
    exponents = torch.arange(100, 164, dtype=torch.uint8).view(32, 2)
    tensors |= {f"{V}.weight": codes, f"{V}.weight_scale": exponents}
    save_file(tensors, folder / "model.safetensors")
    found = schemes(folder)
    assert str(found[V]) == "e4m3 1x32 e8m0 (input e4m3 1x32 dynamic e8m0)"
    assert str(found[K]) == "e2m1 1x32 e8m0 (input e2m1 1x32 dynamic e8m0)"
    values = codes.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(read(folder, V, (32, 64)).weight.dequantize(), values)


@pytest.mark.parametrize("key", ["act_data_type", "data_type"])
@pytest.mark.parametrize("rounding", ["", "_rceil"])
def test_how_powers_of_two_are_rounded(rounding: str, key: str, tmp_path: Path) -> None:
    """That of the largest |x|, or the least under which nothing saturates; those of weights are stored."""
    change = {key: f"mx_fp{rounding}"}
    found = schemes(changed(FIXTURES / "auto_round" / "mxfp4", tmp_path / "model", change))[Q]
    plain = schemes(FIXTURES / "auto_round" / "mxfp4")[Q]
    assert found.weight_alone == plain.weight_alone
    x = torch.zeros(8, 32)
    x[:, 3] = -torch.tensor([0.9, 1.0, 1.5, 1.5001, 1.9, 3.0, 6.0, 7.9])
    assert found.activation is not None
    _, scales = grouped_codes(x, found.activation, None)
    largest = x.abs().amax(1)
    up = rounding and key == "act_data_type"  # "data_type" says nothing of inputs that have a type
    exponents = torch.log2(largest / 6).ceil() if up else torch.log2(largest).floor() - 2
    assert torch.equal(scales.flatten(), torch.exp2(exponents))


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data_type": "mx_int"}, "E0218", "data_type 'mx_int' of 4 bits"),
        ({"bits": 6}, "E0218", "data_type 'mx_fp' of 6 bits"),
        ({"act_data_type": "int"}, "E0218", "act_data_type 'int' of 4 bits"),
        ({"act_data_type": "nv_fp4"}, "E0218", "inputs of nv_fp beside weights of mx_fp"),
        ({"act_bits": 6}, "E0218", "act_data_type 'mx_fp' of 6 bits"),
        ({"act_bits": "4"}, "E0212", "act_bits must be a whole number"),
        ({"act_group_size": 64}, "E0218", "act_group_size is 64; mx_fp has groups of 32"),
        ({"group_size": 16}, "E0218", "group_size is 16; mx_fp has groups of 32"),
        ({"extra_config": {Q: {"act_group_size": -1}}}, "E0218", "act_group_size is -1"),
        ({"extra_config": {Q: {"bits": 8}}}, "E0214", "is to be mxfp8-quantized"),
        ({"extra_config": {Q: {"bits": 16}}}, "E0212", "no config group targets it"),
        ({"extra_config": {Q: {"rotation_config": {"block_size": 32}}}}, "E0218", "rotation_config"),
        ({"extra_config": [Q]}, "E0212", "an object of objects"),
    ],
)
def test_what_layers_of_floats_cannot_be(change: dict, code: str, said: str, tmp_path: Path) -> None:
    folder = changed(FIXTURES / "auto_round" / "mxfp4", tmp_path / "model", change)
    with pytest.raises(LowbitError) as caught:
        schemes(folder)
    assert caught.value.code == code and said in str(caught.value), caught.value


def test_rules_of_modules_beside_fp8(tmp_path: Path) -> None:
    """They may leave modules alone, but not have other inputs."""
    folder = FIXTURES / "auto_round" / "fp8_static"
    left = changed(folder, tmp_path / "left", {"extra_config": {"lm_head": {"bits": 16, "act_bits": 16}}})
    assert reader_of(left, strict=True)
    with pytest.raises(LowbitError, match="FP8 with inputs of 16 bits in single modules") as caught:
        reader_of(changed(folder, tmp_path / "model", {"extra_config": {DOWN: {"act_bits": 16}}}))
    assert caught.value.code == "E0218"


@pytest.mark.parametrize("change", [{"act_bits": 8}, {"extra_config": {DOWN: {"act_bits": 8}}}, {}])
@pytest.mark.parametrize("folder", ["w4_sym", "w4_asym_awq", "w2_asym_v1"])
def test_inputs_of_integers_stay_as_they_are(
    folder: str, change: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = reader_of(changed(FIXTURES / "auto_round" / folder, tmp_path / "model", change))
    assert reader.scheme_of(StoredModule(DOWN, DOWN, SHAPES[DOWN])).activation is None
    said = "act_bits asks for inputs that are quantized too; they are left as they are"
    assert (said in caplog.text) == bool(change)


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("w2_asym_v1", ("gptq:exllamav2", "auto_gptq:triton", "auto_round:gptq:exllamav2", "gptq")),
        ("w3_asym", ("autoround:exllamav2", "auto-round:triton", "AutoRound", "auto_round:tritonv2")),
    ],
)
def test_what_packings_were_called_in_2024(folder: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Whether zero points are one less hangs on it; under "backend", of quant_method intel/auto-round."""
    for number, name in enumerate(names):
        told = {"backend": name, "packing_format": None, "quant_method": "intel/auto-round"}
        check_values(changed(FIXTURES / "auto_round" / folder, tmp_path / str(number), told))


@pytest.mark.parametrize(
    "name", ["auto_round:mlx", "autoround:marlin", "gptqmodel", "auto_round:gptq:a:b", ""]
)
def test_packings_that_are_not_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        LowbitError, match="packing_format .* is not read; use another quantization"
    ) as caught:
        reader_of(changed(FIXTURES / "auto_round" / "w4_sym", tmp_path / "model", {"packing_format": name}))
    assert caught.value.code == "E0218"
