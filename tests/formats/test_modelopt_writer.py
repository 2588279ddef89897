"""ModelOpt and gpt-oss' MXFP4, written: cruel weights there and back, fixtures of the tools, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from formats.helpers import FIXTURES
from formats.writing_cases import cruel, round_trip, scheme
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear, StoredModule
from lowbit.formats.fp8_writer import Fp8Writer
from lowbit.formats.modelopt_writer import ModelOptWriter
from lowbit.formats.mxfp4_writer import Mxfp4Writer
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme

SCALE = InputRule(static_scale=torch.tensor(0.0123))
STATIC = ActivationScheme(number_format("e4m3"), (0, 0), "static", limit=448.0)
TOKEN = ActivationScheme(number_format("e4m3"), (1, 0), limit=448.0)
NVFP4 = ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3"))
INT8 = ActivationScheme(number_format("int8"), (0, 0), "static", limit=127.0)
MX = {
    code: ActivationScheme(number_format(code), (1, 32), limit=limit, scale=number_format("e8m0"))
    for code, limit in (("e2m1", 6.0), ("e4m3", 448.0))
}


def nvfp4(width: int, inputs: ActivationScheme | None) -> Scheme:
    return scheme("e2m1", (1, width), (0, 0), scales="e4m3 f32", activation=inputs)


CASES = [
    (nvfp4(16, NVFP4), SCALE, "NVFP4"),
    (nvfp4(16, None), None, "W4A16_NVFP4"),
    (nvfp4(32, STATIC), SCALE, "W4A8_NVFP4_FP8"),
    (scheme("e2m1", (1, 32), scales="e8m0"), None, "W4A16_MXFP4"),
    (scheme("e2m1", (1, 32), scales="e8m0", activation=MX["e4m3"]), None, "W4A8_MXFP4_MXFP8"),
    (scheme("e2m1", (1, 32), scales="e8m0", activation=STATIC), SCALE, "W4A8_MXFP4_FP8"),
    (scheme("e4m3", (1, 32), scales="e8m0", activation=MX["e4m3"]), None, "MXFP8"),
    (scheme("e4m3", (0, 0), scales="f32", activation=STATIC), SCALE, "FP8"),
    (scheme("e4m3", (1, 0), scales="f32", activation=TOKEN), None, "FP8_PER_CHANNEL_PER_TOKEN"),
    (scheme("e4m3", (128, 128), scales="f32"), None, "FP8_PB_WO"),
    (scheme("int4", (1, 32), scales="f32"), None, "W4A16_AWQ"),
    (scheme("int4", (1, 0), scales="f32"), InputRule(multiplier=torch.linspace(0.5, 1.5, 192)), "W4A16_AWQ"),
    (scheme("int8", (1, 0), scales="f32", activation=INT8), SCALE, "W8A8_SQ_PER_CHANNEL"),
    (scheme("int8", (1, 0), scales="f32"), None, "W8A16"),
]


@pytest.mark.parametrize(
    ("made", "rule", "algorithm"), CASES, ids=[f"{n}-{one[2]}" for n, one in enumerate(CASES)]
)
def test_there_and_back(made: Scheme, rule: InputRule | None, algorithm: str, tmp_path: Path) -> None:
    linear = StoredLinear(cruel(made, (136, 192)), torch.randn(136), rule)
    round_trip(tmp_path, ModelOptWriter, {"model.layers.0.mlp.up_proj": linear})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == algorithm and config["ignore"] == ["lm_head"]


def test_mixed(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(len(CASES))]
    linears = []
    for number, (made, rule, _) in enumerate(CASES):
        own = InputRule(static_scale=torch.tensor(0.01 * (number + 1))) if rule is SCALE else rule
        linears.append(StoredLinear(cruel(made, (136, 192), number), None, own))
    round_trip(tmp_path, ModelOptWriter, dict(zip(names, linears, strict=True)))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert [config["quantized_layers"][name]["quant_algo"] for name in names] == [one[2] for one in CASES]


FOLDERS = sorted(path.parent for path in (FIXTURES / "modelopt").glob("*/hf_quant_config.json"))
STACKED = {"nvfp4_gpt_oss"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tool_s_own(folder: Path, tmp_path: Path) -> None:
    """Its export, read and written: the same tensors, bit for bit, and the same algorithms."""
    header = open_checkpoint(str(folder))
    if folder.name in STACKED or folder.name == "w4a8_awq":
        with pytest.raises(LowbitError, match="cannot be written"):
            convert(header, "modelopt", tmp_path / "out")
        return
    convert(header, "modelopt", tmp_path / "out")
    made = open_checkpoint(str(tmp_path / "out"))
    kept = {name for name in header.tensors if not name.endswith(("k_scale", "v_scale"))}
    assert set(made.tensors) == kept
    with TensorData(header) as old, TensorData(made) as new:
        for name in kept:
            a, b = old.tensor(name), new.tensor(name)
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), name
    theirs, ours = (
        json.loads((path / "hf_quant_config.json").read_text())["quantization"]
        for path in (folder, made.root)
    )
    theirs["quant_algo"] = theirs["quant_algo"].upper()  # the tool itself writes fp8_pb_wo
    for key in ("quant_algo", "group_size", "quantized_layers", "has_zero_point", "pre_quant_scale"):
        if key != "group_size" or folder.name != "int4_awq":  # 128, narrower layers have what they have
            assert theirs.get(key) == ours.get(key), key


def test_gpt_oss(tmp_path: Path) -> None:
    """transformers' gpt-oss, read and written: the same tensors."""
    header = open_checkpoint(str(FIXTURES / "mxfp4" / "gpt_oss"))
    convert(header, "mxfp4", tmp_path / "out")
    made = open_checkpoint(str(tmp_path / "out"))
    assert set(made.tensors) == set(header.tensors)
    with TensorData(header) as old, TensorData(made) as new:
        for name in header.tensors:
            assert torch.equal(old.tensor(name), new.tensor(name)), name
    assert SourceModel(made, strict=True).form.name == "mxfp4"


@pytest.mark.parametrize("bound", [0.0, 1200.0])
def test_fp8_a_row(bound: float, tmp_path: Path) -> None:
    """fbgemm's layout; no bound is the largest float32, which the reader takes for none."""
    inputs = ActivationScheme(number_format("e4m3"), (1, 0), limit=448.0, upper_bound=bound)
    made = scheme("e4m3", (1, 0), scales="f32", activation=inputs)
    linear = StoredLinear(cruel(made, (48, 64)))
    round_trip(tmp_path, Fp8Writer, {"model.layers.0.mlp.up_proj": linear})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fbgemm_fp8" and config["activation_scale_ub"] > 1000


REFUSED = [
    (ModelOptWriter, scheme("uint4", (1, 32), zero=True), "no layout"),
    (ModelOptWriter, scheme("int4", (1, 32), activation=STATIC), "no algorithm"),
    (ModelOptWriter, scheme("e4m3", (1, 0)), "no algorithm"),
    (ModelOptWriter, nvfp4(16, MX["e2m1"]), "no algorithm"),
    (ModelOptWriter, scheme("e2m1", (1, 32), scales="e8m0", activation=MX["e2m1"]), "no algorithm"),
    (Mxfp4Writer, scheme("e2m1", (1, 32), scales="e8m0", activation=MX["e2m1"]), "inputs"),
    (Mxfp4Writer, scheme("e4m3", (1, 32), scales="e8m0"), "e2m1"),
]


@pytest.mark.parametrize(("kind", "made", "reason"), REFUSED, ids=str)
def test_refusals(kind: type[ModelOptWriter], made: Scheme, reason: str) -> None:
    assert reason in (kind.refuses_to_write(made, (64, 64)) or "")


def test_mxfp4_is_for_stacked_experts() -> None:
    stacked = StoredModule("x.experts.1.down_proj", "x.experts.down_proj", (32, 32), 1, 2)
    assert Mxfp4Writer.refuses_module(stacked) is None
    assert "only stacked experts" in (Mxfp4Writer.refuses_module(StoredModule("x", "x", (32, 32))) or "")
    assert "embedding" in (ModelOptWriter.refuses_module(StoredModule("m.embed_tokens", "m", (8, 8))) or "")
