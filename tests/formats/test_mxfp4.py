"""gpt-oss' MXFP4: against transformers' own unpacking, and a whole model against its dequantized one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from formats.helpers import expected, fixture_cases, header_of, reader_of, write_folder
from forward_helpers import differences, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.mxfp4 import Mxfp4
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model
from oracles import mxfp4 as oracle

EXPERTS, HIDDEN, INNER = 4, 64, 32
STEM = "model.layers.0.mlp.experts"
CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss as published: bf16 but for the experts, which are MXFP4 (the oracle's encoder)."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**CONFIG)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        weight = tensors.pop(name).transpose(1, 2).float().numpy()  # (experts, out, in)
        weight = weight * np.exp2(np.arange(weight.shape[1]) % 7)[None, :, None]  # rows of unlike sizes
        blocks, exponents = oracle.encode(weight.astype(np.float32))
        tensors[f"{name}_blocks"] = torch.from_numpy(blocks).contiguous()
        tensors[f"{name}_scales"] = torch.from_numpy(exponents).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def module(leaf: str, expert: int) -> StoredModule:
    shape = (2 * INNER, HIDDEN) if leaf == "gate_up_proj" else (HIDDEN, INNER)
    return StoredModule(f"{STEM}.{expert}.{leaf}", f"{STEM}.{leaf}", shape, expert, EXPERTS, transposed=True)


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_values_are_transformers(leaf: str, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    blocks, scales = tensors[f"{STEM}.{leaf}_blocks"], tensors[f"{STEM}.{leaf}_scales"]
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    reader = reader_of(checkpoint)
    with TensorData(header_of(checkpoint)) as data:
        for expert in range(EXPERTS):
            found = reader.read(module(leaf, expert), data)
            assert torch.equal(found.weight.dequantize(), theirs[expert])
            assert found.weight.scheme == reader.scheme_of(module(leaf, expert))
            assert found.bias is not None and torch.equal(found.bias, tensors[f"{STEM}.{leaf}_bias"][expert])
    assert np.array_equal(theirs.numpy(), oracle.decode(blocks.numpy(), scales.numpy()))


@pytest.mark.parametrize("folder", fixture_cases("mxfp4"), ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    reader = reader_of(folder, strict=True)
    for name, values in expected(folder).items():
        stack, number, leaf = name.rsplit(".", 2)
        shape = (values.shape[0], values.shape[1])
        mine = StoredModule(name, f"{stack}.{leaf}", shape, int(number), 2, transposed=True)
        with TensorData(header_of(folder)) as data:
            found = reader.read(mine, data)
        assert torch.equal(found.weight.dequantize(), values.float()), name
        names = {tensor for tensor in header_of(folder).tensors if tensor.startswith(mine.stored)}
        assert names == set(reader.tensors_of(mine)) and len(names) == 3
        assert found.weight.scheme.activation is None and found.input is None
    router = StoredModule("r", "model.layers.0.mlp.router", (2, 32))
    assert reader.scheme_of(router).is_dense


def test_every_code_under_every_scale(tmp_path: Path) -> None:
    """Exponents 0 to 252: the largest code would not fit float32 above."""
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1)
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).roll(3).expand(1, 253, 1, 16).contiguous()
    stem = f"{STEM}.down_proj"
    tensors = {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
    folder = write_folder(tmp_path, tensors, {"quant_method": "mxfp4"})
    with TensorData(header_of(folder)) as data:
        found = reader_of(folder).read(StoredModule(f"{STEM}.0.down_proj", stem, (253, 32), 0, 1), data)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)[0]
    assert torch.equal(found.weight.dequantize(), theirs)
    assert theirs.isfinite().all() and theirs.unique().numel() > 253


@pytest.mark.parametrize("style", [".weight_", "_"])
def test_experts_one_by_one(style: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    stem = f"{STEM}.2.down_proj"
    single = {f"{stem}{style}{name}": tensors[f"{STEM}.down_proj_{name}"][2] for name in ("blocks", "scales")}
    single[f"{stem}{style[0]}bias"] = tensors[f"{STEM}.down_proj_bias"][2]
    folder = write_folder(tmp_path, single, {"quant_method": "mxfp4"})
    reader = reader_of(folder, strict=True)
    mine = StoredModule(stem, stem, (HIDDEN, INNER))
    with TensorData(header_of(folder)) as data:
        found = reader.read(mine, data)
    wanted = oracle.decode(*(single[f"{stem}{style}{name}"].numpy() for name in ("blocks", "scales")))
    assert np.array_equal(found.weight.dequantize().numpy(), wanted)
    assert found.bias is not None and torch.equal(found.bias, single[f"{stem}{style[0]}bias"])
    assert set(reader.tensors_of(mine)) == set(single)


def test_claims(tmp_path: Path) -> None:
    blocks = {f"{STEM}.down_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}
    folder = write_folder(tmp_path / "a", blocks, {"quant_method": "mxfp4"})
    assert Mxfp4.claims(header_of(folder)) == "config.json: quantization_config says mxfp4"
    assert reader_of(folder).name == "mxfp4"
    other = write_folder(tmp_path / "b", blocks, {"quant_method": "mxfp8"})
    assert Mxfp4.claims(header_of(other)) is None
    with pytest.raises(LowbitError, match="_blocks") as caught:  # its config got lost
        reader_of(write_folder(tmp_path / "c", blocks, None))
    assert caught.value.code == "E0213"


def test_no_blocks_under_strict(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.weight": torch.zeros(2, 2)}, {"quant_method": "mxfp4"})
    with pytest.raises(LowbitError) as caught:
        reader_of(folder, strict=True)
    assert caught.value.code == "E0214"


@pytest.mark.parametrize(("kernels", "limit"), [("chosen", 5e-2), ("reference", 1e-3)])
def test_whole_model(kernels: str, limit: float, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "reference":
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    tokens = torch.randint(1, 64, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    loaded = transformers.GptOssForCausalLM.from_pretrained(
        checkpoint, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        wanted = loaded(torch.tensor([tokens])).logits[0]
    model = load_model(open_checkpoint(str(checkpoint)), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [tokens])
    worst = differences(logits, wanted).max()
    # The chosen kernels round inputs to bfloat16.
    assert worst <= limit, f"{worst:.2e} on {sorted(model.kernels)}"


def test_plain_experts_of_a_fine_tune(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    plain = {k: v for k, v in tensors.items() if not k.endswith(("_blocks", "_scales"))}
    stacked = torch.randn(EXPERTS, HIDDEN, 2 * INNER, dtype=torch.bfloat16)
    plain[f"{STEM}.gate_up_proj"] = stacked
    save_file(plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with TensorData(header_of(tmp_path)) as data:
        found = reader_of(tmp_path).read(module("gate_up_proj", 2), data).weight
    assert torch.equal(found.dequantize(), stacked[2].T.float())
    assert "E0214" in caplog.text


NAME = f"{STEM}.down_proj"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), "E0209", "_scales"),
        (lambda t: t.pop(f"{NAME}_blocks"), "E0209", "_blocks"),
        (
            lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"].view(torch.float8_e8m0fnu)}),
            "E0213",
            "_blocks",
        ),
        (
            lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"].transpose(1, 2).contiguous()}),
            "E0213",
            "_blocks",
        ),
        (
            lambda t: t.update({f"{NAME}_scales": torch.zeros(EXPERTS, HIDDEN, 2, dtype=torch.uint8)}),
            "E0213",
            "_scales",
        ),
        (lambda t: t.update({f"{NAME}_scales": torch.zeros(EXPERTS, HIDDEN, 1)}), "E0213", "_scales"),
        (lambda t: t[f"{NAME}_scales"].fill_(255), "E0215", "_scales"),
        (
            lambda t: t.update({f"{NAME}_blocks": torch.zeros(3, HIDDEN, 1, 16, dtype=torch.uint8)}),
            "E0213",
            "_blocks",
        ),
        (lambda t: t.update({f"{NAME}_bias": torch.zeros(EXPERTS, 3)}), "E0210", "_bias"),
    ],
)
def test_damaged(
    change: Callable[[dict[str, Tensor]], object], code: str, said: str, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with TensorData(header_of(tmp_path)) as data, pytest.raises(LowbitError) as caught:
        reader_of(tmp_path).read(module("down_proj", 1), data)
    assert caught.value.code == code and said in str(caught.value), caught.value
