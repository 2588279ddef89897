"""Opening a checkpoint in spite of what is wrong with its files.

``read_local`` stops at the first thing that is wrong, as loading must. Here every file is read by itself, so
that one damaged shard does not hide the other's; what can be read becomes a header for the further rules.
"""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.folder import is_left_over, own_weights, read_folder_header
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.mistral_folder import has_mistral_names
from lowbit.checkpoint.output_folder import MARK
from lowbit.checkpoint.safetensors_file import INDEX, read_safetensors_header
from lowbit.checkpoint.source import read_local
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import Report
from lowbit.errors import LowbitError, printable

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def open_leniently(path: Path, report: Report, correction: Correction) -> CheckpointHeader | None:
    """The header of what can be read; None where that is nothing."""
    if path.is_dir() and (path / MARK).is_file() and path.name.endswith(".partial"):
        report.whole = False
        name = path.name.removesuffix(".partial")
        report.add(
            "D007",
            f"{printable(path.name)} is unfinished; give the command that writes {printable(name)} again "
            "and it goes on, or delete the folder",
            file=path.name,
        )
        return None
    try:
        if not path.is_dir() or _is_gguf_folder(path):
            return read_local(path)
        return _open_folder(path, report, correction)
    except LowbitError as error:
        report.whole = False
        report.add_error(error, "D001", file=path.name)
        return None


def _is_gguf_folder(folder: Path) -> bool:
    if not any(folder.glob("*.gguf")):
        return False
    return not ((folder / "config.json").exists() and any(folder.glob("*.safetensors")))


def _open_folder(folder: Path, report: Report, correction: Correction) -> CheckpointHeader:
    config = read_json(folder, "config.json")
    if config is None:
        return read_folder_header(folder)  # says what is missing
    weight_map = _weight_map(folder, report, correction)
    if weight_map is None:
        whole = folder / "model.safetensors"
        names = own_weights(path.name for path in folder.glob("*.safetensors"))
        paths = [whole] if whole.exists() else [folder / name for name in names]
        if not paths:
            return read_folder_header(folder)  # tells pickles from nothing at all
    else:
        paths = _shards(folder, weight_map, report)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, object] = {}
    read: set[str] = set()
    for path in paths:
        try:
            found, told = read_safetensors_header(path)
        except LowbitError as error:
            report.whole = False
            report.add_error(error, "D001", file=path.name)
            continue
        read.add(path.name)
        metadata.update(told)
        for name, entry in found.items():
            if name in tensors:
                report.whole = False
                report.add(
                    "D003",
                    f"{path.name}: tensor {printable(name)!r} is in {tensors[name].file.name} too; files of "
                    "different models were mixed, fetch the model again into an empty folder",
                    file=path.name,
                    tensor=name,
                )
            tensors.setdefault(name, entry)
    if has_mistral_names(tensors):
        return read_folder_header(folder)
    if weight_map is not None:
        _compare(weight_map, tensors, read, report, correction)
    return CheckpointHeader(folder, "safetensors", tensors, config, metadata)


def _weight_map(folder: Path, report: Report, correction: Correction) -> dict[str, str] | None:
    """The index, tensor -> file; None where there is none or it is of no use."""
    try:
        index = read_json(folder, INDEX)
    except LowbitError as error:
        report.add("D004", f"{error.message}; the shards themselves were read", file=INDEX, fix=_ANEW)
        correction.index = True
        return None
    if index is None:
        return None
    found = index.get("weight_map")
    if isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values()):
        if not is_left_over(folder, INDEX, index, "*.safetensors"):
            return found
        report.add(
            "D004",
            f"{INDEX} names no file that is there; it was left over from another copy of the model, and the "
            "files themselves were read",
            file=INDEX,
            fix=_ANEW,
        )
        correction.index = True
        return None
    report.add("D004", f"{INDEX}: weight_map must map tensor names to file names", file=INDEX, fix=_ANEW)
    correction.index = True
    return None


_ANEW = f"{INDEX} written anew from the shards"


def _shards(folder: Path, weight_map: dict[str, str], report: Report) -> list[Path]:
    """The files the index names that are there."""
    paths = []
    for name in sorted(set(weight_map.values())):
        shown = printable(name)
        if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
            report.whole = False
            report.add(
                "D001",
                f"{INDEX} names shard {shown!r} outside the model's folder; do not trust it",
                file=INDEX,
            )
        elif not (folder / name).exists():
            missing = [tensor for tensor, shard in weight_map.items() if shard == name]
            report.whole = False
            report.add(
                "D002",
                f"{shown} is missing (named in {INDEX} for {len(missing)} tensors, first "
                f"{printable(missing[0])!r}); fetch it (lowbit pull MODEL)",
                file=name,
                tensor=missing[0],
            )
        else:
            paths.append(folder / name)
    for path in sorted(folder.glob("*.safetensors")):
        if _SHARD.fullmatch(path.name) and path not in paths:
            report.add(
                "D005",
                f"{path.name} is called like a shard but {INDEX} does not name it; it is not read. Delete it "
                "if it is from another version",
                file=path.name,
            )
    return paths


def _compare(
    weight_map: dict[str, str],
    tensors: dict[str, TensorEntry],
    read: set[str],
    report: Report,
    correction: Correction,
) -> None:
    """A line for each kind of disagreement and file, about the files that could be read."""
    nowhere: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    unlisted: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        if entry is None and shard in read:
            nowhere.setdefault(shard, []).append(name)
        elif entry is not None and entry.file.name != shard:
            elsewhere.setdefault(shard, []).append(name)
    for name, entry in tensors.items():
        if name not in weight_map:
            unlisted.setdefault(entry.file.name, []).append(name)
    kinds = (
        (nowhere, f"{INDEX} names tensors that no shard holds, in {{file}}"),
        (elsewhere, f"{INDEX} puts tensors in {{file}} that another shard holds"),
        (unlisted, f"{{file}} holds tensors that are not in {INDEX}"),
    )
    for groups, what in kinds:
        for file, names in groups.items():
            correction.index = report.whole
            report.add(
                "D004",
                f"{what.format(file=printable(file))}: {len(names)}, first {printable(names[0])!r}; files of "
                "different versions were mixed, or a tool left the index as it was",
                file=file,
                tensor=names[0],
                fix=_ANEW if report.whole else "",
            )
