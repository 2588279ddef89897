"""Names that torch.compile, DataParallel, FSDP and trainers leave: the bare model's are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import FIXTURES, header_of
from forward_helpers import prompt_logits
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.loading import load_model

SOURCE = FIXTURES / "torchao/int8wo"
WRAPPED: dict[str, Callable[[str], str]] = {
    "DataParallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "both": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "a trainer": lambda name: f"model.{name}",
    "all": lambda name: f"module._orig_mod.model.{name}",
}


def write(folder: Path, tensors: dict[str, Tensor], pickled: bool, texts: dict[str, str]) -> Path:
    folder.mkdir()
    config = json.loads((SOURCE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", texts)
    return folder


def stored() -> tuple[dict[str, Tensor], dict[str, str]]:
    texts = {key: str(text) for key, text in header_of(SOURCE).metadata.items()}
    return load_file(SOURCE / "model.safetensors"), texts


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_are_taken_off(how: str, tmp_path: Path) -> None:
    """torchao's texts lie under the same names."""
    tensors, texts = stored()
    name = WRAPPED[how]
    folder = write(
        tmp_path / "m",
        {name(key): tensor for key, tensor in tensors.items()},
        False,
        {name(key) if key.endswith(".weight") else key: text for key, text in texts.items()},
    )
    found, bare = header_of(folder), header_of(SOURCE)
    assert found.tensors.keys() == bare.tensors.keys() and found.metadata == bare.metadata
    tokens = [[3, 5, 2, 9]]
    logits = [prompt_logits(load_model(header, device="cpu"), tokens)[0] for header in (found, bare)]
    assert torch.equal(*logits)


def test_pickled_names_too(tmp_path: Path) -> None:
    plain = {key: tensor for key, tensor in stored()[0].items() if tensor.is_floating_point()}
    folder = write(tmp_path / "m", {f"module.{key}": tensor for key, tensor in plain.items()}, True, {})
    with TensorData(header_of(folder)) as data:
        assert all(torch.equal(data.tensor(key), tensor) for key, tensor in plain.items())


def test_a_part_of_the_names_says_nothing(tmp_path: Path) -> None:
    """``module.`` or ``model.model.`` before some names alone, or before all of a real model's, stays."""
    some = {"module.a.weight": torch.ones(1), "b.weight": torch.ones(1)}
    nested = {"model.model.a.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}
    for number, tensors in enumerate((some, nested)):
        assert header_of(write(tmp_path / str(number), tensors, False, {})).tensors.keys() == tensors.keys()


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    tensors = {"_orig_mod.a.weight": torch.ones(1), "a.weight": torch.zeros(1)}
    with pytest.raises(LowbitError, match="are both 'a.weight' without what wrapped the model") as caught:
        header_of(write(tmp_path / "m", tensors, False, {}))
    assert caught.value.code == "E0226"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_transposed_tensors(legacy: bool, tmp_path: Path) -> None:
    """As they were saved by ``.T`` and ``permute``; a row or column alone lies like any vector."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    values = torch.arange(24.0)
    tensors = {
        "a": values.view(4, 6).T,
        "b": values.view(2, 3, 4).permute(2, 0, 1),
        "c": values.view(24, 1).T,
        "d": values.view(2, 1, 12).permute(2, 1, 0),
        "e": values[:1].view(1, 1).T,
        "f": values[:0].view(0, 3).T,
    }
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    header = header_of(folder)
    assert {name for name, entry in header.tensors.items() if entry.axes} == {"a", "b", "d"}
    with TensorData(header) as data:
        for name, tensor in tensors.items():
            assert torch.equal(data.tensor(name), tensor) and data.tensor(name).is_contiguous(), name
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(data.raw(name), raw), name
