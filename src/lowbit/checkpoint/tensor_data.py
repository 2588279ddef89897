"""TensorData: the payload of a checkpoint as torch views of memory maps. The one place here with torch."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lowbit.checkpoint.file_checks import truncated
from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.errors import LowbitError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorData:
    """Maps each file of a checkpoint once, read-only. Views are valid until ``close``."""

    def __init__(self, header: CheckpointHeader) -> None:
        self.header = header
        self._maps: dict[Path, Tensor] = {}

    def __enter__(self) -> TensorData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the maps; their memory goes when the last view does."""
        self._maps.clear()

    def raw(self, name: str) -> Tensor:
        """uint8 (nbytes,): the stored bytes of a tensor, not copied, but of one that lies transposed."""
        if self._entry(name).axes is not None:
            return self.tensor(name).view(-1).view(torch.uint8)
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        entry = self._entry(name)
        mapped = self._map(entry.file)
        end = entry.start + entry.nbytes
        if end > mapped.numel():
            raise truncated(entry.file, mapped.numel(), end)
        return mapped[entry.start : end]

    def tensor(self, name: str) -> Tensor:
        """The tensor in its logical shape; GGUF blocks as uint8 (..., out, row bytes)."""
        entry, raw = self._entry(name), self._stored(name)
        if self.header.container == "gguf" and entry.dtype not in DTYPES:
            kind = GGUF_TYPES_BY_NAME[entry.dtype]
            return raw.view(*entry.shape[:-1], entry.shape[-1] // kind.weights * kind.bytes)
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise LowbitError(
                "E0219", f"{entry.file.name}: tensor {name!r} has dtype {entry.dtype}, which is not supported"
            )
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()  # a view needs an aligned address
        if entry.axes is None:
            return raw.view(dtype).view(entry.shape)
        lying = raw.view(dtype).view([entry.shape[axis] for axis in entry.axes])
        back = sorted(range(len(entry.axes)), key=entry.axes.__getitem__)
        return lying.permute(back).contiguous()

    def _entry(self, name: str) -> TensorEntry:
        entry = self.header.tensors.get(name)
        if entry is None:
            raise LowbitError("E0209", f"{self.header.root.name}: no tensor {name!r}")
        return entry

    def _map(self, path: Path) -> Tensor:
        """uint8 (file size,) over the whole file."""
        if path in self._maps:
            return self._maps[path]
        self._maps[path] = mapped = mapped_file(path)
        return mapped


def mapped_file(path: Path, advice: int | None = None) -> Tensor:
    """uint8 (file size,): the file, mapped and read-only, for as long as the tensor or a view of it lives.

    ``advice``: for ``madvise``.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if advice is not None:
            area.madvise(advice)
    except (OSError, ValueError) as error:
        raise LowbitError("E0301", f"{path.name}: cannot be mapped: {error}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(area, dtype=torch.uint8, count=size)
