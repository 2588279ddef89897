"""Qwen3-Next quantized: at load, saved and loaded again in formats whose rows move and whose rows do not;
each beside the plain matrices that its numbers are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.loading.calibrate import calibrate
from lowbit.loading.convert import convert
from lowbit.loading.opened import Opened
from lowbit.loading.quantizing import quantized_checkpoint
from lowbit.models.mixer_model import MixerModel
from lowbit.models.qwen_next import DeltaNet, GatedAttention
from lowbit.quantize.calibration import CalibrationOptions
from lowbit.quantize.recipe import Asked
from models.test_qwen_next import loaded, make_checkpoint, prompts

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_next")
    make_checkpoint(path, **SIZES)
    return path


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Mean KL in nats."""
    first, second = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize(("method", "most"), [("fp8", 0.4), ("int8", 0.05), ("gguf:type=q8_0", 0.05)])
def test_quantized_at_load(method: str, most: float, folder: Path) -> None:
    """Of rows in another order the divergence would be several nats."""
    [expected] = prompt_logits(loaded(folder), prompts(40))
    model = load_model(open_checkpoint(str(folder)), device="cpu", quantization=method)
    [found] = prompt_logits(model, prompts(40))
    assert 0 < divergence(expected, found) < most


def test_what_stays_plain(folder: Path) -> None:
    plan = plan_model(open_checkpoint(str(folder)), device="cpu", quantization="int8")
    kept = {re.sub(r"\.\d+\.", ".*.", module.name) for module in plan.modules if module.scheme.is_dense}
    assert kept == {
        "lm_head",
        "model.embed_tokens",
        "model.layers.*.linear_attn.in_proj_ba",
        "model.layers.*.mlp.gate",
        "model.layers.*.mlp.shared_expert_gate",
    }


@pytest.mark.parametrize(
    ("method", "most"),
    [("int4:group_size=32", 0.02), ("fp8:weights=block", 0.4), ("fp8:activation=none", 0.02)],
)
def test_saved_and_loaded(method: str, most: float, folder: Path, tmp_path: Path) -> None:
    """The saved checkpoint keeps its rows as transformers has them, and computes what its numbers as plain
    matrices compute, but for rounded inputs."""
    opened = Opened.of(open_checkpoint(str(folder)), Asked(method), False)
    quantized_checkpoint(opened, save=tmp_path / "small")
    convert(open_checkpoint(str(tmp_path / "small")), "dense", tmp_path / "plain", dtype="f32")
    [before], [after] = (list(path.glob("*.safetensors")) for path in (folder, tmp_path / "plain"))
    originals, tensors = load_file(before), load_file(after)
    for leaf in ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "mlp.gate"):
        name = f"model.layers.0.{leaf}.weight"
        off = (tensors[name] - originals[name]).norm() / originals[name].norm()
        assert (off == 0) == (leaf != "linear_attn.in_proj_qkvz") and off < 0.12
    [found] = prompt_logits(loaded(tmp_path / "small"), prompts(40))
    [expected] = prompt_logits(loaded(tmp_path / "plain"), prompts(40))
    assert divergence(expected, found) < most


def test_calibration_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(LowbitError, match="Qwen3NextForCausalLM cannot be calibrated") as caught:
        calibrate(open_checkpoint(str(folder)), [[1, 2]], CalibrationOptions("gptq"))
    assert caught.value.code == "E0440"


def test_inspect_says_what_states_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--max-running-requests", "3", "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    each = 3 * 4 * ((2 * 2 * 32 + 4 * 64) * 3 + 4 * 32 * 64)
    assert f"states of recurrent layers: {each / 1024:.1f} KiB a sequence" in text
    assert f"{4 * each / 1024:.1f} KiB for --max-running-requests 3" in text


def test_rows_that_cannot_move_are_gathered(folder: Path, tmp_path: Path) -> None:
    """Blocks of 128 rows span q, k, v and z: outputs are put in order instead, those beside them kept."""
    opened = Opened.of(open_checkpoint(str(folder)), Asked("fp8:weights=block"), False)
    quantized_checkpoint(opened, save=tmp_path / "small")
    model = loaded(tmp_path / "small")
    assert isinstance(model, MixerModel)
    delta_net, attention = model.blocks[0].mixer, model.blocks[3].mixer
    assert isinstance(delta_net, DeltaNet) and isinstance(attention, GatedAttention)
    first, last = delta_net.inner, attention.inner
    assert first.order is not None and last.order is not None
    # q of key head 0, then of head 1; plain b and a have moved as they were read.
    assert first.order[:64].tolist() == [*range(32), *range(320, 352)]
    assert first.order[640:].tolist() == list(range(640, 648))
    assert last.order[:64].tolist() == [*range(32), *range(64, 96)]
    assert last.order[256:].tolist() == list(range(256, 384))


@pytest.mark.parametrize("method", ["fp8:weights=block", "int8:group_size=32", "nf4"])
@pytest.mark.parametrize("kind", ["Qwen3_5", "Qwen3_5Moe"])
def test_qwen35_saved(kind: str, method: str, tmp_path: Path) -> None:
    """What gates the state stays plain, and the folder is served as the model quantized at load is."""
    make_checkpoint(tmp_path / "float", kind, **SIZES)
    source = open_checkpoint(str(tmp_path / "float"))
    quantized_checkpoint(Opened.of(source, Asked(method), False), save=tmp_path / "small")
    header = open_checkpoint(str(tmp_path / "small"))
    gates = [name for name in header.tensors if ".in_proj_b." in name or ".in_proj_a." in name]
    assert len(gates) == 6 and {header.tensors[name].dtype for name in gates} <= {"F32", "BF16"}
    assert not any(
        name.endswith("in_proj_qkv.weight") and entry.dtype == "F32" for name, entry in header.tensors.items()
    )
    served = load_model(source, device="cpu", quantization=method, kv_cache_dtype="bf16")
    saved = load_model(header, device="cpu", kv_cache_dtype="bf16")
    [expected], [found] = (prompt_logits(model, prompts(40)) for model in (served, saved))
    # Blocks of the query projection's rows, which change places, are other blocks.
    assert method.startswith("fp8") or (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    [plain] = prompt_logits(loaded(tmp_path / "float"), prompts(40))
    assert 0 < divergence(plain, found) < 1.2
