"""Tokenizer files and templates made wrong: each is refused in one line or keeps working, in bounded time."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoint.tiny import write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.tokenization import check_vocabulary, load_chat_template, load_tokenizer

ROWS = 300
TEXT = "Hello there, 42 worlds! <|user|> naïve café"
WRONG: tuple[object, ...] = (
    None,
    -1,
    0,
    2**31,
    10**12,
    "x",
    [],
    {},
    True,
    1.5,
    [[1, 2]],
    {"type": "Nonsense"},
)


@pytest.fixture(scope="module")
def source() -> dict:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS, special_tokens=["<|user|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello worlds there", "the user says 42 things", TEXT] * 3, trainer)
    return json.loads(tokenizer.to_str())


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    if isinstance(value, dict) and len(value) < 100:
        return [found for key, inner in value.items() for found in leaves(inner, (*path, key))] or [path]
    return [path]


def changed(source: dict, path: tuple, value: object) -> dict:
    made = json.loads(json.dumps(source))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


def outcome(folder: Path, text: str) -> str:
    """ "refused", or "works": it encodes and decodes without another exception, within seconds."""
    write_folder(folder)
    (folder / "tokenizer.json").write_text(text)
    start = time.monotonic()
    try:
        tokenizer = load_tokenizer(open_checkpoint(str(folder)))
        check_vocabulary(tokenizer, ROWS)
        ids = tokenizer.encode(TEXT)
        assert all(0 <= token < ROWS for token in ids)
        tokenizer.decode(ids)
        found = "works"
    except LowbitError as error:
        assert "\n" not in str(error)
        found = "refused"
    assert time.monotonic() - start < 8
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_part_made_wrong(seed: int, source: dict, tmp_path: Path) -> None:
    generator = random.Random(seed)
    path = generator.choice([path for path in leaves(source) if path])
    outcome(tmp_path, json.dumps(changed(source, path, generator.choice(WRONG))))


@pytest.mark.parametrize("seed", range(12))
def test_cut_anywhere(seed: int, source: dict, tmp_path: Path) -> None:
    text = json.dumps(source)
    assert outcome(tmp_path, text[: random.Random(seed).randrange(len(text))]) == "refused"


def test_sound_one_works(source: dict, tmp_path: Path) -> None:
    assert outcome(tmp_path, json.dumps(source)) == "works"


def added(number: int, content: str = "<|x|>") -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


@pytest.mark.parametrize("number", [ROWS, 10**6, 2**31])
def test_ids_past_the_embedding(number: int, source: dict, tmp_path: Path) -> None:
    made = {**source, "added_tokens": [*source["added_tokens"], added(number)]}
    assert outcome(tmp_path, json.dumps(made)) == "refused"


def test_duplicate_ids(source: dict, tmp_path: Path) -> None:
    vocabulary = {**source["model"]["vocab"], "extra": 5}
    outcome(tmp_path, json.dumps(changed(source, ("model", "vocab"), vocabulary)))


def test_hundred_thousand_added_tokens(source: dict, tmp_path: Path) -> None:
    made = {**source, "added_tokens": [added(n, f"<|{n}|>") for n in range(ROWS, ROWS + 100_000)]}
    assert outcome(tmp_path, json.dumps(made)) == "refused"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*b", "(" * 5000, r"\p{Nonsense}", r"(?=x)*"])
def test_catastrophic_patterns(pattern: str, source: dict, tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    outcome(tmp_path, json.dumps(changed(source, ("pre_tokenizer",), split)))


TEMPLATES = (
    "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ 9**9**9 }}",
    "{% if %}",
    "{{ undefined_thing.attribute }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(template: str, source: dict, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    header = open_checkpoint(str(tmp_path))
    start = time.monotonic()
    with pytest.raises(LowbitError):
        found = load_chat_template(header, load_tokenizer(header))
        assert found is not None
        found.render([{"role": "user", "content": "hi"}])
    assert time.monotonic() - start < 8
