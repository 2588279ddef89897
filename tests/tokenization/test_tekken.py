"""tekken.json: the ids that joining by rank gives, special tokens, and what is refused."""

from __future__ import annotations

import base64
import copy
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization import load_tokenizer
from lowbit.tokenization.pretokenizers import TEKKEN

TEXT = "the theme of this thesis: there, then, these 123 theses — naïve café 日本日 🙂🙂 \n\n  the\tend"


def tokens_of(text: str, count: int) -> list[bytes]:
    """Bytes, then the most frequent pairs, as training would find them."""
    tokens = [bytes([n]) for n in range(256)]
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(TEKKEN, text * 3)]
    while len(tokens) < count:
        pairs: dict[bytes, int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[b"".join(pair)] = pairs.get(b"".join(pair), 0) + 1
        best = max(sorted(pair for pair in pairs if pair not in tokens), key=lambda pair: pairs[pair])
        tokens.append(best)
        words = [joined(word, {best: 0}) for word in words]
    return tokens


def joined(word: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Join the neighbours of the lowest rank, the first of them, until none is left."""
    word = list(word)
    while True:
        found = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(word)) if a + b in ranks]
        if not found:
            return word
        _, at = min(found)
        word[at : at + 2] = [word[at] + word[at + 1]]


def tekken(tokens: list[bytes], special: int = 20) -> dict:
    vocab = [{"rank": n, "token_bytes": base64.b64encode(t).decode()} for n, t in enumerate(tokens)]
    config = {"pattern": TEKKEN, "default_vocab_size": len(tokens) - 3 + special, "version": "v3"}
    return {"config": config | {"default_num_special_tokens": special}, "vocab": vocab}


@pytest.fixture(scope="module")
def values() -> dict:
    return tekken(tokens_of(TEXT, 300))


def loaded(folder: Path, values: dict):
    (folder / "tekken.json").write_text(json.dumps(values))
    return load_tokenizer(CheckpointHeader(folder, "safetensors", {}))


def test_ids_are_those_of_joining_by_rank(values: dict, tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, values)
    count = values["config"]["default_vocab_size"] - 20
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in values["vocab"][:count]}
    generator = random.Random(3)
    texts = [TEXT, *("".join(generator.choices(TEXT, k=60)) for _ in range(40))]
    for text in texts:
        wanted = []
        for word in regex.findall(TEKKEN, text):
            pieces = [bytes([b]) for b in word.encode()]
            whole = [word.encode()] if word.encode() in ranks else joined(pieces, ranks)
            wanted += [20 + ranks[piece] for piece in whole]
        assert tokenizer.encode(text, add_special=False) == wanted, text
        assert tokenizer.decode(wanted) == text
    assert max(ranks.values()) == count - 1  # ranks beyond the vocabulary's size do not count


def test_special_tokens(values: dict, tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, values)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and 2 in tokenizer.stop_ids
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("[INST]x", add_special=False)[0] == 3
    listed = copy.deepcopy(values)
    listed["special_tokens"] = [{"rank": 5, "token_str": "[THINK]", "is_control": True}]
    assert loaded(tmp_path, listed).encode("[THINK]", add_special=False) == [5]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("config"),
        lambda v: v["config"].update(pattern=3),
        lambda v: v["config"].update(pattern="x" * 5000),
        lambda v: v["config"].update(default_vocab_size=2**40),
        lambda v: v["config"].update(default_num_special_tokens="20"),
        lambda v: v["vocab"].pop(),
        lambda v: v.update(vocab={}),
        lambda v: v["vocab"].__setitem__(7, {"rank": 7}),
        lambda v: v["vocab"][7].update(rank=8),
        lambda v: v["vocab"][7].update(token_bytes="***"),
        lambda v: v["vocab"][7].update(token_bytes=v["vocab"][8]["token_bytes"]),
        lambda v: v["vocab"].__setitem__(7, None),
        lambda v: v.update(special_tokens=[{"rank": 99, "token_str": "x"}]),
        lambda v: v.update(special_tokens=[3]),
    ],
)
def test_refused(change, values: dict, tmp_path: Path) -> None:
    damaged = copy.deepcopy(values)
    damaged["vocab"] = damaged["vocab"][: damaged["config"]["default_vocab_size"] - 20]
    change(damaged)
    with pytest.raises(LowbitError) as caught:
        loaded(tmp_path, damaged)
    assert caught.value.code == "E0254" and "tekken.json" in str(caught.value)
    assert "\n" not in str(caught.value)
