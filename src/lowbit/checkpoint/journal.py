"""The journal of an output that is written shard by shard: what a run that was broken off left finished.

    OUT.partial/journal.jsonl     {"key": {"source": "…", "--format": "gptq", …}}
                                  {"shard": "model-00001.safetensors.tmp", "bytes": …, "sha256": "…",
                                   "parts": {"model.layers.0.…": what is known of it, …}, "learned": {…}}

A line is written when a shard and all before it are on the disk. The next run with the same key keeps the
shards whose bytes are still those and makes the rest, so that the result has the bytes it would have had;
another key is refused (E0304), naming what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import LowbitError, printable

JOURNAL = "journal.jsonl"
_PIECE = 8 << 20
_NUMBER = re.compile(r"model-(\d+)\.safetensors\.tmp")

Json = dict[str, object]


@dataclass(frozen=True)
class Line:
    """A finished shard. ``parts``: what lies wholly in it and those before it, and was not listed yet."""

    shard: str
    nbytes: int
    sha256: str
    parts: dict[str, Json]
    learned: dict[str, float]


@dataclass
class Journal:
    """``key``: what the output depends on, by the name a person knows it by."""

    key: Mapping[str, str]
    lines: list[Line] = field(default_factory=list)
    file: Path | None = None

    def open(self, partial: Path) -> None:
        """Take over what an equal run left in the folder; E0304 where it is another's."""
        self.file = partial / JOURNAL
        self.lines = []
        found = _read(self.file)
        if found:
            self._compare(found[0].get("key"), partial)
            self.lines = _finished(partial, found[1:])
        told = [json.dumps({"key": dict(self.key)})] + [_text(line) for line in self.lines]
        temporary = partial / f"{JOURNAL}.tmp"
        with open(temporary, "w") as file:
            file.write("".join(f"{line}\n" for line in told))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.file)

    def _compare(self, other: object, partial: Path) -> None:
        before = other if isinstance(other, dict) else {}
        names = [name for name in {**before, **self.key} if before.get(name) != self.key.get(name)]
        if not names:
            return
        changes = ", ".join(_change(name, before.get(name), self.key.get(name)) for name in names)
        raise LowbitError(
            "E0304",
            f"{printable(partial)} is an unfinished output of a run with another {changes}; run it as it "
            "was to go on, or delete that folder to begin anew",
        )

    @property
    def kept(self) -> set[str]:
        """Names of the files that stay."""
        return {JOURNAL, *(line.shard for line in self.lines)}

    @property
    def parts(self) -> dict[str, Json]:
        """Every part that lies in the finished shards."""
        return {name: told for line in self.lines for name, told in line.parts.items()}

    def add(self, shard: Path, parts: dict[str, Json], learned: Mapping[str, float]) -> None:
        """A shard is finished and on the disk."""
        assert self.file is not None, "open() comes first"
        line = Line(shard.name, shard.stat().st_size, sha256_of(shard), parts, dict(learned))
        with open(self.file, "a") as file:
            file.write(f"{_text(line)}\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)


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
    told = {"shard": line.shard, "bytes": line.nbytes, "sha256": line.sha256}
    return json.dumps(told | {"parts": line.parts, "learned": line.learned})


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


def _finished(partial: Path, lines: list[Json]) -> list[Line]:
    """The shards that are still what the journal says, up to the first that is not."""
    found = []
    for number, told in enumerate(lines, 1):
        try:
            line = Line(
                str(told["shard"]),
                int(str(told["bytes"])),
                str(told["sha256"]),
                told["parts"],  # type: ignore[arg-type]
                told["learned"],  # type: ignore[arg-type]
            )
        except (KeyError, ValueError):
            break
        match = _NUMBER.fullmatch(line.shard)
        if match is None or int(match[1]) != number:
            break
        path = partial / line.shard
        for named in (*partial.glob(f"model-{number:05}-of-*.safetensors"), partial / "model.safetensors"):
            if not path.exists() and named.exists():  # the run was broken off after it was given its name
                os.rename(named, path)
        if not path.is_file() or path.stat().st_size != line.nbytes or sha256_of(path) != line.sha256:
            break
        found.append(line)
    return found
