"""bitsandbytes: the tool's own files and values, a numpy oracle for odd shapes, damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, last_bit, read, reader_of, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.kernels.activation_quant import limit_of
from lowbit.loading.source_modules import SourceModel

CASES = fixture_cases("bitsandbytes")
LLAMA = [path for path in CASES if "conv1d" not in path.name]
NAME = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{NAME}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
NAN, INF = float("nan"), float("inf")
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
FP4 = (np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12).astype(np.float32)


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


def shape_of(folder: Path) -> tuple[int, int]:
    rows, columns = expected(folder)[NAME].shape
    return rows, columns


# ---- the tool's files


@pytest.mark.parametrize("name", ["nf4_double", "fp4_double_odd", "int8"])
def test_gptqmodels_names(name: str, tmp_path: Path) -> None:
    """The same tensors as GPTQModel calls them; the type of 4 bits stands in the config alone."""
    folder, tensors = case(name), {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        stem, mark, part = key.partition(".weight.")
        renamed = f"{stem}.weight_{part.partition('.')[0]}" if mark else key.replace(".SCB", ".weight_scb")
        if not key.endswith(".weight_format"):
            tensors[renamed] = tensor
    config = {"quant_method": "bitsandbytes", "bits": 4, "format": name.partition("_")[0]}
    other = write_folder(tmp_path / "m", tensors, config)
    shape = shape_of(folder)
    found, wanted = read(other, NAME, shape, strict=True).weight, read(folder, NAME, shape).weight
    assert torch.equal(found.dequantize(), wanted.dequantize())
    assert found.scheme.weight_alone == wanted.scheme.weight_alone
    if name == "int8":
        assert found.scheme.activation is not None and not found.scheme.activation.outliers
    module = StoredModule(NAME, NAME, shape)
    asked = set(reader_of(other).tensors_of(module))
    assert asked == {key for key in tensors if key.startswith(NAME)}


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    """Equal in float32; int8 to 2 last bits, as the tool multiplies code and row first."""
    for name, values in expected(folder).items():
        linear = read(folder, name, tuple(values.shape))
        found = linear.weight.dequantize()
        assert linear.weight.scheme == reader_of(folder).scheme_of(
            StoredModule(name, name, tuple(values.shape))
        )
        if folder.name != "int8":
            assert torch.equal(found, values), name
            continue
        assert ((found - values).abs() <= 2 * last_bit(torch.float32, values)).all(), name
        for dtype in (torch.float16, torch.bfloat16):
            apart = (found.to(dtype) - values.to(dtype)).float().abs()
            assert (apart <= last_bit(dtype, values)).all(), name
            assert (apart > 0).float().mean() < 0.001, name


def test_what_the_cases_cover() -> None:
    schemes = {path.name: str(read(path, NAME, shape_of(path)).weight.scheme) for path in LLAMA}
    assert schemes == {
        "nf4": "nf4 1x64 f32",
        "nf4_double": "nf4 1x64 f32",
        "nf4_storage_bf16": "nf4 1x64 f32",
        "nf4_odd": "nf4 1x64 f32 flat",
        "fp4_double_odd": "fp4_bnb 1x64 f32 flat",
        "int8": "int8 1xall f32 (input int8 1xall dynamic outliers 5)",
    }
    dtypes = {path.name: header_of(path).tensors[WEIGHT].dtype for path in LLAMA}
    assert dtypes["nf4"] == "U8" and dtypes["nf4_storage_bf16"] == "BF16"
    assert dtypes["int8"] == "I8"
    outer = header_of(case("nf4_double")).tensors["model.layers.0.mlp.down_proj.weight.nested_absmax"]
    assert outer.shape == (2,), "one block of the second level would not show its size"


def test_scales_and_codes_are_canonical() -> None:
    plain = read(case("nf4_double"), NAME, (64, 64)).weight
    assert plain.codes.dtype == torch.uint8 and int(plain.codes.max()) <= 15
    assert plain.scales[0].shape == (64, 1) and plain.scales[0].dtype == torch.float32
    flat = read(case("fp4_double_odd"), NAME, (64, 48)).weight
    assert flat.codes.shape == (64, 48) and flat.scales[0].shape == (48,)
    stored = load_file(case("int8") / "model.safetensors")
    int8 = read(case("int8"), NAME, (64, 64)).weight
    assert torch.equal(int8.codes.to(torch.int16) - 128, stored[WEIGHT].to(torch.int16))
    assert int8.scales[0].shape == (64, 1)


def test_bias_and_float_modules() -> None:
    stored = load_file(case("nf4") / "model.safetensors")
    bias = read(case("nf4"), NAME, (64, 64)).bias
    assert bias is not None and bias.abs().sum() > 0 and torch.equal(bias, stored[f"{NAME}.bias"])
    head = read(case("nf4"), "lm_head", (64, 64)).weight
    assert head.scheme.is_dense and torch.equal(head.codes, stored["lm_head.weight"])


@pytest.mark.parametrize("folder", LLAMA, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, shape_of(folder))))
    assert used == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}


def test_description() -> None:
    assert reader_of(case("nf4_double")).describe() == "bitsandbytes, nf4 in config.json"
    assert reader_of(case("int8")).describe() == "bitsandbytes, int8 in config.json"


# ---- shapes and sizes the tool's files do not have, against numpy


def packed(shape: tuple[int, int], size: int, kind: str, nested: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a module, its float32 weight), random; ``nested``: block of absmax."""
    rng = np.random.default_rng(shape[0] * shape[1] + size)
    count = shape[0] * shape[1]
    table, blocks = (NF4 if kind == "nf4" else FP4), -(-count // size)
    codes = rng.integers(0, 16, count + count % 2).astype(np.uint8)
    said: dict[str, object] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": shape}
    absmax = rng.uniform(1e-4, 3, blocks).astype(np.float32)
    tensors = {
        WEIGHT: (codes[::2] << 4 | codes[1::2]).reshape(-1, 1),
        f"{WEIGHT}.absmax": absmax,
        f"{WEIGHT}.quant_map": table,
    }
    if nested:
        steps = rng.integers(0, 256, blocks).astype(np.uint8)
        inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        outer = rng.uniform(0.1, 1, -(-blocks // nested)).astype(np.float32)
        said |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 1.25}
        tensors[f"{WEIGHT}.absmax"] = steps
        tensors[f"{WEIGHT}.nested_absmax"], tensors[f"{WEIGHT}.nested_quant_map"] = outer, inner
        absmax = inner[steps] * outer[np.arange(blocks) // nested] + np.float32(1.25)
    text = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    tensors[f"{WEIGHT}.quant_state.bitsandbytes__{kind}"] = text
    weight = table[codes[:count]] * absmax[np.arange(count) // size]
    found = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    return found, torch.from_numpy(weight).view(shape)


@pytest.mark.parametrize("name", ["nf4_conv1d", "nf4_conv1d_storage_bf16"])
def test_gpt2_s_layers(name: str) -> None:
    """transformers turns a Conv1D before it is packed: read as (out, in), whatever dtype holds the bytes."""
    header = open_checkpoint(str(case(name)))
    source, wanted = SourceModel(header, strict=True), expected(case(name))
    with TensorData(header) as data:
        found = {m.target.stored: source.read(m, data).weight for m in source.modules}
    for stem, values in wanted.items():
        assert torch.equal(found[stem].dequantize(), values), stem
    assert str(found["transformer.h.0.attn.c_proj"].scheme) == "nf4 1x64 f32"


@pytest.mark.parametrize(
    ("shape", "size", "kind", "nested", "flat"),
    [
        ((5, 13), 64, "nf4", 0, True),  # an odd number of weights: the last nibble is padding
        ((7, 96), 64, "fp4", 0, True),
        ((3, 100), 128, "nf4", 0, True),
        ((9, 33), 64, "nf4", 4, True),
        ((3, 256), 128, "fp4", 0, False),
        ((2, 4096), 4096, "nf4", 0, False),
        ((66, 256), 64, "nf4", 256, False),  # 264 blocks: the second level has a short one
        ((4, 7), 64, "fp4", 256, True),  # less than one block
    ],
)
def test_against_numpy(
    shape: tuple[int, int], size: int, kind: str, nested: int, flat: bool, tmp_path: Path
) -> None:
    tensors, wanted = packed(shape, size, kind, nested)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    found = read(write_folder(tmp_path, tensors, config), NAME, shape).weight
    assert torch.equal(found.dequantize(), wanted)
    assert found.scheme.flattened == flat and found.scheme.blocks == ((1, size),)


# ---- damaged and contradictory files


def changed(
    folder: Path, name: str, change: Callable[[dict[str, Tensor]], object], config: dict | None = None
) -> Path:
    """A copy of a case with its tensors, and perhaps its config, changed."""
    tensors = load_file(case(name) / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    written = json.loads((case(name) / "config.json").read_text())
    written["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "model.safetensors")
    return folder


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def same(tensors: dict[str, Tensor]) -> None:
    """Nothing is changed."""


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def state(**change: object) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(key for key in tensors if key.startswith(f"{WEIGHT}.quant_state"))
        tensors[name] = text(json.dumps({**json.loads(bytes(tensors[name].tolist())), **change}))

    return edit


@pytest.mark.parametrize(
    ("name", "change", "code", "said"),
    [
        ("nf4", put(WEIGHT, torch.zeros(2047, 1, dtype=torch.uint8)), "E0213", "2047 bytes"),
        ("nf4", put(WEIGHT, torch.zeros(2048, 1, dtype=torch.int64)), "E0213", "I64"),
        ("nf4_storage_bf16", put(WEIGHT, torch.zeros(1023, 1, dtype=torch.bfloat16)), "E0213", "2046 bytes"),
        ("nf4", put(f"{WEIGHT}.absmax", torch.ones(63)), "E0213", "absmax"),
        ("nf4", put(f"{WEIGHT}.absmax", torch.ones(64, dtype=torch.float16)), "E0213", "absmax"),
        ("nf4", put(f"{WEIGHT}.absmax", torch.full((64,), NAN)), "E0215", "absmax"),
        ("nf4", drop(f"{WEIGHT}.absmax"), "E0209", "absmax"),
        ("nf4", put(f"{WEIGHT}.quant_map", torch.linspace(-1, 1, 16)), "E0218", "code 1 "),
        ("nf4", put(f"{WEIGHT}.quant_map", torch.full((16,), NAN)), "E0218", "quant_map"),
        ("nf4", put(f"{WEIGHT}.quant_map", torch.ones(15)), "E0213", "quant_map"),
        ("nf4", drop(f"{WEIGHT}.quant_map"), "E0209", "quant_map"),
        ("nf4", rename(STATE, STATE.replace("nf4", "fp4")), "E0218", "quant_map"),
        ("nf4", rename(STATE, STATE.replace("nf4", "af4")), "E0218", "af4"),
        ("nf4", put(STATE.replace("nf4", "fp4"), text("{}")), "E0213", "two states"),
        ("nf4", drop(STATE), "E0209", "quant_state"),
        ("nf4", drop(STATE, f"{WEIGHT}.absmax"), "E0209", "quant_state"),
        ("nf4_storage_bf16", drop(STATE), "E0209", "quant_state"),
        ("nf4", drop(WEIGHT), "E0209", WEIGHT),
        ("nf4", state(shape=[32, 128]), "E0210", "32, 128"),
        ("nf4", state(shape=None), "E0210", "None"),
        ("nf4", state(blocksize=128), "E0213", "blocksize 128"),
        ("nf4", put(STATE, torch.tensor([1, 2], dtype=torch.uint8)), "E0213", "JSON"),
        ("nf4", put(STATE, text("[" * 60_000)), "E0213", "JSON"),
        ("nf4", put(STATE, text("[1]")), "E0213", "JSON"),
        ("nf4", put(STATE, torch.zeros(70000, dtype=torch.uint8)), "E0213", "70000"),
        ("nf4", put(STATE, torch.zeros(8)), "E0213", "F32"),
        ("nf4_double", drop(f"{WEIGHT}.nested_absmax"), "E0209", "nested_absmax"),
        ("nf4_double", drop(f"{WEIGHT}.nested_quant_map"), "E0209", "nested_quant_map"),
        ("nf4_double", put(f"{WEIGHT}.nested_absmax", torch.ones(3)), "E0213", "nested_absmax"),
        ("nf4_double", put(f"{WEIGHT}.nested_quant_map", torch.ones(255)), "E0213", "nested_quant_map"),
        ("nf4_double", put(f"{WEIGHT}.nested_absmax", torch.full((1,), NAN)), "E0215", "nested_absmax"),
        (
            "nf4_double",
            put(f"{WEIGHT}.nested_quant_map", torch.full((256,), INF)),
            "E0215",
            "nested_quant_map",
        ),
        ("nf4_double", state(nested_offset="x"), "E0213", "nested_offset"),
        ("nf4_double", state(nested_offset=NAN), "E0215", "absmax"),
        ("nf4_double", state(nested_offset=1e300), "E0215", "absmax"),
        ("nf4_double", state(nested_blocksize=0), "E0213", "nested_blocksize"),
        ("nf4_double", state(nested_blocksize=32), "E0213", "nested_absmax"),
        ("int8", drop(f"{NAME}.SCB"), "E0209", "SCB"),
        ("int8", put(f"{NAME}.SCB", torch.ones(63)), "E0213", "SCB"),
        ("int8", put(f"{NAME}.SCB", torch.ones(64, dtype=torch.int32)), "E0213", "SCB"),
        ("int8", put(f"{NAME}.SCB", torch.full((64,), INF)), "E0215", "SCB"),
        ("int8", put(WEIGHT, torch.zeros(64, 63, dtype=torch.int8)), "E0213", WEIGHT),
        ("int8", put(WEIGHT, torch.zeros(64, 64)), "E0213", WEIGHT),
        ("int8", put(f"{NAME}.weight_format", torch.tensor(2, dtype=torch.uint8)), "E0218", "column-tiled"),
        ("int8", put(f"{NAME}.weight_format", torch.tensor(1, dtype=torch.int32)), "E0218", "column-tiled"),
    ],
)
def test_damaged_files(
    name: str, change: Callable[[dict[str, Tensor]], None], code: str, said: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, name, change)
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 64))
    message = str(caught.value)
    assert caught.value.code == code and said in message, message
    assert NAME in message and "\n" not in message and len(message) < 500, message


def test_other_shapes_than_the_models(tmp_path: Path) -> None:
    for name, code in (("nf4", "E0210"), ("int8", "E0213")):
        with pytest.raises(LowbitError) as caught:
            read(case(name), NAME, (128, 32))
        assert caught.value.code == code and NAME in str(caught.value)
    with pytest.raises(LowbitError) as caught:
        reader_of(case("nf4")).scheme_of(StoredModule(NAME, NAME, (64, 128)))
    assert caught.value.code == "E0213" and "8192 4-bit weights need 4096" in str(caught.value)


def test_a_second_level_of_any_size_is_read_in_its_own_memory(tmp_path: Path) -> None:
    folder = changed(tmp_path, "nf4_double", state(nested_blocksize=10**15))
    assert torch.equal(read(folder, NAME, (64, 64)).weight.dequantize(), expected(case("nf4_double"))[NAME])


def test_int8_without_weight_format(tmp_path: Path) -> None:
    folder = changed(tmp_path, "int8", drop(f"{NAME}.weight_format"))
    found = read(folder, NAME, (64, 64)).weight
    assert torch.equal(found.codes, read(case("int8"), NAME, (64, 64)).weight.codes)


def test_zero_and_negative_scales_are_legal(tmp_path: Path) -> None:
    folder = changed(tmp_path, "nf4", put(f"{WEIGHT}.absmax", torch.tensor([-1.0, 0.0] * 32)))
    weight = read(folder, NAME, (64, 64)).weight.dequantize()
    assert torch.equal(weight[1], torch.zeros(64)) and weight[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"llm_int8_threshold": "6"}, "llm_int8_threshold"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold"),
        ({"llm_int8_threshold": True}, "llm_int8_threshold"),
        ({"load_in_4bit": True}, "both"),
        ({"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": [4]}, "bnb_4bit_quant_type"),
    ],
)
def test_impossible_configs(config: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        reader_of(changed(tmp_path, "int8", same, config))
    assert caught.value.code == "E0212" and said in str(caught.value)


def test_threshold_of_zero_means_no_outliers(tmp_path: Path) -> None:
    folder = changed(tmp_path, "int8", same, {"llm_int8_threshold": 0})
    activation = read(folder, NAME, (64, 64)).weight.scheme.activation
    assert activation is not None and activation.outliers == 0 and limit_of(activation) == 127


def test_tensors_win_over_the_configs_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(tmp_path, "nf4", same, {"bnb_4bit_quant_type": "fp4"})
    assert torch.equal(read(folder, NAME, (64, 64)).weight.dequantize(), expected(case("nf4"))[NAME])
    assert "E0214" in caplog.text and "says fp4 but the tensors are nf4" in caplog.text
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 64), strict=True)
    assert caught.value.code == "E0214"


def test_honest_files_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for folder in LLAMA:
        read(folder, NAME, shape_of(folder), strict=True)
    assert not caplog.text


def test_plain_floats_under_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = torch.randn(64, 64)
    folder = write_folder(tmp_path, {WEIGHT: plain}, {"load_in_4bit": True})
    assert torch.equal(read(folder, NAME, (64, 64)).weight.codes, plain)
    assert "E0214" in caplog.text and "not quantized" in reader_of(folder).describe()
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 64), strict=True)
    assert caught.value.code == "E0214"


def test_skip_lists_do_not_decide(tmp_path: Path) -> None:
    folder = changed(tmp_path, "nf4", same, {"llm_int8_skip_modules": [NAME]})
    assert torch.equal(read(folder, NAME, (64, 64)).weight.dequantize(), expected(case("nf4"))[NAME])


def test_files_of_2023_name_no_method(tmp_path: Path) -> None:
    shutil.copytree(case("nf4"), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    del written["quantization_config"]["quant_method"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(written))
    assert reader_of(tmp_path / "m").name == "bitsandbytes"


def test_claims(tmp_path: Path) -> None:
    for number, method in enumerate(("bitsandbytes", "bitsandbytes_4bit", "gptq")):
        config = {"quant_method": method, "bits": 4, "group_size": 64}
        header = header_of(write_folder(tmp_path / str(number), {WEIGHT: torch.ones(2, 2)}, config))
        claims = type(reader_of(case("nf4"))).claims(header)
        assert (claims is not None) == method.startswith("bitsandbytes")
        assert claims is None or method in claims


# ---- stacks of experts

STACK = "model.layers.0.mlp.experts.down_proj"


def stacked(folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized, _ = packed((64, 64), 64, "nf4")
    write_folder(folder, quantized | tensors, config)
    reader, module = reader_of(folder), StoredModule(f"{STACK}.1", STACK, (8, 16), 1, 3)
    with TensorData(header_of(folder)) as data:
        assert reader.scheme_of(module).is_dense and reader.tensors_of(module) == [STACK]
        return reader.read(module, data).weight.codes


def test_stacks_left_in_floats(tmp_path: Path) -> None:
    stack = torch.randn(3, 8, 16).bfloat16()
    assert torch.equal(stacked(tmp_path, {STACK: stack}), stack[1])


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [
        (torch.uint8, ""),
        (torch.int8, ""),
        (torch.uint8, ".quant_state.bitsandbytes__nf4"),
        (torch.bfloat16, ".quant_state.bitsandbytes__nf4"),
        (torch.bfloat16, ".absmax"),
    ],
)
def test_packed_stacks_are_refused(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    tensors = {STACK: torch.zeros(192, 1, dtype=dtype)}
    if suffix:
        tensors[STACK + suffix] = torch.ones(6)
    with pytest.raises(LowbitError) as caught:
        stacked(tmp_path, tensors)
    assert caught.value.code == "E0218" and f"{STACK!r} is a stack of experts" in str(caught.value)
