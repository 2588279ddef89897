"""The command: lines, JSON, exit status, --fix and --rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from doctor.helpers import dense, edit, gptq, quantization_of
from formats.helpers import FIXTURES
from lowbit.cli import main
from lowbit.doctor import RULES, examine


def test_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(dense(tmp_path)), "--no-canary"]) == 0
    assert capsys.readouterr().out.endswith("nothing found\n")


def test_a_line_for_each_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dense(tmp_path)
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    assert main(["check", str(folder), "--no-canary"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error   D201 model.safetensors: tensor 'model.norm.weight'")
    assert lines[-1].endswith(": 1 error")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dense(tmp_path)
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.inf))
    assert main(["check", str(folder), "--json", "--no-canary"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["errors"] == 1 and told["findings"][0]["tensor"] == "model.norm.weight"


def test_fix_writes_a_corrected_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gptq(tmp_path / "in", {"checkpoint_format": "gptq_v2", "sym": True}, sym=True)
    out = tmp_path / "out"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["check", str(folder), "--fix", str(out), "--no-canary"]) == 0
    assert quantization_of(out)["checkpoint_format"] == "gptq"
    assert "fixed" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert main(["check", str(out), "--no-canary"]) == 0
    capsys.readouterr()
    assert main(["check", str(folder), "--fix", str(out), "--no-canary"]) != 0, "nothing is overwritten"
    assert "E0302" in capsys.readouterr().err


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--rules"]) == 0
    text = capsys.readouterr().out
    assert all(number in text for number in RULES)
    assert main(["check", "--rules", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(RULES)


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in FIXTURES.glob("*/*/model.safetensors")),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_what_the_tools_wrote_is_sound(folder: Path) -> None:
    """No false alarm on any fixture but that it has no tokenizer."""
    found = examine(folder, canary=False).report.findings
    assert [f for f in found if f.severity != "note" and f.rule not in ("D120", "D121")] == []
