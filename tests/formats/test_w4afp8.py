"""W4AFP8 against numpy: packed int4 experts, FP8 blocks beside them, one input scale a layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import FIXTURES, read, reader_of, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.quantization_config import quantization_config
from lowbit.loading.source_modules import SourceModel

EXPERTS = "model.layers.0.mlp.experts"
QKV = "model.layers.0.self_attn.q_proj"
CONFIG = {"quant_method": "w4afp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
OUT, COLUMNS = 48, 256


def checkpoint() -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    rng = np.random.default_rng(8)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, np.ndarray] = {}
    for number in range(3):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"{EXPERTS}.{number}.{leaf}"
            codes = rng.integers(-8, 8, (OUT, COLUMNS))
            scale = rng.uniform(0.001, 0.1, (OUT, COLUMNS // 128)).astype(np.float32)
            bytes_ = (codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4
            tensors[f"{name}.weight"] = torch.from_numpy(bytes_.astype(np.uint8).view(np.int8))
            tensors[f"{name}.weight_scale_inv"] = torch.from_numpy(scale)
            tensors[f"{name}.input_scale"] = torch.tensor(0.5 + number + 10 * (leaf == "down_proj"))
            weights[name] = codes.astype(np.float32) * scale.repeat(128, 1)
    tensors[f"{QKV}.weight"] = torch.randn(OUT, COLUMNS).to(torch.float8_e4m3fn)
    tensors[f"{QKV}.weight_scale_inv"] = torch.rand(1, 2)
    return tensors, weights


def test_values_and_inputs(tmp_path: Path) -> None:
    tensors, weights = checkpoint()
    folder = write_folder(tmp_path, tensors, CONFIG)
    for name, weight in weights.items():
        found = read(folder, name, (OUT, COLUMNS))
        assert np.array_equal(found.weight.dequantize().numpy(), weight)
        assert str(found.weight.scheme) == "int4 1x128 f32 (input e4m3 allxall static)"
        assert found.input is not None
        assert found.input.static_scale == (12.5 if name.endswith("down_proj") else 2.5)
    plain = read(folder, QKV, (OUT, COLUMNS))
    assert str(plain.weight.scheme) == "e4m3 128x128 f32 (input e4m3 1x128 dynamic)" and plain.input is None
    assert reader_of(folder).name == "w4afp8"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{EXPERTS}.0.up_proj.weight_scale_inv": torch.ones(OUT, 3)}, "E0213"),
        ({f"{EXPERTS}.0.up_proj.weight": torch.zeros(OUT, COLUMNS, dtype=torch.int8)}, "E0213"),
        ({f"{EXPERTS}.2.gate_proj.input_scale": torch.tensor(float("nan"))}, "E0215"),
        (
            dict.fromkeys(f"{EXPERTS}.{n}.{x}_proj.input_scale" for n in range(3) for x in ("gate", "up")),
            "E0209",
        ),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    tensors |= change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, kept, CONFIG), f"{EXPERTS}.0.up_proj", (OUT, COLUMNS))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_the_writer_s_own_file() -> None:
    """Nothing in config.json, input scales as w1, w2, w3: every tensor has its place, strictly."""
    header = open_checkpoint(str(FIXTURES / "w4afp8" / "moe"))
    source = SourceModel(header, strict=True)
    assert source.form.name == "w4afp8"
    scales = {}
    with TensorData(header) as data:
        for module in source.modules:
            rule = source.read(module, data).input
            if rule is not None and rule.static_scale is not None:
                scales[module.target.stored.split("experts.")[1]] = float(rule.static_scale)
    wanted = {
        f"{n}.{leaf}_proj": 1.0 if leaf == "down" else 2.0 for n in (0, 1) for leaf in ("gate", "up", "down")
    }
    assert scales == wanted  # the largest of the layer's experts


def test_modelopt_s_mixtures_stay_its_own(tmp_path: Path) -> None:
    """MIXED_PRECISION with layers named is no W4AFP8."""
    folder = write_folder(tmp_path, {"x.weight": torch.ones(2, 2), "x.weight_scale": torch.ones(1)}, None)
    for layers, method in (({}, "w4afp8"), ({"x": {"quant_algo": "FP8"}}, "modelopt")):
        told = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
        found = quantization_config(open_checkpoint(str(folder)))
        assert found is not None and found.method == method


def test_only_experts_are_packed(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    tensors[f"{QKV}.weight"] = tensors[f"{EXPERTS}.0.up_proj.weight"].clone()
    tensors[f"{QKV}.weight_scale_inv"] = tensors[f"{EXPERTS}.0.up_proj.weight_scale_inv"].clone()
    with pytest.raises(LowbitError, match="no expert by its name"):
        read(write_folder(tmp_path, tensors, CONFIG), QKV, (OUT, COLUMNS))
