"""compressed-tensors written: read back as it was, and the tool's own decompressor gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme, written
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear, StoredModule
from lowbit.formats.compressed_tensors_writer import CompressedTensorsWriter as Writer
from lowbit.formats.compressed_tensors_writer import reciprocal
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme

E4M3, E2M1, INT8, E8M0 = (number_format(name) for name in ("e4m3", "e2m1", "int8", "e8m0"))
TOKEN8 = ActivationScheme(INT8, (1, 0), limit=127.5)
TOKEN8_ASYM = ActivationScheme(INT8, (1, 0), limit=127.5, symmetric=False)
STATIC8 = ActivationScheme(INT8, (0, 0), "static")
STATIC8_ASYM = ActivationScheme(INT8, (0, 0), "static", symmetric=False)
FP8_TOKEN = ActivationScheme(E4M3, (1, 0))
FP8_STATIC = ActivationScheme(E4M3, (0, 0), "static")
FP8_GROUP = ActivationScheme(E4M3, (1, 128))
NVFP4 = ActivationScheme(E2M1, (1, 16), scale=E4M3)
MXFP4 = ActivationScheme(E2M1, (1, 32), scale=E8M0, round_up=1.75)

SHAPE = (24, 64)
SCHEMES = [
    *(scheme(f"int{bits}", (1, 32)) for bits in range(2, 9)),
    *(scheme(f"uint{bits}", (1, 16), zero=True, scales="bf16") for bits in range(2, 9)),
    scheme("int4", (1, 0), scales="f32"),
    scheme("uint4", (1, 0), zero=True),
    scheme("int8", (0, 0)),
    scheme("int4", (1, 32), reordered=True),
    scheme("int8", (1, 0), activation=TOKEN8),
    scheme("uint8", (1, 0), zero=True, activation=TOKEN8_ASYM),
    scheme("int8", (1, 0), activation=STATIC8, scales="bf16"),
    scheme("int8", (0, 0), activation=STATIC8_ASYM),
    scheme("int4", (1, 32), activation=TOKEN8),
    scheme("int4", (1, 32), activation=FP8_TOKEN),
    scheme("e4m3", (0, 0), scales="bf16", activation=FP8_STATIC),
    scheme("e4m3", (1, 0), scales="f32", activation=FP8_TOKEN),
    scheme("e4m3", (8, 16), scales="f32"),
    scheme("e4m3", (7, 24), scales="f32", activation=FP8_GROUP),
    scheme("e4m3", (1, 32), scales="e8m0"),
    scheme("e2m1", (1, 32), scales="e8m0"),
    scheme("e2m1", (1, 32), scales="e8m0", activation=MXFP4),
    scheme("e2m3", (1, 32), scales="e8m0"),
    scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32", activation=NVFP4),
    scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32"),
]


def linear(made: Scheme, shape: tuple[int, int] = SHAPE, seed: int = 0) -> StoredLinear:
    weight = cruel(made, shape, seed)
    if len(weight.scales) == 2:
        outer = 1.0 / torch.tensor([[317.25 + seed]])
        weight = type(weight)(made, shape, weight.codes, (weight.scales[0], outer))
    rule, activation = None, made.activation
    if activation is not None and (activation.mode == "static" or activation.scale is E4M3):
        static = 1.0 / torch.tensor(77.5) if activation.scale is E4M3 else torch.tensor(0.0371)
        zero = None if activation.symmetric else torch.tensor(-3, dtype=torch.int8)
        rule = InputRule(static_scale=static, static_zero=zero)
    bias = torch.arange(shape[0], dtype=torch.float16) if seed % 2 else None
    return StoredLinear(weight, bias, rule)


@pytest.mark.parametrize("made", SCHEMES, ids=str)
def test_round_trip(made: Scheme, tmp_path: Path) -> None:
    shapes = [(24, 64), (13, 96), (1, 32)] if (1, 0) in made.blocks or (0, 0) in made.blocks else [SHAPE]
    modules = {
        f"model.layers.{n}.mlp.up_proj": linear(made, shape, n)
        for n, shape in enumerate(shapes)
        if Writer.refuses_to_write(made, shape) is None
    }
    assert modules
    round_trip(tmp_path, Writer, modules)


def test_several_groups_and_an_embedding(tmp_path: Path) -> None:
    """Every scheme in one checkpoint: each module under its own group, by name."""
    modules = {f"model.layers.{n}.mlp.down_proj": linear(made, seed=n) for n, made in enumerate(SCHEMES)}
    modules["model.embed_tokens"] = linear(scheme("int8", (1, 0)), (40, 64), 9)
    round_trip(tmp_path, Writer, modules)


@pytest.mark.parametrize(
    "folder", fixtures_it_takes(Writer, "*"), ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_fixtures(folder: Path, tmp_path: Path) -> None:
    """What any tool saved, and this format can hold, is the same in it."""
    try:
        convert_and_compare(folder, "compressed-tensors", tmp_path / "out")
    except LowbitError as error:
        assert "reciprocal of no float32" in error.message or "multiplied by a vector" in error.message


def test_takes_all_it_should() -> None:
    taken = {folder.name for folder in fixtures_it_takes(Writer, "compressed_tensors")}
    left = {"marlin_24_int4", "marlin_24_int8", "sparse_24", "sparse_bitmask"}
    assert len(taken) >= 20 and not taken & (left - {"marlin_24_int4", "marlin_24_int8"})
    assert {folder.name for folder in fixtures_it_takes(Writer, "gptq")} >= {"w4_sym", "w4_asym_actorder"}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("int4", (1, 48)), "groups of 48 do not divide its 64 columns"),
        (scheme("int4", (2, 32)), "a scale covers 2 rows"),
        (scheme("nf4", (1, 64), scales="f32"), "no layout"),
        (scheme("int4", (1, 32), scales="e8m0"), "scales of integers are"),
        (scheme("uint4", (1, 32)), "signed or with zero points"),
        (scheme("e2m1", (1, 16), scales="e8m0"), "one for 32 columns"),
        (scheme("e2m1", (1, 16), (1, 0), scales="e4m3 f32"), "two levels of scales are NVFP4's"),
        (scheme("e5m2", (1, 0), scales="f32"), "no layout"),
        (
            scheme("int8", (1, 0), activation=ActivationScheme(INT8, (1, 0), limit=127.0)),
            "inputs cannot be said",
        ),
        (scheme("int4", (1, 32), offset=True), "no layout"),
    ],
    ids=str,
)
def test_refusals(made: Scheme, reason: str) -> None:
    assert reason in (Writer.refuses_to_write(made, SHAPE) or "")


def test_reciprocals() -> None:
    module = StoredModule("x", "x", SHAPE)
    for stored in torch.linspace(0.1, 5000, 400):
        wanted = 1.0 / stored
        assert torch.equal(1.0 / reciprocal(wanted, "f", module), wanted.reshape(1))
    with pytest.raises(LowbitError, match="reciprocal of no float32"):
        for step in range(64):
            reciprocal(torch.tensor(1.99) + step * 2.0**-23, "f", module)


@pytest.mark.slow
def test_the_tool_decompresses_them(tmp_path: Path) -> None:
    """compressed-tensors' own compressors on the written tensors."""
    compressed_tensors = pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert compressed_tensors.__version__
    from safetensors.torch import load_file

    for number, made in enumerate(SCHEMES):
        if made.reordered:
            continue  # the tool reads no g_idx from 0.20 on
        stored = linear(made)
        folder = written(tmp_path / str(number), Writer, {"layer": stored}, ())
        import json

        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        [group] = QuantizationConfig.model_validate(told).config_groups.values()
        compressor = BaseCompressor.get_value_from_registry(group.format)
        tensors = {k.removeprefix("layer."): v for k, v in load_file(folder / "model.safetensors").items()}
        found = compressor.decompress(tensors, group)["weight"].float()
        exact = stored.weight.dequantize()
        step = 2.0**-7 if made.scales[0].name in ("bf16", "e8m0", "e4m3") else 2.0**-10
        assert ((found - exact).abs() <= step * exact.abs() + 1e-30).all(), made
