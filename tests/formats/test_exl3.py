"""EXL3: the tool's numbers and numpy's definition; padding, tied heads, joined layers; damage refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tiny import write_folder as write_model
from formats.helpers import (
    FIXTURES,
    expected,
    fixture_cases,
    header_of,
    last_bit,
    read,
    reader_of,
    write_folder,
)
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.trellis import code_book

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("exl3")]
NAME = "model.layers.0.mlp.up_proj"
OTHER = "model.layers.1.mlp.up_proj"
EXL3 = {"quant_method": "exl3", "version": "1.4.1", "bits": 4.25, "head_bits": 6}
STEP = 8  # the fixtures hold every 8th output


def number(book: str, code: int) -> float:
    """The code book's number for 16 bits, one at a time."""

    def half(bits: int) -> np.float16:
        return np.array(bits, np.uint16).view(np.float16)[()]

    if book == "mul1":
        total = sum((code * 0x83DCD12D % 2**32).to_bytes(4, "little"))
        return float(np.float16(float(1024 + total) * float(half(0x1EEE)) + float(half(0xC931))))
    x = code * 0xCBAC1FED if book == "mcg" else code * 89226354 + 64248484
    x = x % 2**32 & 0x8FFF8FFF ^ 0x3B603B60
    return float(half(x & 0xFFFF) + half(x >> 16))


def layer(
    name: str, out: int, columns: int, bits: int, book: str = "mul1", signs: bool = False
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of one layer, bit by bit, and the weight they mean."""
    rng = np.random.default_rng(len(name) + 100 * bits + out)
    rows, tiles = (-(-size // 128) * 8 for size in (columns, out))
    stream = rng.integers(0, 2, (rows, tiles, 256 * bits))
    halves = (stream.reshape(rows, tiles, -1, 16) << np.arange(15, -1, -1)).sum(-1).astype(np.uint16)
    trellis = halves.reshape(rows, tiles, -1, 2)[..., ::-1].reshape(rows, tiles, -1)  # the second one first
    inner = np.zeros((rows * 16, tiles * 16))
    known = {}
    for weight in range(256):
        lane, at = divmod(weight, 8)
        row, column = lane % 4 * 2 + at % 2 + (8 if at % 4 > 1 else 0), lane // 4 + (8 if at > 3 else 0)
        last = (weight + 1) * bits
        window = stream[..., np.arange(last - 16, last) % (256 * bits)]
        codes = (window << np.arange(15, -1, -1)).sum(-1)
        known |= {code: number(book, code) for code in np.unique(codes).tolist() if code not in known}
        inner[row::16, column::16] = np.vectorize(known.get)(codes)
    turn = np.ones((1, 1))
    while len(turn) < 128:
        turn = np.block([[turn, turn], [turn, -turn]])
    turn /= np.sqrt(128)
    vectors, found = [], {f"{name}.trellis": trellis.view(np.int16)}
    for letter, size in (("u", rows * 16), ("v", tiles * 16)):
        sign = rng.integers(0, 2, size)
        if signs:
            packed = (sign.reshape(-1, 16) << np.arange(16)).sum(-1).astype(np.uint16)
            found[f"{name}.s{letter}"] = packed.view(np.int16)
            vectors.append(1.0 - 2 * sign)
        else:
            found[f"{name}.s{letter}h"] = ((1 - 2 * sign) * rng.uniform(0.05, 0.5, size)).astype(np.float16)
            vectors.append(found[f"{name}.s{letter}h"].astype(np.float64))
    whole = np.kron(np.eye(rows // 8), turn) @ inner @ np.kron(np.eye(tiles // 8), turn)
    whole *= vectors[0][:, None] * vectors[1]
    tensors = {key: torch.from_numpy(value.copy()) for key, value in found.items()}
    multiplier = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}.get(book)
    if multiplier is not None:
        tensors[f"{name}.{book}"] = torch.tensor(multiplier, dtype=torch.uint32).view(torch.int32)
    return tensors, whole.T[:out, :columns]


def assert_rounded(weight: QuantizedTensor, wanted: np.ndarray) -> None:
    """Each number is the float16 next to the definition's, or the one beside it where float32 sums differ."""
    found = weight.dequantize()
    assert torch.equal(found, found.half().float())
    exact = torch.from_numpy(wanted.copy())
    step = last_bit(torch.float16, exact.float())
    assert ((found.double() - exact).abs() <= 0.51 * step + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    source, wanted = SourceModel(open_checkpoint(str(folder)), strict=True), expected(folder)
    seen = set()
    with TensorData(source.header) as data:
        for module in source.modules:
            name = module.target.stored
            linear = source.read(module, data)
            assert linear.weight.scheme == module.scheme and linear.weight.shape == module.place.part.shape
            if name not in wanted:
                continue
            seen.add(name)
            assert linear.weight.scheme.weight.trellis is not None, "whatever its size"
            rows = linear.weight.dequantize().half()[::STEP]
            step = last_bit(torch.float16, wanted[name].float())
            assert ((rows.float() - wanted[name].float()).abs() <= step).all(), name
            assert (rows != wanted[name]).float().mean() < 0.01, name  # ties alone
            biased = source.header.config["attention_bias"] and "self_attn" in name
            assert (linear.bias is not None) == biased
            if linear.bias is not None:
                assert linear.bias.shape == (linear.weight.shape[0],)
                stored = data.tensor(f"{name}.bias")
                assert len(stored) == 128 and torch.equal(stored[: len(linear.bias)], linear.bias)
    assert seen == set(wanted)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("book", ["3inst", "mcg", "mul1"])
def test_values(bits: int, book: str, tmp_path: Path) -> None:
    signs = (bits + len(book)) % 2 == 0
    shape = {0: (256, 128), 1: (128, 256), 2: (130, 100)}[bits % 3]
    tensors, weight = layer(NAME, *shape, bits, book, signs)
    folder = write_folder(tmp_path, tensors, EXL3 if bits % 2 else None)
    assert_rounded(read(folder, NAME, shape).weight, weight)
    assert ("4.25 bits" in reader_of(folder).describe()) == bool(bits % 2)


def test_every_number_of_the_code_books() -> None:
    for book in ("3inst", "mcg", "mul1"):
        codes = np.random.default_rng(1).integers(0, 65536, 4096).tolist()
        wanted = torch.tensor([number(book, code) for code in codes])
        assert torch.equal(code_book(book)[codes].float(), wanted)


def test_slices_of_outputs_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weight = layer(NAME, 300, 128, 3)
    folder = write_folder(tmp_path, tensors, EXL3)
    monkeypatch.setattr("lowbit.numerics.trellis._SLICE", 1)
    assert_rounded(read(folder, NAME, (300, 128)).weight, weight)
    tensors, weight = layer(NAME, 384, 128, 3)
    assert_rounded(read(write_folder(tmp_path / "b", tensors, EXL3), NAME, (384, 128)).weight, weight)


def quantized(tensors: dict[str, Tensor], names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(EXL3's tensors with these modules quantized, the same as plain floats)."""
    coded, plain = dict(tensors), dict(tensors)
    for turn, name in enumerate(names):
        out, columns = tensors[f"{name}.weight"].shape
        made, weight = layer(name, out, columns, 1 + turn % 8, ("3inst", "mcg", "mul1")[turn % 3])
        del coded[f"{name}.weight"]
        coded |= made
        plain[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).half().float()
    return coded, plain


def assert_answers_alike(first: Path, second: Path) -> None:
    ours, wanted = (
        prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
        for folder in (first, second)
    )
    assert wanted.std() > 0 and (ours - wanted).abs().max() <= 0.01 * wanted.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_answers_as_its_floats_do(tied: bool, tmp_path: Path) -> None:
    """The head of a tied model is quantized by itself, and config.json still says that it is tied."""
    folders = [write_model(tmp_path / name) for name in ("plain", "coded")]
    floats = load_file(folders[0] / "model.safetensors")
    names = [name.removesuffix(".weight") for name in floats if "_proj" in name] + ["lm_head"]
    coded, plain = quantized(floats, names)
    config = json.loads((folders[1] / "config.json").read_text())
    config |= {"quantization_config": EXL3, "tie_word_embeddings": tied}
    (folders[1] / "config.json").write_text(json.dumps(config))
    for folder, tensors in zip(folders, (plain, coded), strict=True):
        save_file(tensors, folder / "model.safetensors")
    plan = plan_model(header_of(folders[1]), device="cpu")
    coded_ones = {one.name for one in plan.modules if one.scheme.weight.trellis is not None}
    assert coded_ones == set(names) and all(size % 128 for one in plan.modules for size in one.shape)
    if native.library() is not None:
        assert {one.kernel for one in plan.modules if one.name in coded_ones} == {"cpu_trellis"}
    assert_answers_alike(folders[1], folders[0])
    convert(header_of(folders[1]), "dense", tmp_path / "out", dtype="f32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_answers_alike(tmp_path / "out", folders[0])


def exl3_model(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose sizes 128 divides, as floats and in trellises."""
    folders = [write_model(tmp_path / name) for name in ("plain", "coded")]
    turn, floats = torch.Generator().manual_seed(5), {}
    for name, tensor in load_file(folders[0] / "model.safetensors").items():
        shape = [{64: 128, 96: 256}.get(size, size) for size in tensor.shape]
        floats[name] = torch.randn(shape, generator=turn) * 0.1
    config = json.loads((folders[1] / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 256}
    (folders[0] / "config.json").write_text(json.dumps(config))
    names = [name.removesuffix(".weight") for name in floats if "_proj" in name]
    coded, plain = quantized(floats, names)
    (folders[1] / "config.json").write_text(json.dumps(config | {"quantization_config": EXL3}))
    for folder, tensors in zip(folders, (plain, coded), strict=True):
        save_file(tensors, folder / "model.safetensors")
    return folders[0], folders[1]


def test_trellises_stay_packed(tmp_path: Path) -> None:
    """The plan says it, the model holds it, and what is converted is what was decoded before."""
    plain, coded = exl3_model(tmp_path)
    plan = plan_model(header_of(coded), device="cpu")
    projections = [one for one in plan.modules if "_proj" in one.name]
    model = load_model(header_of(coded), device="cpu")
    if native.library() is None:
        assert {one.kernel for one in projections} == {"reference"}
    else:
        assert {one.kernel for one in projections} == {"cpu_trellis"}
        assert all(one.scheme.weight.trellis is not None for one in projections)
        for one in projections:
            bits = one.scheme.weight.bits
            stored = one.shape[0] * one.shape[1] * bits / 8 + 2 * sum(one.shape)
            assert stored <= one.nbytes <= stored + 8, (one.name, bits)
    assert model is not None
    assert_answers_alike(coded, plain)
    convert(header_of(coded), "dense", tmp_path / "out")
    written, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", plain))
    for name in (f"{one.name}.weight" for one in projections):
        assert torch.equal(written[name], written[name].half().float()), "each is a float16"
        exact = wanted[name].float()
        off = (written[name].float() - exact).abs()  # where float32 sums differ, a last bit
        assert (off <= last_bit(torch.float16, exact) + 1e-6 * exact.abs().max()).all(), name
    assert_answers_alike(tmp_path / "out", plain)


def test_layers_that_the_family_has_in_one(tmp_path: Path) -> None:
    """ExLlamaV3 takes Phi-3's qkv_proj and gate_up_proj apart."""
    import transformers

    torch.manual_seed(3)
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=32,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    cuts = {"qkv_proj": ({"q": 64, "k": 32, "v": 32}), "gate_up_proj": {"gate": 96, "up": 96}}
    coded = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        parts = (
            dict(zip(cuts[leaf], tensor.split(list(cuts[leaf].values())), strict=True))
            if leaf in cuts
            else {}
        )
        coded |= {f"{stem}.{key}_proj.weight": part for key, part in parts.items()} or {name: tensor}
    names = [name.removesuffix(".weight") for name in coded if "_proj" in name]
    coded, plain = quantized(coded, names)
    for stem in ("model.layers.0.self_attn", "model.layers.0.mlp"):
        for leaf, parts in cuts.items():
            wanted = [f"{stem}.{key}_proj.weight" for key in parts]
            if wanted[0] in plain:
                plain[f"{stem}.{leaf}.weight"] = torch.cat([plain.pop(name) for name in wanted])
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"quantization_config": EXL3}
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "config.json").write_text(json.dumps(written))
    save_file(coded, tmp_path / "coded" / "model.safetensors")
    assert_answers_alike(tmp_path / "coded", tmp_path / "plain")


@pytest.mark.parametrize("folder", CASES)
def test_fixtures_answer(folder: Path) -> None:
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"trellis": torch.zeros(8, 8, 64)}, "E0213"),
        ({"trellis": torch.zeros(8, 8, 64, dtype=torch.int32)}, "E0213"),
        ({"trellis": torch.zeros(8, 16, 64, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros(16, 8, 64, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros(8, 8, 72, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros(8, 8, 144, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros(8, 8, 0, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros(8, 512, dtype=torch.int16)}, "E0213"),
        ({"trellis": torch.zeros((), dtype=torch.int16)}, "E0213"),
        ({"trellis": None}, "E0209"),
        ({"suh": torch.ones(96).half()}, "E0213"),
        ({"suh": torch.ones(128)}, "E0213"),
        ({"svh": torch.ones(128, 1).half()}, "E0213"),
        ({"svh": None}, "E0209"),
        ({"suh": None, "su": torch.zeros(7, dtype=torch.int16)}, "E0213"),
        ({"suh": None, "su": torch.zeros(8)}, "E0213"),
        ({"svh": torch.full((128,), float("nan")).half()}, "E0215"),
        ({"suh": torch.full((128,), 6e4).half(), "svh": torch.full((128,), 6e4).half()}, "E0215"),
        ({"mcg": torch.tensor(0xCBAC1FED - 2**32, dtype=torch.int32)}, "E0213"),
        ({"mul1": torch.tensor(12345, dtype=torch.int32)}, "E0218"),
        ({"mul1": torch.zeros(2, dtype=torch.int32)}, "E0213"),
        ({"mul1": torch.tensor(1.0)}, "E0213"),
        ({"bias": torch.zeros(64).half()}, "E0213"),
        ({"bias": torch.zeros(96, dtype=torch.int32)}, "E0213"),
        ({"bias": torch.zeros(96).half()}, "none"),
        ({"bias": torch.zeros(128).half()}, "none"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, weight = layer(NAME, 96, 100, 4)
    tensors |= layer(OTHER, 96, 100, 4)[0]
    changed = {f"{NAME}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (tensors | changed).items() if value is not None}
    folder = write_folder(tmp_path, tensors, EXL3)
    if code == "none":
        found = read(folder, NAME, weight.shape)
        assert found.bias is not None and found.bias.shape == (96,)
        return
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, weight.shape)
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_exl3(tmp_path: Path) -> None:
    plain = {f"{NAME}.weight": torch.ones(4, 4)}
    with pytest.raises(LowbitError, match=r"no tensor ends in .trellis") as caught:
        reader_of(write_folder(tmp_path / "a", plain, EXL3))
    assert caught.value.code == "E0213"
    # What the first files had, and no version reads today, has no place in a model.
    seed = Seed.of(FIXTURES / "exl3" / "mul1")
    tensors = seed.tensors | {f"{NAME}.scale": torch.ones(1)}
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(seed.write(tmp_path / "b", seed.config, tensors))), device="cpu")
    assert caught.value.code == "E0217"
