"""Tiny checkpoints written by hand, and fixtures written by the tools."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats import CheckpointFormat, Notes, StoredLinear, StoredModule, detect

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    quantization: dict | None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A folder with one safetensors file and a config that says no more than the quantization."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def header_of(folder: Path) -> CheckpointHeader:
    """The folder, opened."""
    return open_checkpoint(str(folder))


def reader_of(folder: Path, strict: bool = False) -> CheckpointFormat:
    """The one format that claims the folder, opened on it."""
    header = header_of(folder)
    return detect(header)(header, Notes(strict))


def read(folder: Path, name: str, shape: tuple[int, int], strict: bool = False) -> StoredLinear:
    """One module as the folder's own format reads it."""
    reader = reader_of(folder, strict)
    module = StoredModule(name, name, shape)
    with TensorData(header_of(folder)) as data:
        return reader.read(module, data)


def fixture_cases(name: str) -> list[Path]:
    """The folders of a format's fixtures."""
    return sorted(path.parent for path in (FIXTURES / name).glob("*/expected.safetensors"))


def expected(folder: Path) -> dict[str, Tensor]:
    """What the tool itself dequantized the fixture to, by module name.

    It lies beside a folder of pickles, where it would be taken for the weights.
    """
    beside = folder.with_suffix(".safetensors")
    found = load_file(beside if beside.exists() else folder / "expected.safetensors")
    return {name.removesuffix(".weight"): tensor for name, tensor in found.items()}


def check_values(folder: Path) -> None:
    """Every module that the tool dequantized has its values, to the last bit, and the scheme that is told."""
    for name, values in expected(folder).items():
        shape = (values.shape[0], values.shape[1])
        found = read(folder, name, shape, strict=True).weight
        assert torch.equal(found.dequantize(), values.float()), f"{name}: {found.scheme}"
        assert found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, shape))


def last_bit(dtype: torch.dtype, values: Tensor) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around float32 ``values``."""
    exponent = torch.frexp(values.abs().clamp(min=float(torch.finfo(dtype).tiny)))[1] - 1
    return torch.exp2(exponent.float()) * torch.finfo(dtype).eps
