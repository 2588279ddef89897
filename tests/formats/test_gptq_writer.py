"""GPTQ and AWQ written: read back as they were, and unpacked by independent numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme, written
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.gptq_writer import AwqWriter, GptqWriter
from lowbit.formats.writing import CheckpointWriter
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme

SHAPE = (32, 96)
GPTQ = [
    *(scheme(f"int{bits}", (1, 32)) for bits in (2, 3, 4, 8)),
    *(scheme(f"uint{bits}", (1, 24), zero=True) for bits in (2, 3, 4, 8)),
    scheme("int4", (1, 0), scales="bf16"),
    scheme("uint4", (1, 0), zero=True),
    scheme("uint4", (1, 64), zero=True),
    scheme("int4", (1, 32), reordered=True),
    scheme("uint3", (1, 32), zero=True, reordered=True),
]
AWQ = [scheme("uint4", (1, 32), zero=True), scheme("uint4", (1, 0), zero=True), scheme("int4", (1, 48))]


def linear(made: Scheme, seed: int, shape: tuple[int, int] = SHAPE) -> StoredLinear:
    bias = torch.arange(shape[0], dtype=torch.float16) if seed % 2 else None
    return StoredLinear(cruel(made, shape, seed), bias)


@pytest.mark.parametrize("made", GPTQ, ids=str)
def test_gptq_round_trip(made: Scheme, tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.mlp.up_proj": linear(made, n, (32 + 32 * n, 96)) for n in range(3)}
    round_trip(tmp_path, GptqWriter, modules)


@pytest.mark.parametrize("made", AWQ, ids=str)
def test_awq_round_trip(made: Scheme, tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.mlp.up_proj": linear(made, n, (8 + 16 * n, 96)) for n in range(3)}
    round_trip(tmp_path, AwqWriter, modules)


def test_every_rule_in_one_checkpoint(tmp_path: Path) -> None:
    """Bits, groups, zero points and order differ by module: ``dynamic`` says so."""
    modules = {f"model.layers.{n}.mlp.up_proj": linear(made, n) for n, made in enumerate(GPTQ)}
    modules["model.layers.1.mlp.up_proj_2"] = linear(GPTQ[3], 5)  # a name that begins like another
    folder = written(tmp_path / "a", GptqWriter, modules, ("model.layers.0.mlp.gate",))
    config = open_checkpoint(str(folder)).config["quantization_config"]
    assert isinstance(config, dict) and config["checkpoint_format"] == "gptq_v2"
    assert r"-:^model\.layers\.0\.mlp\.gate$" in config["dynamic"]
    from formats.helpers import read

    for name, stored in modules.items():
        found = read(folder, name, SHAPE).weight
        assert torch.equal(found.dequantize(), stored.weight.dequantize()), name


def test_what_transformers_does_not_heed_is_said() -> None:
    """Rules of modules, and a quantized head."""
    four, eight, plain = GPTQ[2], GPTQ[3], Scheme(number_format("bf16"))
    up, gate = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"
    assert GptqWriter({up: four, "lm_head": plain}).warning() == ""
    assert "the quantized head" in GptqWriter({up: four, "lm_head": four}).warning()
    other, expert = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj"
    for schemes in ({up: four, other: plain}, {up: four, other: eight}, {expert: four, gate: plain}):
        writer = GptqWriter(schemes)
        assert "modules with a rule of their own" in writer.warning()
        assert "modules_in_block_to_quantize" not in writer.quantization_config()


def test_kinds_that_are_plain_in_every_block_are_said_for_transformers() -> None:
    four, plain = GPTQ[2], Scheme(number_format("bf16"))
    leaves = {"self_attn.q_proj": four, "self_attn.o_proj": plain, "mlp.up_proj": four, "mlp.gate": plain}
    names = {f"model.layers.{n}.{leaf}": made for n in (0, 11) for leaf, made in leaves.items()}
    writer = GptqWriter(names | {"lm_head": plain})
    config = writer.quantization_config()
    assert config["modules_in_block_to_quantize"] == [["self_attn.q_proj", "mlp.up_proj"]]
    assert set(config["dynamic"]) == {
        f"-:^model\\.layers\\.{n}\\.{leaf}$" for n in (0, 11) for leaf in (r"self_attn\.o_proj", r"mlp\.gate")
    }
    assert writer.warning() == ""
    assert (
        "modules_in_block_to_quantize"
        not in GptqWriter({"model.layers.0.mlp.up_proj": four}).quantization_config()
    )


def test_layers_of_vllm_and_sglang_are_named_too() -> None:
    """They ask for qkv_proj where the modules are q_proj, k_proj and v_proj, and for all experts together."""
    four, eight, plain = GPTQ[2], GPTQ[3], Scheme(number_format("bf16"))
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    experts = [f"mlp.experts.{n}.{leaf}" for n in (0, 1) for leaf in ("gate_proj", "up_proj", "down_proj")]
    schemes = {f"model.layers.0.{leaf}": four for leaf in (*attention, *experts)}
    schemes |= {f"model.layers.1.{leaf}": eight for leaf in attention}
    schemes |= {f"model.layers.1.{leaf}": plain for leaf in experts}
    schemes |= {f"model.layers.2.{leaf}": plain for leaf in (*attention, "mlp.up_proj")}
    schemes |= {"model.layers.2.mlp.gate_proj": four}
    dynamic = GptqWriter(schemes).quantization_config()["dynamic"]
    assert isinstance(dynamic, dict)

    def override(prefix: str) -> object:
        """What vLLM's get_dynamic_override finds for a layer."""
        for pattern, values in dynamic.items():
            if re.match(pattern[2:], prefix):
                return False if pattern.startswith("-:") else values
        return None

    assert override("model.layers.0.self_attn.qkv_proj") is None
    assert override("model.layers.1.self_attn.qkv_proj") == {"bits": 8}
    assert override("model.layers.2.self_attn.qkv_proj") is False
    assert override("model.layers.0.mlp.experts") is None
    assert override("model.layers.1.mlp.experts") is False
    assert override("model.layers.2.mlp.gate_up_proj") is None  # of which one half is quantized
    left = AwqWriter({n: s for n, s in schemes.items() if s != eight}).quantization_config()
    skipped = left["modules_to_not_convert"]
    assert isinstance(skipped, list)
    assert {"model.layers.2.self_attn.qkv_proj", "model.layers.1.mlp.experts"} <= set(skipped)
    assert not [name for name in skipped if "layers.0" in name or "gate_up_proj" in name]


@pytest.mark.parametrize("zeros", ["v1", "v2"])
def test_against_numpy(zeros: str, tmp_path: Path) -> None:
    """The words themselves, by the oracle that reads the tools' files."""
    made = scheme("uint4", (1, 32), zero=True)
    stored = linear(made, 0)
    assert stored.weight.zeros is not None
    if zeros == "v1":
        stored.weight.zeros.clamp_(min=1)
    writer = GptqWriter({"x": made}, zeros)
    tensors = writer.write(StoredModule("x", "x", SHAPE), stored.weight)
    found = unpacked(tensors["x.qweight"].numpy(), 0), unpacked(tensors["x.qzeros"].numpy(), 1)
    codes, fields = found[0].T, found[1].T + (zeros == "v1")
    scales = tensors["x.scales"].float().numpy().T
    group = tensors["x.g_idx"].numpy()
    exact = (codes - fields[:, group].astype(np.float32)) * scales[:, group]
    assert np.array_equal(exact, stored.weight.dequantize().numpy())
    assert writer.quantization_config()["checkpoint_format"] == ("gptq" if zeros == "v1" else "gptq_v2")


def unpacked(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight nibbles a word, the lowest first."""
    words = np.moveaxis(words.astype(np.int64) & 0xFFFFFFFF, axis, -1)
    nibbles = np.stack([words >> 4 * n & 15 for n in range(8)], -1)
    return np.moveaxis(nibbles.reshape(*words.shape[:-1], -1), -1, axis)


def test_awq_words_by_numpy(tmp_path: Path) -> None:
    stored = linear(AWQ[0], 3)
    tensors = AwqWriter({"x": AWQ[0]}).write(StoredModule("x", "x", SHAPE), stored.weight)
    words = tensors["x.qweight"].numpy().astype(np.int64)
    for column, field in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        nibble = (words >> 4 * field & 15).T  # (out / 8, in)
        assert np.array_equal(nibble, stored.weight.codes.numpy()[column::8])


def test_v1_has_no_zero_of_zero() -> None:
    made = scheme("uint4", (1, 32), zero=True)
    stored = linear(made, 0)
    assert stored.weight.zeros is not None and int(stored.weight.zeros.min()) == 0
    with pytest.raises(LowbitError, match="a zero point is 0"):
        GptqWriter({"x": made}, "v1").write(StoredModule("x", "x", SHAPE), stored.weight)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        pytest.param(kind, folder, id=f"{kind.name}-{folder.parent.name}-{folder.name}")
        for kind in (GptqWriter, AwqWriter)
        for folder in fixtures_it_takes(kind, "*")
    ],
)
def test_fixtures(kind: type[CheckpointWriter], folder: Path, tmp_path: Path) -> None:
    """Of any tool's checkpoints those that this format can hold."""
    try:
        convert_and_compare(folder, kind.name, tmp_path / "out")
    except LowbitError as error:
        assert (
            "has one" in error.message
            or "it has one scale for its" in error.message
            or "multiplied by a vector" in error.message
        ), error.message


def test_takes_all_it_should() -> None:
    taken = {folder.name for folder in fixtures_it_takes(GptqWriter, "gptq")}
    assert taken >= {"w4_sym", "w4_asym_actorder", "w3_asym", "w2_asym", "w8_asym", "dynamic", "lm_head"}
    assert {folder.name for folder in fixtures_it_takes(AwqWriter, "awq")} >= {"gemm", "gemv_64"}
    assert "w4a16_group" in {f.name for f in fixtures_it_takes(GptqWriter, "compressed_tensors")}


@pytest.mark.parametrize(
    ("kind", "made", "reason"),
    [
        (GptqWriter, scheme("int5", (1, 32)), "integers of 2, 3, 4, 8 bits"),
        (GptqWriter, scheme("int4", (1, 32), scales="f32"), "scales are f16 or bf16"),
        (GptqWriter, scheme("int4", (2, 32)), "a scale covers 2 rows"),
        (GptqWriter, scheme("int4", (1, 32), offset=True), "one for a group of columns"),
        (GptqWriter, scheme("nf4", (1, 64), scales="f16"), "not nf4"),
        (
            GptqWriter,
            scheme("int4", (1, 32), activation=ActivationScheme(number_format("int8"), (1, 0))),
            "its inputs are quantized",
        ),
        (AwqWriter, scheme("int4", (1, 32), reordered=True), "act-order"),
        (AwqWriter, scheme("int8", (1, 32)), "integers of 4 bits"),
        (AwqWriter, scheme("int4", (1, 64)), "no whole words or groups"),
    ],
    ids=str,
)
def test_refusals(kind: type[CheckpointWriter], made: Scheme, reason: str) -> None:
    assert reason in (kind.refuses_to_write(made, SHAPE) or "")


def test_sizes() -> None:
    assert "no whole words" in (GptqWriter.refuses_to_write(GPTQ[2], (33, 96)) or "")
    assert "no whole words" in (GptqWriter.refuses_to_write(GPTQ[1], (32, 88)) or "")
    with pytest.raises(LowbitError, match="groups are 32 in a, 48 in b; an AWQ checkpoint has one"):
        AwqWriter({"a": AWQ[0], "b": AWQ[2]})
    writer = AwqWriter({"a": AWQ[0], "b": AWQ[1]})
    assert writer.quantization_config()["group_size"] == 32
    assert writer.write(StoredModule("b", "b", (8, 32)), cruel(AWQ[1], (8, 32)))
    for columns in (16, 64):  # AutoAWQ takes neither a part of a group nor two for one scale
        why = writer.misfit(StoredModule("b", "b", (8, columns)))
        assert why == f"it has one scale for its {columns} columns, other modules have groups of 32"


def test_config_is_written_beside_too(tmp_path: Path) -> None:
    from formats.helpers import FIXTURES
    from lowbit.loading.convert import convert

    convert(open_checkpoint(str(FIXTURES / "gptq" / "w4_sym")), "gptq", tmp_path / "out")
    import json

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    assert config["checkpoint_format"] == "gptq" and config["sym"] is True
    assert load_file(tmp_path / "out" / "model.safetensors")
