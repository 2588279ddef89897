"""FP8 and int8 weights whose config says nothing, against numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tiny import write_folder as write_model
from formats.helpers import FIXTURES, expected, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model
from lowbit.loading.source_modules import SourceModel

NAME = "model.layers.0.mlp.up_proj"
OUT, COLUMNS = 150, 260


def weights(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-128, 128, (OUT, COLUMNS), generator=generator)
    return values.to(torch.int8) if dtype == torch.int8 else (values * 3.0).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) + 0.01


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1), (2, 3)])
def test_values(dtype: torch.dtype, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    codes, scale = (
        weights(dtype),
        scales(*shape).to(torch.bfloat16 if name == "weight_scale" else torch.float32),
    )
    folder = write_folder(tmp_path, {f"{NAME}.weight": codes, f"{NAME}.{name}": scale}, None)
    found = read(folder, NAME, (OUT, COLUMNS))
    wide = scale.float().numpy()
    if shape == (2, 3):
        wide = wide.repeat(128, 0)[:OUT].repeat(128, 1)[:, :COLUMNS]
    elif shape == (OUT,):
        wide = wide[:, None]
    assert np.array_equal(found.weight.dequantize().numpy(), codes.float().numpy() * wide)
    assert found.weight.scheme.activation is None and found.input is None
    assert "recognised from the tensors" in reader_of(folder).describe()


def test_inputs_are_rounded_where_their_scale_is_there(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": weights(torch.float8_e4m3fn), f"{NAME}.weight_scale": torch.tensor(0.5)}
    tensors[f"{NAME}.input_scale"] = torch.tensor([0.25])
    found = read(write_folder(tmp_path / "a", tensors, None), NAME, (OUT, COLUMNS))
    assert str(found.weight.scheme.activation) == "e4m3 allxall static"
    assert found.input is not None and found.input.static_scale == 0.25
    tensors[f"{NAME}.weight"] = weights(torch.int8)
    with pytest.raises(LowbitError, match="beside an I8 weight"):
        read(write_folder(tmp_path / "b", tensors, None), NAME, (OUT, COLUMNS))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{NAME}.weight_scale": scales(3, 5)}, "E0213"),
        ({f"{NAME}.weight_scale": scales(OUT, 1).double()}, "E0213"),
        ({f"{NAME}.weight_scale": torch.full((OUT,), float("nan"))}, "E0215"),
        ({f"{NAME}.weight": weights(torch.int8)[1:]}, "E0213"),
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2, dtype=torch.uint8)}, "E0213"),
        ({"model.layers.1.mlp.up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "E0213"),
    ],
)
def test_refused(change: dict[str, Tensor], code: str, tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": weights(torch.int8), f"{NAME}.weight_scale": scales(OUT)} | change
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, None), NAME, (OUT, COLUMNS))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_a_module_without_its_scale(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": weights(torch.int8), f"{NAME}.weight_scale": scales(OUT)}
    tensors["model.layers.1.mlp.up_proj.weight"] = weights(torch.int8)
    reader = reader_of(write_folder(tmp_path, tensors, None))
    with pytest.raises(LowbitError, match=r"layers\.1\.mlp\.up_proj\.weight_scale"):
        reader.scheme_of(StoredModule(NAME, "model.layers.1.mlp.up_proj", (OUT, COLUMNS)))


def test_a_model_answers(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name.replace("weight", "weight_scale")] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
    plain = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4]])[0]
    save_file(tensors, folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
    found = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4]])[0]
    assert (found - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("case", ["fp8_tensor", "fp8_row", "int8_row"])
def test_the_tool_s_own_files(case: str) -> None:
    """ComfyUI's files, embedding and head included: the tool's values, and every tensor in its place."""
    folder = FIXTURES / "scaled_8bit" / case
    source, wanted = SourceModel(open_checkpoint(str(folder)), strict=True), expected(folder)
    with TensorData(source.header) as data:
        found = {m.target.stored: source.read(m, data).weight.dequantize() for m in source.modules}
    assert source.form.name == "scaled-8bit"
    for stem, values in wanted.items():
        assert torch.equal(found[stem], values), stem


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "int8_tensorwise", "per_row": true, "convrot": true, "convrot_groupsize": 64}',
        '{"format": "float8_e4m3fn"}',
        '{"format": "int8_blockwise", "group_size": 128}',
        '{"format": "nvfp4"}',
        "[1]",
        "no JSON",
    ],
)
def test_what_comfyui_says_must_agree(text: str, tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": weights(torch.int8), f"{NAME}.weight_scale": scales(OUT, 1)}
    note = f"{NAME}.comfy_quant"
    for said in ('{"format": "int8_tensorwise", "orig_dtype": "torch.bfloat16", "per_row": true}', text):
        tensors[note] = torch.tensor(list(said.encode()), dtype=torch.uint8)
        folder = write_folder(tmp_path, tensors, None)
        if said != text:
            read(folder, NAME, (OUT, COLUMNS), strict=True)
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (OUT, COLUMNS))
    assert caught.value.code == "E0218" and note in str(caught.value) and "\n" not in str(caught.value)
