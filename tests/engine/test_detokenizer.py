"""Incremental detokenization: the pieces are the whole, and nothing is shown that must be taken back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.checkpoint import open_checkpoint
from lowbit.engine.detokenizer import IncrementalDetokenizer
from lowbit.engine.messages import SamplingParams
from lowbit.tokenization import load_tokenizer
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from tokenization.texts import varied_texts


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return load_tokenizer(open_checkpoint("smollm2"))


_CACHE: list[FastTokenizer] = []


def shared() -> FastTokenizer:
    if not _CACHE:
        _CACHE.append(load_tokenizer(open_checkpoint("smollm2")))
    return _CACHE[0]


def run(tokenizer: FastTokenizer, ids: list[int], **options: object) -> tuple[list[str], str | None]:
    """The pieces, and the stop string that ended it."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**options))
    pieces = []
    for token in ids:
        text, matched = detokenizer.add([token])
        pieces.append(text)
        if matched is not None:
            return pieces, matched
    pieces.append(detokenizer.finish())
    return pieces, None


def test_pieces_are_the_whole_text(tokenizer: FastTokenizer) -> None:
    for text in varied_texts(400, seed=11):
        ids = tokenizer.encode(text, parse_special=False)
        pieces, _ = run(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40))
def test_any_tokens_at_all(ids: list[int]) -> None:
    tokenizer = shared()
    pieces, _ = run(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=False)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abc \n€", min_size=1, max_size=40),
    st.lists(st.text(alphabet="abc €", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings(text: str, stops: list[str], include: bool) -> None:
    """Whatever the token borders, the text ends before (or after) the first complete stop string."""
    tokenizer = shared()
    ids = tokenizer.encode(text)
    pieces, matched = run(tokenizer, ids, stop=tuple(stops), include_stop_str_in_output=include)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert matched is None and "".join(pieces) == text
        return
    first_end = min(end for end, _, _ in ends)
    assert matched is not None
    shown = "".join(pieces)
    # A token may complete several stop strings at once; the first to be complete decides.
    best = min((end, start, stop) for end, start, stop in ends if end == first_end)
    assert shown == (text[: best[0]] if include else text[: best[1]])
    assert matched in stops and text[: best[0]].endswith(matched)


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: FastTokenizer) -> None:
    ids = [*tokenizer.encode("a b"), 2]
    assert "".join(run(tokenizer, ids)[0]) == "a b"
    assert "".join(run(tokenizer, ids, skip_special_tokens=False)[0]) == "a b<|im_end|>"


def test_half_a_character_waits(tokenizer: FastTokenizer) -> None:
    ids = tokenizer.encode("𓀀")
    assert len(ids) > 2
    pieces, _ = run(tokenizer, ids)
    assert pieces[: len(ids) - 1] == [""] * (len(ids) - 1) and pieces[len(ids) - 1] == "𓀀"
    cut, _ = run(tokenizer, ids[:-1])
    assert "".join(cut) == tokenizer.decode(ids[:-1])  # the end shows what there is


def test_a_stop_string_that_does_not_count_yet(tokenizer: FastTokenizer) -> None:
    """It is text like any other, also where it is held back as the beginning of a longer one."""
    ids = tokenizer.encode("abcabcd")
    for least in range(len(ids) + 1):
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=("ab", "abcd")))
        text, matched = "", None
        for place, token in enumerate(ids):
            if matched is None:
                fresh, matched = detokenizer.add([token], stops=place >= least)
                text += fresh
        text += detokenizer.finish() if matched is None else ""
        before = tokenizer.decode(ids[:least])
        counts = [end for end in (2, 5, 7) if end > len(before)]
        assert "abcabcd".startswith(text) and (matched is not None) == bool(counts)
        if counts:
            assert text == {2: "", 5: "abc", 7: "abc"}[counts[0]]
        else:
            assert text == "abcabcd"
