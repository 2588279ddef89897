"""The journal of an output that is written piece by piece: what a run that was broken off left finished.

    OUT.partial/journal.jsonl     {"key": {"source": "…", "--format": "gptq", …}}
                                  {"shard": "model-00001.safetensors.tmp", "bytes": …, "sha256": "…",
                                   "parts": {"model.layers.0.…": what is known of it, …}, "learned": {…}}
    and of one file of tensors    {"tensor": "blk.0.attn_q.weight", "offset": …, "bytes": …, …}

A line is written when a shard and all before it are on the disk, or a tensor and all before it are in the
file. The next run with the same key keeps what still has those bytes and makes the rest, so that the result
has the bytes it would have had. Shards of another key are refused (E0304), naming what differs; a file of
another key is begun anew (``FileJournal.discarded`` says why).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from lowbit.errors import LowbitError, printable

JOURNAL = "journal.jsonl"
_PIECE = 8 << 20
_NUMBER = re.compile(r"model-(\d+)\.safetensors\.tmp")

Json = dict[str, object]


@dataclass(frozen=True)
class Line:
    """A finished shard, or a tensor at ``offset`` of a file. ``parts``: what lies wholly in it and those
    before it, and was not listed yet."""

    name: str
    nbytes: int
    sha256: str
    parts: dict[str, Json]
    learned: dict[str, float]
    offset: int | None = None


@dataclass
class Journal:
    """``key``: what the output depends on, by the name a person knows it by."""

    key: Mapping[str, str]
    lines: list[Line] = field(default_factory=list)
    file: Path | None = None

    pieces: ClassVar[str] = "shards"  # what the lines are of, for people

    def open(self, partial: Path) -> None:
        """Take over what an equal run left in the folder; E0304 where it is another's."""
        self.file = partial / JOURNAL
        self.lines = []
        found = _read(self.file)
        if found:
            changes = self._changes(found[0].get("key"))
            if changes:
                self._another(partial, changes)
            else:
                self.lines = self._finished(partial, found[1:])
        told = [json.dumps({"key": dict(self.key)})] + [_text(line) for line in self.lines]
        temporary = partial / f"{JOURNAL}.tmp"
        with open(temporary, "w") as file:
            file.write("".join(f"{line}\n" for line in told))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.file)

    def _changes(self, other: object) -> str:
        """What differs from another key, "" where nothing does."""
        before = other if isinstance(other, dict) else {}
        names = [name for name in {**before, **self.key} if before.get(name) != self.key.get(name)]
        return ", ".join(_change(name, before.get(name), self.key.get(name)) for name in names)

    def _another(self, partial: Path, changes: str) -> None:
        raise LowbitError(
            "E0304",
            f"{printable(partial)} is an unfinished output of a run with another {changes}; run it as it "
            "was to go on, or delete that folder to begin anew",
        )

    def _finished(self, partial: Path, told: list[Json]) -> list[Line]:
        """The shards that are still what the journal says, up to the first that is not."""
        found = []
        for number, line in enumerate(_lines(told, "shard"), 1):
            match = _NUMBER.fullmatch(line.name)
            if match is None or int(match[1]) != number:
                break
            path = partial / line.name
            for named in (
                *partial.glob(f"model-{number:05}-of-*.safetensors"),
                partial / "model.safetensors",
            ):
                if not path.exists() and named.exists():  # the run was broken off after it was given its name
                    os.rename(named, path)
            if not path.is_file() or path.stat().st_size != line.nbytes or sha256_of(path) != line.sha256:
                break
            found.append(line)
        return found

    @property
    def kept(self) -> set[str]:
        """Names of the files that stay."""
        return {JOURNAL, *(line.name for line in self.lines)}

    @property
    def parts(self) -> dict[str, Json]:
        """Every part that lies in the finished shards."""
        return {name: told for line in self.lines for name, told in line.parts.items()}

    def add(self, shard: Path, parts: dict[str, Json], learned: Mapping[str, float]) -> None:
        """A shard is finished and on the disk."""
        self._append(
            Line(shard.name, shard.stat().st_size, sha256_of(shard), parts, dict(learned)), sync=True
        )

    def _append(self, line: Line, *, sync: bool) -> None:
        assert self.file is not None, "open() comes first"
        with open(self.file, "a") as file:
            file.write(f"{_text(line)}\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self.lines.append(line)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    name: str
    offset: int
    nbytes: int


@dataclass
class FileJournal(Journal):
    """Of one file, ``name`` in the folder, whose tensors come in the order of ``places``.

    Lines are not synced: they are worth what the file's bytes are, and those are hashed again. ``discarded``:
    what an unfinished file was begun anew for.
    """

    name: str = ""
    places: Sequence[Place] = ()
    discarded: str = ""

    pieces: ClassVar[str] = "tensors"

    def _another(self, partial: Path, changes: str) -> None:
        self.discarded = (
            f"{printable(partial)} was unfinished and of a run with another {changes}; begun anew"
        )

    def _finished(self, partial: Path, told: list[Json]) -> list[Line]:
        """The tensors that are still what the journal says, up to the first that is not."""
        found: list[Line] = []
        path = partial / self.name
        if not path.is_file():
            return found
        with open(path, "rb") as file:
            for place, line in zip(self.places, _lines(told, "tensor"), strict=False):
                if (line.name, line.offset, line.nbytes) != (place.name, place.offset, place.nbytes):
                    break
                file.seek(place.offset)
                digest, left = hashlib.sha256(), place.nbytes
                while left and (piece := file.read(min(left, _PIECE))):
                    digest.update(piece)
                    left -= len(piece)
                if left or digest.hexdigest() != line.sha256:
                    break
                found.append(line)
        return found

    @property
    def kept(self) -> set[str]:
        """Names of the files that stay."""
        return {JOURNAL, self.name} if self.lines else {JOURNAL}

    def add_tensor(self, place: Place, data: memoryview, parts: dict[str, Json]) -> None:
        """A tensor is in the file."""
        digest = hashlib.sha256(data).hexdigest()
        self._append(Line(place.name, place.nbytes, digest, parts, {}, place.offset), sync=False)


def _change(name: str, before: object, now: object) -> str:
    short = [printable(str(value)[:12] if name == "source" else value, 60) for value in (before, now)]
    return f"{name} ({short[0]} then, {short[1]} now)"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _text(line: Line) -> str:
    named: Json = {"shard": line.name}
    if line.offset is not None:
        named = {"tensor": line.name, "offset": line.offset}
    return json.dumps(
        named | {"bytes": line.nbytes, "sha256": line.sha256, "parts": line.parts, "learned": line.learned}
    )


def _read(file: Path) -> list[Json]:
    """The lines, up to one that was cut off."""
    found: list[Json] = []
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def _lines(told: list[Json], kind: str) -> list[Line]:
    """Lines of a kind, up to the first that is none."""
    found = []
    for one in told:
        try:
            parts, learned = one["parts"], one["learned"]
            offset = int(str(one["offset"])) if kind == "tensor" else None
            line = Line(str(one[kind]), int(str(one["bytes"])), str(one["sha256"]), {}, {}, offset)
        except (KeyError, ValueError):
            break
        if not isinstance(parts, dict) or not isinstance(learned, dict):
            break
        found.append(replace(line, parts=parts, learned=learned))
    return found
