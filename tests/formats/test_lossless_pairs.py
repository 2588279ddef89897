"""The pairs of docs/formats.md, one by one: written, read back, on record as exact; all others refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from formats.lossless import TARGETS, models, pairs
from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.errors import LowbitError
from lowbit.loading.convert import Work, convert

TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}  # the fixtures have none
ALL = sorted({(source.form.name, form) for source in models().values() for form in TARGETS})


@pytest.fixture(autouse=True)
def own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.loading.gguf_saving.tokenizer_metadata", lambda header, rows: TOKENS)


def output(form: str, folder: Path) -> Path:
    return folder / ("out.gguf" if form == "gguf" else "out")


# Which pairs there are takes seconds to find out: not while tests are collected, by every worker.
@pytest.mark.parametrize(("name", "form"), ALL, ids=lambda text: text)
def test_pair(name: str, form: str, tmp_path: Path) -> None:
    """The smallest fixture of a pair: read by the target's own reader, its numbers are the source's."""
    if (name, form) not in pairs():
        is_refused(name, form, tmp_path)
        return
    source = models()[min(pairs()[name, form], key=lambda path: models()[path].header.nbytes)]
    out = output(form, tmp_path)
    done = convert(source.header, form, out)
    assert not done.errors
    place = out.with_name(f"{out.name}.{CERTIFICATE}") if form == "gguf" else out / CERTIFICATE
    told = json.loads(place.read_text())
    assert told["exact"] and told["result"]["format"] == form
    written = source.for_gguf() if form == "gguf" else Work(source, form, None, None).source
    assert set(told["modules"]) == {module.place.part.name for module in written.modules}


def is_refused(name: str, form: str, tmp_path: Path) -> None:
    source = next(model for model in models().values() if model.form.name == name)
    with pytest.raises(LowbitError) as caught:
        convert(source.header, form, output(form, tmp_path))
    assert caught.value.code == "E0450", caught.value.message
    assert not list(tmp_path.iterdir())


def test_there_are_enough() -> None:
    """The pairs a person looks for first."""
    wanted = {
        ("gptq", "compressed-tensors"),
        ("awq", "compressed-tensors"),
        ("awq", "gptq"),
        ("gptq", "awq"),
        ("gptq", "gguf"),
        ("gguf", "gptq"),
        ("compressed-tensors", "modelopt"),
        ("modelopt", "compressed-tensors"),
        ("fp8", "compressed-tensors"),
        ("compressed-tensors", "fp8"),
        ("torchao", "gptq"),
        ("mxfp4", "mxfp4"),
        ("mxfp4", "gguf"),
        ("gguf", "mxfp4"),
    }
    assert wanted <= set(pairs())
