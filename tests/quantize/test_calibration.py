"""Calibration text and what is remembered of inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.quantize.calibrated import options_of
from lowbit.quantize.calibration import (
    InputStatistics,
    built_in_texts,
    calibration_sequences,
    read_texts,
    token_sequences,
)
from lowbit.quantize.method import Module, build_method
from lowbit.quantize.specification import parse_method


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_built_in_text_is_there_and_varied() -> None:
    texts = built_in_texts()
    words = texts[0].split()
    assert len(words) > 3000
    assert all(mark in texts[0] for mark in ("def ", "SELECT", "theorem", '"id"', "#include", "Assistant:"))
    assert sum(map(len, texts)) > 100_000, "Python's language reference comes with it"


def test_sequences_are_spread_over_all_the_text() -> None:
    text = "".join(chr(256 + n) for n in range(1000))
    found = token_sequences(letters, [text[:700], text[700:]], count=4, length=100)
    assert [sequence[0] - 256 for sequence in found] == [0, 250, 500, 750]
    assert all(sequence == list(range(sequence[0], sequence[0] + 100)) for sequence in found)
    assert found == token_sequences(letters, [text], count=4, length=100)


def test_every_sequence_begins_as_the_model_expects() -> None:
    """With BOS where the tokenizer puts one, and no longer for it."""
    found = token_sequences(letters, ["ab" * 100, "cd" * 100], count=4, length=50, first=2)
    assert [len(sequence) for sequence in found] == [50] * 4
    assert all(sequence[0] == 2 and 2 not in sequence[1:] for sequence in found)
    assert found[0][1:] == letters("ab" * 24 + "a")


def test_short_text_gives_fewer_sequences_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert [len(s) for s in token_sequences(letters, ["x" * 250], count=9, length=100)] == [100, 100]
    assert "2 sequences of 100 tokens, 9 were asked for" in caplog.text
    with pytest.raises(LowbitError, match="99 tokens, one sequence is 100") as caught:
        token_sequences(letters, ["x" * 99], length=100)
    assert caught.value.code == "E0441"


def test_a_file_replaces_the_built_in_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    found = calibration_sequences(letters, tmp_path / "a.txt", count=2, length=100, context_length=3)
    assert found == [letters("abc"), letters("def")]
    built_in = calibration_sequences(letters, count=3, length=50)
    assert built_in[0] == letters(built_in_texts()[0][:50]) and len(built_in) == 3


def test_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo é", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo é"]
    lines = [json.dumps({"text": text, "source": 1}) for text in ("first\nline", "second")]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines))
    assert read_texts(tmp_path / "b.jsonl") == ["first\nline", "second"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", b"text", r"\.txt or \.jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "line 2 has no string"),
        ("a.jsonl", b'["text"]', "line 1 has no string"),
        ("a.jsonl", b"plain text", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LowbitError, match=says) as caught:
        read_texts(tmp_path / name)
    assert caught.value.code == "E0441"
    assert name in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("chunks", [(100,), (1,) * 100, (7, 50, 0, 43), (99, 1)])
def test_the_sample_does_not_depend_on_how_inputs_come(chunks: tuple[int, ...]) -> None:
    """100 inputs, at most 16 kept: every eighth."""
    x = torch.arange(100.0)[:, None] * torch.tensor([1.0, -2.0])
    statistics = InputStatistics(2, gram=True, sample_rows=16)
    for part in x.split(chunks):
        statistics.add(part)
    assert statistics.tokens == 100
    assert torch.equal(statistics.sample, x[::8])
    assert statistics.gram is not None
    assert torch.allclose(statistics.gram, x.T @ x)
    assert torch.allclose(statistics.magnitude, x.abs().mean(0))


def test_the_names_of_the_flag() -> None:
    """awq_marlin and gptq_marlin are the same numerics; marlin is int4, symmetric, in groups of 128."""
    said = {name: options_of(parse_method(name)) for name in ("gptq", "gptq_marlin", "awq", "awq_marlin")}
    assert said["gptq"] == said["gptq_marlin"] and said["awq"] == said["awq_marlin"]
    assert (said["gptq"].method, said["gptq"].symmetric, said["gptq"].group_size) == ("gptq", True, None)
    assert (said["awq"].method, said["awq"].symmetric) == ("awq", False)
    marlin = options_of(parse_method("marlin"))
    assert (marlin.method, marlin.bits, marlin.symmetric, marlin.group_size) == ("gptq", 4, True, 128)
    assert options_of(parse_method("gptq:group_size=-1,bits=8")).group_size == -1


@pytest.mark.parametrize(
    ("method", "shape", "fits"),
    [
        ("awq", (24, 64), True),
        ("awq", (12, 64), False),  # a word of AWQ's has eight rows
        ("awq", (24, 84), True),
        ("gptq", (24, 64), True),
        ("gptq", (12, 64), False),
        ("gptq", (24, 84), False),
    ],
)
def test_codes_fill_whole_words(method: str, shape: tuple[int, int], fits: bool) -> None:
    reason = build_method(parse_method(method)).refuses(Module("m", shape))
    assert (reason is None) == fits, reason
