"""D006: one flipped bit is found where a hash is known."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from doctor.helpers import dense
from lowbit.doctor import examine


def sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in folder.iterdir()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_a_sound_copy_gives_nothing(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    sums(folder)
    assert not examine(folder, canary=False).report.has("D006")


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit(seed: int, tmp_path: Path) -> None:
    folder = dense(tmp_path)
    sums(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    place = len(data) - 1 - random.Random(seed).randrange(len(data) // 2)
    data[place] ^= 1 << seed % 8
    file.write_bytes(data)
    found = [f for f in examine(folder, canary=False).report.findings if f.rule == "D006"]
    assert [f.file for f in found] == ["model.safetensors"] and "sha256" in found[0].message


def test_a_manifest_of_nonsense(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    (folder / "SHA256SUMS").write_text("nothing\n")
    assert examine(folder, canary=False).report.has("D001")
