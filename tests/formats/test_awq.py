"""AWQ: gemm, gemv, gemv_fast and Marlin packing against numpy packers; impossible configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model
from oracles import gptq as oracle

NAME = "model.layers.0.mlp.up_proj"
SHAPE = (64, 256)


def words(array: np.ndarray, kind: type = np.int32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(kind).copy())


def make(version: str, group: int = 64, bits: int = 4) -> tuple[dict[str, Tensor], np.ndarray]:
    """(tensors, float32 weight (out, in)); all codes and zeros occur."""
    rng = np.random.default_rng(7)
    out, columns = SHAPE
    size = columns if group == -1 else group
    groups = columns // size
    codes = rng.integers(0, 2**bits, (columns, out))
    zeros = rng.integers(0, 2**bits, (groups, out))
    scales = rng.uniform(1e-7, 0.2, (groups, out)).astype(np.float16)  # some subnormal
    index = np.arange(columns) // size
    wanted = oracle.dequantize(codes, zeros, scales, index)
    if version == "gemm":
        pack = oracle.awq_gemm if bits == 4 else lambda c: oracle.stream(c.T, bits).T
        tensors = {"qweight": words(pack(codes)), "qzeros": words(pack(zeros)), "scales": scales}
    else:
        padded = {128: 1, 64: 2, 32: 4}.get(size, 1)
        padded *= 8  # all cases here have at most 8 groups
        wide_zeros = np.zeros((padded, out), np.int64)
        wide_zeros[:groups] = zeros
        wide_scales = np.zeros((padded, out), np.float16)
        wide_scales[:groups] = scales
        if version == "gemv":
            tensors = {
                "qweight": words(oracle.stream(codes, 4).T),
                "qzeros": words(oracle.stream(wide_zeros, 4).T),
                "scales": np.ascontiguousarray(wide_scales.T),
            }
        else:
            offsets = (-(wide_zeros.astype(np.float32) * wide_scales.astype(np.float32))).astype(np.float16)
            tensors = {
                "qweight": words(oracle.awq_gemv_fast(codes.T), np.int16),
                "qzeros": offsets,
                "scales": wide_scales,
            }
            offset = offsets[:groups].astype(np.float32)[index].T
            wanted = codes.T.astype(np.float32) * scales.astype(np.float32)[index].T + offset
    as_torch = {k: v if isinstance(v, Tensor) else torch.from_numpy(v) for k, v in tensors.items()}
    return {f"{NAME}.{k}": v for k, v in as_torch.items()}, wanted


def config(version: str = "gemm", group: int = 64, **more: object) -> dict:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": version,
        **more,
    }


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_every_packing(version: str, group: int, tmp_path: Path) -> None:
    tensors, wanted = make(version, group)
    folder = write_folder(tmp_path, tensors, config(version, group))
    found = read(folder, NAME, SHAPE).weight
    assert np.array_equal(found.dequantize().numpy(), wanted)
    assert found.scheme == reader_of(folder).scheme_of(StoredModule(NAME, NAME, SHAPE))
    assert found.scheme.offset == (version == "gemv_fast")


@pytest.mark.parametrize("bits", [2, 8])
def test_other_bits_are_in_plain_order(bits: int, tmp_path: Path) -> None:
    tensors, wanted = make("gemm", bits=bits)
    found = read(write_folder(tmp_path, tensors, config(bits=bits)), NAME, SHAPE).weight
    assert np.array_equal(found.dequantize().numpy(), wanted)


def test_rules_of_single_modules(tmp_path: Path) -> None:
    """GPTQModel's: of those that match the first counts, and bits decide the order of a module's codes."""
    rules = {
        "-:.*o_proj": {},
        "+:.*mlp": {"bits": 8, "group_size": 32},
        ".*q_proj$": {"group_size": -1, "bits": 2},
        ".*": {"bits": 3},
    }
    others = {"model.layers.0.self_attn.q_proj": (2, -1), NAME: (8, 32)}
    wanted, tensors = {}, {}
    for name, (bits, group) in others.items():
        made, wanted[name] = make("gemm", group, bits)
        tensors |= {key.replace(NAME, name): tensor for key, tensor in made.items()}
    folder = write_folder(tmp_path, tensors, config(dynamic=rules))
    for name, values in wanted.items():
        found = read(folder, name, SHAPE, strict=True).weight
        assert np.array_equal(found.dequantize().numpy(), values)
        assert found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, SHAPE))
    plain = write_folder(tmp_path / "plain", make("gemm")[0], config(dynamic={".*down_proj": {"bits": 8}}))
    assert np.array_equal(read(plain, NAME, SHAPE).weight.dequantize().numpy(), make("gemm")[1])


def test_old_config_file(tmp_path: Path) -> None:
    tensors, wanted = make("gemm")
    write_folder(tmp_path, tensors, None)
    text = '{"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}'
    (tmp_path / "quant_config.json").write_text(text)
    assert np.array_equal(read(tmp_path, NAME, SHAPE).weight.dequantize().numpy(), wanted)


def test_symmetric_zeros_become_signed_codes(tmp_path: Path) -> None:
    tensors, _ = make("gemm")
    tensors[f"{NAME}.qzeros"] = words(np.full((4, 8), 0x88888888, np.uint32))
    found = read(write_folder(tmp_path, tensors, config()), NAME, SHAPE).weight
    assert found.zeros is None and found.scheme.weight.name == "int4"


def test_marlin_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (256, 64))
    scales = rng.uniform(0.01, 0.2, (2, 64)).astype(np.float16)
    wanted = oracle.dequantize(codes, np.full((2, 64), 8), scales, np.arange(256) // 128)
    tensors = {
        f"{NAME}.qweight": words(oracle.marlin(codes)),
        f"{NAME}.scales": torch.from_numpy(oracle.marlin_scales(scales)),
    }
    folder = write_folder(tmp_path, tensors, config("marlin", 128, zero_point=False))
    assert np.array_equal(read(folder, NAME, SHAPE).weight.dequantize().numpy(), wanted)


def test_bias_and_float_modules(tmp_path: Path) -> None:
    tensors, _ = make("gemm")
    tensors |= {f"{NAME}.bias": torch.randn(64), "gate.weight": torch.randn(3, 5)}
    folder = write_folder(tmp_path, tensors, config(modules_to_not_convert=["gate"]))
    assert torch.equal(read(folder, NAME, SHAPE).bias, tensors[f"{NAME}.bias"])
    assert torch.equal(read(folder, "gate", (3, 5)).weight.dequantize(), tensors["gate.weight"])


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"bits": 5}, "E0212", "bits is 5"),
        ({"bits": 8, "version": "gemv"}, "E0212", "bits is 8"),
        ({"bits": 8}, "E0213", "qweight"),
        ({"group_size": 0}, "E0212", "group_size is 0"),
        ({"group_size": 32}, "E0213", "qzeros"),
        ({"version": "exotic"}, "E0218", "exotic"),
        ({"version": "gemv"}, "E0213", "qweight"),
        ({"version": "gemv_fast"}, "E0213", "qweight"),
        ({"dynamic": ["mlp"]}, "E0212", "dynamic must be an object of patterns"),
        ({"dynamic": {".*": {"bits": 5}}}, "E0212", "dynamic.bits is 5"),
        ({"dynamic": {".*": {"group_size": 0}}}, "E0212", "dynamic.group_size is 0"),
        ({"dynamic": {".*": {"bits": 8}}}, "E0213", "qweight"),
        ({"dynamic": {"(": {"bits": 8}}}, "E0212", "pattern"),
        ({"quant_method": "gptq"}, "E0213", "qweight"),  # AWQ's order in a file that says GPTQ
    ],
)
def test_impossible_config(change: dict, code: str, said: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make("gemm")[0], {**config(), **change})
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == code and said in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("qweight", torch.zeros(32, 64, dtype=torch.int32), "E0213"),  # GPTQ's shape
        ("qweight", torch.zeros(256, 8, dtype=torch.int64), "E0213"),
        ("qzeros", torch.zeros(4, 7, dtype=torch.int32), "E0213"),
        ("scales", torch.ones(4, 63, dtype=torch.float16), "E0213"),
        ("scales", torch.full((4, 64), float("nan")), "E0215"),
        ("scales", None, "E0209"),
    ],
)
def test_damaged_tensors(name: str, value: Tensor | None, code: str, tmp_path: Path) -> None:
    tensors = make("gemm")[0] | ({} if value is None else {f"{NAME}.{name}": value})
    if value is None:
        del tensors[f"{NAME}.{name}"]
    folder = write_folder(tmp_path, tensors, config())
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == code and name in str(caught.value), caught.value


# ---- scaled activations, in a tied model of which AutoAWQ kept the head


SCALED = FIXTURES / "awq" / "starcoder2"
ACT = "model.layers.0.mlp.act.scales"
DOWN = "model.layers.0.mlp.c_proj"


def test_the_tools_own_logits() -> None:
    """The second Linear's input is divided by what stands beside the activation."""
    wanted = load_file(SCALED / "outputs.safetensors")["logits"]
    model = load_model(
        header_of(SCALED), device="cpu", kv_cache_dtype="f32", linear_kernel="reference", dtype="float32"
    )
    tokens = [[1, 5, 9, 3, 7, 2, 0, 14, 8, 8, 4]]
    assert (prompt_logits(model, tokens)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    found = prompt_logits(load_model(header_of(SCALED), device="cpu", kv_cache_dtype="f32"), tokens)[0]
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
    assert "model.embed_tokens.weight" not in header_of(SCALED).tensors, "the head is the embedding"


@pytest.mark.parametrize("leaf", ["c_proj", "dense_4h_to_h", "down_proj"])
@pytest.mark.parametrize("packed", [True, False])
def test_which_layers_follow_a_scaled_activation(leaf: str, packed: bool, tmp_path: Path) -> None:
    """StarCoder2's, Falcon's and GPT-NeoX's, packed or kept plain; elsewhere it belongs to nothing."""
    name, scales = f"transformer.h.0.mlp.{leaf}", torch.rand(256).half() + 0.5
    tensors, wanted = make("gemm")
    tensors = {
        key.replace(NAME, name if packed else f"{name}_other"): value for key, value in tensors.items()
    }
    tensors |= {"transformer.h.0.mlp.act.scales": scales}
    tensors |= {} if packed else {f"{name}.weight": torch.from_numpy(wanted).half()}
    folder = write_folder(tmp_path, tensors, config())
    found = read(folder, name, SHAPE)
    after = leaf != "down_proj"
    assert found.weight.scheme.is_dense != packed and (found.input is not None) == after
    used = reader_of(folder).tensors_of(StoredModule(name, name, SHAPE))
    assert ("transformer.h.0.mlp.act.scales" in used) == after
    if after:
        assert torch.equal(found.input.multiplier, 1.0 / scales.float())


@pytest.mark.parametrize(
    ("scales", "code", "words"),
    [
        (torch.ones(64).half(), "E0213", r"\[96\]"),
        (torch.full((96,), torch.inf).half(), "E0215", "infinite"),
        (torch.zeros(96).half(), "E0215", "inputs are divided by it"),
    ],
)
def test_damaged_scales_of_activations(scales: Tensor, code: str, words: str, tmp_path: Path) -> None:
    seed = Seed.of(SCALED)
    folder = seed.write(tmp_path, seed.config, seed.tensors | {ACT: scales})
    with pytest.raises(LowbitError, match=words) as caught:
        read(folder, DOWN, (64, 96))
    assert caught.value.code == code and ACT in str(caught.value) and "\n" not in str(caught.value)
