"""FP8 and SGLang's 8-bit formats written: read back as they were; transformers dequantizes them the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme, written
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear
from lowbit.formats.fp8_writer import BlockwiseInt8Writer, Fp8Writer, W8a8Fp8Writer, W8a8Int8Writer
from lowbit.formats.writing import CheckpointWriter
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme


def inputs(code: str, columns: int, limit: float, scale: str = "f32") -> ActivationScheme:
    return ActivationScheme(number_format(code), (1, columns), limit=limit, scale=number_format(scale))


STATIC = ActivationScheme(number_format("e4m3"), (0, 0), "static")
CASES: list[tuple[type[CheckpointWriter], Scheme]] = [
    (Fp8Writer, scheme("e4m3", (16, 8), scales="f32", activation=inputs("e4m3", 8, 448))),
    (Fp8Writer, scheme("e4m3", (7, 24), scales="bf16", activation=inputs("e4m3", 24, 448))),
    (Fp8Writer, scheme("e4m3", (1, 32), scales="e8m0", activation=inputs("e4m3", 32, 448, "e8m0"))),
    (Fp8Writer, scheme("e4m3", (16, 16), scales="f32", activation=STATIC)),
    (Fp8Writer, scheme("e4m3", (0, 0), scales="f32", activation=STATIC)),
    (Fp8Writer, scheme("e4m3", (0, 0), scales="f32", activation=inputs("e4m3", 0, 448))),
    (W8a8Int8Writer, scheme("int8", (1, 0), scales="f32", activation=inputs("int8", 0, 127))),
    (W8a8Fp8Writer, scheme("e4m3", (1, 0), scales="bf16", activation=inputs("e4m3", 0, 448))),
    (BlockwiseInt8Writer, scheme("int8", (16, 24), scales="f32", activation=inputs("int8", 24, 127))),
]


def linear(made: Scheme, shape: tuple[int, int], seed: int) -> StoredLinear:
    static = made.activation is not None and made.activation.mode == "static"
    rule = InputRule(static_scale=torch.tensor(0.0371 + seed)) if static else None
    bias = torch.arange(shape[0], dtype=torch.bfloat16) if seed % 2 else None
    return StoredLinear(cruel(made, shape, seed), bias, rule)


@pytest.mark.parametrize(("kind", "made"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_round_trip(kind: type[CheckpointWriter], made: Scheme, tmp_path: Path) -> None:
    shapes = [(24, 64), (33, 96), (64, 40) if made.blocks != ((1, 32),) else (64, 32)]
    names = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {
        f"model.layers.0.{name}": linear(made, shape, n)
        for n, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    round_trip(tmp_path, kind, modules)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        pytest.param(kind, folder, id=f"{kind.name}-{folder.parent.name}-{folder.name}")
        for kind in (Fp8Writer, W8a8Int8Writer, W8a8Fp8Writer, BlockwiseInt8Writer)
        for folder in fixtures_it_takes(kind, "*")
    ],
)
def test_fixtures(kind: type[CheckpointWriter], folder: Path, tmp_path: Path) -> None:
    convert_and_compare(folder, kind.name, tmp_path / "out")


def test_takes_all_it_should() -> None:
    taken = {folder.name for folder in fixtures_it_takes(Fp8Writer, "fp8")}
    assert taken >= {"block_128", "block_32_ue8m0", "tensor_static", "experts_block_16"}
    assert "gptqmodel_block" not in taken  # its inputs are not quantized; those of the format are


@pytest.mark.parametrize(
    ("kind", "made", "reason"),
    [
        (Fp8Writer, scheme("e4m3", (0, 8), scales="f32", activation=inputs("e4m3", 0, 448)), "not as in"),
        (Fp8Writer, scheme("e4m3", (16, 16), scales="f32"), "its inputs stay as they are"),
        (Fp8Writer, scheme("e5m2", (0, 0), scales="f32", activation=STATIC), "weights are e4m3"),
        (
            Fp8Writer,
            scheme("e4m3", (8, 8), scales="f32", activation=inputs("e4m3", 16, 448)),
            "inputs cannot",
        ),
        (W8a8Int8Writer, scheme("int8", (1, 0), activation=inputs("int8", 0, 127.5)), "limit 127"),
        (W8a8Int8Writer, scheme("int8", (1, 32), activation=inputs("int8", 32, 127)), "one a row"),
        (BlockwiseInt8Writer, scheme("int8", (1, 0), activation=inputs("int8", 0, 127)), "one a block"),
    ],
    ids=str,
)
def test_refusals(kind: type[CheckpointWriter], made: Scheme, reason: str) -> None:
    assert reason in (kind.refuses_to_write(made, (64, 64)) or "")


def test_one_block_size_and_one_kind_of_inputs() -> None:
    def block(size: int) -> Scheme:
        return scheme("e4m3", (size, size), scales="f32", activation=inputs("e4m3", size, 448))

    with pytest.raises(LowbitError, match=r"b has blocks of \(32, 32\), other modules \(16, 16\)"):
        Fp8Writer({"a": block(16), "b": block(32)})
    with pytest.raises(LowbitError, match="b has inputs static, other modules dynamic in a"):
        Fp8Writer({"a": block(16), "b": scheme("e4m3", (0, 0), scales="f32", activation=STATIC)})
    whole = scheme("e4m3", (0, 0), scales="f32", activation=inputs("e4m3", 0, 448))
    with pytest.raises(LowbitError, match="it has one scale, other modules blocks"):
        writer = Fp8Writer({"a": block(16), "b": whole})
        from lowbit.formats import StoredModule

        writer.write(StoredModule("b", "b", (17, 16)), cruel(whole, (17, 16)))


def test_transformers_dequantizes_them(tmp_path: Path) -> None:
    """A model of random blocks, as transformers understands it."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    from formats.helpers import FIXTURES
    from lowbit.loading.convert import convert

    for name in ("block_128", "tensor_static"):
        convert(open_checkpoint(str(FIXTURES / "fp8" / name)), "fp8", tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
        theirs = dict(model.named_parameters())
        source = SourceModel(open_checkpoint(str(tmp_path / name)))
        with TensorData(source.header) as data:
            for module in source.modules:
                mine = source.read(module, data).weight.dequantize()
                found = theirs[module.target.tensor("weight")].detach().float()
                assert torch.allclose(found, mine, rtol=2e-7, atol=0), module.target.name


def test_what_was_left_alone_is_named(tmp_path: Path) -> None:
    _, made = CASES[0]
    modules = {"model.layers.0.mlp.up_proj": linear(made, (24, 64), 0)}
    folder = written(tmp_path, Fp8Writer, modules, ("model.layers.0.mlp.gate", "model.embed_tokens"))
    config = open_checkpoint(str(folder)).config["quantization_config"]
    assert isinstance(config, dict)
    assert config["modules_to_not_convert"] == ["model.layers.0.mlp.gate", "lm_head"]
