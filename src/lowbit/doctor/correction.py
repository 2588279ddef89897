"""Correction: what is certainly wrong with a checkpoint and how it should be; applied, or written as a copy.

    config.json, quantize_config.json …   keys set or removed
    names                                 tensors renamed, left out, added (g_idx)
    the index                             written anew

``applied`` gives the header the corrected checkpoint would have, so that one run of the doctor finds what the
first fault hides. ``write`` copies file by file with one buffer: a shard whose names do not change is copied
as it is, another gets a new header and its payload tensor by tensor. The copy appears under its name complete
or not at all. Weights that are not this model's (pickles, stray shards) and folders in its folder are left,
but for the template of tools; hashes of files that changed are left out of lists of hashes.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.hashes import CERTIFICATE, MANIFEST
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.safetensors_file import DTYPE_BITS, INDEX, read_safetensors_header
from lowbit.errors import LowbitError, printable, thousands
from lowbit.tokenization.chat_template import TOOL_TEMPLATE

_BUFFER = 8 << 20
_NESTED = ("text_config", "llm_config", "language_config", "language_model_config")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "quip_params")
_QUANTIZATION_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl")

Progress = Callable[[int, int, str], None]
Json = dict[str, object]


@dataclass
class Correction:
    """``config``: keys of config.json. ``quantization``: keys of the quantization config, wherever it is.

    ``added``: int32 tensors by name, new ones or in place of stored ones; each lies beside its module's.
    """

    config: Json = field(default_factory=dict)
    quantization: Json = field(default_factory=dict)
    drop_quantization: bool = False
    renames: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    added: dict[str, Tensor] = field(default_factory=dict)
    index: bool = False

    def __bool__(self) -> bool:
        parts = (self.config, self.quantization, self.renames, self.dropped, self.added)
        return any(map(bool, parts)) or self.drop_quantization or self.index

    def applied(self, header: CheckpointHeader) -> CheckpointHeader:
        """The header with corrected config and names; added tensors are not in it."""
        tensors = {
            self.renames.get(name, name): entry
            for name, entry in header.tensors.items()
            if name not in self.dropped
        }
        return replace(header, tensors=tensors, config=self._config(header.config))

    def _config(self, config: Json) -> Json:
        """config.json as it should be."""
        changed = {**config, **self.config}
        for key in _QUANTIZATION_KEYS:
            changed.update(self._quantization(changed, key))
            if self.drop_quantization:
                changed.pop(key, None)
        for name in _NESTED:
            nested = changed.get(name)
            if isinstance(nested, dict) and "quantization_config" in nested:
                nested = {**nested, **self._quantization(nested, "quantization_config")}
                if self.drop_quantization:
                    del nested["quantization_config"]
                changed[name] = nested
        return changed

    def _quantization(self, holder: Json, key: str) -> Json:
        found = holder.get(key)
        return {key: self._quantized(found)} if isinstance(found, dict) else {}

    def _quantized(self, values: Json) -> Json:
        """A quantization config; ``format`` is the older name of ``checkpoint_format``."""
        changed = {**values, **self.quantization}
        if "checkpoint_format" in self.quantization and "format" in values:
            changed["format"] = self.quantization["checkpoint_format"]
        return changed

    def write(self, header: CheckpointHeader, out: Path, on_progress: Progress | None = None) -> None:
        """The corrected copy of a folder at ``out``, which must not exist."""
        if header.container == "pickle" or header.rotary_pairs:
            raise LowbitError(
                "E0450",
                f"--fix {printable(out)}: {header.root.name} is not in Hugging Face's safetensors layout; "
                "convert it first (lowbit convert MODEL OUT) and check that",
            )
        partial = out.with_name(out.name + ".partial")
        for path in (out, partial):
            if os.path.lexists(path):
                raise LowbitError(
                    "E0302", f"--fix {printable(out)}: {printable(path)} is there already; name another place"
                )
        _check_room(header, out)
        try:
            partial.mkdir(parents=True)
            self._write_files(header, partial, on_progress)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_files(self, header: CheckpointHeader, target: Path, on_progress: Progress | None) -> None:
        shards: dict[Path, list[TensorEntry]] = {}
        for entry in header.tensors.values():
            shards.setdefault(entry.file, []).append(entry)
        done, weight_map, size = 0, {}, 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if on_progress is not None:
                on_progress(done, header.nbytes, "corrected copy")

        for path, entries in shards.items():
            for name, nbytes in self._write_shard(path, entries, target / path.name, count):
                weight_map[name], size = path.name, size + nbytes
        for path in [*sorted(header.root.iterdir()), header.root / TOOL_TEMPLATE]:
            if path.is_file() and path not in shards and path.suffix not in _WEIGHTS:
                copy = target / path.relative_to(header.root)
                copy.parent.mkdir(exist_ok=True)
                self._write_document(header, path, copy)
        stored = (header.root / INDEX).exists()
        if self.index or (stored and (self.renames or self.added or self.dropped)):
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(target / INDEX, index)
        _forget_other_hashes(header.root, target)

    def _write_document(self, header: CheckpointHeader, source: Path, target: Path) -> None:
        name = source.name
        if name == "config.json":
            _write_json(target, self._config(header.config))
        elif name in _QUANTIZATION_FILES and (self.drop_quantization or self.quantization):
            values = read_json(header, name)
            if values is not None and not self.drop_quantization:
                _write_json(target, self._quantized(values))
        else:
            _copy(source, target)

    def _write_shard(
        self, source: Path, entries: list[TensorEntry], target: Path, count: Callable[[int], None]
    ) -> list[tuple[str, int]]:
        """Write one file; its (tensor, bytes)."""
        places = [
            _Place(self.renames.get(entry.name, entry.name), entry.dtype, entry.shape, entry.nbytes, entry)
            for entry in entries
            if entry.name not in self.dropped
        ]
        modules = {place.name.rpartition(".")[0] for place in places if place.name.endswith(".qweight")}
        added = {n: t for n, t in self.added.items() if n.rpartition(".")[0] in modules}
        places = [place for place in places if place.name not in added]
        places += [_Place(n, "I32", tuple(t.shape), 4 * t.numel(), t) for n, t in added.items()]
        if [place.name for place in places] == [entry.name for entry in entries]:
            _copy(source, target, count)
        else:
            # Wide elements first, as the format's own library has it: every tensor then lies aligned.
            places.sort(key=lambda place: (-DTYPE_BITS[place.dtype], place.order))
            _, metadata = read_safetensors_header(source)
            _write_safetensors(source, target, places, metadata, count)
        return [(place.name, place.nbytes) for place in places]


@dataclass(frozen=True)
class _Place:
    """A tensor of a file to write: its bytes lie in the old file, or are those of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorEntry | Tensor

    @property
    def order(self) -> int:
        return self.source.start if isinstance(self.source, TensorEntry) else 1 << 62


def _write_safetensors(
    source: Path, target: Path, places: list[_Place], metadata: dict[str, str], count: Callable[[int], None]
) -> None:
    parts: Json = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for place in places:
        offsets = [begin, begin + place.nbytes]
        parts[place.name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
        begin += place.nbytes
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(source, "rb") as old, open(target, "xb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for place in places:
            if isinstance(place.source, TensorEntry):
                old.seek(place.source.start)
                _pour(old.read, new.write, place.nbytes, source, count)
            else:
                new.write(place.source.numpy().astype("<i4").tobytes())
        _settle(new.fileno(), new.flush)


def _forget_other_hashes(source: Path, target: Path) -> None:
    """Leave out of what is known of the files (``checkpoint.hashes``) what does not hold of the copies."""

    def as_it_was(name: str) -> bool:
        paths = source / name, target / name
        return Path(name).name == name and paths[1].is_file() and filecmp.cmp(*paths, shallow=False)

    if (target / CERTIFICATE).exists() and not all(
        map(as_it_was, (p.name for p in target.glob("*.safetensors")))
    ):
        (target / CERTIFICATE).unlink()
    manifest = target / MANIFEST
    if manifest.exists():
        lines = manifest.read_text("utf-8", "replace").splitlines()
        kept = [line for line in lines if line.startswith("#") or as_it_was(re.sub(r"^\S+ [ *]", "", line))]
        manifest.write_text("".join(f"{line}\n" for line in kept), "utf-8")


def _pour(
    read: Callable[[int], bytes],
    write: Callable[[bytes], object],
    nbytes: int,
    source: Path,
    count: Callable[[int], None],
) -> None:
    left = nbytes
    while left:
        data = read(min(left, _BUFFER))
        if not data:
            raise LowbitError(
                "E0203", f"{source.name} ends {thousands(left)} bytes too early; it was changed"
            )
        write(data)
        count(len(data))
        left -= len(data)


def _copy(source: Path, target: Path, count: Callable[[int], None] = lambda nbytes: None) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:
        _pour(old.read, new.write, os.fstat(old.fileno()).st_size, source, count)
        _settle(new.fileno(), new.flush)


def _write_json(path: Path, values: object) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _settle(file.fileno(), file.flush)


def _settle(number: int, flush: Callable[[], None]) -> None:
    """On the disk before the folder gets its name."""
    flush()
    os.fsync(number)


def _check_room(header: CheckpointHeader, out: Path) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, int(header.nbytes * 1.01)
    if free < needed:
        raise LowbitError(
            "E0510",
            f"--fix {printable(out)} needs {thousands(needed)} bytes, {thousands(free)} are free there; "
            "nothing was written. Name a place on another disk",
        )
