"""PyTorch's own weight files (``pytorch_model.bin``): headers only, and no unpickler anywhere.

    zip      NAME/data.pkl says which tensor is which part of which storage; NAME/data/KEY holds a
             storage's bytes, *stored*, so that they can be mapped where they lie
    legacy   before PyTorch 1.6: five pickles one after another (magic number, version, sizes, the tensors,
             the storages' keys), then for each key in that order its elements' number (i64) and bytes

``pickle_stream`` reads the pickles. Every place is checked against the size of the very file that was
opened: entries may not overlap, a storage has the bytes its elements need, a tensor lies inside its storage.
A tensor that was saved transposed says so (``TensorEntry.axes``); one with gaps between its numbers is
refused. No torch.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lowbit.checkpoint.file_checks import check_regular_file, refuse_impostors, truncated
from lowbit.checkpoint.header import TensorEntry
from lowbit.checkpoint.pickle_stream import MAX_BYTES, PickledTensor, Storage, read_pickle
from lowbit.checkpoint.pickled_objects import flatten
from lowbit.checkpoint.safetensors_file import DTYPE_BITS, MAX_NAME, MAX_TENSORS
from lowbit.errors import LowbitError, printable, thousands

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_HOLDERS = ("state_dict", "model")  # where training scripts put the tensors
_MAX_DIRECTORY = 128 << 20
_RESAVE = "use the repo's .safetensors files, or re-save with safetensors.torch.save_file"


def read_pickled_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, object]]:
    """The tensors of one file, and what it says of those that are parts of others (``pickled_objects``)."""
    check_regular_file(path, "weight file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if start.startswith(b"PK\x03\x04"):
            found, places = _read_zip(file, path, size)
        else:
            refuse_impostors(path, start, size)
            if not start.startswith(b"\x80"):
                raise LowbitError(
                    "E0230", f"{path.name} is neither a zip file nor a pickle, the two forms of PyTorch's "
                    f"weight files; {_RESAVE}",
                )  # fmt: skip
            found, places = _read_legacy(file, path, size)
    tensors, texts = _flattened(path, found)
    return _entries(path, tensors, places), texts


# ---- what the pickle says


def _flattened(path: Path, found: object) -> tuple[dict[object, object], dict[str, object]]:
    try:
        return flatten(_state_dict(path, found))
    except ValueError as error:
        raise LowbitError("E0232", f"{path.name}: tensor {printable(error)}; the file is damaged") from None


def _state_dict(path: Path, found: object) -> dict[object, object]:
    if not isinstance(found, dict):
        raise LowbitError(
            "E0230",
            f"{path.name} holds a {type(found).__name__}, not a dictionary of tensors; {_RESAVE}",
        )
    for holder in _HOLDERS:
        inner = found.get(holder)
        if isinstance(inner, dict):
            return inner
    return found


def _entries(
    path: Path, found: dict[object, object], places: dict[str, tuple[int, int]]
) -> dict[str, TensorEntry]:
    """``places``: storage key -> (start, bytes) in the file."""
    if len(found) > MAX_TENSORS:
        raise LowbitError("E0232", f"{path.name}: {len(found)} tensors, limit {MAX_TENSORS}")
    entries: dict[str, TensorEntry] = {}
    for name, tensor in found.items():
        shown = printable(name)
        if not isinstance(name, str) or not name or len(name.encode()) > MAX_NAME or not name.isprintable():
            raise LowbitError("E0232", f"{path.name}: {shown!r} is no usable name of a tensor")
        if name.endswith("_extra_state") and not isinstance(tensor, PickledTensor):
            continue
        if name.startswith("sparse_threshold.") and isinstance(tensor, int):
            continue  # SqueezeLLM's counts of outliers
        if not isinstance(tensor, PickledTensor):
            raise LowbitError(
                "E0230",
                f"{path.name}: {shown!r} is a {type(tensor).__name__}, not a tensor; {_RESAVE}",
            )
        start, nbytes, axes = _place(path, shown, tensor, places)
        entries[name] = TensorEntry(name, path, tensor.dtype, tensor.shape, start, nbytes, axes)
    return entries


def _place(
    path: Path, shown: str, tensor: PickledTensor, places: dict[str, tuple[int, int]]
) -> tuple[int, int, tuple[int, ...] | None]:
    """(start, bytes) of a tensor in the file, and its axes as they lie there."""
    # Axes of one element lie anywhere: they stay where they are.
    ones = [size == 1 or 0 in tensor.shape for size in tensor.shape]
    long = [axis for axis, one in enumerate(ones) if not one]
    by_stride = iter(sorted(long, key=lambda axis: -tensor.strides[axis]))
    axes = tuple(axis if one else next(by_stride) for axis, one in enumerate(ones))
    expected = 1
    for axis in reversed(axes):
        size, stride = tensor.shape[axis], tensor.strides[axis]
        if not ones[axis] and stride != expected:
            raise LowbitError(
                "E0230",
                f"{path.name}: tensor {shown!r} of {list(tensor.shape)} was saved as a view with strides "
                f"{list(tensor.strides)}, which leave gaps; re-save it with tensor.contiguous()",
            )
        expected *= size
    item = DTYPE_BITS[tensor.dtype] // 8
    base, held = _storage(path, tensor.storage, places)
    begin, nbytes = tensor.offset * item, expected * item
    if begin + nbytes > held:
        raise LowbitError(
            "E0232",
            f"{path.name}: tensor {shown!r} needs bytes {thousands(begin)} to {thousands(begin + nbytes)} of "
            f"a storage of {thousands(held)}; the file is damaged",
        )
    return base + begin, nbytes, None if axes == tuple(range(len(axes))) else axes


def _storage(path: Path, storage: Storage, places: dict[str, tuple[int, int]]) -> tuple[int, int]:
    needed = storage.size * DTYPE_BITS[storage.dtype] // 8
    if storage.key not in places:
        raise LowbitError(
            "E0232", f"{path.name}: storage {printable(storage.key)!r} is not there; the file is damaged"
        )
    start, nbytes = places[storage.key]
    if nbytes != needed:
        raise LowbitError(
            "E0232",
            f"{path.name}: storage {printable(storage.key)!r} has {thousands(nbytes)} bytes, "
            f"{thousands(storage.size)} elements of {storage.dtype} need {thousands(needed)}; the file is "
            "damaged",
        )
    return start, nbytes


# ---- the legacy form


def _read_legacy(file: BinaryIO, path: Path, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
    file.seek(0)
    data = file.read(min(size, MAX_BYTES))
    magic, at = read_pickle(data, path.name)
    if magic != _MAGIC:
        raise LowbitError("E0230", f"{path.name} is a pickle, but not a weight file of PyTorch; {_RESAVE}")
    version, at = read_pickle(data, path.name, at)
    told, at = read_pickle(data, path.name, at)
    if version != _VERSION or not isinstance(told, dict) or told.get("little_endian") is not True:
        raise LowbitError(
            "E0230",
            f"{path.name} is of version {printable(repr(version))}, or not little-endian; {_RESAVE}",
        )
    found, at = read_pickle(data, path.name, at)
    keys, at = read_pickle(data, path.name, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise LowbitError("E0232", f"{path.name}: its storages are not listed; the file is damaged")
    elements = {
        tensor.storage.key: tensor.storage
        for tensor in _flattened(path, found)[0].values()
        if isinstance(tensor, PickledTensor)
    }
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = elements.get(key)
        if storage is None or key in places:
            raise LowbitError(
                "E0230",
                f"{path.name}: storage {printable(key)!r} belongs to no tensor of the state dict; {_RESAVE}",
            )
        file.seek(at)
        count = file.read(8)
        if len(count) != 8:
            raise truncated(path, size, at + 8)
        [number] = struct.unpack("<q", count)
        nbytes = storage.size * DTYPE_BITS[storage.dtype] // 8
        if number != storage.size:
            raise LowbitError(
                "E0232",
                f"{path.name}: storage {printable(key)!r} says {number} elements in one place, "
                f"{storage.size} in another; the file is damaged",
            )
        places[key] = (at + 8, nbytes)
        at += 8 + nbytes
        if at > size:
            raise truncated(path, size, at)
    if at != size:
        raise LowbitError(
            "E0232",
            f"{path.name} is {thousands(size)} bytes, but its last storage ends at {thousands(at)}; the file "
            "is damaged",
        )
    return found, places


# ---- the zip form


@dataclass(frozen=True)
class _Member:
    name: str
    header: int  # where its local header is
    start: int
    nbytes: int


def _read_zip(file: BinaryIO, path: Path, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
    members = _members(file, path, size)
    folder = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if folder is None or folder.count("/") != 1:
        raise LowbitError(
            "E0205", f"{path.name} is a compressed archive, not weights; unpack it first"
        )  # any other zip file
    if any(name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in members):
        raise LowbitError(
            "E0230",
            f"{path.name} is a TorchScript archive (it contains code), not a state dict; lowbit reads plain "
            "tensors only. Use the repo's .safetensors files, or re-save with safetensors.torch.save_file",
        )
    order = members.get(f"{folder}byteorder")
    if order is not None and _content(file, path, order, 16) != b"little":
        raise LowbitError("E0230", f"{path.name} is not little-endian; {_RESAVE}")
    found, _ = read_pickle(_content(file, path, members[f"{folder}data.pkl"], MAX_BYTES), path.name)
    prefix = f"{folder}data/"
    places = {
        name.removeprefix(prefix): (member.start, member.nbytes)
        for name, member in members.items()
        if name.startswith(prefix)
    }
    return found, places


def _content(file: BinaryIO, path: Path, member: _Member, limit: int) -> bytes:
    if member.nbytes > limit:
        raise LowbitError(
            "E0232",
            f"{path.name}: {printable(member.name)!r} has {thousands(member.nbytes)} bytes, limit "
            f"{thousands(limit)}; it is no weight file",
        )
    file.seek(member.start)
    return file.read(member.nbytes)


def _members(file: BinaryIO, path: Path, size: int) -> dict[str, _Member]:
    """Every entry of the zip file, all of them stored as they are, none over another."""

    def damaged(what: str) -> LowbitError:
        return LowbitError("E0232", f"{path.name}: {what}; the file is damaged or incomplete")

    count, length, start = _directory(file, path, size)
    if start + length > size or length > _MAX_DIRECTORY or count * 46 > length:
        raise damaged(f"its zip directory of {count} entries does not fit the file")
    file.seek(start)
    directory = file.read(length)
    members: dict[str, _Member] = {}
    at = 0
    for _ in range(count):
        if at + 46 > length or directory[at : at + 4] != b"PK\x01\x02":
            raise damaged("its zip directory is cut")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        packed, nbytes = struct.unpack_from("<II", directory, at + 20)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", directory, at + 28)
        [header] = struct.unpack_from("<I", directory, at + 42)
        end = at + 46 + name_size + extra_size + comment_size
        if end > length:
            raise damaged("its zip directory is cut")
        raw_name = directory[at + 46 : at + 46 + name_size]
        name = raw_name.decode("utf-8", "replace")
        extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
        nbytes, packed, header = _wide(extra, nbytes, packed, header)
        if method != 0 or packed != nbytes or flags & 1:
            raise LowbitError(
                "E0230",
                f"{path.name}: {printable(name)!r} is compressed or encrypted, which PyTorch's files never "
                f"are; {_RESAVE}",
            )
        if name in members:
            raise damaged(f"{printable(name)!r} is in it twice")
        file.seek(header)
        local = file.read(30 + name_size)
        if len(local) != 30 + name_size or local[:4] != b"PK\x03\x04" or local[30:] != raw_name:
            raise damaged(f"{printable(name)!r} is not where its zip directory says")
        local_name, local_extra = struct.unpack_from("<HH", local, 26)
        members[name] = _Member(name, header, header + 30 + local_name + local_extra, nbytes)
        at = end
    last = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < last or member.start + member.nbytes > start:
            raise damaged(f"{printable(member.name)!r} overlaps another entry or the end")
        last = member.start + member.nbytes
    return members


def _directory(file: BinaryIO, path: Path, size: int) -> tuple[int, int, int]:
    """(entries, bytes, start) of the zip directory, from the record that ends the file."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    at = len(tail) - 22
    if at < 0 or tail[at : at + 4] != b"PK\x05\x06":
        raise LowbitError(
            "E0203",
            f"{path.name} begins as a zip file but does not end as one: incomplete download. Fetch it again "
            "(lowbit pull <repo>)",
        )
    count, length, start = struct.unpack_from("<HII", tail, at + 10)
    if 0xFFFF in (count,) or 0xFFFFFFFF in (length, start):
        # 56 bytes of the wide record, 20 that say where it is, then the one just read.
        if len(tail) < 98 or tail[:4] != b"PK\x06\x06" or tail[56:60] != b"PK\x06\x07":
            raise LowbitError("E0232", f"{path.name}: its zip directory is not there; the file is damaged")
        count, length, start = struct.unpack_from("<QQQ", tail, 32)
    return count, length, start


def _wide(extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three numbers, those that do not fit 32 bits from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1:
            numbers = [value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
            nbytes = numbers.pop(0) if nbytes == 0xFFFFFFFF and numbers else nbytes
            packed = numbers.pop(0) if packed == 0xFFFFFFFF and numbers else packed
            header = numbers.pop(0) if header == 0xFFFFFFFF and numbers else header
        at += 4 + length
    return nbytes, packed, header
