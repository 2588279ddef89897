"""Tokenizers of Hugging Face folders: what the files beside tokenizer.json say, and tokens without a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from checkpoint.tiny import VOCABULARY, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.tokenization import check_vocabulary, load_tokenizer
from lowbit.tokenization.fast_tokenizer import MAX_LEFT_OUT, FastTokenizer
from lowbit.tokenization.gguf_export import tokenizer_metadata

LETTERS = "ab<>_imagesoftkn"


def letters(words: int) -> dict:
    """tokenizer.json of a byte-level vocabulary with ``words`` tokens."""
    alphabet = sorted(set(LETTERS))
    vocabulary = {text: n for n, text in enumerate([*alphabet, *(f"w{n}" for n in range(words))][:words])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return json.loads(made.to_str())


def added(number: int, content: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def folder_with(folder: Path, source: dict, config: dict | None = None) -> Path:
    """A tiny model, whose embedding has ``VOCABULARY`` rows, with this tokenizer.json."""
    write_folder(folder)
    (folder / "tokenizer.json").write_text(json.dumps(source))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def of(folder: Path) -> FastTokenizer:
    return load_tokenizer(open_checkpoint(str(folder)))


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_added_tokens_behind_the_last_row_are_text(in_vocabulary: bool, tmp_path: Path) -> None:
    """Gemma 3's text models have 262,144 rows and <image_soft_token> 262144; many fine-tunes a [PAD]."""
    source, image = letters(VOCABULARY - 1), "<image_soft_token>"
    source["added_tokens"] = [added(VOCABULARY - 1, "<end>"), added(VOCABULARY, image)]
    if in_vocabulary:
        source["model"]["vocab"] |= {"<end>": VOCABULARY - 1, image: VOCABULARY}
    ours = of(folder_with(tmp_path, source, {"eos_token": "<end>", "pad_token": image}))
    check_vocabulary(ours, VOCABULARY)
    assert ours.vocab_size == VOCABULARY and ours.source.left_out == (image,)
    ids = ours.encode(f"a{image}<end>")
    assert max(ids) < VOCABULARY and len(ids) == len(f"a{image}") + 1
    assert ours.eos_id == ids[-1] == VOCABULARY - 1
    assert image not in ours.special_texts and ours.decode(ids) == f"a{image}"


@pytest.mark.parametrize(
    ("words", "more", "config", "told"),
    [
        (VOCABULARY + 1, [VOCABULARY + 1], {}, "42 ids but"),
        (VOCABULARY, [*range(VOCABULARY, VOCABULARY + MAX_LEFT_OUT + 1)], {}, "105 ids but"),
        (VOCABULARY, [VOCABULARY], {"eos_token": "<40>"}, r"41 ids \(its eos_token is 40\) but"),
        (VOCABULARY, [VOCABULARY], {"bos_token": {"content": "<40>"}}, r"41 ids \(its bos_token is 40\) but"),
    ],
    ids=["vocabulary", "many", "eos", "bos"],
)
def test_tokenizers_of_other_models(
    words: int, more: list[int], config: dict, told: str, tmp_path: Path
) -> None:
    source = letters(words)
    source["added_tokens"] = [added(number, f"<{number}>") for number in more]
    with pytest.raises(LowbitError, match=f"{told} the embedding has {VOCABULARY} rows") as caught:
        check_vocabulary(of(folder_with(tmp_path, source, config)), VOCABULARY)
    assert caught.value.code == "E0251"


def test_ids_behind_holes_and_of_the_post_processor_count(tmp_path: Path) -> None:
    """The number of tokens is not the largest id where numbers are left out."""
    source = letters(20)
    source["model"]["vocab"]["hole"] = VOCABULARY
    assert of(folder_with(tmp_path, source)).vocab_size == VOCABULARY + 1
    source = letters(20)
    source["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": [VOCABULARY + 7], "tokens": ["x"]}},
    }
    assert of(folder_with(tmp_path, source)).vocab_size == VOCABULARY + 8


def test_a_gguf_file_has_as_many_tokens_as_rows(tmp_path: Path) -> None:
    source = letters(VOCABULARY)
    source["added_tokens"] = [added(VOCABULARY, "<image_soft_token>")]
    metadata = tokenizer_metadata(open_checkpoint(str(folder_with(tmp_path, source))), VOCABULARY)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == VOCABULARY and "<image_soft_token>" not in tokens


def around(*tokens: str) -> dict:
    """A post-processor that puts "<s>" and "</s>" where ``tokens``, which "A" is among, say."""
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if t == "A" else {"SpecialToken": {"id": t, "type_id": 0}}
        for t in tokens
    ]
    named = {t: {"id": t, "ids": [30 + (t == "</s>")], "tokens": [t]} for t in tokens if t != "A"}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": named}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("name", "told", "processor", "wanted"),
    [
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": False}, BYTES, "<s> A"),  # DeepSeek's
        ("LlamaTokenizer", {"add_bos_token": True, "add_eos_token": True}, around("<s>", "A"), "<s> A </s>"),
        ("GemmaTokenizer", {"add_bos_token": False}, around("<s>", "A"), "A"),
        ("CohereTokenizerFast", {"add_eos_token": True}, around("A"), "<s> A </s>"),
        ("CodeLlamaTokenizer", {}, None, "<s> A"),
        ("LlamaTokenizerFast", {"add_bos_token": None}, BYTES, "<s> A"),
        ("LlamaTokenizer", {}, around("A"), "A"),  # as transformers 5 saves one that adds nothing
        ("LlamaTokenizer", {}, around("A", "</s>"), "A </s>"),
        ("Qwen2Tokenizer", {"add_bos_token": True}, BYTES, "A"),
        ("PreTrainedTokenizerFast", {"add_bos_token": False}, around("<s>", "A"), "<s> A"),
        (None, {"add_bos_token": True}, None, "A"),
    ],
)
def test_who_says_what_is_put_around_a_text(
    name: str | None, told: dict, processor: dict | None, wanted: str, tmp_path: Path
) -> None:
    """transformers builds the post-processor of some classes anew, from tokenizer_config.json."""
    source = letters(30) | {"post_processor": processor}
    source["added_tokens"] = [added(30, "<s>"), added(31, "</s>")]
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", **told}
    ours = of(folder_with(tmp_path, source, config))
    plain = ours.encode("ab", add_special=False)
    ids = {"<s>": [30], "A": plain, "</s>": [31]}
    assert ours.encode("ab") == [n for part in wanted.split() for n in ids[part]]
    assert ours.adds_bos is wanted.startswith("<s>") and len(plain) == 2
    assert ours.encode("<s>ab")[:2] == [30, plain[0]]


def test_llamas_bos_where_no_file_names_it(tmp_path: Path) -> None:
    source = letters(30) | {"post_processor": around("<s>", "A"), "added_tokens": [added(30, "<s>")]}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    assert of(folder_with(tmp_path, source, config)).encode("a")[0] == 30
