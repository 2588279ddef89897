"""AQLM: what the tool's layers hold against its own dequantizer; damaged files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, last_bit, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.kernels import native as native_library
from lowbit.kernels.cpu_vectors import CpuVectors
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.number_formats import VectorLayout

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("aqlm")]
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (32, 64)


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("aqlm") if folder.name == name)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    """The tool rounds sum and product: one codebook is equal once rounded, several within two last bits."""
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight
        assert found.scheme.weight.vectors is not None
        rounded = found.dequantize().to(values.dtype)
        if folder.name.startswith("1x"):
            assert torch.equal(rounded, values), name
        else:
            # A sum that cancels is rounded where its terms were: their size counts.
            step = last_bit(values.dtype, values.float().abs() + 0.5)
            assert ((rounded.float() - values.float()).abs() <= step).all(), name


def test_codebooks_stay_packed() -> None:
    """Two bits a weight, a scale a row and the module's own codebooks: what the file holds."""
    weight = read(case("2x8_g8"), DOWN, SHAPE).weight
    layout = weight.scheme.weight.vectors
    assert layout == VectorLayout(books=2, bits=8, length=8)
    assert weight.codes.shape == (32, 16) and weight.nbytes == 32 * 16 + 32 * 2
    assert weight.codebooks is not None and weight.codebooks.shape == (2, 256, 8)
    tensors = load_file(case("2x8_g8") / "model.safetensors")
    stored = tensors[f"{DOWN}.codes"].view(torch.uint8).int()  # (out, in / g, M)
    assert torch.equal(layout.indices(weight.codes), stored)


def test_vectors_of_several_rows_stay_packed_as_well() -> None:
    """An index and a scale for two rows, whose vectors have four numbers for each."""
    weight = read(case("1x12_g4x2"), DOWN, SHAPE).weight
    layout = weight.scheme.weight.vectors
    assert layout == VectorLayout(books=1, bits=12, length=4, height=2) and layout.name == "vq1x12_2x4"
    assert weight.scheme.heights == (2, 2) and weight.scheme.weight.is_tall
    assert weight.codes.shape == (16, 32) and weight.nbytes == 16 * 32 + 16 * 2
    assert weight.codebooks is not None
    tensors = load_file(case("1x12_g4x2") / "model.safetensors")
    codes, books = tensors[f"{DOWN}.codes"], tensors[f"{DOWN}.codebooks"]
    index, scale = int(codes[3, 5, 0]) & 0xFFF, float(tensors[f"{DOWN}.scales"][3])
    assert torch.equal(weight.dequantize()[6:8, 20:24], books[0, index].float() * scale)
    part = weight.rows(6, 8)
    assert torch.equal(part.dequantize(), weight.dequantize()[6:8])
    with pytest.raises(LowbitError, match=r"rows 5:8 cut a"):
        weight.rows(5, 8)


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_indices_above_the_middle_are_stored_as_negative_ones(bits: int, tmp_path: Path) -> None:
    seed = Seed.of(case("1x8_g8"))
    config = {
        **seed.config,
        "quantization_config": {**seed.config["quantization_config"], "nbits_per_codebook": bits},
    }
    generator = torch.Generator().manual_seed(bits)
    indices = torch.randint(1 << bits, (32, 8, 1), generator=generator)
    codebooks = torch.randn(1, 1 << bits, 1, 8, generator=generator).half()
    changed = {
        "codes": torch.where(indices < 1 << bits - 1, indices, indices - (1 << bits)).short(),
        "codebooks": codebooks,
    }
    tensors = seed.tensors | {f"{DOWN}.{key}": value for key, value in changed.items()}
    weight = read(seed.write(tmp_path, config, tensors), DOWN, SHAPE).weight
    wanted = codebooks[0, :, 0].float()[indices[..., 0]].flatten(1) * weight.scales[0].float()
    assert torch.equal(weight.dequantize(), wanted)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_and_the_plan_says_what_it_costs(
    folder: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing multiplies codebooks they are decoded when they are loaded, to 16 bits a weight."""
    if not native:
        monkeypatch.setattr(CpuVectors, "refuses", lambda *_: "not here")
    [down] = [module for module in plan_model(header_of(folder), device="cpu").modules if module.name == DOWN]
    by_rows = folder.name != "1x12_g4x2"
    assert ("decoded to 16 bits" in reader_of(folder).describe()) == (not by_rows)
    entries = header_of(folder).tensors
    stored = sum(entry.nbytes for name, entry in entries.items() if name.startswith(f"{DOWN}."))
    packed = by_rows and native and native_library.library() is not None
    assert (down.kernel == "cpu_vectors") == packed
    assert down.nbytes == (stored if packed else 2 * 32 * 64)
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()
    if not native:
        monkeypatch.undo()
        others = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
        assert (others - logits).abs().max() < 0.02 * logits.abs().max()


@pytest.mark.parametrize(("name", "dtype"), [("2x8_g8", torch.float32), ("1x12_g4x2", torch.float16)])
def test_converted_it_is_plain(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Float32 holds every sum and product; vectors of rows are written as they are decoded."""
    folder, out = case(name), tmp_path / "out"
    assert not convert(header_of(folder), "dense", out).errors
    written = load_file(out / "model.safetensors")[f"{DOWN}.weight"]
    assert written.dtype is dtype
    assert torch.equal(written, read(folder, DOWN, SHAPE).weight.dequantize().to(dtype))
    assert prompt_logits(load_model(header_of(out), device="cpu"), [[1, 2, 3, 4, 5]])[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"codes": torch.zeros(32, 8, 2, dtype=torch.int8)}, "E0213"),
        ({"codes": torch.zeros(32, 8, 1, dtype=torch.int16)}, "E0213"),
        ({"codebooks": torch.zeros(1, 128, 1, 8).half()}, "E0213"),
        ({"codebooks": torch.full((1, 256, 1, 8), float("nan")).half()}, "E0215"),
        ({"scales": torch.zeros(32, 1).half()}, "E0213"),
        ({"scales": torch.full((32, 1, 1, 1), float("inf")).half()}, "E0215"),
        ({"codes": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("1x8_g8"))
    changed = {f"{DOWN}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["in_group_size", "num_codebooks", "nbits_per_codebook"])
@pytest.mark.parametrize("value", [0, -1, 2**40, "8", True, [], 3])
def test_configs_that_cannot_be(key: str, value: object, tmp_path: Path) -> None:
    seed = Seed.of(case("1x8_g8"))
    config = {**seed.config, "quantization_config": {**seed.config["quantization_config"], key: value}}
    folder = seed.write(tmp_path, config, seed.tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code in ("E0212", "E0213")
