"""That a written checkpoint holds the numbers it was made of: digests while writing, and all of it read back.

A module's numbers are float32 rows as ``QuantizedTensor.dequantize`` gives them, under SHA-256; zero has no
sign. Beside them stand its bias, what its inputs are quantized to and their scales. The result is opened as
any checkpoint, by its format's own reader and strictly, before it gets its name. What was proved is kept in
``lowbit-conversion.json`` beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.checkpoint.journal import sha256_of
from lowbit.checkpoint.safetensors_writer import write_file
from lowbit.checkpoint.source import read_local
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats.dense_writer import FLOATS, row_step
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceVector
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_CHUNK = 1 << 24  # weights dequantized at a time

Json = dict[str, object]


@dataclass(frozen=True)
class Comparison:
    """Two weights number by number. ``largest``: |a - b|; ``relative``: to the largest |a| of its row."""

    source: str
    result: str
    largest: float
    relative: float

    @property
    def equal(self) -> bool:
        """Whether not one number differs."""
        return self.source == self.result


@dataclass(frozen=True)
class Numbers:
    """A weight as it counts: times ``multiplier`` (in,) where there is one, rounded to ``dtype``."""

    weight: QuantizedTensor
    multiplier: Tensor | None = None
    dtype: str | None = None

    @property
    def step(self) -> int:
        """The fewest rows that can be taken by themselves."""
        return row_step(self.weight.scheme, self.weight.shape[-1])

    def rows(self, step: int = 0) -> Iterator[Tensor]:
        """float32 (rows, in), some ``step`` rows (a multiple of its own) at a time."""
        out, columns = self.weight.shape[-2:]
        step = step or self.step
        step *= max(1, _CHUNK // (step * columns))
        for start in range(0, out, step):
            part = self.weight.rows(start, min(out, start + step), ragged=True).dequantize()
            if self.multiplier is not None:
                part = part * self.multiplier.float()
            if self.dtype is not None:
                part = part.to(FLOATS[self.dtype]).float()
            yield part + 0.0  # -0 is 0

    def whole(self) -> Tensor:
        """float32 (out, in)."""
        return torch.cat(list(self.rows()))

    def sha256(self) -> str:
        """Of all rows."""
        digest = hashlib.sha256()
        for part in self.rows():
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


def compare(source: Numbers, result: Numbers) -> Comparison:
    """Both digests, and how far apart the numbers are. A row of zeros that are none any more is off by 1."""
    if result.weight is source.weight and source.multiplier is result.multiplier is result.dtype is None:
        digest = source.sha256()
        return Comparison(digest, digest, 0.0, 0.0)
    before, after = hashlib.sha256(), hashlib.sha256()
    largest = relative = 0.0
    step = math.lcm(source.step, result.step)
    for a, b in zip(source.rows(step), result.rows(step), strict=True):
        before.update(a.contiguous().numpy().data)
        after.update(b.contiguous().numpy().data)
        far = (a - b).abs().amax(-1)
        largest = max(largest, float(far.max()))
        row = a.abs().amax(-1)
        relative = max(relative, float(torch.where(row > 0, far / row, (far > 0).float()).max()))
    return Comparison(before.hexdigest(), after.hexdigest(), largest, relative)


def beside(read: ReadModule, scheme: Scheme, dtype: str | None = None) -> str:
    """SHA-256 of what stands beside the numbers: bias, inputs and their scales. ``scheme``: as written."""
    digest = hashlib.sha256(str(scheme.activation).encode())
    bias, rule = read.bias, read.input
    tensors = [bias if bias is None or dtype is None else bias.to(FLOATS[dtype])]
    if rule is not None and not scheme.is_dense:
        tensors.append(rule.multiplier)
        if scheme.activation is not None:
            tensors += [rule.static_scale, rule.static_zero]
    for tensor in tensors:
        if tensor is not None:
            digest.update(b"1" + tensor.float().reshape(-1).contiguous().numpy().tobytes())
    return digest.hexdigest()


def prove(path: Path, form: str, source: SourceModel, told: Mapping[str, Json]) -> None:
    """Read all of the result back; E0707 where it is not what ``told`` says was to be written.

    ``told``: of each module by the model's name for it, ``sha256`` and ``beside``.
    """
    result = SourceModel(read_local(path), strict=True)
    result = result.for_gguf() if form == "gguf" else result
    if result.form.name != form:
        raise _differs(path, f"it is read as {result.form.name}, not as {form}")
    left = dict(told)
    with TensorData(result.header) as data, TensorData(source.header) as before:
        for module in result.modules:
            name = module.place.part.name
            wanted = left.pop(name, None)
            if wanted is None:
                raise _differs(path, f"nobody wrote {printable(name)}")
            read = result.read(module, data)
            if Numbers(read.weight).sha256() != wanted["sha256"]:
                raise _differs(path, f"the numbers of {printable(name)} changed")
            if beside(read, read.weight.scheme) != wanted["beside"]:
                raise _differs(path, f"bias, input scales or inputs of {printable(name)} changed")
        if left:
            raise _differs(path, f"{printable(next(iter(left)))} is missing")
        vectors = {part.name: part for part in source.parts if isinstance(part, SourceVector)}
        for vector in result.parts:
            if isinstance(vector, SourceVector):
                exact = source.read_vector(vectors[vector.name], before).float() - vector.shift
                if not torch.equal(data.tensor(vector.stored).float(), exact):
                    raise _differs(path, f"{printable(vector.name)} changed")


def _differs(path: Path, what: str) -> LowbitError:
    return LowbitError(
        "E0707",
        f"{printable(path.name.removesuffix('.partial'))} was written and read back, and {what}; it was not "
        "kept. Report it with the model's name; another --format may hold the model",
    )


def certificate(
    source: SourceModel,
    form: str,
    dtype: str | None,
    files: Mapping[str, Json],
    told: Mapping[str, Json],
    version: str,
    notes: list[str],
) -> bytes:
    """lowbit-conversion.json. ``files``: bytes and sha256 of each file of the result."""
    origin = {entry.file for entry in source.header.tensors.values()}
    values: Json = {
        "certificate": 1,
        "lowbit": version,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "exact": all("largest_error" not in one for one in told.values()),
        "source": {
            "name": source.header.root.name,
            "format": source.form.name,
            "files": {file.name: {"bytes": file.stat().st_size} for file in sorted(origin)},
        },
        "result": {"format": form, "dtype": dtype, "files": dict(files)},
        "digest": "SHA-256 of float32 rows as dequantized, -0 as 0",
        "modules": dict(told),
        "notes": notes,
    }
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def files_of(paths: list[Path]) -> dict[str, Json]:
    """Bytes and sha256 of files."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def write_certificate(path: Path, text: bytes) -> None:
    """Beside the result: in its folder, or with the name of its only file in front."""
    write_file(path / CERTIFICATE if path.is_dir() else path.with_name(f"{path.name}.{CERTIFICATE}"), text)
