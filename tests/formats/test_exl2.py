"""EXL2 against numpy's definition: mixed widths, order of columns, small scales, padding; damage refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tiny import HIDDEN, INNER
from checkpoint.tiny import write_folder as write_model
from formats.helpers import FIXTURES, expected, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.loading.source_modules import SourceModel

NAME = "model.layers.0.mlp.up_proj"
OUT = 48
MIXED = [(8, 32), (6, 64), (5, 32), (4, 64), (3, 32), (2, 64)]  # bits, columns


def layer(
    name: str, out: int, groups: list[tuple[int, int]], padded: int = 0, size: float = 0.5
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of one layer, bit by bit, and the weight they mean."""
    rng = np.random.default_rng(len(name) + out)
    columns, stored = sum(size for _, size in groups), out + padded
    rows: list[np.ndarray] = []
    weight = np.zeros((columns, stored), np.float32)
    firsts, at = [], 0
    small = rng.integers(0, 16, (len(groups), stored))
    largest = rng.uniform(0.1, 1.0, len(groups)).astype(np.float16) * np.float16(size)
    for number, (bits, count) in enumerate(groups):
        firsts += [bits, sum(len(part) for part in rows)]
        codes = rng.integers(0, 2**bits, (count, stored))
        for start in range(0, count, 32):
            stream = np.zeros((32 * bits, stored), np.uint64)
            for row in range(32):
                for bit in range(bits):
                    stream[row * bits + bit] = codes[start + row] >> bit & 1
            words = (stream.reshape(bits, 32, stored) << np.arange(32, dtype=np.uint64)[:, None]).sum(1)
            rows.append(words.astype(np.uint32).view(np.int32))
        scale = ((small[number] + 1) ** 2).astype(np.float16) * (largest[number] * np.float16(1 / 256))
        weight[at : at + count] = (codes - 2 ** (bits - 1)) * scale.astype(np.float32)
        at += count
    perm = rng.permutation(columns)
    placed = np.zeros_like(weight)
    placed[perm] = weight
    nibbles = small.astype(np.uint32).reshape(len(groups), stored // 8, 8)
    packed = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32)
    tensors = {
        "q_weight": np.concatenate(rows),
        "q_groups": np.array(firsts, np.int16),
        "q_scale": packed.view(np.int32),
        "q_scale_max": largest,
        "q_invperm": np.argsort(perm).astype(np.int32),
    }
    return {f"{name}.{key}": torch.from_numpy(value) for key, value in tensors.items()}, placed[:, :out].T


@pytest.mark.parametrize("groups", [MIXED, [(4, 128)], [(5, 64), (4, 64)], [(3, 96)]])
@pytest.mark.parametrize("padded", [0, 16])
@pytest.mark.parametrize("config", [None, {"quant_method": "exl2", "bits": 4.25}])
def test_values(groups: list, padded: int, config: dict | None, tmp_path: Path) -> None:
    tensors, weight = layer(NAME, OUT, groups, padded)
    folder = write_folder(tmp_path, tensors, config)
    found = read(folder, NAME, weight.shape).weight
    assert np.array_equal(found.dequantize().numpy(), weight)
    assert found.scheme.weight.name == f"int{max(bits for bits, _ in groups)}"
    assert ("4.25 bits" in reader_of(folder).describe()) == (config is not None)


def test_a_model_answers_as_its_floats_do(tmp_path: Path) -> None:
    plain, quantized = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    floats = load_file(plain / "model.safetensors")
    tensors = dict(floats)
    for name in [name for name in floats if "_proj" in name]:
        stem, (out, columns) = name.removesuffix(".weight"), floats[name].shape
        groups = {HIDDEN: [(5, 32), (4, 32)], INNER: [(6, 32), (4, 64)]}[columns]
        made, weight = layer(stem, out, groups)
        floats[name] = torch.from_numpy(weight.copy())
        del tensors[name]
        tensors |= made
    save_file(floats, plain / "model.safetensors")
    save_file(tensors, quantized / "model.safetensors")
    plan = plan_model(header_of(quantized), device="cpu")
    assert {one.kernel for one in plan.modules if not one.scheme.is_dense} <= {"cpu_blocks", "reference"}
    prompt = [[1, 2, 3, 4, 5]]
    ours, wanted = (
        prompt_logits(load_model(header_of(folder), device="cpu"), prompt)[0] for folder in (quantized, plain)
    )
    assert (ours - wanted).abs().max() <= 0.02 * wanted.abs().max()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"q_groups": torch.tensor([8, 0, 7, 8] + [0] * 8, dtype=torch.int16)}, "E0213"),
        ({"q_groups": torch.tensor([8, 1, 6, 8, 5, 20, 4, 25, 3, 33, 2, 36], dtype=torch.int16)}, "E0213"),
        ({"q_groups": torch.tensor([8, 0, 6, 8, 5, 20, 4, 25, 3, 33, 2, 999], dtype=torch.int16)}, "E0213"),
        ({"q_groups": torch.zeros(10, dtype=torch.int16)}, "E0213"),
        ({"q_invperm": torch.zeros(288, dtype=torch.int32)}, "E0213"),
        ({"q_invperm": torch.arange(287, dtype=torch.int32)}, "E0213"),
        ({"q_scale": torch.zeros(5, 6, dtype=torch.int32)}, "E0213"),
        ({"q_scale_max": torch.full((6,), float("nan")).half()}, "E0215"),
        ({"q_scale_max": torch.full((6,), 65504.0).half()}, "none"),
        ({"q_weight": torch.zeros(40, 47, dtype=torch.int32)}, "E0213"),
        ({"q_weight": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, weight = layer(NAME, OUT, MIXED)
    tensors |= layer("model.layers.1.mlp.up_proj", OUT, MIXED)[0]
    changed = {f"{NAME}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (tensors | changed).items() if value is not None}
    folder = write_folder(tmp_path, tensors, {"quant_method": "exl2"})
    if code == "none":
        assert read(folder, NAME, weight.shape).weight.dequantize().isfinite().all()
        return
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, weight.shape)
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)


def test_headers_alone_give_a_plan(tmp_path: Path) -> None:
    """A skeleton of a remote model has zeros where the groups are."""
    tensors, weight = layer(NAME, OUT, [(4, 64), (3, 64)])
    tensors[f"{NAME}.q_groups"] = torch.zeros(4, dtype=torch.int16)
    folder = write_folder(tmp_path, tensors, None)
    from lowbit.formats import StoredModule

    scheme = reader_of(folder).scheme_of(StoredModule(NAME, NAME, weight.shape))
    assert scheme.weight.name == "int4"
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None


def test_the_tool_s_own_file() -> None:
    """Every width, mixed in matrices, act-order and a padded head: as it reconstructs them, in float16."""
    header = open_checkpoint(str(FIXTURES / "exl2" / "mixed"))
    source, wanted = SourceModel(header, strict=True), expected(FIXTURES / "exl2" / "mixed")
    with TensorData(header) as data:
        quantized = [module for module in source.modules if not module.scheme.is_dense]
        assert {module.target.stored for module in quantized} == set(wanted)
        for module in quantized:
            linear = source.read(module, data)
            assert torch.equal(linear.weight.dequantize().half(), wanted[module.target.stored])
            assert (linear.bias is not None) == ("self_attn" in module.target.stored)
