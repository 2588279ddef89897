"""Hugging Face folders: config.json, and the weights in one file, several, or an index of them.

The weights are safetensors files; where there are none, PyTorch's pickled ones (``pickled_file`` reads them
as data). A folder in Mistral's own layout is read through ``mistral_folder``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.mistral_folder import PARAMS, config_of, has_mistral_names, named_as_transformers
from lowbit.checkpoint.pickled_file import read_pickled_header
from lowbit.checkpoint.pickled_objects import owner
from lowbit.checkpoint.safetensors_file import INDEX, read_safetensors_header
from lowbit.checkpoint.wrapped_names import without_wrappers
from lowbit.errors import LowbitError, printable

MAX_SHARDS = 10_000
MAX_ALL_TENSORS = 1_000_000  # of all shards: each of Kimi K2's 69,120 experts' matrices is up to four
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED}.index.json"
HQQ_PICKLED = "qmodel.pt"  # of HQQ's own save_quantized
SQUEEZED = "sq-*.pt"  # of SqueezeLLM's pack.py, by the names of its published models
_MIXED = "files of different versions were mixed: fetch them again, or delete the index if it is a left-over"
_PART = re.compile(r"(?P<stem>.+-)\d{5}-of-(?P<count>\d{5})(?P<ending>\.\w+)")


def read_folder_header(folder: Path) -> CheckpointHeader:
    """The checkpoint in a folder."""
    config = read_json(folder, "config.json")
    if config is None:
        params = read_json(folder, PARAMS)
        if params is None or not any(folder.glob("consolidated*.safetensors")):
            raise LowbitError(
                "E0201",
                f"{folder.name}: no config.json there; a Hugging Face folder, a .gguf file, or {PARAMS} "
                "beside consolidated*.safetensors is expected",
            )
        config = config_of(params)
    index_name, names = _weight_files(folder)
    index = read_json(folder, index_name) if index_name else None
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, object] = {}
    for name in names:
        for tensor, entry in _tensors_of(folder / name, metadata).items():
            if tensor in tensors:
                raise LowbitError(
                    "E0226", f"{name}: tensor {printable(tensor)!r} is in {tensors[tensor].file.name} too"
                )
            tensors[tensor] = entry
    if index is not None:
        pickled = not names[0].endswith(".safetensors")
        stored = {owner(name, metadata): entry for name, entry in tensors.items()} if pickled else tensors
        _check_index(index_name, index, stored)
    if len(tensors) > MAX_ALL_TENSORS:
        raise LowbitError("E0225", f"{folder.name}: {len(tensors)} tensors, limit {MAX_ALL_TENSORS}")
    container: Literal["pickle", "safetensors"] = (
        "safetensors" if names[0].endswith(".safetensors") else "pickle"
    )
    tensors, metadata = without_wrappers(tensors, metadata)
    if has_mistral_names(tensors):
        tensors = named_as_transformers(tensors)
        return CheckpointHeader(folder, container, tensors, config, metadata, rotary_pairs=True)
    return CheckpointHeader(folder, container, tensors, config, metadata)


def _tensors_of(path: Path, metadata: dict[str, object]) -> dict[str, TensorEntry]:
    read = read_safetensors_header if path.suffix == ".safetensors" else read_pickled_header
    found, told = read(path)
    metadata.update(told)
    return found


def _weight_files(folder: Path) -> tuple[str, list[str]]:
    """(the index or "", the files): safetensors where there are any, else pickled ones."""
    found = _one_copy(folder, "model.safetensors", INDEX, "*.safetensors")
    if found is not None:
        return found
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickled:
        found = _one_copy(folder, PICKLED, PICKLED_INDEX, "pytorch_model*.bin")
        if found is not None:
            return found
        if HQQ_PICKLED in pickled:
            return "", [HQQ_PICKLED]
        squeezed = [name for name in pickled if fnmatch.fnmatchcase(name, SQUEEZED)]
        if len(squeezed) == 1:
            return "", squeezed
        raise LowbitError(
            "E0230",
            f"{folder.name} holds only pickled weights that are not read ({printable(pickled[0])}); of these "
            f"lowbit reads {PICKLED}, its parts, and {HQQ_PICKLED}. Use the repo's .safetensors files, or "
            "re-save with safetensors.torch.save_file",
        )
    raise LowbitError("E0201", f"{folder.name}: no .safetensors file there")


def _one_copy(folder: Path, whole: str, index: str, pattern: str) -> tuple[str, list[str]] | None:
    listed = read_json(folder, index)
    if listed is not None and not is_left_over(folder, index, listed, pattern):
        return index, _shards_of(folder, index, listed)
    if (folder / whole).exists():
        return "", [whole]
    names = own_weights(path.name for path in folder.glob(pattern))
    return ("", names) if names else None


def is_left_over(folder: Path, where: str, index: dict[str, object], pattern: str) -> bool:
    """Whether the index is another copy's: no file it names is there, and others are, all parts of them.

    Tools that write files of their own names (ExLlama's output.safetensors) copy the original's index.
    """
    there = set(own_weights(path.name for path in folder.glob(pattern)))
    if not there or there & set(_weight_map(where, index).values()):
        return False
    parts = [match for name in there if (match := _PART.fullmatch(name))]
    return all(
        f"{part['stem']}{number:0{len(part['count'])}}-of-{part['count']}{part['ending']}" in there
        for part in parts
        for number in range(1, min(int(part["count"]), MAX_SHARDS) + 1)
    )


def own_weights(names: Iterable[str]) -> list[str]:
    """The files of one copy of the weights: Mistral's consolidated ones only where there are no others."""
    found = sorted(names)
    return [name for name in found if not name.startswith("consolidated")] or found


def _weight_map(name: str, index: dict[str, object]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise LowbitError("E0227", f"{name}: weight_map must map tensor names to file names")
    return found


def _shards_of(folder: Path, where: str, index: dict[str, object]) -> list[str]:
    weight_map = _weight_map(where, index)
    if len(weight_map) > MAX_ALL_TENSORS:
        raise LowbitError("E0227", f"{where}: {len(weight_map)} tensors, limit {MAX_ALL_TENSORS}")
    names = sorted(set(weight_map.values()))
    if not names or len(names) > MAX_SHARDS:
        raise LowbitError("E0227", f"{where} names {len(names)} shards; 1 to {MAX_SHARDS} are possible")
    for name in names:
        if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
            raise LowbitError(
                "E0208", f"{where} names shard {printable(name)!r} outside the model directory; refused"
            )
        if not (folder / name).exists():
            missing = [tensor for tensor, shard in weight_map.items() if shard == name]
            raise LowbitError(
                "E0207",
                f"{printable(name)} is missing (named in {where} for {len(missing)} tensors, first "
                f"{printable(missing[0])!r})",
            )
    return names


def _check_index(where: str, index: dict[str, object], tensors: dict[str, TensorEntry]) -> None:
    """The index and the shards must tell the same story."""
    weight_map = _weight_map(where, index)
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        if entry is None or entry.file.name != shard:
            holder = "no shard" if entry is None else entry.file.name
            raise LowbitError(
                "E0226",
                f"{where} puts tensor {printable(name)!r} in {printable(shard)}, but {holder} holds it; "
                f"{_MIXED}",
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise LowbitError(
                "E0226", f"{entry.file.name}: tensor {printable(name)!r} is not in {where}; {_MIXED}"
            )
