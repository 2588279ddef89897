"""Qwen3-Next from GGUF files of other shapes than the fixture has: Q, K, V and z in one matrix, as earlier
converters wrote them, and layers that predict further tokens behind the model's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forward_helpers import differences, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from models.test_gguf_families import FOLDER

KEY_HEADS, K_DIM = 2, 8
MORE = ("enorm", "hnorm", "shared_head_norm", "eh_proj")


def rewritten(
    path: Path, *, fused: bool = False, predicts: bool = False, without: str = "", **changed: object
) -> Path:
    """The fixture with its matrices fused, with a further layer, or with other metadata."""
    reader = gguf.GGUFReader(FOLDER / "qwen3next.gguf")
    writer = gguf.GGUFWriter(path, "qwen3next")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", without):
            continue
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        value = changed.pop(field.name.rpartition(".")[2], field.contents())
        if predicts and field.name.endswith("recurrent_layers"):
            value = [*value, False]
        if predicts and field.name.endswith("block_count"):
            value += 1
        writer.add_key_value(field.name, value, kind, inner)
    if predicts:
        writer.add_uint32("qwen3next.nextn_predict_layers", 1)
        for name in MORE:
            writer.add_tensor(f"blk.4.nextn.{name}.weight", np.ones(32, dtype=np.float32))
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name in list(stored):
        if fused and name.endswith("attn_qkv.weight"):
            layer = name.removesuffix("attn_qkv.weight")
            keys = KEY_HEADS * K_DIM
            q, k, v = np.split(stored.pop(name), [keys, 2 * keys])
            parts = [q, k, v, stored.pop(f"{layer}attn_gate.weight")]
            grouped = [np.split(part, KEY_HEADS) for part in parts]
            rows = [part[head] for head in range(KEY_HEADS) for part in grouped]
            stored[f"{layer}ssm_in.weight"] = np.concatenate(rows)
    for name, values in stored.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"predicts": True}, {"without": "qwen3next.attention.recurrent_layers"}],
    ids=str,
)
def test_logits(options: dict, tmp_path: Path) -> None:
    expected = load_file(FOLDER / "qwen3next.safetensors")
    path = rewritten(tmp_path / "other.gguf", **options)
    model = load_model(open_checkpoint(str(path)), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [expected["tokens"].flatten().tolist()])
    wanted = expected["logits"].view(logits.shape)
    assert differences(logits, wanted).max() <= 1e-3
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_size": 66}, "ssm.inner_size 66 over 4 value heads"),
        ({"group_count": 3}, "4 value heads over 3 key heads of linear attention"),
        ({"recurrent_layers": [True]}, "attention.recurrent_layers does not list 4 layers"),
        ({"without": "qwen3next.ssm.conv_kernel"}, "key 'ssm.conv_kernel' must be a whole number"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be(changes: dict, message: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "other.gguf", **changes)
    with pytest.raises(LowbitError, match=message) as caught:
        plan_model(open_checkpoint(str(path)))
    assert caught.value.code == "E0216" and "other.gguf" in caught.value.message
