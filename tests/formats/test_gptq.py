"""GPTQ: every packing against a numpy packer, contradictions between config and data, impossible configs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import FIXTURES, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from forward_helpers import differences, prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model
from oracles import gptq as oracle

NAME = "model.layers.0.self_attn.q_proj"


def words(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.view(np.int32).copy())


def make(
    bits: int = 4,
    group: int = 32,
    shape: tuple[int, int] = (64, 96),
    *,
    sym: bool = False,
    v1: bool = True,
    act_order: bool = False,
    planar: bool = False,
    whole_words: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """(tensors, float32 weight (out, in)) of one module; all codes and zeros occur."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes = rng.integers(0, 2**bits, (columns, out))
    zeros = np.full((groups, out), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (groups, out))
    scales = rng.uniform(-0.1, 0.2, (groups, out)).astype(np.float16)
    index = np.arange(columns) // size
    if act_order:
        index = rng.permutation(index)
    pack = oracle.planar if planar else oracle.stream
    stored = zeros
    if v1:
        stored = (zeros - 1) % 2**bits
    packed = pack(stored.T, bits).T
    if whole_words:
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        packed = (pack(zeros.T, bits).T.astype(np.int64) - ones & 0xFFFFFFFF).astype(np.uint32)
    tensors = {
        f"{NAME}.qweight": words(pack(codes, bits)),
        f"{NAME}.qzeros": words(np.ascontiguousarray(packed)),
        f"{NAME}.scales": torch.from_numpy(scales),
        f"{NAME}.g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, oracle.dequantize(codes, zeros, scales, index)


def config(bits: int = 4, group: int = 32, **more: object) -> dict:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": False,
        "desc_act": False,
        **more,
    }


def check(folder: Path, shape: tuple[int, int], wanted: np.ndarray) -> None:
    found = read(folder, NAME, shape).weight
    assert np.array_equal(found.dequantize().numpy(), wanted), "bit-equal to the definition"


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_packing(bits: int, sym: bool, v1: bool, act_order: bool, tmp_path: Path) -> None:
    tensors, wanted = make(bits, sym=sym, v1=v1, act_order=act_order)
    written = config(bits, sym=sym, desc_act=act_order, checkpoint_format="gptq" if v1 else "gptq_v2")
    folder = write_folder(tmp_path, tensors, written)
    check(folder, (64, 96), wanted)
    found = read(folder, NAME, (64, 96)).weight
    assert found.scheme.weight.name == f"{'int' if sym else 'uint'}{bits}"
    assert found.scheme == reader_of(folder).scheme_of(StoredModule(NAME, NAME, (64, 96)))
    assert (found.column_order is not None) == act_order


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planar(bits: int, tmp_path: Path) -> None:
    tensors, wanted = make(bits, planar=True, v1=False)
    check(write_folder(tmp_path, tensors, config(bits, checkpoint_format="gptq_p")), (64, 96), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_zero_borrow_from_their_word(bits: int, tmp_path: Path) -> None:
    tensors, wanted = make(bits, whole_words=True, seed=3)
    written = config(bits, meta={"quantizer": ["gptqmodel:5.0.0"]})
    check(write_folder(tmp_path, tensors, written), (64, 96), wanted)


@pytest.mark.parametrize("group", [-1, 96, 1024])
def test_one_group(group: int, tmp_path: Path) -> None:
    tensors, wanted = make(group=-1)
    folder = write_folder(tmp_path, tensors, config(group=group))
    check(folder, (64, 96), wanted)
    assert read(folder, NAME, (64, 96)).weight.scheme.blocks == ((1, 0),)


def test_last_group_is_short(tmp_path: Path) -> None:
    tensors, wanted = make(group=64)
    check(write_folder(tmp_path, tensors, config(group=64)), (64, 96), wanted)


def test_padded_input_is_cut(tmp_path: Path) -> None:
    tensors, wanted = make(shape=(64, 128))
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"][:96]
    check(write_folder(tmp_path, tensors, config()), (64, 96), wanted[:, :96])


def test_old_file_names_and_spellings(tmp_path: Path) -> None:
    tensors, wanted = make()
    write_folder(tmp_path, tensors, None)
    text = '{"wbits": 4, "q_group_size": 32, "desc_act": false, "sym": false}'
    (tmp_path / "quantize_config.json").write_text(text)
    check(tmp_path, (64, 96), wanted)


def test_dynamic_rules_first_match_wins(tmp_path: Path) -> None:
    tensors, wanted = make(8, 48)
    rules = {"-:.*k_proj$": {}, "+:.*q_proj": {"bits": 8, "group_size": 48}, ".*": {"bits": 2}}
    check(write_folder(tmp_path, tensors, config(dynamic=rules)), (64, 96), wanted)


def test_module_left_float(tmp_path: Path) -> None:
    tensors, _ = make()
    plain = torch.randn(5, 7, dtype=torch.float16)
    folder = write_folder(tmp_path, {**tensors, "lm_head.weight": plain}, config())
    assert torch.equal(read(folder, "lm_head", (5, 7)).weight.codes, plain)


def refuse_strictly(folder: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 96), strict=True)
    assert caught.value.code == "E0214"


@pytest.mark.parametrize(("said", "stored"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_data_prove_v1_or_v2(
    said: str, stored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, wanted = make(sym=True, v1=stored == "gptq")
    folder = write_folder(tmp_path, tensors, config(sym=True, checkpoint_format=said))
    with caplog.at_level(logging.WARNING, "lowbit"):
        check(folder, (64, 96), wanted)
    assert "E0214" in caplog.text and "reading as" in caplog.text
    refuse_strictly(folder)


def test_sym_contradicted_by_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, wanted = make()
    folder = write_folder(tmp_path, tensors, config(sym=True))
    check(folder, (64, 96), wanted)
    assert "E0214" in caplog.text
    refuse_strictly(folder)


def test_order_without_desc_act(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, wanted = make(act_order=True)
    check(write_folder(tmp_path, tensors, config()), (64, 96), wanted)
    assert "desc_act false" in caplog.text
    refuse_strictly(tmp_path)


def test_inputs_that_another_engine_would_quantize(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, weight = make()
    folder = write_folder(tmp_path, tensors, config(activation="w4afp8"))
    stored = read(folder, NAME, (64, 96), strict=True)
    assert np.array_equal(stored.weight.dequantize().numpy(), weight)
    assert stored.weight.scheme.activation is None
    assert "activation asks for inputs that are quantized too; they are left as they are" in caplog.text


def test_missing_g_idx(tmp_path: Path) -> None:
    tensors, wanted = make()
    del tensors[f"{NAME}.g_idx"]
    check(write_folder(tmp_path / "a", tensors, config()), (64, 96), wanted)
    refuse(tmp_path / "b", tensors, config(desc_act=True), "E0209", "g_idx")


def test_g_idx_nobody_filled_in(tmp_path: Path) -> None:
    tensors, wanted = make()
    tensors[f"{NAME}.g_idx"] *= 0
    check(write_folder(tmp_path, tensors, config()), (64, 96), wanted)


def test_symmetric_without_zeros(tmp_path: Path) -> None:
    tensors, wanted = make(sym=True)
    del tensors[f"{NAME}.qzeros"]
    check(write_folder(tmp_path / "a", tensors, config(sym=True)), (64, 96), wanted)
    refuse(tmp_path / "b", tensors, config(), "E0209", "qzeros")


@pytest.mark.parametrize(("columns", "group"), [(96, -1), (256, 128)])
def test_marlin(columns: int, group: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (columns, 128))
    groups = 1 if group == -1 else columns // group
    scales = rng.uniform(0.01, 0.2, (groups, 128)).astype(np.float16)
    index = np.arange(columns) // (columns // groups)
    wanted = oracle.dequantize(codes, np.full((groups, 128), 8), scales, index)
    for names, more in (
        (("B", "s"), {"is_marlin_format": True}),
        (("qweight", "scales"), {"checkpoint_format": "marlin"}),
    ):
        tensors = {
            f"{NAME}.{names[0]}": words(oracle.marlin(codes)),
            f"{NAME}.{names[1]}": torch.from_numpy(oracle.marlin_scales(scales)),
            f"{NAME}.workspace": torch.zeros(4, dtype=torch.int32),
        }
        folder = write_folder(tmp_path / names[0], tensors, config(group=group, sym=True, **more))
        check(folder, (128, columns), wanted)


def refuse(folder: Path, tensors: dict[str, Tensor], written: dict, code: str, *said: str) -> None:
    write_folder(folder, tensors, written)
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 96))
    assert caught.value.code == code, caught.value
    for text in said:
        assert text in str(caught.value), f"{text!r} not in {caught.value}"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"bits": 1}, "E0212", "bits is 1"),
        ({"bits": 16}, "E0212", "bits is 16"),
        ({"bits": "4"}, "E0212", "whole number"),
        ({"bits": True}, "E0212", "whole number"),
        ({"bits": None}, "E0212", "no 'bits'"),
        ({"group_size": 0}, "E0212", "group_size is 0"),
        ({"group_size": -2}, "E0212", "group_size is -2"),
        ({"group_size": 3}, "E0213", "scales"),
        ({"group_size": 64}, "E0213", "scales"),
        ({"group_size": None}, "E0212", "group_size"),
        ({"bits": 8}, "E0213", "qweight"),
        ({"bits": 3}, "E0213", "scales"),  # 12 rows of words could be padded 3-bit codes
        ({"checkpoint_format": "bitblas"}, "E0218", "bitblas"),
        ({"pack_dtype": "int64"}, "E0218", "int64"),
        ({"adapter": {"r": 4}}, "E0218", "adapter"),
        ({"dynamic": ["x"]}, "E0212", "dynamic"),
        ({"dynamic": {"(": {"bits": 4}}}, "E0212", "pattern"),
        ({"dynamic": {".*": {"bits": 9}}}, "E0212", "bits is 9"),
    ],
)
def test_impossible_config(change: dict, code: str, said: str, tmp_path: Path) -> None:
    refuse(tmp_path, make()[0], {**config(), **change}, code, said)


def damaged(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**make()[0], f"{NAME}.{name}": value}


def bad_scale(value: float) -> Tensor:
    scales = make()[0][f"{NAME}.scales"].clone()
    scales[1, 3] = value
    return scales


INDEX = torch.arange(96, dtype=torch.int32) // 32


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("qweight", torch.zeros(12, 64, dtype=torch.int8), "E0213"),
        ("qweight", torch.zeros(64, 12, dtype=torch.int32), "E0213"),
        ("qweight", torch.zeros(12, 63, dtype=torch.int32), "E0213"),
        ("qweight", torch.zeros(96, 8, dtype=torch.int32), "E0213"),  # AWQ's shape
        ("qzeros", torch.zeros(3, 9, dtype=torch.int32), "E0213"),
        ("qzeros", torch.zeros(3, 8), "E0213"),
        ("scales", torch.ones(4, 64, dtype=torch.float16), "E0213"),
        ("scales", torch.ones(3, 64, dtype=torch.int32), "E0213"),
        ("scales", bad_scale(float("nan")), "E0215"),
        ("scales", bad_scale(float("inf")), "E0215"),
        ("g_idx", INDEX - 1, "E0213"),
        ("g_idx", INDEX + 1, "E0213"),
        ("g_idx", INDEX.roll(1).masked_fill(torch.arange(96) == 40, 0), "E0213"),
        ("g_idx", INDEX[:95], "E0213"),
        ("g_idx", INDEX.float(), "E0213"),
    ],
)
def test_damaged_tensors(name: str, value: Tensor, code: str, tmp_path: Path) -> None:
    refuse(tmp_path, damaged(name, value), config(), code, name)


@pytest.mark.parametrize("name", ["qweight", "scales"])
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in make()[0].items() if not k.endswith(name)}
    code = "E0213" if name == "qweight" else "E0209"  # without any qweight nothing is quantized
    refuse(tmp_path, tensors, config(), code, name)


def test_config_kept_by_a_dequantized_model(tmp_path: Path) -> None:
    refuse(
        tmp_path, {f"{NAME}.weight": torch.randn(64, 96)}, config(), "E0213", "remove the quantization config"
    )


def test_zero_and_negative_scales_are_legal(tmp_path: Path) -> None:
    tensors = damaged("scales", bad_scale(0.0))
    found = read(write_folder(tmp_path, tensors, config()), NAME, (64, 96)).weight.dequantize()
    assert (found[3, 32:64] == 0).all()


EMBEDDING = "model.embed_tokens"


def test_an_embedding_has_groups_of_words(tmp_path: Path) -> None:
    """Of GPTQModel's own file: as its values say, and a model answers as with them unquantized."""
    folder = FIXTURES / "gptq/embedding"
    found = read(folder, EMBEDDING, (80, 64), strict=True).weight
    assert str(found.scheme) == "int8 32x1 f16" and found.scales[0].shape == (3, 64)  # the last of 16 words
    assert reader_of(folder).scheme_of(StoredModule(EMBEDDING, EMBEDDING, (80, 64))) == found.scheme
    seed = Seed.of(folder)
    tensors = {name: tensor for name, tensor in seed.tensors.items() if not name.startswith(EMBEDDING)}
    plain = seed.write(tmp_path, seed.config, tensors | {f"{EMBEDDING}.weight": found.dequantize()})
    tokens = [[0, 31, 32, 33, 63, 64, 79]]
    reference = {"device": "cpu", "dtype": "float32", "linear_kernel": "reference"}
    wanted = prompt_logits(load_model(header_of(plain), **reference), tokens)[0]
    assert torch.equal(prompt_logits(load_model(header_of(folder), **reference), tokens)[0], wanted)
    assert (
        differences(prompt_logits(load_model(header_of(folder), device="cpu"), tokens)[0], wanted).max()
        < 0.05
    )


def test_an_embedding_whose_words_are_in_another_order(tmp_path: Path) -> None:
    seed = Seed.of(FIXTURES / "gptq/embedding")
    order = seed.tensors[f"{EMBEDDING}.g_idx"].flip(0).sort().values.roll(1)
    config = seed.config | {"quantization_config": seed.config["quantization_config"] | {"desc_act": True}}
    config["quantization_config"]["dynamic"][EMBEDDING]["desc_act"] = True
    folder = seed.write(tmp_path, config, seed.tensors | {f"{EMBEDDING}.g_idx": order})
    with pytest.raises(LowbitError, match="quantized in another order") as raised:
        read(folder, EMBEDDING, (80, 64))
    assert raised.value.code == "E0218"
