"""``lowbit convert --format gguf``: against the files of llama.cpp's converter, and the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import FIXTURES
from formats.writing_cases import cruel, fixtures_it_takes, scheme
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.gguf_writer import GgufWriter, type_of
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme
from lowbit.tokenization import load_tokenizer

GGUF = FIXTURES / "gguf_families"
FAMILIES = [
    *(
        "gemma2",
        "gemma3",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "phi3_longrope",
        "qwen2",
        "qwen3",
        "qwen3moe",
    ),
]
# What the converter derives otherwise: names, counts and its own version.
OWN = ("general.name", "general.size_label", "general.file_type", "general.finetune", "general.basename")


def fields(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_there_and_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF -> folder -> GGUF: the converter's tensors and keys, the values to the last bit."""
    original, out = GGUF / f"{name}.gguf", tmp_path / "out.gguf"
    convert(open_checkpoint(str(original)), "dense", tmp_path / "folder")
    convert(open_checkpoint(str(tmp_path / "folder")), "gguf", out)
    before = {t.name: t for t in gguf.GGUFReader(original).tensors}
    after = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert before.keys() == after.keys()
    for tensor, theirs in before.items():
        wanted = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        found = gguf.quants.dequantize(after[tensor].data, after[tensor].tensor_type)
        assert wanted.shape == found.shape
        if tensor.startswith("rope_"):
            assert np.allclose(wanted, found, rtol=1e-6, atol=0), tensor
        elif name.startswith("gemma") and tensor.endswith("norm.weight"):
            assert np.allclose(wanted, found, rtol=0, atol=2.0**-23), tensor  # 1 taken off, and added again
        else:
            assert np.array_equal(wanted, found), tensor
    keys, mine = fields(original), fields(out)
    for key, value in keys.items():
        # Keys that repeat what another says, or that only its own vocabulary has.
        if key.startswith(("tokenizer.ggml.scores", *OWN)) or key not in mine:
            continue
        found = mine[key]
        if isinstance(value, float):
            assert found == pytest.approx(value, rel=1e-6), key
        elif key != "tokenizer.ggml.pre":
            assert found == value, key
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    tokens = load_file(GGUF / f"{name}.safetensors")["tokens"].flatten().tolist()
    [a], [b] = (
        prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [tokens])
        for path in (original, out)
    )
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    first, second = (load_tokenizer(open_checkpoint(str(path))) for path in (original, out))
    for text in ("the hour", " and  an", "hinder the ant\n"):
        assert first.encode(text) == second.encode(text)


CASES = [
    (scheme("int4", (1, 32)), "Q4_0"),
    (scheme("int4", (1, 64)), "Q4_0"),
    (scheme("int4", (1, 0)), "Q4_0"),
    (scheme("int5", (1, 32)), "Q5_0"),
    (scheme("int8", (1, 96)), "Q8_0"),
    (scheme("int8", (0, 0)), "Q8_0"),
    (scheme("e2m1", (1, 32), scales="e8m0"), "MXFP4"),
]


@pytest.mark.parametrize(("made", "kind"), CASES, ids=str)
def test_blocks_by_the_gguf_package(made: Scheme, kind: str) -> None:
    """The package's own decoder on what was written: the same numbers."""
    weight = cruel(made, (5, 192))
    assert GgufWriter.refuses_to_write(made, (5, 192)) is None and type_of(made) == kind
    tensors = GgufWriter({"x": made}).write(StoredModule("x", "x", (5, 192)), weight)
    found = gguf.quants.dequantize(tensors["x.weight"].numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, weight.dequantize().numpy())


def test_nvfp4() -> None:
    made = scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32")
    weight = cruel(made, (5, 192))
    tensors = GgufWriter({"x": made}).write(StoredModule("x", "x", (5, 192)), weight)
    layout = number_format("gguf_nvfp4").block
    assert layout is not None
    found = layout.decode(tensors["x.weight"].unflatten(-1, (-1, layout.bytes))).flatten(-2)
    assert torch.allclose(found * tensors["x.scale"], weight.dequantize(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("uint4", (1, 32), zero=True), "zero points"),
        (scheme("int4", (1, 48)), "whole blocks of 32"),
        (scheme("int4", (1, 32), reordered=True), "act-order"),
        (scheme("int3", (1, 32)), "no block type"),
        (scheme("int8", (1, 0), activation=ActivationScheme(number_format("int8"), (1, 0))), "inputs"),
        (scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32"), "blocks of 64"),
    ],
    ids=str,
)
def test_refusals(made: Scheme, reason: str) -> None:
    assert reason in (GgufWriter.refuses_to_write(made, (8, 96)) or "")


def test_scales_that_are_no_f16() -> None:
    made = scheme("int4", (1, 32), scales="f32")
    weight = cruel(made, (4, 64))
    with pytest.raises(LowbitError, match="f32 scales are not exact in f16"):
        GgufWriter({"x": made}).write(StoredModule("x", "x", (4, 64)), weight)
    halves = QuantizedTensor(made, (4, 64), weight.codes, (weight.scales[0].half().float(),))
    assert GgufWriter({"x": made}).write(StoredModule("x", "x", (4, 64)), halves)


@pytest.mark.parametrize(
    "folder",
    fixtures_it_takes(GgufWriter, "gptq", "compressed_tensors", "auto_round"),
    ids=lambda f: f"{f.parent.name}-{f.name}",
)
def test_quantized_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module's numbers, read from the file by lowbit: rows of Q and K back in their order."""
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}  # the fixtures have none
    monkeypatch.setattr("lowbit.loading.gguf_saving.tokenizer_metadata", lambda header, rows: tokens)
    try:
        convert(open_checkpoint(str(folder)), "gguf", tmp_path / "out.gguf")
    except LowbitError as error:
        assert "not exact in f16" in error.message, error.message
        return
    before, after = (SourceModel(open_checkpoint(str(p))) for p in (folder, tmp_path / "out.gguf"))
    theirs = {module.place.part.name: module for module in after.modules}
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for module in before.modules:
            a = before.read(module, old).weight.dequantize()
            b = after.read(theirs[module.place.part.name], new).weight.dequantize()
            assert torch.equal(a, b), module.target.name


def test_missing_package_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = open_checkpoint(str(GGUF / "llama.gguf"))
    convert(header, "dense", tmp_path / "folder")
    folder = open_checkpoint(str(tmp_path / "folder"))
    with pytest.raises(LowbitError, match="one file; name it out.gguf"):
        convert(folder, "gguf", tmp_path / "out")
    with pytest.raises(LowbitError, match="is a GGUF file already"):
        convert(header, "gguf", tmp_path / "out.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[gguf\]'") as caught:
        convert(folder, "gguf", tmp_path / "out.gguf")
    assert caught.value.code == "E0451"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize(("form", "kinds"), [("compressed-tensors", {"Q8_0"}), ("gptq", {"Q8_0", "F32"})])
def test_simple_blocks_in_other_formats(form: str, kinds: set[str], tmp_path: Path) -> None:
    """A Q8_0 file as groups of 32: the numbers of every matrix; embeddings plain where they must be."""
    header = open_checkpoint(str(GGUF / "mistral.gguf"))
    convert(header, form, tmp_path / "out")
    before, after = SourceModel(header), SourceModel(open_checkpoint(str(tmp_path / "out")), strict=True)
    found = set()
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for one, other in zip(before.modules, after.modules, strict=True):
            a, b = before.read(one, old).weight, after.read(other, new).weight
            assert torch.equal(a.dequantize(), b.dequantize()), one.target.name
            found.add("F32" if b.scheme.is_dense else "Q8_0")
    assert found == kinds


def test_what_has_offsets_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be written without"):
        convert(open_checkpoint("smollm2"), "gptq", tmp_path / "out")
    assert not list(tmp_path.iterdir())
