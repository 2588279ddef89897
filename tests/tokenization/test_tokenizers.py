"""Tokenizers against transformers and sentencepiece on more than two thousand varied strings each."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from checkpoint.tiny import METADATA, gguf_tensors, write_folder
from gguf_writing import write_gguf
from lowbit.checkpoint import CheckpointHeader, open_checkpoint
from lowbit.engine.detokenizer import IncrementalDetokenizer
from lowbit.engine.messages import SamplingParams
from lowbit.errors import LowbitError
from lowbit.tokenization import check_vocabulary, load_generation_config, load_tokenizer, sampling_defaults
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from lowbit.tokenization.pretokenizers import LLAMA3, PRE_TOKENIZERS, pre_tokenizer
from tokenization.texts import SPECIALS, varied_texts

CORPUS = [topics[name] for name in sorted(topics)[:40]] + varied_texts(300, seed=9)


@pytest.fixture(scope="module")
def embedded() -> FastTokenizer:
    return load_tokenizer(open_checkpoint("smollm2"))


@pytest.fixture(scope="module")
def oracle(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """That reader ignores the pre-tokenizer's name, so the one SmolLM2 was trained with (each digit by
    itself, then GPT-2's words) is put in."""
    made = copy.deepcopy(plain)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def test_embedded_tokenizer_on_varied_strings(
    embedded: FastTokenizer, oracle: PreTrainedTokenizerFast
) -> None:
    texts = varied_texts()
    assert len(texts) >= 2000
    for text in texts:
        expected = oracle.encode(text, add_special_tokens=False)
        assert embedded.encode(text) == expected, repr(text)
        assert embedded.decode(expected, skip_special=False) == oracle.decode(expected), repr(text)


def test_embedded_tokenizer_without_digits_as_transformers_reads_it(
    embedded: FastTokenizer, plain: PreTrainedTokenizerFast
) -> None:
    """Without the pre-tokenizer put in by hand, on strings it makes no difference for."""
    texts = [text for text in varied_texts() if not any(c.isnumeric() for c in text)]
    assert len(texts) > 800
    for text in texts:
        assert embedded.encode(text) == plain.encode(text, add_special_tokens=False), repr(text)


def test_embedded_facts(embedded: FastTokenizer) -> None:
    assert embedded.vocab_size == 49152
    assert (embedded.bos_id, embedded.eos_id, embedded.adds_bos) == (1, 2, False)
    assert embedded.stop_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert embedded.token_bytes(2) == b"<|im_end|>"
    ids = embedded.encode("Ünï 猫😀\n")
    assert b"".join(map(embedded.token_bytes, ids)).decode() == "Ünï 猫😀\n"


def test_specials_count_only_where_they_may(embedded: FastTokenizer) -> None:
    text = "a<|im_end|>b"
    assert 2 in embedded.encode(text)
    plain = embedded.encode(text, parse_special=False)
    assert not embedded.special_ids & set(plain)
    assert embedded.decode(plain) == text


# ---- Hugging Face folders -------------------------------------------------------------------------------


def byte_level() -> tokenizers.Tokenizer:
    """Llama 3's kind: a regular expression, bytes, BOS by the post-processor."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces as underlines, bytes for what is unknown."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=2500, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram() -> tokenizers.Tokenizer:
    """T5's and Gemma's relatives."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"),
    )
    return made


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like, unigram])
def test_folder_tokenizers_on_varied_strings(kind: object, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    made = PreTrainedTokenizerFast(
        tokenizer_object=kind(),  # type: ignore[operator]
        bos_token="<s>",
        eos_token="</s>",
    )
    made.save_pretrained(folder)
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(open_checkpoint(str(folder)))
    assert (ours.bos_id, ours.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    for text in varied_texts(2050, seed=3):
        for add_special in (True, False):
            expected = oracle.encode(text, add_special_tokens=add_special)
            if text.startswith("<s>") and add_special and expected[:2] == [ours.bos_id] * 2:
                expected = expected[1:]  # never a double BOS
            assert ours.encode(text, add_special=add_special) == expected, repr(text)
        assert ours.decode(expected) == oracle.decode(expected, skip_special_tokens=True)


def test_a_tokenizer_saved_in_training_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """tokenizer.json then holds the length and the padding of the training's batches."""
    made = byte_level()
    text = "The quick brown fox jumps over the lazy dog, and sleeps. " * 3
    wanted = made.encode(text).ids
    made.enable_truncation(8)
    made.enable_padding(direction="left", length=64, pad_id=1, pad_token="</s>")
    folder = write_folder(tmp_path / "hf")
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    ours = load_tokenizer(open_checkpoint(str(folder)))
    gguf = load_tokenizer(header_with({"tokenizer.huggingface.json": made.to_str()}))
    assert len(wanted) > 8
    for one in (ours, gguf):
        for parse_special in (True, False):
            ids = one.encode(text, add_special=False, parse_special=parse_special)
            assert [0, *ids] == wanted
        assert one.encode("a", add_special=False) == made.encode("a", add_special_tokens=False).ids[-1:]


def test_vocab_and_merges_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS[:40], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    made.model.save(str(folder))
    ours = load_tokenizer(open_checkpoint(str(folder)))
    for text in varied_texts(400):
        assert ours.encode(text) == made.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


# ---- GGUF with SentencePiece vocabularies ---------------------------------------------------------------


def trained(kind: str) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines() if line.strip()),
        model_writer=written,
        model_type=kind,
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def sentencepiece_metadata(spm: sentencepiece.SentencePieceProcessor, model: str) -> dict[str, object]:
    def token_type(number: int) -> int:
        if spm.is_unknown(number):
            return 2
        return 3 if spm.is_control(number) else 6 if spm.is_byte(number) else 1

    count = spm.get_piece_size()
    return {
        **METADATA,
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": [spm.id_to_piece(n) for n in range(count)],
        "tokenizer.ggml.scores": [float(spm.get_score(n)) for n in range(count)],
        "tokenizer.ggml.token_type": [token_type(n) for n in range(count)],
        "tokenizer.ggml.bos_token_id": spm.bos_id(),
        "tokenizer.ggml.eos_token_id": spm.eos_id(),
        "tokenizer.ggml.unknown_token_id": spm.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
    }


def score(spm: sentencepiece.SentencePieceProcessor, ids: list[int]) -> float:
    return sum(spm.get_score(token) for token in ids)


@pytest.mark.parametrize(("kind", "model"), [("bpe", "llama"), ("unigram", "t5")])
def test_gguf_sentencepiece_on_varied_strings(kind: str, model: str, tmp_path: Path) -> None:
    spm = trained(kind)
    path = tmp_path / "m.gguf"
    write_gguf(path, sentencepiece_metadata(spm, model), gguf_tensors())
    ours = load_tokenizer(open_checkpoint(str(path)))
    assert ours.adds_bos and ours.bos_id == spm.bos_id() and spm.eos_id() in ours.stop_ids
    checked = ties = 0
    for text in varied_texts(2400, seed=5):
        if "\0" in text or "▁" in text or not text or any(special in text for special in SPECIALS):
            continue  # sentencepiece itself gives up at NUL, and reads "<s>" in a text as text
        expected = spm.encode(text)
        bos, *found = ours.encode(text)
        assert bos == spm.bos_id()
        if found != expected:
            # A unigram text may have two segmentations of one score ("\\\\" + "\\" or the reverse).
            assert kind == "unigram" and score(spm, found) == pytest.approx(score(spm, expected)), repr(text)
            ties += 1
        assert ours.decode(expected) == spm.decode(expected), repr(text)
        checked += 1
    assert checked >= 1500 and ties < 0.1 * checked


# ---- What is refused ------------------------------------------------------------------------------------


def bytes_and_a_word() -> FastTokenizer:
    """<unk>, <s>, the 256 bytes, and " the"."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    known: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", *bytes_, "▁the"],
        "tokenizer.ggml.scores": [0.0] * 259,
        "tokenizer.ggml.token_type": [2, 3, *[6] * 256, 1],
    }
    return load_tokenizer(header_with(known))


def test_bytes_that_are_no_text_leave_others_alone() -> None:
    """In a row of byte tokens, as ggml has it; the library makes U+FFFD of all of them."""
    spm = bytes_and_a_word()
    the, row = 258, [2 + byte for byte in b"a\xc3\n\xc3\xa9\xff!"]
    assert spm.decode([the, *row, the]) == "thea\ufffd\né\ufffd! the"
    assert spm.decode([1, the, *row], skip_special=False) == "<s> thea\ufffd\né\ufffd!"
    detokenizer = IncrementalDetokenizer(spm, SamplingParams())
    pieces = [detokenizer.add([token])[0] for token in (the, *row, the)]
    assert "".join(pieces) + detokenizer.finish() == "thea\ufffd\né\ufffd! the"


@pytest.mark.parametrize("prompt", [[258], [2 + 0x41], [1]], ids=["word", "letter", "start"])
def test_a_space_before_the_first_word_of_the_output(prompt: list[int]) -> None:
    """It is the text's first, and left out, only where the prompt has no text."""
    spm = bytes_and_a_word()
    detokenizer = IncrementalDetokenizer(spm, SamplingParams(), prompt)
    text = "".join(detokenizer.add([token])[0] for token in (258, 258)) + detokenizer.finish()
    assert text == ("the the" if prompt == [1] else " the the")
    assert spm.decode(prompt) + text == spm.decode([*prompt, 258, 258])


def header_with(metadata: dict[str, object]) -> CheckpointHeader:
    return CheckpointHeader(Path("x.gguf"), "gguf", {}, metadata={**METADATA, **metadata})


@pytest.mark.parametrize(
    ("metadata", "code", "words"),
    [
        ({"tokenizer.ggml.tokens": None}, "E0250", "no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "E0254", "'rwkv'"),
        ({"tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "klingon"}, "E0254", "'klingon' is not known"),
        ({"tokenizer.ggml.merges": None}, "E0254", "merges"),
        ({"tokenizer.ggml.token_type": [1]}, "E0254", "token_type"),
        ({"tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 40}, "E0254", "has 40 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "E0254", "scores"),
        ({"tokenizer.ggml.merges": ["t1 nope"]}, "E0254", "no usable tokenizer"),
        ({"tokenizer.huggingface.json": "{"}, "E0254", "no usable tokenizer"),
    ],
    ids=str,
)
def test_gguf_tokenizers_that_cannot_be(metadata: dict[str, object], code: str, words: str) -> None:
    with pytest.raises(LowbitError) as caught:
        load_tokenizer(header_with(metadata))
    assert caught.value.code == code and words in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"added_tokens": [{"id": -1, "content": "x"}]},
        {"added_tokens": [{"id": 1 << 31, "content": "x"}]},
        {"added_tokens": [{"id": 5, "content": "x"}, {"id": 5, "content": "y"}]},
        {"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}},
        {"model": {"type": "Magic"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=str,
)
def test_hostile_tokenizer_files(change: dict[str, object], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    values = json.loads(byte_level_json())
    (folder / "tokenizer.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(LowbitError) as caught:
        load_tokenizer(open_checkpoint(str(folder)))
    assert caught.value.code == "E0254" and "tokenizer.json" in caught.value.message


def byte_level_json() -> str:
    made = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    return made.to_str()


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="--tokenizer") as caught:
        load_tokenizer(open_checkpoint(str(write_folder(tmp_path / "hf"))))
    assert caught.value.code == "E0250"


def test_tokenizer_of_another_model(embedded: FastTokenizer) -> None:
    check_vocabulary(embedded, 49152)
    with pytest.raises(LowbitError, match="49152 ids but the embedding has 32000 rows") as caught:
        check_vocabulary(embedded, 32000)
    assert caught.value.code == "E0251"


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_runs(name: str) -> None:
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    header = header_with(
        {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(tokens),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.pre": name,
        }
    )
    ours = load_tokenizer(header)
    for text in varied_texts(60):
        assert ours.decode(ours.encode(text)) == text  # nothing is lost between the pieces


def letters(name: str, **more: object) -> FastTokenizer:
    """A GGUF tokenizer of single bytes and BOS."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"]
    known = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.add_bos_token": None,
    }
    return load_tokenizer(header_with(known | more))


@pytest.mark.parametrize(
    ("name", "more", "adds"),
    [
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
        ("qwen2", {}, False),
    ],
    ids=["llama-bpe", "tekken", "llama-bpe-told", "qwen2"],
)
def test_bos_where_a_file_does_not_say(name: str, more: dict[str, object], adds: bool) -> None:
    """Llama 3's first GGUF files do not: their pre-tokenizer's name does, as llama.cpp has it."""
    ours = letters(name, **more)
    assert ours.adds_bos is adds and (ours.encode("a")[0] == 256) is adds


def test_what_ends_a_turn_of_gpt_oss() -> None:
    """Not <|end|>, which stands behind its thoughts, too."""
    ends = ["<|return|>", "<|end|>", "<|call|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", *ends]
    known: dict[str, object] = {"tokenizer.ggml.eos_token_id": 257}
    known |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3] * 4}
    assert letters("gpt-4o", **known).stop_ids == {257, 259}
    phi = known | {"tokenizer.ggml.tokens": [*tokens[:-3], "<|x|>", "<|end|>", "<|y|>"]}
    assert letters("gpt-4o", **phi).stop_ids == {257, 258}


def test_letters_that_look_like_bytes() -> None:
    """DeepSeek's vocabularies add "ö" and others, the stand-ins of bytes that UTF-8 never has."""
    tokens = [*sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"ö"}), "ö", "<s>"]
    ours = letters(
        "deepseek-llm",
        **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 255 + [4, 3]},
    )
    for text in ("schön", "ö", "öö é ö"):
        ids = ours.encode(text)
        assert 255 in ids and ours.decode(ids) == text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text


def test_spaces_behind_special_tokens_of_phi_3() -> None:
    """GGUF does not say that they are swallowed; by llama.cpp and the model's tokenizer.json they are."""
    tokens = ["<unk>", "<s>", "<|user|>", "▁", "a", "\n"]
    known: dict[str, object] = {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 6,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = load_tokenizer(header_with(known))
    assert ours.encode("<s>\na<|user|>\n \na", add_special=False) == [1, 5, 4, 2, 4]
    other = load_tokenizer(header_with(known | {"general.architecture": "llama"}))
    assert other.encode("<|user|>\na", add_special=False) == [2, 5, 4]


@pytest.mark.parametrize(
    ("architecture", "count", "name"),
    [
        ("qwen2", 257, "qwen2"),
        ("falcon", 257, "falcon"),
        ("llama", 32256, "deepseek-coder"),
        ("llama", 257, "gpt-2"),
    ],
    ids=["qwen2", "falcon", "deepseek-coder", "gpt-2"],
)
def test_pre_tokenizers_of_files_without_a_name(architecture: str, count: int, name: str) -> None:
    """Those of early 2024 name none; Qwen1.5's digits are still tokens of their own."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", *(f"<{n}>" for n in range(257, count))]
    told: dict[str, object] = {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] + [5] * (count - 257),
    }
    cuts = [
        letters(pre, **told)._tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234, DON'T\n(x1)")
        for pre in ("default", name)
    ]
    assert cuts[0] == cuts[1]


# As llama.cpp cuts them.
PIECES = {
    "kormo": ["Don", "'t", " Pay", " ", "1", "2", "3", "4", "!\n"],
    "hunyuan-dense": ["Don", "'t", " Pay", " ", "123", "4", "!\n"],
    "minicpm5": ["Don", "'t", " Pay", " ", "123", "4", "!\n"],
    "qwen35": ["Don", "'t", " Pay", " ", "1", "2", "3", "4", "!\n"],
    "seed-coder": ["Don", "'t", " Pay", " ", "1", "2", "3", "4", "!", "\n"],
    "kanana2": ["Don't", " Pay", " ", "123", "4", "!\n"],
    "tiny_aya": ["Don't", " Pay", " ", "1", "234", "!\n"],
    "gigachat": ["Don", "'t", " Pay", " 1234", "!", "\n"],
    "youtu": ["Don't", " Pay", " ", "1", "2", "3", "4", "!\n"],
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    steps = pre_tokenizer(name, "x.gguf")
    cut = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": steps,
                    "model": {"type": "BPE", "vocab": {}, "merges": []}})
    ).pre_tokenizer  # fmt: skip
    pieces = cut.pre_tokenize_str("Don't Pay 1234!\n")
    assert [text.replace("Ġ", " ").replace("Ċ", "\n") for text, _ in pieces] == PIECES[name]


def test_pieces_of_deepseek_llm() -> None:
    """Letters of two cases with the space before them, but none of mathematics; the class of signs has ASCII
    letters too, and cuts them off accented ones. The size of the class is llama.cpp's."""
    steps = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in PRE_TOKENIZERS["deepseek-llm"]
    ]
    pieces = pre_tokenizers.Sequence(steps).pre_tokenize_str("Ab Éc9, 12\n\u0561\u4e2d\u6587!x \U0001d400")
    wanted = ["Ab", " É", "c", "9", ",", " ", "12", "\n", "\u0561", "\u4e2d\u6587", "!", "x", " \U0001d400"]
    assert [text for text, _ in pieces] == wanted
    letters = pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS["deepseek-llm"][1]), "removed")
    planes = [*range(0xD800), *range(0xE000, 0x20000)]
    assert sum(not letters.pre_tokenize_str(chr(code)) for code in planes) == 2729


def test_generation_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 50, "do_sample": True, "top_p": 0.9})
    )
    config = load_generation_config(open_checkpoint(str(folder)))
    assert config.stop_ids == {7, 9}
    assert config.sampling() == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
    (folder / "generation_config.json").write_text('{"temperature": "hot", "top_k": true}')
    assert load_generation_config(open_checkpoint(str(folder))).sampling() == {}


def test_sampling_defaults(tmp_path: Path) -> None:
    """The checkpoint's, or OpenAI's; under what the command line prefers."""
    folder = write_folder(tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 50}')
    header = open_checkpoint(str(folder))
    assert sampling_defaults(header, "model", None) == {"temperature": 0.6, "top_k": 50}
    assert sampling_defaults(header, "openai", None) == {}
    preferred = '{"temperature": 0, "top_p": 0.9}'
    assert sampling_defaults(header, "model", preferred) == {"temperature": 0, "top_k": 50, "top_p": 0.9}
    stored = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.top_p": math.nan}
    gguf = CheckpointHeader(Path("x.gguf"), "gguf", {}, metadata=stored)
    assert sampling_defaults(gguf, "model", None) == {"temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    "text,told",
    [
        ("{temperature: 1}", "is not JSON"),
        pytest.param('{"a":' * 5000 + "1" + "}" * 5000, "is not JSON", id="deep"),
        ("[1]", "must be a JSON object, got [1]"),
        ('{"temp": 1}', "unknown key 'temp'; did you mean 'temperature'?"),
        ('{"max_tokens": 1}', "unknown key 'max_tokens'; known are temperature, top_p, top_k, min_p, rep"),
        ('{"temperature": "1"}', 'temperature must be a number from 0 to 2, got "1"'),
        ('{"top_k": 1.5}', "top_k must be a whole number from -1 to 2147483647, got 1.5"),
        ('{"top_p": NaN}', "top_p must be a number from 0 to 1, got NaN"),
        ('{"min_p": true}', "min_p must be a number from 0 to 1, got true"),
    ],
)
def test_preferred_sampling_that_makes_no_sense(tmp_path: Path, text: str, told: str) -> None:
    header = open_checkpoint(str(write_folder(tmp_path / "hf")))
    with pytest.raises(LowbitError) as caught:
        sampling_defaults(header, "model", text)
    assert caught.value.code == "E0103"
    assert caught.value.message.startswith("--preferred-sampling-params") and told in caught.value.message
