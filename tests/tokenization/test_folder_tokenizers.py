"""Tokenizers of Hugging Face folders: what the files beside tokenizer.json say, and tokens without a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import CodeGenTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer

from checkpoint.tiny import VOCABULARY, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization import check_vocabulary, load_chat_template, load_tokenizer
from lowbit.tokenization.fast_tokenizer import MAX_LEFT_OUT, FastTokenizer
from lowbit.tokenization.gguf_export import tokenizer_metadata
from lowbit.tokenization.gguf_tokenizer import gguf_tokenizer
from tokenization.texts import varied_texts

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


@pytest.mark.parametrize("content", [["x"], {"a": 1}, 7, None])
def test_added_tokens_behind_the_last_row_without_a_text(content: object, tmp_path: Path) -> None:
    source = letters(VOCABULARY)
    source["added_tokens"] = [added(VOCABULARY, "<x>") | {"content": content}]
    assert of(folder_with(tmp_path, source)).vocab_size == VOCABULARY
    source["added_tokens"].append(added(3, "<y>") | {"content": content})
    with pytest.raises(LowbitError, match="no usable tokenizer"):
        of(folder_with(tmp_path, source))


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


def test_vocabularies_without_a_letter(tmp_path: Path) -> None:
    """Of proteins, say; each text is asked for itself."""
    source = letters(20)
    words = {"type": "WordLevel", "vocab": {"MKV": 0}, "unk_token": "<unk>"}
    ours = of(folder_with(tmp_path, source | {"model": words, "pre_tokenizer": None}))
    assert ours.encode("MKV") == [0] and not ours.adds_bos
    with pytest.raises(LowbitError) as caught:
        ours.encode("a")
    assert caught.value.code == "E0255"


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


# ---- vocab.json with merges.txt -------------------------------------------------------------------------

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def slow_save(folder: Path, name: str | None, **config: object) -> Path:
    """The files that slow tokenizers left before there was added_tokens_decoder, of a small vocabulary."""
    write_folder(folder)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\n+|[^\n]+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [made.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*varied_texts(200), "a\n\nb\n\nc\n\n", "12 34 12 34"] * 2, trainer)
    made.model.save(str(folder))
    count = made.get_vocab_size()
    files = {
        "tokenizer_config.json": {"tokenizer_class": name, **config},
        "added_tokens.json": {text: count + n for n, text in enumerate(CHATML)},
        "special_tokens_map.json": {
            "additional_special_tokens": CHATML[1:],
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "pad_token": "<|endoftext|>",
        },
    }
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", [Qwen2Tokenizer, GPT2Tokenizer, CodeGenTokenizer, GPTNeoXTokenizer])
def test_vocab_and_merges_as_their_class_reads_them(kind: type, tmp_path: Path) -> None:
    folder = slow_save(tmp_path, kind.__name__)
    oracle, ours = kind.from_pretrained(folder), of(folder)
    for text in ("a\n\nb\n\nc", "e\u0301 DON'T 1234", "<|im_start|>user\nHi<|im_end|>\n", *varied_texts(400)):
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False), repr(text)
    assert ours.eos_id == oracle.convert_tokens_to_ids("<|im_end|>")
    assert set(ours.special_texts) == set(CHATML)


def test_the_class_by_the_model_where_none_is_named(tmp_path: Path) -> None:
    text = "a\n\nb"
    plain = of(slow_save(tmp_path, None)).encode(text)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert len(of(tmp_path).encode(text)) == 3 < len(plain)


def test_vocab_json_in_a_gguf_file(tmp_path: Path) -> None:
    header = open_checkpoint(str(slow_save(tmp_path, "GPT2Tokenizer")))
    metadata, ours = tokenizer_metadata(header, 510), load_tokenizer(header)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    made = gguf_tokenizer(CheckpointHeader(Path("x"), "gguf", {}, metadata=metadata))
    for text in (*varied_texts(50, seed=4), f"a{CHATML[2]}b"):
        assert made.encode(text) == ours.encode(text)


def test_classes_that_cut_in_ways_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="not of 'Arcade100kTokenizer'; pass --tokenizer") as caught:
        of(slow_save(tmp_path, "Arcade100kTokenizer"))
    assert caught.value.code == "E0250"


def test_added_tokens_decoder_counts(tmp_path: Path) -> None:
    """Beside added_tokens.json; a token that has a name is special, whatever it says."""
    listed = {
        "9000": {"content": "<tool>", "rstrip": True},
        "502": {"content": "<|im_end|>", "special": False},
    }
    ours = of(slow_save(tmp_path, "GPT2Tokenizer", added_tokens_decoder=listed, add_bos_token=True))
    assert ours.encode("<tool>  \n<|im_end|>") == [9000, 502]
    assert set(ours.special_texts) == set(CHATML)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 7}')
    assert of(tmp_path).encode("<x>") == [7], "in the place of another"
    named = {"bos_token": "<tool>", "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, **named}))
    assert of(tmp_path).encode("a")[0] == 9000


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("added_tokens.json", {"<x>": "7"}, "an added token has id 7"),
        ("added_tokens.json", {"<x>": -1}, "an added token has id -1"),
        ("added_tokens.json", {"<x>": 700, "<y>": 700}, "two added tokens have id 700"),
        ("added_tokens.json", {"<x>": 1 << 40}, f"an added token has id {1 << 40}"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "token x is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": "a"}}, "token 9 is 'a', expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": 1}}}, "with content"),
    ],
)
def test_added_tokens_that_cannot_be(file: str, values: dict, told: str, tmp_path: Path) -> None:
    folder = slow_save(tmp_path, "GPT2Tokenizer")
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(LowbitError, match=told) as caught:
        of(folder)
    assert caught.value.code == "E0254" and "\n" not in str(caught.value)


# ---- What templates print -------------------------------------------------------------------------------


def test_names_of_special_tokens_map_in_templates(tmp_path: Path) -> None:
    """Folders of older slow saves have them in no other file."""
    source = letters(30) | {"added_tokens": [added(n, text) for n, text in enumerate(CHATML, 30)]}
    folder = folder_with(tmp_path, source, {"eos_token": None, "image_token": {"content": CHATML[2]}})
    named = {"bos_token": {"content": CHATML[0]}, "eos_token": CHATML[1], "image_token": "a"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text("{{ bos_token + image_token + eos_token }}")
    header = open_checkpoint(str(folder))
    template = load_chat_template(header, load_tokenizer(header))
    assert template is not None and template.render([]) == [30, 32, 31]


def test_names_that_only_the_tokenizer_knows(tmp_path: Path) -> None:
    """Those of tekken.json, and Llama's BOS where no file names one."""
    source = letters(30) | {"added_tokens": [added(30, "<s>")]}
    folder = folder_with(tmp_path, source, {"tokenizer_class": "LlamaTokenizer"})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}a{{ eos_token }}")
    header = open_checkpoint(str(folder))
    tokenizer = load_tokenizer(header)
    template = load_chat_template(header, tokenizer)
    assert template is not None and template.render([]) == [30, *tokenizer.encode("a", add_special=False)]
