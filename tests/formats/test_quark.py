"""Quark: the tool's own files and values, what its config may say, and what contradicts it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import check_values, expected, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed, with_leaf
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.loading import plan_model
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import RotationScheme, Scheme

CASES = fixture_cases("quark")
NAME = "model.layers.0.self_attn.k_proj"
SHAPE = (32, 64)
RULE = ("quantization_config", "global_quant_config")


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    if folder.name != "int4_fp8":
        check_values(folder)
        return
    for name, values in expected(folder).items():  # code * scale * scale, which is scale * scale * code here
        mine = read(folder, name, (values.shape[0], values.shape[1]), strict=True).weight.dequantize()
        assert ((mine - values).abs() <= 2.0**-23 * values.abs()).all() and values.any()


def test_what_the_cases_cover() -> None:
    found = {path.name: str(read(path, NAME, SHAPE).weight.scheme) for path in CASES}
    assert found == {
        "fp8_static": "e4m3 allxall bf16 (input e4m3 allxall static)",
        "fp8_token": "e4m3 1xall bf16 (input e4m3 1xall dynamic)",
        "fp8_kv": "e4m3 allxall bf16 (input e4m3 allxall static)",
        "fp8_attention": "e4m3 allxall bf16 (input e4m3 allxall static)",
        "fp8_custom": "e4m3 allxall bf16 (input e4m3 allxall static)",
        "awq_custom": "uint4 1x32 bf16 asym",
        "int8_static": "int8 allxall f32 (input int8 allxall static)",
        "int8_asym": "int8 1xall bf16 (input int8 allxall static asym)",
        "int8_g32": "int8 1x32 bf16",
        "uint8_channel": "uint8 1xall f16 asym",
        "int4_g32": "int4 1x32 bf16",
        "int4_g32_order": "int4 1x32 f16",
        "int4_channel": "int4 1xall bf16",
        "int4_fp8": "int4 1xall f32 allxall f32 (input e4m3 1xall dynamic)",
        "int4_inputs": "int4 1x32 bf16 (input int4 1x32 dynamic)",
        "patterns": "uint4 1x32 f32 asym",
        "int4_rotated": "int4 1x32 bf16 (input rotated by hadamard 64)",
        "uint4_g32": "uint4 1x32 bf16 asym",
        "uint4_channel": "uint4 1xall bf16 asym",
        "mxfp4": "e2m1 1x32 e8m0 (input e2m1 1x32 dynamic e8m0)",
        "mxfp4_fp8": "e2m1 1x32 e8m0 (input e4m3 allxall static)",
        "mxfp6_e3m2": "e3m2 1x32 e8m0 (input e3m2 1x32 dynamic e8m0)",
        "mxfp6_e2m3": "e2m3 1x32 e8m0",
        "nvfp4": "e2m1 1x16 e4m3 allxall f32 (input e2m1 1x16 dynamic e4m3)",
    }


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, SHAPE)))
    cache = {f"{NAME}.output_scale"} if folder.name in ("fp8_kv", "fp8_attention") else set()
    assert used | cache == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}
    plan = plan_model(header_of(folder), device="cpu").modules
    kernels = {module.kernel for module in plan if not module.scheme.is_dense}
    assert kernels == {"reference" if native.library() is None else "cpu_blocks"}


def test_of_several_patterns_that_which_fits() -> None:
    """config.json has patterns by name; of down_proj's two only static inputs tell one from the other."""
    assert [*header_of(case("patterns")).config["quantization_config"]["layer_quant_config"]] == [
        "*down_proj",
        "*k_proj",
        "*mlp*",
        "*self_attn*",
    ]
    module = "model.layers.0.mlp.down_proj"
    found = read(case("patterns"), module, (64, 32), strict=True)
    assert str(found.weight.scheme) == "e4m3 allxall f32 (input e4m3 allxall static)"
    assert found.input is not None and found.input.static_scale is not None


PATTERNS = ("quantization_config", "layer_quant_config")


def test_two_patterns_that_fit_alike(tmp_path: Path) -> None:
    """Nothing tells which was meant: said, and an error where that is asked for."""
    seed = Seed.of(case("patterns"))
    layers = copy.deepcopy(seed.config)["quantization_config"]["layer_quant_config"]
    layers["*down_proj"]["input_tensors"] = layers["*mlp*"]["input_tensors"] | {"is_dynamic": True}
    layers["*mlp*"]["input_tensors"] = None
    tensors = {key: value for key, value in seed.tensors.items() if not key.endswith("input_scale")}
    folder = seed.write(tmp_path, with_leaf(seed.config, PATTERNS, layers), tensors)
    module = "model.layers.0.mlp.down_proj"
    assert str(read(folder, module, (64, 32)).weight.scheme).endswith("(input e4m3 1xall dynamic)")
    with pytest.raises(LowbitError, match=r"two rules .* '\*down_proj' and '\*mlp\*'") as raised:
        read(folder, module, (64, 32), strict=True)
    assert raised.value.code == "E0214"


def test_patterns_of_which_none_fits(tmp_path: Path) -> None:
    seed = Seed.of(case("patterns"))
    tensors = {key: value for key, value in seed.tensors.items() if not key.endswith("down_proj.input_scale")}
    layers = copy.deepcopy(seed.config)["quantization_config"]["layer_quant_config"]
    layers["*down_proj"]["weight"]["dtype"] = "int8"
    folder = seed.write(tmp_path, with_leaf(seed.config, PATTERNS, layers), tensors)
    with pytest.raises(LowbitError, match="stores I8") as raised:
        read(folder, "model.layers.0.mlp.down_proj", (64, 32))
    assert raised.value.code == "E0213"
    layers["*down_proj"] = layers["*mlp*"] | {"input_tensors": None}
    layers["*down_proj"]["weight"]["dtype"] = "fp8_e5m2"
    folder = seed.write(tmp_path / "second", with_leaf(seed.config, PATTERNS, layers), tensors)
    with pytest.raises(LowbitError) as raised:
        read(folder, "model.layers.0.mlp.down_proj", (64, 32))
    assert raised.value.code == "E0213" and "\n" not in str(raised.value)


def test_groups_of_int4_inputs_are_quarks_own() -> None:
    """The largest |x| of a group is 7.5 codes, a tie where it is negative, by x times 1 / scale."""
    scheme = reader_of(case("int4_inputs")).scheme_of(StoredModule(NAME, NAME, SHAPE)).activation
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(4))
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    wanted = ((groups * (1 / scale)).round().clamp(-8, 7) * scale).flatten(-2)
    assert (wanted != (groups / scale).round().clamp(-8, 7).mul(scale).flatten(-2)).any()
    assert torch.equal(InputTransform(scheme)(x)[0], wanted)


def test_attention_in_fp8_is_left_in_floats(caplog: pytest.LogCaptureFixture) -> None:
    """Q's outputs and the softmax's: weights and inputs are those of the same model without them."""
    folder = case("fp8_attention")
    stored = load_file(folder / "model.safetensors")
    assert {
        "model.layers.0.self_attn.prob_output_scale",
        "model.layers.0.self_attn.q_proj.output_scale",
    } <= set(stored)
    schemes = {module.name: module.scheme for module in plan_model(header_of(folder), device="cpu").modules}
    assert "queries and softmax weights were quantized" in caplog.text
    assert schemes == {
        module.name: module.scheme for module in plan_model(header_of(case("fp8_kv")), device="cpu").modules
    }


def test_patterns_of_layers() -> None:
    module = "model.layers.0.self_attn.q_proj"
    assert str(read(case("uint4_g32"), module, (64, 64)).weight.scheme) == "uint4 1xall bf16 asym"
    module = "model.layers.0.mlp.down_proj"
    assert str(read(case("uint4_g32"), module, (64, 32)).weight.scheme) == "int8 1xall bf16"


def test_what_is_only_cast_is_plain(tmp_path: Path) -> None:
    """Quark's bfloat16 spec; it writes a scale of 1 beside the weight."""
    values = torch.randn(SHAPE).bfloat16()
    tensors = {f"{NAME}.weight": values, f"{NAME}.weight_zero_point": None}
    own = {"*k_proj": {"weight": {"dtype": "bfloat16", "qscheme": None}, "input_tensors": None}}
    folder = changed("int8_g32", tmp_path, {(*OTHER, "layer_quant_config"): own}, tensors)
    found = read(folder, NAME, SHAPE, strict=True).weight
    assert found.scheme.is_dense and torch.equal(found.codes, values)


def test_description() -> None:
    assert reader_of(case("uint4_g32")).describe() == "quark, int8 and uint4 in config.json"


def test_scales_of_the_cache_are_found() -> None:
    from lowbit.loading import load_model

    model = load_model(open_checkpoint(str(case("fp8_kv"))), device="cpu", kv_cache_dtype="fp8_e4m3")
    assert model.blocks[0].k_scale != 1.0


def test_static_inputs() -> None:
    stored = read(case("int8_asym"), NAME, SHAPE)
    assert stored.input is not None and stored.input.static_zero is not None
    assert -128 <= float(stored.input.static_zero) <= 127
    wide = stored.input.static_scale * torch.tensor([[-1e6, 1e6, 0.0]])
    values, _ = InputTransform(
        stored.weight.scheme.activation, None, stored.input.static_scale, stored.input.static_zero
    )(wide)
    assert float(values.max() - values.min()) == 255.0 and values[0, 2] == 0.0
    stored = read(case("nvfp4"), NAME, SHAPE)
    assert stored.input is not None and float(stored.input.static_scale) > 0


@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
def test_dynamic_int8_inputs(qscheme: str, tmp_path: Path) -> None:
    """What the tool's fake quantizer gave: 127.5 for the largest |x|, and x times the scale's inverse."""
    inputs = {"dtype": "int8", "qscheme": qscheme, "ch_axis": 1, "symmetric": True, "is_dynamic": True}
    folder = changed("int8_g32", tmp_path, {(*RULE, "input_tensors"): inputs})
    scheme = read(folder, NAME, SHAPE).weight.scheme.activation
    x = torch.tensor(INT8_ROWS)
    values, factor = InputTransform(scheme)(x)
    assert factor is not None and torch.equal(factor.flatten(), x.abs().amax(1) / 127.5)
    assert values.tolist() == INT8_CODES


# Rows of x, and the codes that Quark 0.13 gives them.
INT8_ROWS = [
    [-1.0, 0.5, 0.3, 0.0],
    [2.71875, -0.7, 2.0, -2.5],
    [-2.718817, 1.25, -0.01, 0.6],
    [-0.81, 0.8, 0.81, -0.4],
    [-3.3, -3.29, 3.28, 0.1],
]
INT8_CODES = [
    [-127.0, 64.0, 38.0, 0.0],
    [127.0, -33.0, 94.0, -117.0],
    [-127.0, 59.0, 0.0, 28.0],
    [-128.0, 126.0, 127.0, -63.0],
    [-128.0, -127.0, 127.0, 4.0],
]


@pytest.mark.parametrize(
    ("mode", "powers"),
    # The largest |x| of a block of 32, and the power of two its scale is.
    [
        ("even", {1.0: -2, 1.74: -2, 1.75: -1, 1.99: -1, 6.0: 0}),
        ("floor", {1.0: -2, 1.75: -2, 1.99: -2, 6.0: 0}),
        ("ceil", {1.0: -2, 1.0625: -1, 1.99: -1, 6.0: 1}),
    ],
)
def test_scales_of_mx_inputs(mode: str, powers: dict, tmp_path: Path) -> None:
    path = (*RULE, "input_tensors", "scale_calculation_mode")
    scheme = read(changed("mxfp4", tmp_path, {path: mode}), NAME, SHAPE).weight.scheme.activation
    for largest, power in powers.items():
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1] = largest, 2.0 ** (power - 1)  # the smallest that is not 0
        values, _ = InputTransform(scheme)(x)
        assert values[0, 1] == 2.0 ** (power - 1), f"{mode} {largest}"
        x[0, 1] = 2.0 ** (power - 1) * 0.5  # a tie, to 0
        assert not InputTransform(scheme)(x)[0][0, 1]


def test_even_is_what_the_tool_does() -> None:
    """2 - 2^-(digits + 1) of the code: 1.75 for fp4, as the tool's comments have it."""
    from lowbit.formats.quark import _round_up

    found = [_round_up("even", code) for code in ("e2m1", "e3m2", "e2m3", "e4m3")]
    assert found == [1.75, 1.875, 1.9375, 1.9375] and _round_up(None, "e2m1") == 1.75


# ---- rotated inputs

DOWN, DOWN_SHAPE = "model.layers.0.mlp.down_proj", (64, 96)


@pytest.mark.parametrize(("name", "shape"), [(NAME, SHAPE), (DOWN, DOWN_SHAPE)], ids=["64", "12x8"])
def test_rotated_inputs(name: str, shape: tuple[int, int]) -> None:
    """What the tool's own layer gives; 96 columns are rotated by a matrix that is not symmetric."""
    folder = case("int4_rotated")
    found = read(folder, name, shape, strict=True)
    assert found.input is not None and found.weight.scheme.rotation == RotationScheme("hadamard", shape[1])
    rotated = found.input.rotation(torch.linspace(-1, 1, shape[1]).unsqueeze(0))
    wanted = load_file(folder / "outputs.safetensors")[name]
    assert (rotated @ found.weight.dequantize().T - wanted).abs().max() < 1e-5


def test_rotations_are_shared() -> None:
    """So that Q, K and V are one product of x rotated once."""
    same = [f"model.layers.0.self_attn.{letter}_proj" for letter in "kv"]
    reader = reader_of(case("int4_rotated"))
    with TensorData(header_of(case("int4_rotated"))) as data:
        first, second = (reader.read(StoredModule(name, name, SHAPE), data).input for name in same)
    assert first is not None and second is not None and first.rotation is second.rotation


def test_other_rotations(tmp_path: Path) -> None:
    """One matrix for all of a size, a multiplier before it, matrices of floats, plain weights."""
    stored = load_file(case("int4_rotated") / "model.safetensors")
    x, name = torch.linspace(-1, 1, 64).unsqueeze(0), f"{NAME}.input_rotation"
    plain = read(case("int4_rotated"), NAME, SHAPE).input.rotation(x)

    def rotated(
        out: str, tensors: dict[str, torch.Tensor | None], config: dict | None = None
    ) -> StoredLinear:
        folder = changed("int4_rotated", tmp_path / out, config, tensors)
        return read(folder, NAME, SHAPE, strict=True)

    signs = stored[name]
    shared = rotated("shared", {name: None, "model.shared_input_rotation_64": signs})
    assert torch.equal(shared.input.rotation(x), plain)
    scale = torch.linspace(0.5, 2, 64)
    scaled = rotated("scaled", {f"{NAME}.input_prescale": scale, name: signs[:32, :32].contiguous()})
    wanted = (x * scale).view(2, 32) @ signs[:32, :32].float() / 32**0.5
    assert (scaled.input.rotation(x).view(2, 32) - wanted).abs().max() < 1e-5
    assert scaled.weight.scheme.rotation == RotationScheme("hadamard", 32)
    matrix = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0].contiguous()
    learned = rotated("learned", {name: matrix})
    assert (learned.input.rotation(x).view(4, 16) - x.view(4, 16) @ matrix.float()).abs().max() < 1e-6
    assert learned.weight.scheme.rotation == RotationScheme("orthogonal", 16)
    left = {f"{NAME}.{suffix}": None for suffix in ("weight_scale", "weight_zero_point")}
    values = torch.randn(SHAPE)
    dense = rotated("plain", {**left, f"{NAME}.weight": values}, {(*OTHER, "exclude"): [NAME]})
    assert dense.weight.scheme == Scheme(number_format("f32"), rotation=RotationScheme("hadamard", 64))
    assert torch.equal(dense.weight.dequantize(), values) and torch.equal(dense.input.rotation(x), plain)


@pytest.mark.parametrize(
    ("tensors", "code", "words"),
    [
        ({"input_rotation": torch.ones(48, 48, dtype=torch.int8)}, "E0213", "an n that divides"),
        ({"input_rotation": torch.ones(64, 32, dtype=torch.int8)}, "E0213", "an n that divides"),
        ({"input_rotation": torch.ones(64, 64, dtype=torch.int32)}, "E0213", "is I32"),
        ({"input_rotation": torch.full((64, 64), float("nan"))}, "E0215", "NaN"),
        ({"input_prescale": torch.ones(32)}, "E0213", "input_prescale"),
        ({"input_rotation": torch.eye(64), "input_prescale": torch.ones(64)}, "E0218", "no Hadamard matrix"),
    ],
    ids=["48", "flat", "int32", "nan", "prescale", "learned-prescale"],
)
def test_wrong_rotations(tensors: dict, code: str, words: str, tmp_path: Path) -> None:
    folder = changed("int4_rotated", tmp_path, {}, {f"{NAME}.{name}": one for name, one in tensors.items()})
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, SHAPE)
    assert raised.value.code == code


# ---- what is wrong


def changed(name: str, out: Path, leaves: dict | None = None, tensors: dict | None = None) -> Path:
    """A fixture with other leaves in its config and other tensors (None: without it)."""
    seed = Seed.of(case(name))
    config = copy.deepcopy(seed.config)
    for path, value in (leaves or {}).items():
        config = with_leaf(config, path, value)
    found = seed.tensors | (tensors or {})
    return seed.write(out, config, {key: tensor for key, tensor in found.items() if tensor is not None})


WEIGHT, INPUT = (*RULE, "weight"), (*RULE, "input_tensors")
OTHER = ("quantization_config",)
ONLINE = (*OTHER, "algo_config", 0, "online_config")


@pytest.mark.parametrize(
    ("name", "path", "value", "code", "words"),
    [
        ("int8_g32", (*WEIGHT, "dtype"), "mx6", "E0218", "dtype 'mx6' is not supported"),
        ("int8_g32", (*WEIGHT, "dtype"), "int4", "E0213", "stores I32"),
        ("int8_g32", (*WEIGHT, "qscheme"), "nonsense", "E0212", "qscheme must be one of per_tensor"),
        ("int8_g32", (*WEIGHT, "qscheme"), "per_channel", "E0218", "a scale for each column"),
        ("int8_g32", (*WEIGHT, "group_size"), 0, "E0212", "group_size must be a positive number"),
        ("int8_g32", (*WEIGHT, "group_size"), True, "E0212", "group_size must be a positive number"),
        ("int8_g32", (*WEIGHT, "group_size"), 16, "E0213", r"\[4, 64\]"),
        ("int8_g32", (*WEIGHT, "group_size"), 48, "E0213", "do not divide it"),
        ("int8_g32", (*WEIGHT, "ch_axis"), 7, "E0212", "ch_axis must be 0, 1 or -1"),
        ("int8_g32", (*WEIGHT, "symmetric"), "no", "E0212", "must be true, false or null"),
        ("int8_g32", (*WEIGHT, "is_dynamic"), True, "E0212", "weights in a file are not"),
        ("int8_g32", (*WEIGHT, "scale_format"), "e5m3", "E0218", "scale_format 'e5m3'"),
        ("int8_g32", (*WEIGHT, "zero_point_type"), "float32", "E0218", "zero_point_type 'float32'"),
        ("int8_g32", (*RULE, "weight"), None, "E0213", "does not say how"),
        ("int8_g32", (*RULE, "weight"), 3, "E0212", "must be an object"),
        ("int8_g32", (*RULE, "bias"), {}, "E0218", "quantizes biases"),
        ("int8_g32", (*RULE, "output_tensors"), {}, "E0218", "quantizes outputs"),
        ("int8_g32", (*OTHER, "algo_config"), [{"name": "rotation", "r3": True}], None, ""),
        ("fp8_kv", (*OTHER, "algo_config"), [{"name": "rotation", "r3": True}], "E0218", "rotates K"),
        ("int8_g32", (*OTHER, "algo_config"), [{"name": "rotation", "r4": True}], "E0209", "rotates inputs"),
        ("int4_rotated", (*ONLINE, "online_rotation_layers"), 3, "E0212", "must be a list of module names"),
        ("int4_rotated", (*ONLINE, "online_rotation_layers"), ["*o_proj"], "E0209", "no file contains"),
        ("int8_g32", (*OTHER, "layer_quant_config"), [1], "E0212", "must be an object, found list"),
        ("int8_g32", (*OTHER, "exclude"), [3], "E0212", "must be a list of module names"),
        ("int8_g32", (*OTHER, "export", "pack_method"), "x", "E0212", "pack_method must be reorder or order"),
        ("uint4_g32", (*WEIGHT, "dtype"), "int4", None, ""),
        ("fp8_custom", (*OTHER, "activation_scheme"), "x", "E0212", "activation_scheme must be static or"),
        ("fp8_custom", (*OTHER, "ignored_layers"), 3, "E0212", "must be a list of module names"),
        ("awq_custom", (*OTHER, "bits"), 5, "E0218", "dtype 'uint5' is not supported"),
        ("awq_custom", (*OTHER, "bits"), 8, "E0213", "stores U8"),
        ("awq_custom", (*OTHER, "group_size"), None, "E0212", "group_size must be a positive number"),
        ("mxfp4", (*INPUT, "scale_calculation_mode"), "x", "E0212", "scale_calculation_mode must be"),
        ("mxfp4", (*INPUT, "is_dynamic"), False, "E0218", "static, is not supported"),
        ("fp8_static", (*INPUT, "dtype"), "fp8_e5m2", "E0218", "fp8_e5m2 per_tensor is not supported"),
        ("fp8_token", (*INPUT, "ch_axis"), 0, "E0218", "along axis 0"),
        ("fp8_token", (*INPUT, "is_dynamic"), False, "E0218", "is not supported"),
        ("nvfp4", (*WEIGHT, 1, "is_scale_quant"), False, "E0218", "2 stages"),
        ("nvfp4", (*WEIGHT, 1, "dtype"), "int8", "E0218", "2 stages"),
        ("nvfp4", (*INPUT, 0, "group_size"), 32, "E0218", "only groups of 16"),
    ],
)
def test_wrong_configs(
    name: str, path: tuple, value: object, code: str | None, words: str, tmp_path: Path
) -> None:
    folder = changed(name, tmp_path, {path: value})
    if code is None:  # another meaning of the same bytes: nobody can see it
        plan_model(open_checkpoint(str(folder)), device="cpu")
        return
    with pytest.raises(LowbitError, match=words) as raised:
        plan_model(open_checkpoint(str(folder)), device="cpu")
    assert raised.value.code == code and "\n" not in str(raised.value)


I8 = torch.zeros(64, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "code", "words"),
    [
        ("int8_g32", "weight", I8[:63], "E0213", r"\[64, 32\]"),
        ("int8_g32", "weight", I8.int(), "E0213", "stores I8"),
        ("int8_g32", "weight_scale", torch.ones(32, 2), "E0213", r"\[2, 32\]"),
        ("int8_g32", "weight_scale", torch.full((2, 32), torch.nan), "E0215", "NaN"),
        ("int8_g32", "weight_scale", None, "E0209", "weight_scale"),
        ("int8_g32", "weight_zero_point", torch.ones(2, 32, dtype=torch.int8), "E0213", "is symmetric"),
        ("int8_g32", "weight_zero_point", torch.ones(2, 31, dtype=torch.int8), "E0213", r"\[2, 32\]"),
        ("uint8_channel", "weight_zero_point", torch.full((32,), 256, dtype=torch.int32), "E0213", "256"),
        ("uint8_channel", "weight_zero_point", None, "E0209", "the zero points of"),
        ("uint4_g32", "weight", torch.zeros(64, 5, dtype=torch.int32), "E0213", r"\[64, 4\]"),
        ("fp8_static", "weight", torch.full(SHAPE, torch.nan).to(torch.float8_e4m3fn), "E0215", "NaN"),
        ("fp8_static", "weight_scale", torch.ones(2), "E0213", r"stores \[\]"),
        ("fp8_static", "weight_zero_point", torch.zeros(()), "E0213", "have no zero points"),
        ("fp8_static", "input_scale", None, "E0209", "input_scale"),
        ("fp8_static", "input_scale", torch.ones(3), "E0213", "per tensor"),
        (
            "int8_asym",
            "input_zero_point",
            torch.tensor(300, dtype=torch.int32),
            "E0213",
            "no zero point of 8",
        ),
        ("int8_asym", "input_zero_point", None, "E0209", "input_zero_point"),
        ("mxfp4", "weight_scale", torch.full((32, 2), 255, dtype=torch.uint8), "E0215", "NaN"),
        ("mxfp4", "weight_scale", torch.ones(32, 2), "E0213", "stores U8 or F8_E8M0"),
        ("nvfp4", "weight_scale_2", None, "E0209", "weight_scale_2"),
        ("nvfp4", "input_scale_2", torch.tensor(torch.inf), "E0215", "infinite"),
    ],
)
def test_wrong_tensors(name: str, suffix: str, tensor: object, code: str, words: str, tmp_path: Path) -> None:
    folder = changed(name, tmp_path, tensors={f"{NAME}.{suffix}": tensor})
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, SHAPE)
    assert raised.value.code == code and NAME in str(raised.value) and "\n" not in str(raised.value)


def test_plain_weights_where_the_config_says_quantized(tmp_path: Path) -> None:
    """Fake-quantized exports, and layers somebody dequantized: the floats count, with a warning."""
    folder = changed("int8_g32", tmp_path, tensors={f"{NAME}.weight": torch.ones(SHAPE)})
    assert str(read(folder, NAME, SHAPE).weight.scheme) == "f32"
    with pytest.raises(LowbitError, match="stored as plain floats"):
        read(folder, NAME, SHAPE, strict=True)
