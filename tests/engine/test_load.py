"""An engine from settings."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from checkpoint.tiny import VOCABULARY, write_folder
from doctor.helpers import add_tokenizer
from lowbit.engine.cuda_graphs import Progress
from lowbit.errors import LowbitError
from lowbit.settings import Settings
from models.family_cases import saved
from models.test_plain_mlp_families import GPT2


def test_a_tokenizer_that_fails_ends_loading_at_once(
    tmp_path: Path, embedded_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read while weights are packed."""
    from lowbit import tokenization
    from lowbit.engine import load as load_module

    failed = threading.Event()
    modules = 0

    def fails(*arguments: object) -> object:
        failed.set()
        raise LowbitError("E0254", "no usable tokenizer")

    def progress(done: int, total: int, what: str) -> None:
        nonlocal modules
        assert failed.wait(10)
        modules += 1
        time.sleep(0.01)

    monkeypatch.setattr(tokenization, "load_tokenizer", fails)
    with pytest.raises(LowbitError, match="no usable tokenizer"):
        load_module.load_engine(Settings(model=str(embedded_path), device="cpu"), progress)
    assert modules < 20, "of 211"


def test_a_tokenizer_of_another_model_ends_loading_at_once(
    tmp_path: Path, embedded_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the weights are there, and so without them where they cannot be read."""
    from lowbit.engine import load as load_module

    add_tokenizer(write_folder(tmp_path), VOCABULARY + 1)
    monkeypatch.setattr(load_module, "load_part", lambda *arguments: _report_until_it_fails(arguments[4]))
    with pytest.raises(LowbitError, match="41 ids but the embedding has 40 rows") as caught:
        load_module.load_engine(Settings(model=str(tmp_path), device="cpu"))
    assert caught.value.code == "E0251"


def _report_until_it_fails(report: Progress) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        report(0, 1, "packing")
        time.sleep(0.01)


def test_tokens_without_a_row_are_served_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lowbit.engine.load import load_engine

    add_tokenizer(write_folder(tmp_path))
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    source["added_tokens"] = [{"id": VOCABULARY, "content": "[PAD]", "special": True, **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with caplog.at_level("INFO", "lowbit"):
        engine = load_engine(Settings(model=str(tmp_path), device="cpu", max_total_tokens=64))
    engine.close()
    assert "the embedding has no row for it: '[PAD]'" in caplog.text


def test_a_context_beyond_the_models_own(embedded_path: Path) -> None:
    from lowbit.engine.load import load_engine

    asked = {"model": str(embedded_path), "device": "cpu", "context_length": 8200, "max_total_tokens": 8224}
    told = "--context-length 8 200 is more than the model's own 8 192"
    with pytest.raises(LowbitError, match=told) as caught:
        load_engine(Settings(**asked, strict=True))
    assert caught.value.code == "E0103"
    engine = load_engine(Settings(**asked))
    try:
        assert engine.ready().details["warning"].startswith(told)
    finally:
        engine.close()


def test_what_is_said_of_dynamic_scaling(tmp_path: Path) -> None:
    from lowbit.checkpoint import open_checkpoint
    from lowbit.engine.load import _beyond_context

    config = json.loads((write_folder(tmp_path) / "config.json").read_text())
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = open_checkpoint(str(tmp_path))
    assert _beyond_context(Settings(model=str(tmp_path), context_length=128), header) == ""
    said = _beyond_context(Settings(model=str(tmp_path), context_length=256), header)
    assert said.endswith(": it computes all positions as dynamic NTK does those of the longest sequence")


def test_learned_positions_end_where_they_end(tmp_path: Path) -> None:
    """The first longer sequence would ask for a row outside the table, and end the engine."""
    from lowbit.engine.load import load_engine

    saved("GPT2", tmp_path, **GPT2)
    own = GPT2["n_positions"]
    told = f"--context-length {own + 1} is more than the model's own {own}, and it has no vectors for later"
    with pytest.raises(LowbitError, match=told) as caught:
        load_engine(Settings(model=str(tmp_path), device="cpu", context_length=own + 1))
    assert caught.value.code == "E0103"
