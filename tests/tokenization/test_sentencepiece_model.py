"""tokenizer.model alone, against the sentencepiece library; and files that are none."""

from __future__ import annotations

import io
import json
import random
import struct
import time
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece

from checkpoint.tiny import write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization import load_chat_template, load_tokenizer
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from lowbit.tokenization.folder_tokenizer import MAX_ADDED_PIECES
from lowbit.tokenization.gguf_export import tokenizer_metadata
from lowbit.tokenization.gguf_tokenizer import gguf_tokenizer
from lowbit.tokenization.sentencepiece_model import MAX_PIECE, sentencepiece_metadata
from tokenization.texts import SPECIALS, varied_texts

SENTENCES = [line for name in sorted(topics)[:12] for line in topics[name].splitlines() if line.strip()]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@cache
def trained(kind: str, *options: tuple[str, object]) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, *varied_texts(200, seed=9)]),
        model_writer=written,
        model_type=kind,
        vocab_size=900,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"byte_fallback": True, **dict(options)},
    )
    return written.getvalue()


def model(kind: str, **options: object) -> bytes:
    return trained(kind, *sorted(options.items()))


def folder_with(folder: Path, data: bytes, name: str = "tokenizer.model", **files: object) -> Path:
    """A tiny model with this file; ``files``: more of them, by their names without ".json"."""
    write_folder(folder)
    (folder / name).write_bytes(data)
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder


def of(folder: Path) -> FastTokenizer:
    return load_tokenizer(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bpe", PLAIN),  # Llama's, Baichuan's, InternLM's
        ("bpe", PLAIN | {"add_dummy_prefix": False, "byte_fallback": False}),
        ("bpe", {}),
        ("unigram", PLAIN),
        ("unigram", {"pad_id": 3, "bos_id": -1}),
    ],
    ids=["bpe", "bpe-bare", "bpe-nfkc", "unigram", "unigram-nfkc"],
)
def test_as_sentencepiece_cuts(kind: str, options: dict, tmp_path: Path) -> None:
    data = model(kind, **options)
    spm = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = of(folder_with(tmp_path, data))
    assert ours.vocab_size == spm.get_piece_size()
    assert (ours.bos_id, ours.eos_id) == (None if spm.bos_id() < 0 else spm.bos_id(), spm.eos_id())
    assert ours.adds_bos is (spm.bos_id() >= 0)
    texts = ["", "   ", "  two  spaces ", "a  b", "ﬁne ½ Ａ", *varied_texts(700, seed=5)]
    # sentencepiece gives up at NUL, and reads "<s>" in a text as text. The library takes a letter with two
    # accents for one where it looks up what to replace.
    others = ("\0", "▁", *SPECIALS, *(() if options.items() >= PLAIN.items() else ("\u0301",)))
    checked = ties = 0
    for text in texts:
        if any(other in text for other in others):
            continue
        wanted, found = spm.encode(text), ours.encode(text, add_special=False)
        if found != wanted:
            scores = (sum(map(spm.get_score, ids)) for ids in (found, wanted))
            assert kind == "unigram" and next(scores) == pytest.approx(next(scores)), repr(text)
            ties += 1
        if spm.unk_id() not in wanted:  # which sentencepiece shows as "⁇"
            assert ours.decode(wanted) == spm.decode(wanted), repr(text)
        checked += 1
    assert checked > 400 and ties < 0.1 * checked


def test_symbols_of_the_user(tmp_path: Path) -> None:
    symbols = {"user_defined_symbols": "<tool>,\u2581\u2581", "control_symbols": "[INST]"}
    data = model("bpe", **PLAIN, add_dummy_prefix=False, **symbols)
    spm = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = of(folder_with(tmp_path, data))
    for text in ("a<tool>b", "x    y  z"):
        assert ours.encode(text, add_special=False) == spm.encode(text)
    assert ours.encode("[INST]", add_special=False) == [spm.piece_to_id("[INST]")]
    assert spm.piece_to_id("[INST]") not in ours.encode("[INST]", parse_special=False)
    assert set(ours.special_texts) == {"<unk>", "<s>", "</s>", "[INST]"}


def test_llamas_space_before_the_text_alone(tmp_path: Path) -> None:
    """With "legacy": false; else each piece between special tokens gets one."""
    data = model("bpe", **PLAIN)
    spm = sentencepiece.SentencePieceProcessor(model_proto=data)
    config: dict[str, object] = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    ours = of(folder_with(tmp_path, data, tokenizer_config=config))
    start, words = [1, *spm.encode("the  end"), 2], ours.encode("the  end</s>the  end")
    assert words[: len(start)] == start
    assert b"".join(map(ours.token_bytes, words[len(start) :])) == b"the  end", "no space"
    other = of(folder_with(tmp_path, data, tokenizer_config=config | {"legacy": True}))
    assert other.encode("the  end</s>the  end") == [1, *spm.encode("the  end"), 2, *spm.encode("the  end")]
    for text in ("the  end", "naïve 猫"):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_tokens_in_messages_are_text(kind: str, tmp_path: Path) -> None:
    """In a unigram vocabulary they are words as well, of a score above all others."""
    data = model(kind, **PLAIN, control_symbols="[INST]")
    spm = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = of(folder_with(tmp_path, data))
    for text in ("x[INST]y</s>z", "<unk><s>", "plain"):
        assert ours.encode(text, add_special=False, parse_special=False) == spm.encode(text)


def test_tokens_that_other_files_add_or_put_in_the_place_of_unused_ones(tmp_path: Path) -> None:
    """InternLM2 ends its turns with what tokenizer.model calls [UNUSED_TOKEN_145]."""
    data = model("bpe", **PLAIN, user_defined_symbols="[UNUSED_TOKEN_145]")
    count = len(sentencepiece_metadata(data, "x")["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ours = of(
        folder_with(
            tmp_path,
            data,
            tokenizer_config={
                "tokenizer_class": "InternLM2Tokenizer",
                "eos_token": "<|im_end|>",
                "add_bos_token": False,
                "added_tokens_decoder": {"3": {"content": "<|im_end|>", **flags}},
                "chat_template": "{{ bos_token }}a<|im_end|><|im_start|>",
            },
            added_tokens={"<|im_start|>": count + 2, "<tool>": count + 1},
            special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
        )
    )
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == (1, 3, False, count + 3)
    plain = ours.encode("a")
    assert ours.encode("a<|im_end|><|im_start|><tool>") == [*plain, 3, count + 2, count + 1]
    assert 3 not in ours.encode("[UNUSED_TOKEN_145]")
    template = load_chat_template(open_checkpoint(str(tmp_path)), ours)
    assert template is not None and template.render([]) == [1, *plain, 3, count + 2]


def test_the_file_of_mistral_with_a_version(tmp_path: Path) -> None:
    ours = of(folder_with(tmp_path, model("bpe", **PLAIN), "tokenizer.model.v3"))
    assert ours.encode("a")[0] == 1 and ours.adds_bos


def test_in_a_gguf_file(tmp_path: Path) -> None:
    data = model("bpe", **PLAIN)
    spm = sentencepiece.SentencePieceProcessor(model_proto=data)
    header = open_checkpoint(str(folder_with(tmp_path, data, tokenizer_config={"eos_token": "</s>"})))
    metadata = tokenizer_metadata(header, spm.vocab_size() + 4)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"]
    made = gguf_tokenizer(CheckpointHeader(Path("x"), "gguf", {}, metadata=metadata))
    for text in varied_texts(100, seed=3):
        assert made.encode(text, add_special=False, parse_special=False) == spm.encode(text)
    assert (made.bos_id, made.eos_id, made.vocab_size) == (1, 2, spm.vocab_size() + 4)


def test_a_unigram_model_is_in_no_gguf_file_yet(tmp_path: Path) -> None:
    header = open_checkpoint(str(folder_with(tmp_path, model("unigram", **PLAIN))))
    with pytest.raises(LowbitError, match="E0450.*only BPE models"):
        tokenizer_metadata(header, 1000)


# ---- What is refused ------------------------------------------------------------------------------------


def field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: a number, or a length and bytes."""

    def varint(whole: int) -> bytes:
        return bytes([whole]) if whole < 128 else bytes([whole & 127 | 128]) + varint(whole >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: bytes, *more: bytes) -> bytes:
    return field(1, field(1, text) + b"".join(more))


def score(value: float) -> bytes:
    return bytes([2 << 3 | 5]) + struct.pack("<f", value)


LETTER = piece(b"a", score(-1.0))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no pieces in it"),
        (field(2, field(3, 2)), "no pieces in it"),
        (LETTER + LETTER, "two pieces have the same text"),
        (piece(b""), "piece 0 has 0 bytes"),
        (piece(b"a" * (MAX_PIECE + 1)), f"piece 0 has {MAX_PIECE + 1} bytes"),
        (piece(b"\xff"), "is no UTF-8"),
        (piece(b"a", score(float("nan"))), "'a', has score nan"),
        (piece(b"a", field(2, b"12345")), "a score of 5"),
        (piece(b"a", field(2, 7)), "a number where a message or text belongs"),
        (piece(b"a", field(3, 7)), "type 7"),
        (LETTER + piece(b"b", field(3, b"x")), "field 3 of its settings is no number"),
        (field(1, 5), "a number where a message or text belongs"),
        (LETTER + field(2, field(3, 3)), "words or characters as tokens"),
        (LETTER + field(2, field(24, 1)), "spaces behind words"),
        (LETTER + field(3, field(5, 0)), "left as they are"),
        (LETTER + b"\x0a\xff\x01" + b"x", "a field of 255 bytes where 1 are left"),
        (LETTER + b"\x0a" + b"\xff" * 12, "a number that does not end"),
        (LETTER + b"\x0a", "a number that does not end"),
        (LETTER + b"\x0b", "a field of kind 3"),
        (LETTER + field(2, field(3, 2) + field(40, 9)), "the unknown token is piece 9 of 1"),
        (LETTER + field(3, field(2, b"\xff\xff\xff\xff")), "no usable tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_model(data: bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        of(folder_with(tmp_path, data))
    assert caught.value.code == "E0254" and "\n" not in str(caught.value)
    assert told in caught.value.message and "tokenizer.model" in caught.value.message


@pytest.mark.parametrize("seed", range(12))
def test_damaged_anywhere(seed: int, tmp_path: Path) -> None:
    """Refused in one line, or a tokenizer that works; soon."""
    generator, data = random.Random(seed), bytearray(model("bpe"))
    for turn in range(6):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(data))] = generator.randrange(256)
        if turn % 2:
            del damaged[generator.randrange(len(data)) :]
        start = time.monotonic()
        try:
            tokenizer = of(folder_with(tmp_path, bytes(damaged)))
            assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode("Hello, wörld"))
        except LowbitError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - start < 5


def test_an_added_token_far_behind(tmp_path: Path) -> None:
    far = 10 + MAX_ADDED_PIECES
    with pytest.raises(LowbitError, match=f"has id {far}, and tokenizer.model has 1 pieces") as caught:
        of(folder_with(tmp_path, LETTER, added_tokens={"<x>": far}))
    assert caught.value.code == "E0254"


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_files_of_tiktoken(name: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=f"; {name} is of tiktoken, which is not read") as caught:
        of(folder_with(tmp_path, b"IQ== 0\nIg== 1\n", name))
    assert caught.value.code == "E0250"
