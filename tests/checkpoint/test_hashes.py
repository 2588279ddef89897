"""One flipped bit anywhere is seen where a hash is known."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from checkpoint.tiny import write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.hashes import check_hash, expected_hashes
from lowbit.errors import LowbitError


def sums(folder: Path) -> str:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.name != "SHA256SUMS"
    ]
    return "".join(lines)


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit(seed: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "SHA256SUMS").write_text(sums(folder))
    header = open_checkpoint(str(folder))
    known = expected_hashes(header)
    assert set(known) == {path for path in folder.iterdir() if path.name != "SHA256SUMS"}
    for file, expected in known.items():
        check_hash(file, expected)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    place = random.Random(seed).randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    with pytest.raises(LowbitError) as caught:
        check_hash(file, known[file])
    assert caught.value.code == "E0206" and "model.safetensors" in str(caught.value)


def test_the_hubs_cache_names_its_blobs(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "snapshot")
    file = folder / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    assert expected_hashes(open_checkpoint(str(folder))) == {file: digest}


@pytest.mark.parametrize(("text", "code"), [("nonsense\n", "E0227"), (f"{'0' * 64}  ../x\n", "E0208")])
def test_bad_manifests(text: str, code: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(LowbitError) as caught:
        expected_hashes(open_checkpoint(str(folder)))
    assert caught.value.code == code


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  gone.safetensors\n")
    [(file, expected)] = expected_hashes(open_checkpoint(str(folder))).items()
    with pytest.raises(LowbitError, match="missing"):
        check_hash(file, expected)
