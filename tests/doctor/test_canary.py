"""D401 to D405: the language canary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from doctor.helpers import add_tokenizer, dense, edit
from lowbit.checkpoint.embedded import embedded_model
from lowbit.doctor import Report, examine
from lowbit.doctor.rules import Finding


def canaries(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.rule.startswith("D4")]


def test_the_embedded_model_speaks_english() -> None:
    [finding] = canaries(examine(embedded_model()).report)
    assert finding.rule == "D401" and finding.severity == "note"
    perplexity = float(finding.message.split("perplexity ")[1].split(" ")[0])
    assert 5 < perplexity < 40


def test_a_random_model_is_no_worse_than_told(tmp_path: Path) -> None:
    [finding] = canaries(examine(dense(tmp_path)).report)
    assert finding.rule in ("D401", "D402")


def test_worse_than_guessing(tmp_path: Path) -> None:
    """A head whose logits are huge: sure of the wrong words."""
    folder = dense(tmp_path)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * 1e4}))
    [finding] = canaries(examine(folder).report)
    assert finding.rule == "D402" and finding.severity == "warning"


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    edit(folder, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    assert [finding.rule for finding in canaries(examine(folder).report)] == ["D404"]


def test_without_a_tokenizer_it_is_not_tried(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    (folder / "tokenizer.json").unlink()
    [finding] = canaries(examine(folder).report)
    assert finding.rule == "D403" and "no tokenizer" in finding.message


def test_errors_before_keep_it_from_loading(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    [finding] = canaries(examine(folder).report)
    assert finding.rule == "D403" and "errors" in finding.message


def test_too_large_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.doctor.canary.free_memory", lambda device: 1 << 20)
    [finding] = canaries(examine(dense(tmp_path)).report)
    assert finding.rule == "D403" and "free" in finding.message


def test_a_model_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.errors import LowbitError

    def fails(*args: object, **more: object) -> None:
        raise LowbitError("E0705", "kernels disagree")

    monkeypatch.setattr("lowbit.doctor.canary.load_model", fails)
    [finding] = canaries(examine(dense(tmp_path)).report)
    assert finding.rule == "D405" and "disagree" in finding.message


def test_a_tokenizer_that_makes_too_little(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    add_tokenizer(folder, 1)  # [UNK] for every word still makes a token each
    assert {finding.rule for finding in canaries(examine(folder).report)} <= {"D401", "D402"}
