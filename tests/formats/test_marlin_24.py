"""Sparse Marlin under GPTQ's config: test_tool_fixtures has what vLLM packs; here are damage and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model, plan_model

GROUPED, ROWS = (FIXTURES / "gptq" / f"marlin_24_{name}" for name in ("w4_g128", "w8_channel"))
NAME, SHAPE = "model.layers.0.mlp.down_proj", (128, 256)


@pytest.mark.parametrize("folder", [GROUPED, ROWS], ids=lambda path: path.name)
def test_a_model_answers(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu", strict=True)
    quantized = [module for module in plan.modules if not module.scheme.is_dense]
    assert len(quantized) == 7 and {module.kernel for module in quantized} == {"cpu_blocks"}
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()
    findings = examine(folder).report.findings
    assert all(finding.severity == "note" for finding in findings), findings


def test_two_of_four_columns_are_kept() -> None:
    weight = read(GROUPED, NAME, SHAPE).weight
    assert str(weight.scheme) == "int4 1x128 f16"
    kept = (weight.dequantize().view(128, 64, 4) != 0).sum(-1)
    assert int(kept.max()) == 2 and float((kept == 2).float().mean()) > 0.8
    used = reader_of(GROUPED).tensors_of(StoredModule(NAME, NAME, SHAPE))
    assert [name.rpartition(".")[2] for name in used] == ["B_24", "B_meta", "s"]


def module() -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = load_file(GROUPED / "model.safetensors")
    config = json.loads((GROUPED / "config.json").read_text())["quantization_config"]
    return {name: tensor for name, tensor in tensors.items() if name.startswith(NAME)}, config


NAMES = [
    {"quant_method": "gptq", "checkpoint_format": "marlin_24"},
    {"quant_method": "gptq", "format": "marlin_24"},
    {"quant_method": "gptq_marlin_24"},
]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_names(names: dict, tmp_path: Path) -> None:
    tensors, _ = module()
    folder = write_folder(tmp_path, tensors, {**names, "bits": 4, "group_size": 128})
    found = read(folder, NAME, SHAPE, strict=True).weight
    assert torch.equal(found.dequantize(), read(GROUPED, NAME, SHAPE).weight.dequantize())


DAMAGE = [
    ({"B_24": torch.zeros(8, 255, dtype=torch.int32)}, {}, "E0213"),
    ({"B_24": torch.zeros(8, 256)}, {}, "E0213"),
    ({"B_24": None}, {}, "E0209"),
    ({"B_meta": torch.zeros(8, 256, dtype=torch.int32)}, {}, "E0213"),
    ({"B_meta": torch.zeros(16, 128, dtype=torch.int16)}, {}, "E0213"),
    ({"B_meta": None}, {}, "E0209"),
    ({"s": torch.ones(1, 128).half()}, {}, "E0213"),
    ({"s": torch.ones(2, 128)}, {}, "E0213"),
    ({"s": torch.full((2, 128), float("nan")).half()}, {}, "E0215"),
    ({"s": None}, {}, "E0209"),
    ({}, {"bits": 8}, "E0213"),
    ({}, {"bits": 3}, "E0213"),
    ({}, {"group_size": -1}, "E0213"),
    ({}, {"group_size": 64}, "E0213"),
]


@pytest.mark.parametrize(("change", "told", "code"), DAMAGE)
def test_damaged(change: dict[str, Tensor | None], told: dict, code: str, tmp_path: Path) -> None:
    tensors, config = module()
    for suffix, value in change.items():
        tensors.pop(f"{NAME}.{suffix}")
        if value is not None:
            tensors[f"{NAME}.{suffix}"] = value
    if change == {"B_24": None}:
        tensors["model.layers.1.mlp.down_proj.B_24"] = torch.zeros(8, 256, dtype=torch.int32)
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, config | told), NAME, SHAPE)
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)
