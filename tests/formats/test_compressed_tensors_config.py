"""compressed-tensors configs: the group a module belongs to, presets, input schemes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
from formats.helpers import header_of, read, reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.compressed_tensors_scheme import PRESETS, parse_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

# ---- which group a module belongs to


def groups(*targets: tuple[str, list[str]], ignore: tuple[str, ...] = ()) -> dict:
    """Groups told apart by their number of bits: 1, 2, 3 …"""
    return {
        "config_groups": {
            name: {"targets": listed, "weights": args(bits)} for bits, (name, listed) in enumerate(targets, 1)
        },
        "ignore": list(ignore),
    }


@pytest.mark.parametrize(
    ("config_groups", "name", "bits"),
    [
        (groups(("a", ["Linear"]), ("b", ["re:.*down_proj"]), ("c", [NAME])), NAME, 3),
        (groups(("a", ["Linear"]), ("b", ["re:.*down_proj"])), NAME, 2),
        (groups(("a", ["re:z?.*down"]), ("b", ["re:.*down_proj"])), NAME, 2),  # alphabetical
        (groups(("a", ["Linear"]), ("b", ["Linear"])), NAME, 2),  # the last owner of a target
        (groups(("a", ["re:down_proj"]), ("b", ["Linear"])), NAME, 2),  # anchored at the start
        (groups(("a", ["re:model.*mlp"]), ("b", ["Linear"])), NAME, 1),  # not at the end
        (groups(("a", ["Linear"]), ("b", ["Embedding"])), "model.embed_tokens", 2),
        (groups(("a", ["Linear"]), ("b", ["Embedding"])), "lm_head", 1),
        (groups(("a", ["LlamaAttention"])), "model.layers.0.self_attn.q_proj", None),
        (groups(("a", ["model.language_model.layers.0.mlp.down_proj"])), NAME, 1),  # another prefix
        (groups(("a", ["Linear"]), ("b", ["re:language_model.*down_proj"])), NAME, 2),
    ],
)
def test_group_of(config_groups: dict, name: str, bits: int | None) -> None:
    group = parse_config(config_groups, "config.json").group_of((name,))
    assert (group.weights.bits if group and group.weights else None) == bits


@pytest.mark.parametrize(
    ("ignore", "name", "ignored"),
    [
        (("lm_head",), "lm_head", True),
        (("re:.*lm_head",), "lm_head", True),
        (("re:.*mlp.gate$",), "model.layers.0.mlp.gate", True),
        (("re:.*mlp.gate$",), "model.layers.0.mlp.gate_proj", False),
        (("model.layers.0.mlp.gate",), "model.layers.0.mlp.gate_proj", False),
        (("re:self_attn",), "model.layers.0.self_attn.q_proj", False),
        (("re:.*self_attn",), "model.layers.0.self_attn.q_proj", True),
        (("Embedding",), "model.embed_tokens", True),
        (("language_model.model.layers.0.mlp.down_proj",), NAME, True),
    ],
)
def test_ignored(ignore: tuple[str, ...], name: str, ignored: bool) -> None:
    assert parse_config(groups(ignore=ignore), "config.json").ignored((name,)) is ignored


COSTLY = "re:.*model.*layers.*mlp.*(gate|up).*experts.*0.*proj.*x"


def test_ignored_by_what_is_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pattern that could take for ever is left out of the ignore list, as the tensors say what is plain."""
    tensors, weight = packed()
    folder = write_folder(tmp_path / "a", tensors, config(args(), ignore=[COSTLY, "lm_head"]))
    assert torch.equal(read(folder, NAME, (16, 64), strict=True).weight.dequantize(), weight)
    assert f"ignore: '{COSTLY}' has 8 repetitions and is not tried" in caplog.text
    assert parse_config(groups(ignore=(COSTLY, "lm_head")), "config.json").ignored(("lm_head",))
    targeted = config(args())
    targeted["config_groups"]["group_0"]["targets"] = [COSTLY]
    fails(write_folder(tmp_path / "b", tensors, targeted), "E0212", "has 8 repetitions")


def test_stored_quantized_against_the_config(tmp_path: Path) -> None:
    """A quantized module that is ignored or targeted by nothing: with one group the data decide, once."""
    tensors, weight = packed()
    ignored = config(args(), ignore=["re:.*down_proj"])
    untargeted = config(args())
    untargeted["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]
    for name, values in (("ignored", ignored), ("untargeted", untargeted)):
        write_folder(tmp_path / name, tensors, values)
        assert torch.equal(read(tmp_path / name, NAME, (16, 64)).weight.dequantize(), weight)
        fails(tmp_path / name, "E0214", NAME, strict=True)
    untargeted["config_groups"]["group_1"] = {"targets": ["re:.*k_proj"], "weights": args(8)}
    write_folder(tmp_path / "two", tensors, untargeted)
    fails(tmp_path / "two", "E0212", NAME)


# ---- presets


def test_presets_are_the_tool_s() -> None:
    """Each preset's meaning, spelled as in compressed-tensors 0.20."""
    assert len(PRESETS) == 33
    for name in PRESETS:
        config_of = parse_config({"config_groups": {name.lower(): ["Linear"]}}, "config.json")
        group = config_of.group_of((NAME,))
        assert group is not None and (group.weights is None) == (name == "UNQUANTIZED")


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [
        ("W4A16", "int4 group 128", None),
        ("W4A16_ASYM", "int4 group 128 asym", None),
        ("W8A8", "int8 channel", "int8 token"),
        ("W4A8", "int4 group 128", "int8 token"),
        ("W4AFP8", "int4 group 128", "float8 token"),
        ("FP8", "float8 tensor", "float8 tensor"),
        ("FP8_DYNAMIC", "float8 channel", "float8 token"),
        ("FP8_BLOCK", "float8 block 128x128", "float8 group 128"),
        ("NVFP4", "float4 group 16", "float4 group 16"),
        ("MXFP4XFP8", "float4 group 32", "float8 group 128"),
        ("MXFP6A8", "float6 group 32", "float8 group 32"),
    ],
)
def test_preset(name: str, weights: str, inputs: str | None) -> None:
    group = parse_config({"config_groups": {name: ["Linear"]}}, "config.json").group_of((NAME,))
    assert group is not None and str(group.weights) == weights
    assert (None if group.inputs is None else str(group.inputs)) == inputs


def test_preset_in_a_file(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight": torch.randint(-128, 128, (16, 64), dtype=torch.int8),
        f"{NAME}.weight_scale": torch.rand(16, 1),
    }
    values = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    write_folder(tmp_path, tensors, {**values, "config_groups": {"W8A8": ["Linear"]}})
    found = read(tmp_path, NAME, (16, 64), strict=True).weight
    assert found.scheme.activation == INT8_TOKEN
    wanted = tensors[f"{NAME}.weight"].float() * tensors[f"{NAME}.weight_scale"]
    assert torch.equal(found.dequantize(), wanted)


# ---- configs no tool writes, or that ask for what is not done


def broken(**changes: object) -> dict:
    return config({**args(), **changes})


@pytest.mark.parametrize(
    ("values", "code", "word"),
    [
        (broken(num_bits=0), "E0212", "num_bits is 0"),
        (broken(num_bits=9), "E0212", "num_bits is 9"),
        (broken(num_bits=16), "E0212", "num_bits is 16"),
        (broken(num_bits="4"), "E0212", "num_bits is '4'"),
        (broken(num_bits=True), "E0212", "num_bits"),
        (broken(num_bits=5, type="float"), "E0212", "num_bits is 5"),
        (broken(type="complex"), "E0212", "type is 'complex'"),
        (broken(type="float", symmetric=False), "E0212", "symmetric"),
        (broken(symmetric="no"), "E0212", "symmetric"),
        (broken(strategy="rows"), "E0212", "strategy is 'rows'"),
        (broken(strategy="token", dynamic=True), "E0218", "strategy is token"),
        (broken(strategy="attn_head"), "E0218", "attn_head"),
        (broken(strategy="tensor_group"), "E0218", "tensor_group"),
        (broken(group_size=0), "E0212", "group_size is 0"),
        (broken(group_size=-2), "E0212", "group_size is -2"),
        (broken(group_size="32"), "E0212", "group_size is '32'"),
        (broken(group_size=None), "E0212", "group_size is None"),
        (broken(strategy="block"), "E0212", "block_structure is None"),
        (broken(strategy="block", block_structure=[128]), "E0212", "block_structure"),
        (broken(strategy="block", block_structure="128x0"), "E0212", "block_structure"),
        (broken(strategy="block", block_structure="axb"), "E0212", "block_structure"),
        (broken(dynamic="local"), "E0212", "dynamic is 'local'"),
        (broken(rotation=1), "E0212", "'rotation'"),
        (config(args(), format="int3-quantized"), "E0218", "int3-quantized"),
        (config(args(), config_groups=None), "E0212", "config_groups"),
        (config(args(), config_groups=[]), "E0212", "config_groups"),
        (config(args(), config_groups={"group_0": 1}), "E0212", "group_0"),
        (config(args(), config_groups={"mine": ["Linear"]}), "E0212", "'mine'"),
        (config(args(), config_groups={"a": {"targets": [1]}}), "E0212", "targets"),
        (config(args(), config_groups={"a": {"targets": [], "scale": 1}}), "E0212", "'scale'"),
        (config([4]), "E0212", "weights"),
        (config(args(), ignore="re:(") | {"ignore": ["re:("]}, "E0212", "pattern"),
        (config(args(), ignore=[3]), "E0212", "ignore"),
        (config(args(), sparsity_config="24"), "E0212", "sparsity_config"),
        (config(args(), transform_config={"R1": {}}), "E0212", "transform_config"),
        (
            config(
                args(),
                transform_config={
                    "config_groups": {
                        "R3": {"apply": [{"location": "q_attn", "targets": ["re:.*self_attn$"]}]}
                    }
                },
            ),
            "E0218",
            "config_groups.R3.type",
        ),
    ],
)
def test_refused_configs(tmp_path: Path, values: dict, code: str, word: str) -> None:
    """Opening the format already refuses, whatever module is asked for."""
    tensors, _ = packed()
    write_folder(tmp_path, tensors, values)
    with pytest.raises(LowbitError) as caught:
        reader_of(tmp_path)
    assert caught.value.code == code, caught.value.message
    assert word in caught.value.message and "\n" not in caught.value.message


def test_offline_rotations_and_unknown_top_level_keys_are_read_over(tmp_path: Path) -> None:
    tensors, weight = packed()
    offline = {
        "config_groups": {
            "R1": {
                "apply": [
                    {"location": "weight_input", "targets": ["Linear"]},
                    {"location": "weight_output", "targets": ["Linear"]},
                ]
            }
        }
    }
    write_folder(tmp_path, tensors, config(args(), transform_config=offline, global_compression_ratio=1.5))
    assert torch.equal(read(tmp_path, NAME, (16, 64), strict=True).weight.dequantize(), weight)


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (args(8, strategy="token", group=None, dynamic=True), INT8_TOKEN),
        (
            args(8, strategy="token", group=None, dynamic=True, symmetric=False),
            ActivationScheme(number_format("int8"), (1, 0), symmetric=False, limit=127.5),
        ),
        (
            args(4, strategy="token", group=None, dynamic=True),
            ActivationScheme(number_format("int4"), (1, 0), limit=7.5),
        ),
        (args(8, "float", "token", None, dynamic=True), FP8_TOKEN),
        (args(8, "float", "group", 64, dynamic=True), ActivationScheme(number_format("e4m3"), (1, 64))),
        (args(8, "float", "group", 32, dynamic=True, scale_dtype="torch.uint8"), MX8_INPUT),
        (
            args(8, "float", "tensor", None, dynamic=True),
            ActivationScheme(number_format("e4m3"), (1, 0)),
        ),
        (args(16, "float", "tensor", None, dynamic=True), None),
        (None, None),
    ],
)
def test_activations(tmp_path: Path, inputs: dict | None, wanted: ActivationScheme | None) -> None:
    tensors, _ = packed()
    write_folder(tmp_path, tensors, config(args(), inputs))
    module = StoredModule(NAME, NAME, (16, 64))
    assert reader_of(tmp_path).scheme_of(module).activation == wanted


@pytest.mark.parametrize(
    "inputs",
    [
        args(8, "float", "group", 128),
        args(8, strategy="group", group=128, dynamic=True, symmetric=False),
        args(8, strategy="channel", group=None),
        args(4, "float", "tensor_group", 16),
        args(8, strategy="attn_head", group=None),
    ],
)
def test_refused_activations(tmp_path: Path, inputs: dict) -> None:
    tensors, _ = packed()
    write_folder(tmp_path, tensors, config(args(), inputs))
    fails(tmp_path, "E0218", NAME, "group_0")


def test_static_tokens_are_impossible(tmp_path: Path) -> None:
    tensors, _ = packed()
    write_folder(tmp_path, tensors, config(args(), args(8, strategy="token", group=None)))
    fails(tmp_path, "E0212", "input_activations", "static")


def test_quantized_outputs(tmp_path: Path) -> None:
    """Of k and v they are the KV cache's, of others refused."""
    key = "model.layers.0.self_attn.k_proj"
    tensors = {**packed()[0], **packed(name=key)[0]}
    values = config(args())
    values["config_groups"]["group_0"]["output_activations"] = args(8, "float", "tensor", None)
    write_folder(tmp_path, tensors, values)
    fails(tmp_path, "E0218", NAME, "output")
    assert read(tmp_path, key, (16, 64)).weight.scheme.activation is None


def test_transposed_quantized_experts_are_refused(tmp_path: Path) -> None:
    stored = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{stored}_packed": torch.zeros(2, 16, 8, dtype=torch.int32),
        f"{stored}_scale": torch.ones(2, 16, 2),
    }
    write_folder(tmp_path, tensors, config(args()))
    with pytest.raises(LowbitError, match="experts") as caught:
        reader_of(tmp_path).scheme_of(StoredModule(stored, stored, (16, 64), 0, 2, transposed=True))
    assert caught.value.code == "E0218"


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_does_not_claim_others(tmp_path: Path, method: str) -> None:
    write_folder(tmp_path, packed()[0], {**config(args()), "quant_method": method})
    assert CompressedTensors.claims(header_of(tmp_path)) is None


@pytest.mark.parametrize("method", ["compressed-tensors", "compressed_tensors", "sparseml"])
def test_claims_every_spelling(tmp_path: Path, method: str) -> None:
    write_folder(tmp_path, packed()[0], {**config(args()), "quant_method": method})
    assert CompressedTensors.claims(header_of(tmp_path))
