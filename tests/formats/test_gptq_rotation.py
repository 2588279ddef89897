"""GPTQ files of rotated models: the inputs of down_proj meet a Hadamard matrix that is in no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import FIXTURES, header_of, read, reader_of
from forward_helpers import differences, prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.gptq_rotation import rotation_of
from lowbit.loading import load_model, packed_cache, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.rotation import Rotation

FIXTURE = FIXTURES / "gptq" / "w4_sym"
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
SHAPES = {DOWN: (64, 96), UP: (96, 64)}
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 31]]


def rotated(to: Path, kind: object = "hadamard") -> Path:
    """GPTQModel's fixture as if it had rotated the model: the config's word is all that a file says of it."""
    shutil.copytree(FIXTURE, to)
    for name, at in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        config = json.loads((to / name).read_text())
        (config if at is None else config[at])["rotation"] = kind
        (to / name).write_text(json.dumps(config))
    return to


def paley(order: int) -> np.ndarray:
    """The Hadamard matrix of a prime + 1, of whether differences of rows and columns are squares."""
    prime = order - 1
    squares = {n * n % prime for n in range(1, prime)}
    matrix = np.ones((order, order))
    matrix[0, 1:] = -1
    for row in range(prime):
        for column in range(prime):
            if row != column:
                matrix[row + 1, column + 1] = 1 if (row - column) % prime in squares else -1
    return matrix


TWO = np.array([[1, 1], [1, -1]])
EIGHT = np.kron(TWO, np.kron(TWO, TWO))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_inputs_of_down_proj_are_rotated(kind: str, tmp_path: Path) -> None:
    """A model answers as one of plain weights that are multiplied by the matrix: (x H^T) W^T = x (W H)^T."""
    plain = tmp_path / "plain"
    shutil.copytree(FIXTURE, plain)
    (plain / "quantize_config.json").unlink()
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    tensors = load_file(FIXTURE / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    weights: dict[str, Tensor] = {
        name: read(
            FIXTURE, name, (len(tensors[f"{name}.scales"].T), len(tensors[f"{name}.g_idx"]))
        ).weight.dequantize()
        for name in modules
    }
    hadamard = np.kron(paley(12), EIGHT) / np.sqrt(96)
    weights[DOWN] = torch.from_numpy(weights[DOWN].double().numpy() @ hadamard).float()
    packed = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(packed)}
    save_file(tensors | {f"{name}.weight": w for name, w in weights.items()}, plain / "model.safetensors")
    reference = {"device": "cpu", "dtype": "float32", "linear_kernel": "reference"}
    wanted = prompt_logits(load_model(header_of(plain), **reference), TOKENS)[0]
    folder = rotated(tmp_path / "rotated", kind)
    found = prompt_logits(load_model(header_of(folder), **reference), TOKENS)[0]
    assert differences(found, wanted).max() < 1e-4
    ours = prompt_logits(load_model(header_of(folder), device="cpu"), TOKENS)[0]
    assert differences(ours, wanted).max() < 0.05
    unrotated = prompt_logits(load_model(header_of(FIXTURE), **reference), TOKENS)[0]
    assert differences(unrotated, wanted).max() > 0.2, "the test sees a matrix that is left out"


@pytest.mark.parametrize(
    ("columns", "matrix"),
    [
        (16, np.kron(TWO, EIGHT)),
        (96, np.kron(paley(12), EIGHT)),
        (20, paley(20)),
        (80, np.kron(np.kron(TWO, paley(20)), TWO)),  # of multiples of 40 the small matrix is not the first
        (320, np.kron(np.kron(TWO, paley(20)), EIGHT)),
        (120, np.kron(paley(60), TWO)),
    ],
)
def test_the_matrix_of_a_number_of_inputs(columns: int, matrix: np.ndarray) -> None:
    found = rotation_of(columns)(torch.eye(columns)).numpy()
    assert np.allclose(found, matrix.T / np.sqrt(columns), atol=1e-6)


def test_the_scheme_says_so(tmp_path: Path) -> None:
    reader = reader_of(rotated(tmp_path / "rotated"), strict=True)
    schemes = {name: reader.scheme_of(StoredModule(name, name, shape)) for name, shape in SHAPES.items()}
    assert str(schemes[DOWN].rotation) == "hadamard 96" and schemes[UP].rotation is None
    assert read(tmp_path / "rotated", DOWN, SHAPES[DOWN]).weight.scheme == schemes[DOWN]
    plain = rotated(tmp_path / "none", None)
    assert reader_of(plain).scheme_of(StoredModule(DOWN, DOWN, SHAPES[DOWN])).rotation is None


def test_a_packed_cache_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", -5.0)
    header = header_of(rotated(tmp_path / "rotated"))
    cache = packed_cache.PackedCache(tmp_path / "packed", 1 << 30)
    fresh = load_model(header, device="cpu", packed_cache=cache)
    mapped = load_model(header, device="cpu", packed_cache=cache)
    assert mapped.mapped_bytes == mapped.weight_bytes > 0
    assert torch.equal(prompt_logits(mapped, TOKENS)[0], prompt_logits(fresh, TOKENS)[0])


@pytest.mark.parametrize("head", [torch.eye(2), torch.ones(2, 3), torch.ones(4)])
def test_a_head_is_square(head: Tensor) -> None:
    assert Rotation(8, head=head).is_whole == (head.shape == (2, 2))


def test_it_is_not_converted(tmp_path: Path) -> None:
    """Another file could not say what its inputs meet."""
    with pytest.raises(LowbitError, match="down_proj has its input rotated by hadamard 96"):
        convert(header_of(rotated(tmp_path / "rotated")), "dense", tmp_path / "out")


@pytest.mark.parametrize("kind", ["quip", 3, ["hadamard"], True])
def test_a_rotation_that_is_not_known(kind: object, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="rotation is .*; 'hadamard' and 'random' are read") as caught:
        reader_of(rotated(tmp_path / "rotated", kind))
    assert caught.value.code == "E0218"


def test_inputs_for_which_there_is_no_matrix(tmp_path: Path) -> None:
    reader = reader_of(rotated(tmp_path / "rotated"))
    tensors = reader.header.tensors  # type: ignore[attr-defined]
    assert tensors[f"{DOWN}.qweight"].shape == (12, 64)
    with pytest.raises(LowbitError, match=r"no Hadamard matrix for the 88 inputs of") as caught:
        reader.scheme_of(StoredModule(DOWN, DOWN, (64, 88)))  # 88 of padded 96
    assert caught.value.code == "E0218"


def test_a_plain_down_proj_beside_it(tmp_path: Path) -> None:
    folder = rotated(tmp_path / "rotated")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(DOWN)}
    save_file(kept | {f"{DOWN}.weight": torch.randn(64, 96)}, folder / "model.safetensors")
    with pytest.raises(LowbitError, match=f"'{DOWN}.weight' is plain, and .*rotation rotates") as caught:
        plan_model(header_of(folder), device="cpu")
    assert caught.value.code == "E0218"
