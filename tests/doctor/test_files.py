"""Files and index: each fault is found though the others' files are read, and the index can be made anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import tiny
from doctor.helpers import checked, dense, edit, fixed, gguf, only, rules, sharded
from lowbit.checkpoint import open_checkpoint

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def test_sound_checkpoints_give_nothing(tmp_path: Path) -> None:
    assert rules(dense(tmp_path / "one")) == []
    assert rules(sharded(tmp_path / "many")) == []
    assert rules(gguf(tmp_path / "model.gguf")) == []


def test_a_truncated_file(tmp_path: Path) -> None:
    file = dense(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = checked(tmp_path)
    [finding] = [f for f in found.report.findings if f.rule == "D001"]
    assert (finding.file, finding.severity) == ("model.safetensors", "error")
    assert "incomplete download" in finding.message and not found.can_fix


def test_a_damaged_gguf(tmp_path: Path) -> None:
    file = gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:200])
    assert rules(file) == ["D001"]


@pytest.mark.parametrize("what", ["config.json", "model.safetensors"])
def test_files_that_are_not_there(what: str, tmp_path: Path) -> None:
    (dense(tmp_path) / what).unlink()
    assert rules(tmp_path) == ["D001"]


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (dense(tmp_path) / "config.json").write_text('{"a": 1, "a": 2}')
    assert "is there twice" in only(tmp_path, "D001")


def test_one_bad_shard_does_not_hide_another(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0] = torch.nan

    edit(tmp_path, spoil, "model-00001-of-00003.safetensors")
    assert rules(tmp_path) == ["D001", "D002", "D201"], "and no tensor is called missing"


def test_a_missing_shard_names_its_tensors(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    message = only(tmp_path, "D002")
    assert message.startswith(f"{SECOND} is missing") and "for 4 tensors" in message


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../x.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "D001" in rules(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    first = load_file(tmp_path / "model-00001-of-00003.safetensors")
    name = next(iter(first))
    edit(tmp_path, lambda tensors: tensors.update({name: first[name]}), SECOND)
    found = checked(tmp_path)
    assert "D003" in {f.rule for f in found.report.findings} and not found.can_fix


def spoilt_index(folder: Path, kind: str) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"]
    if kind == "nowhere":
        weight_map["model.layers.0.self_attn.q_proj.bias"] = SECOND
    elif kind == "elsewhere":
        weight_map["model.norm.weight"] = next(
            shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"]
        )
    elif kind == "unlisted":
        del weight_map["model.norm.weight"]
    elif kind == "left over":
        index["weight_map"] = {"model.norm.weight": "model-00001-of-00009.safetensors"}
    elif kind == "shape":
        index["weight_map"] = ["no", "object"]
    (folder / INDEX).write_text("{" if kind == "json" else json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nowhere", "that no shard holds, in model-00002-of-00003.safetensors: 1, first"),
        ("elsewhere", "that another shard holds: 1, first 'model.norm.weight'"),
        ("unlisted", "that are not in model.safetensors.index.json: 1, first 'model.norm.weight'"),
        ("left over", "names no file that is there; it was left over"),
        ("shape", "must map tensor names to file names"),
        ("json", "is no valid JSON"),
    ],
)
def test_index_against_shards(kind: str, words: str, tmp_path: Path) -> None:
    spoilt_index(tmp_path / "in", kind)
    assert words in only(tmp_path / "in", "D004")
    copy = fixed(tmp_path / "in", tmp_path / "out")
    weight_map = json.loads((copy / INDEX).read_text())["weight_map"]
    assert set(weight_map) == set(tiny.shapes()) == set(open_checkpoint(str(copy)).tensors)
    for file in set(weight_map.values()):
        assert (copy / file).read_bytes() == (tmp_path / "in" / file).read_bytes()


def test_a_stray_shard_is_neither_read_nor_copied(tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    save_file({"x": torch.zeros(1)}, tmp_path / "in" / "model-00004-of-00004.safetensors")
    assert "model-00004-of-00004.safetensors is called like a shard" in only(tmp_path / "in", "D005")


def test_a_file_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = dense(tmp_path) / "model.safetensors"

    def cut(*arguments: object) -> None:
        file.write_bytes(file.read_bytes()[:20000])

    monkeypatch.setattr("lowbit.doctor.config_rules.check_dtype", cut)
    found = checked(tmp_path)
    assert {f.rule for f in found.report.findings} == {"D001"} and not found.can_fix
    assert "it was changed while it was read" in found.report.findings[0].message
