"""D006: one flipped bit is found where a hash is known."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from doctor.helpers import dense, edit
from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.doctor import examine
from lowbit.tokenization.chat_template import TOOL_TEMPLATE


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


def test_hashes_of_what_was_corrected_are_left_out_of_the_copy(tmp_path: Path) -> None:
    """A copy without its second head, in a file of other bytes; what was only copied is still known."""
    folder, out = dense(tmp_path / "m", tie_word_embeddings=True), tmp_path / "out"
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    (folder / "additional_chat_templates").mkdir()
    (folder / TOOL_TEMPLATE).write_text("{{ tools }}")
    sums_of = [path for path in folder.iterdir() if path.is_file()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} *{path.name}\n" for path in sums_of]
    (folder / "SHA256SUMS").write_text("".join(["# made by hand\n", *lines]))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    certificate = {"result": {"files": {"model.safetensors": {"sha256": digest}}}}
    (folder / CERTIFICATE).write_text(json.dumps(certificate))
    found = examine(folder, canary=False)
    assert found.can_fix and found.header is not None and not found.report.has("D006")
    found.correction.write(found.header, out)
    again = examine(out, canary=False)
    assert not again.report.findings or not again.report.has("D006"), again.report.findings
    kept = (out / "SHA256SUMS").read_text().splitlines()
    names = {line.rpartition("*")[2] for line in kept[1:]}
    assert "tokenizer.json" in names and "model.safetensors" not in names and kept[0].startswith("#")
    assert not (out / CERTIFICATE).exists() and (out / TOOL_TEMPLATE).read_text() == "{{ tools }}"


def test_a_manifest_of_nonsense(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    (folder / "SHA256SUMS").write_text("nothing\n")
    assert examine(folder, canary=False).report.has("D001")
