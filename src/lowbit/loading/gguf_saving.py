"""save_gguf: a model as one GGUF file, through the gguf package (``pip install 'lowbit[gguf]'``).

Names and metadata are the family's (``models.gguf_names``, ``gguf_metadata``), rows of Q and K go into
adjacent rotary pairs where the architecture has them so, experts are stacked, one-dimensional tensors are
float32. The file is read back before it gets its name: what its metadata cannot say of this model is refused,
but for sliding windows, which GGUF files of some families have no key for: those are reported.

Places follow from names and types alone: a run that was broken off goes on after its last whole tensor
(``FileJournal``); an unfinished file of another source, command or header is begun anew.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint.gguf_file import read_gguf_header
from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.journal import FileJournal
from lowbit.checkpoint.output_folder import check_room, explained, output_file
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.checkpoint.tensor_file import TensorFile, places_after
from lowbit.errors import LowbitError
from lowbit.formats.gguf_writer import GgufWriter, type_of
from lowbit.layers.linear import Part
from lowbit.loading.names import row_order
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule, SourceVector
from lowbit.models.gguf_metadata import (
    SHIFTED_NORMS,
    UNSAID_WINDOWS,
    WITH_OWN_HEAD,
    architecture_for,
    gguf_metadata,
    lost,
    rope_tensors,
)
from lowbit.models.registry import family_of
from lowbit.numerics.scheme import Scheme
from lowbit.tokenization.gguf_export import tokenizer_metadata

if TYPE_CHECKING:
    import gguf

_log = logging.getLogger("lowbit")

Progress = Callable[[int, int, str], None]
Json = dict[str, object]
Read = Callable[[SourceModule], ReadModule]

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file, and what it is made of: modules (all experts of a stack) or a vector."""

    name: str
    type: str
    shape: tuple[int, ...]
    modules: tuple[SourceModule, ...] = ()
    suffix: str = "weight"
    vector: SourceVector | None = None
    made: Tensor | None = None
    also: str = ""  # what it is to a reader beside its module

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        kind = GGUF_TYPES_BY_NAME[self.type]
        return (*self.shape[:-1], self.shape[-1] // kind.weights * kind.bytes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.bytes_shape)


def require_gguf() -> None:
    """E0451 where the gguf package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LowbitError(
            "E0451",
            "GGUF files are written by the gguf package, which is not installed: pip install 'lowbit[gguf]'",
        ) from None


@dataclass
class SavedGguf:
    """What was written. ``notes``: what is lost on the way, for people; ``resumed``: tensors that an earlier
    run had finished."""

    notes: list[str] = field(default_factory=list)
    resumed: int = 0


def save_gguf(
    out: Path,
    source: SourceModel,
    schemes: Mapping[str, Scheme],
    read: Read,
    data: TensorData,
    *,
    depends_on: Mapping[str, str],
    force: bool = False,
    on_progress: Progress | None = None,
    check: Callable[[Path, Mapping[str, Json], list[str]], None] | None = None,
) -> SavedGguf:
    """Write the model to the file ``out``.

    ``schemes``: of every module by its target's stored name; ``read`` gives a module in that scheme.
    ``depends_on``: what an unfinished file can be gone on with under, beside its own header.
    ``check``: called with the complete file, before it gets its name, what is told of each module, and what
    was lost.
    """
    require_gguf()
    import gguf

    if out.suffix != ".gguf":
        raise LowbitError("E0104", f"--out {out}: a GGUF model is one file; name it {out.name}.gguf")
    entries = _Plan(source, schemes).entries()
    with explained(out):
        head = _head(source, entries)
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    places = places_after(len(head), [(entry.name, entry.nbytes) for entry in entries], alignment)
    key = {**depends_on, "GGUF header": hashlib.sha256(head).hexdigest()[:16]}
    journal = FileJournal(key, name=out.name, places=places)
    with output_file(out, force=force, source=source.header.root, journal=journal) as path:
        if journal.discarded:
            _log.warning("lowbit: %s", journal.discarded)
        resumed, told = len(journal.lines), journal.parts
        total = len(head) + sum(entry.nbytes for entry in entries)
        done = sum(line.nbytes for line in journal.lines)
        check_room(out, total - done + (32 << 20))
        contents = _Contents(source, schemes, read, data, told)
        with explained(out):
            file = TensorFile(path, head, journal, alignment)
            try:
                for entry in entries[resumed:]:
                    tensor = contents.of(entry).numpy().data
                    file.add(tensor, contents.untold())
                    done += entry.nbytes
                    if on_progress is not None:
                        on_progress(done, total, "converting")
            finally:
                file.close()
        notes = _verified(source, path)
        towers = sum(isinstance(part, SourceVector) and part.beside for part in source.parts)
        if towers:
            notes.append(
                f"{towers} tensors of vision or audio were left out: llama.cpp has an mmproj file for them"
            )
        if check is not None:
            check(path, told, notes)
        return SavedGguf(notes, resumed)


def _head(source: SourceModel, entries: list[_Entry]) -> bytes:
    """The file up to its first tensor: metadata, and each tensor's name, type, shape and place."""
    import gguf

    arch = architecture_for(source.family.name, source.header)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        made = gguf.GGUFWriter(path, arch)
        for key, value in _metadata(source, entries).items():
            _add(made, key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.type]
            made.add_tensor_info(entry.name, entry.bytes_shape, np.dtype(np.uint8), entry.nbytes, kind)
        made.add_size_label(gguf.size_label(*made.get_total_parameter_count()))
        made.write_header_to_file()
        made.write_kv_data_to_file()
        made.write_ti_data_to_file()
        made.close()
        return path.read_bytes()


def _metadata(source: SourceModel, entries: list[_Entry]) -> dict[str, object]:
    config, types = source.config, [entry.type for entry in entries if len(entry.shape) > 1]
    common = max(set(types), key=types.count)
    file_types = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
    file_types |= {
        "Q2_K": 10,
        "Q3_K": 12,
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
        "IQ4_NL": 25,
        "IQ3_S": 26,
        "IQ4_XS": 30,
    }
    file_types |= {"TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39}
    name = source.header.config.get("_name_or_path") or source.header.root.name.removesuffix(".gguf")
    return {
        "general.type": "model",
        "general.name": str(name),
        "general.file_type": file_types.get(common, 1024),  # 1024: to be guessed from the tensors
        "general.quantization_version": 2,
        **gguf_metadata(source.header, source.family.name, config),
        **tokenizer_metadata(source.tokenizer, config.vocab_size),
    }


def _add(made: gguf.GGUFWriter, key: str, value: object) -> None:
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    if isinstance(value, list):
        inner = {int: Kind.INT32, **kinds}[type(value[0])] if value else Kind.STRING
        inner = Kind.INT32 if inner is Kind.UINT32 else inner
        made.add_key_value(key, value, Kind.ARRAY, inner)
    else:
        made.add_key_value(key, value, kinds[type(value)])


class _Plan:
    """The tensors of the file, in order."""

    def __init__(self, source: SourceModel, schemes: Mapping[str, Scheme]) -> None:
        self.source, self.schemes = source, schemes
        self.names = source.family.gguf_names

    def entries(self) -> list[_Entry]:
        found: list[_Entry] = []
        family = self.source.family.name
        stacks: dict[str, list[SourceModule]] = {}
        for part in self.source.parts:
            if isinstance(part, SourceVector):
                found += [] if part.beside else [self._vector(part)]
                continue
            expert = _EXPERT.fullmatch(part.place.part.name)
            if expert is None:
                found += self._module(part)
            else:
                stacks.setdefault(f"{expert[1]}.{expert[3]}", []).append(part)
        for canonical, modules in stacks.items():
            found += self._stack(canonical, modules)
        if self.source.config.tied_head and architecture_for(family, self.source.header) in WITH_OWN_HEAD:
            embedding = next(entry for entry in found if entry.name == "token_embd.weight")
            found.append(replace(embedding, name="output.weight", also="lm_head"))
        made = rope_tensors(self.source.header, self.source.config)
        return [_Entry(n, "F32", tuple(t.shape), made=t.float()) for n, t in made.items()] + found

    def _stored(self, canonical: str) -> str:
        stored = self._named(canonical)
        rotated = self.source.family.gguf_rotates_pairs and canonical.endswith(".qkv_proj")
        if stored is None or rotated:
            raise LowbitError(
                "E0450",
                f"{self.source.header.root.name}: GGUF files of {self.source.family.name} have no name for "
                f"{canonical!r}; use llama.cpp's convert_hf_to_gguf.py",
            )
        return stored

    def _named(self, canonical: str) -> str | None:
        """What GGUF files of the family call it."""
        number = re.search(r"\.(\d+)\.", canonical)
        general = canonical if number is None else canonical.replace(number[0], ".{n}.", 1)
        stored = self.names.get(general)
        return stored if stored is None or number is None else stored.format(n=number[1])

    def _vector(self, part: SourceVector) -> _Entry:
        stem, _, suffix = part.name.rpartition(".")
        shape = self.source.header.tensors[part.stored].shape
        shape = (1 + len(part.more), *shape) if part.more else shape
        whole = self._named(part.name)
        return _Entry(whole or f"{self._stored(stem)}.{suffix}", "F32", shape, vector=part)

    def _module(self, part: SourceModule) -> list[_Entry]:
        scheme, stem = self.schemes[part.target.stored], self._stored(part.place.part.name)
        shape: tuple[int, ...] = part.target.shape
        if part.latent is not None:
            shape = (part.latent.heads, shape[0] // part.latent.heads, shape[1])
        found = [_Entry(f"{stem}.weight", type_of(scheme), shape, (part,))]
        if found[0].type == "NVFP4":
            found.append(_Entry(f"{stem}.scale", "F32", (1,), (part,), "scale"))
        if self._has_bias(part):
            found.append(_Entry(f"{stem}.bias", "F32", part.target.shape[:1], (part,), "bias"))
        return found

    def _stack(self, canonical: str, modules: list[SourceModule]) -> list[_Entry]:
        types = {type_of(self.schemes[module.target.stored]) for module in modules}
        if len(types) != 1:
            raise LowbitError(
                "E0450",
                f"--format gguf: the experts of {canonical} are {' and '.join(sorted(types))}; a stack is "
                "of one type",
            )
        kind, stem = types.pop(), self._stored(canonical)
        members = tuple(modules)
        found = [_Entry(f"{stem}.weight", kind, (len(members), *modules[0].target.shape), members)]
        if kind == "NVFP4":
            found.append(_Entry(f"{stem}.scale", "F32", (len(members),), members, "scale"))
        if self._has_bias(modules[0]):
            shape = (len(members), modules[0].target.shape[0])
            found.append(_Entry(f"{stem}.bias", "F32", shape, members, "bias"))
        return found

    def _has_bias(self, part: SourceModule) -> bool:
        return any(name.endswith("bias") for name in self.source.form.tensors_of(part.place.module))


class _Contents:
    """The bytes of the file's tensors, each module read when it is written. ``told``: by target, what goes
    on record of the modules that were read."""

    def __init__(
        self,
        source: SourceModel,
        schemes: Mapping[str, Scheme],
        read: Read,
        data: TensorData,
        told: dict[str, Json],
    ) -> None:
        self.source, self.read, self.data, self.told = source, read, data, told
        self._untold: list[str] = []
        self.writer = GgufWriter(schemes)
        self._last: tuple[SourceModule, dict[str, Tensor]] | None = None

    def of(self, entry: _Entry) -> Tensor:
        """uint8 of the entry's ``bytes_shape``."""
        if entry.made is not None:
            tensor = entry.made
        elif entry.vector is not None:
            tensor = self._vector(entry.vector)
        elif len(entry.modules) == 1 and len(entry.shape) < 3:
            tensor = self._tensors(entry.modules[0])[entry.suffix]
            if entry.also:
                told = self.told.get(entry.modules[0].target.name)
                if told is not None:
                    self.told[entry.also] = {**told, "name": entry.also}
                    self._untold.append(entry.also)
        else:
            parts = [self._tensors(module)[entry.suffix] for module in entry.modules]
            tensor = torch.cat(parts) if entry.suffix == "scale" else torch.stack(parts)
        if entry.type == "F32":
            tensor = tensor.float()
        return tensor.contiguous().view(torch.uint8).reshape(entry.bytes_shape)

    def untold(self) -> dict[str, Json]:
        """What was told since this was asked last."""
        found = {name: self.told[name] for name in self._untold}
        self._untold = []
        return found

    def _vector(self, part: SourceVector) -> Tensor:
        shifted = self.source.family.name in SHIFTED_NORMS and part.name.endswith("norm.weight")
        return self.source.read_vector(part, self.data).float() + (1.0 if shifted else 0.0)

    def _tensors(self, part: SourceModule) -> dict[str, Tensor]:
        if self._last is None or self._last[0] is not part:
            found = self.read(part)
            if found.told:
                self.told[found.target.name] = found.told
                self._untold.append(found.target.name)
            weight, bias = found.weight, found.bias
            order = pairs(part.place.part) if self.source.family.gguf_rotates_pairs else None
            if part.place.groups:
                order = row_order(part.place, self.source.header)
            if order is not None:
                weight = weight.permute_rows(order)
                bias = None if bias is None else bias[order]
            single = replace(found.target, transposed=False, expert=None)  # stacked, if at all, by ``of``
            written = self.writer.write(single, weight, bias, found.input)
            stem = single.tensor("")
            self._last = part, {name.removeprefix(stem): tensor for name, tensor in written.items()}
        return self._last[1]


def pairs(part: Part) -> Tensor | None:
    """int64 (out,): the model's row that each row of the file is, where heads are stored as rotary pairs."""
    rows, heads = part.shape[0], part.rotary_heads
    if not heads:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def _verified(source: SourceModel, path: Path) -> list[str]:
    """Read the file's config back: what is not as it was."""
    header = read_gguf_header(path)
    try:
        found = family_of(header).read_config(header)
    except LowbitError as error:
        raise LowbitError(
            "E0450",
            f"{source.header.root.name}: GGUF metadata of {source.family.name} cannot say what it is "
            f"({error.message}); use llama.cpp's convert_hf_to_gguf.py",
        ) from None
    missing = lost(source.config, found)
    notes = []
    if "windows" in missing and source.family.name in UNSAID_WINDOWS:
        missing.remove("windows")
        notes.append(
            f"the sliding window of {max(source.config.windows)} tokens was left out: GGUF files of "
            f"{source.family.name} have no key for it"
        )
    if missing:
        raise LowbitError(
            "E0450",
            f"{source.header.root.name}: GGUF metadata of {source.family.name} cannot say its "
            f"{', '.join(missing)}; use llama.cpp's convert_hf_to_gguf.py",
        )
    return notes
