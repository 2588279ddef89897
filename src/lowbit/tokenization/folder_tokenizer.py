"""A tokenizer from a folder's tokenizer.json, vocab.json with merges.txt, tekken.json or tokenizer.model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.documents import read_bytes, read_json, read_text
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.tokenization.fast_tokenizer import FastTokenizer, Specials, added_numbers, check_source
from lowbit.tokenization.gguf_tokenizer import CONTROL, UNUSED, USER_DEFINED, Vocabulary, gguf_document
from lowbit.tokenization.pretokenizers import pre_tokenizer
from lowbit.tokenization.sentencepiece_model import sentencepiece_metadata
from lowbit.tokenization.special_tokens import added_tokens, named_tokens
from lowbit.tokenization.tekken import tekken_source

Json = dict[str, object]

# Classes of transformers that put BOS before a text and EOS behind it as tokenizer_config.json says, whatever
# tokenizer.json's post-processor does (DeepSeek's puts none); and their BOS where no file names one.
_TOLD_WHAT_TO_ADD = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer"), "<s>"),
    "GemmaTokenizer": "<bos>",
    "CohereTokenizer": "<BOS_TOKEN>",
}

# Mistral's files have their tokenizer's version in their names.
SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v3")
MAX_ADDED_PIECES = 1 << 16
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")  # a line of its files

# Of vocab.json and merges.txt: class -> how text is cut (a name of GGUF's), and normalized before that.
_NFC: Json = {"type": "NFC"}
_PATTERNS: dict[str, tuple[str, Json | None]] = {
    "GPT2Tokenizer": ("gpt-2", None),
    "CodeGenTokenizer": ("gpt-2", None),
    "GPTNeoXTokenizer": ("gpt-2", _NFC),
    "Qwen2Tokenizer": ("qwen2", _NFC),
    "Qwen3_5Tokenizer": ("qwen35", _NFC),
}
# Where no class is named: by config.json's model_type.
_BY_MODEL = dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer")


@dataclass(frozen=True)
class _Found:
    """``values``: tokenizer.json's object, or what was made of other files; ``place``: the file it is from;
    ``bos``, ``eos``: as that file names them."""

    values: Json
    place: str
    bos: str | None = None
    eos: str | None = None


def folder_tokenizer(
    header: CheckpointHeader, stop_ids: frozenset[int], rows: int | None = None
) -> FastTokenizer:
    """The tokenizer of a folder; ``stop_ids``: what generation_config.json names; ``rows``: of the embedding
    that it is for."""
    config = read_json(header, "tokenizer_config.json") or {}
    named, found = named_tokens(header), _found(header, config)
    adds_bos, adds_eos = _adds(config, found)
    bos = named.get("bos_token", found.bos or _TOLD_WHAT_TO_ADD.get(_class_of(config)))
    eos = named.get("eos_token", found.eos)
    return FastTokenizer(
        check_source(found.values, found.place, rows, (bos, eos)),
        Specials(bos=bos, eos=eos, stop_ids=stop_ids, adds_bos=adds_bos, adds_eos=adds_eos),
    )


def _found(header: CheckpointHeader, config: Json) -> _Found:
    whole = read_json(header, "tokenizer.json")
    if whole is not None:
        return _Found(whole, "tokenizer.json")
    vocabulary, merges = read_json(header, "vocab.json"), read_text(header, "merges.txt")
    if vocabulary is not None and merges is not None:
        return _Found(_byte_level(header, vocabulary, merges, config), "vocab.json")
    tekken = read_json(header, "tekken.json")
    if tekken is not None:
        return _Found(tekken_source(tekken), "tekken.json", "<s>", "</s>")
    for file in SENTENCEPIECE:
        data = read_bytes(header, file)
        if data is not None and not _TIKTOKEN.match(data):
            return _sentencepiece(header, data, file, config)
    listed = (*SENTENCEPIECE, "tiktoken.model", "qwen.tiktoken")
    left = next((file for file in listed if (header.root / file).exists()), None)
    raise LowbitError(
        "E0250",
        f"no tokenizer in {header.root.name} (looked for tokenizer.json, vocab.json+merges.txt, tekken.json, "
        f"tokenizer.model{'' if left is None else f'; {left} is of tiktoken, which is not read'}); pass "
        "--tokenizer <dir or repo> of the base model",
    )


def _class_of(config: Json) -> str:
    return str(config.get("tokenizer_class")).removesuffix("Fast")


def _adds(config: Json, found: _Found) -> tuple[bool | None, bool | None]:
    """Whether BOS and EOS are put around a text; None: as tokenizer.json's post-processor does."""
    bos, eos = (config.get(key) for key in ("add_bos_token", "add_eos_token"))
    if found.place == "tekken.json":
        return True, None
    if found.place == "vocab.json":
        return bos is True, eos is True
    if found.place == "tokenizer.json":
        if _class_of(config) not in _TOLD_WHAT_TO_ADD:
            return None, None
        told = isinstance(bos, bool) or isinstance(eos, bool)
        # transformers 5 no longer writes these keys, only the post-processor that follows from them.
        if not told and "TemplateProcessing" in str(found.values.get("post_processor")):
            return None, None
    return bos is not False, eos is True


def _byte_level(header: CheckpointHeader, vocabulary: Json, merges: str, config: Json) -> Json:
    """GPT-2's files of two, as tokenizer.json has them; how text is cut is known by the class alone."""
    told = config.get("tokenizer_class", header.config.get("tokenizer_class"))
    if told is None:
        told = _BY_MODEL.get(str(header.config.get("model_type")), "GPT2Tokenizer")
    pattern, normalizer = _PATTERNS.get(str(told).removesuffix("Fast"), (None, None))
    if pattern is None:
        raise LowbitError(
            "E0250",
            f"{header.root.name}: vocab.json and merges.txt alone are read of tokenizer_class "
            f"{', '.join(_PATTERNS)}, not of {printable(repr(told))}; pass --tokenizer <dir or repo> of the "
            "base model",
        )
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    added = added_tokens(header, vocabulary)
    numbers: Json = dict(added_numbers(list(added), "vocab.json"))  # where the library looks for them
    replaced = set(numbers.values())
    kept = {token: n for token, n in vocabulary.items() if not isinstance(n, int) or n not in replaced}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer(pattern, "vocab.json"),
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": kept | numbers, "merges": lines},
    }


def _sentencepiece(header: CheckpointHeader, data: bytes, file: str, config: Json) -> _Found:
    """tokenizer.model, with the tokens that other files add to it or have in the place of its unused ones."""
    metadata = sentencepiece_metadata(data, file)
    tokens, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert isinstance(tokens, list) and isinstance(scores, list) and isinstance(types, list), "made above"
    listed = added_tokens(header, {token: number for number, token in enumerate(tokens)})
    numbers = added_numbers(list(listed), header.root.name)
    count = max(len(tokens) - 1, *numbers.values(), 0) + 1
    if count > len(tokens) + MAX_ADDED_PIECES:
        raise LowbitError(
            "E0254",
            f"{header.root.name}: an added token has id {count - 1}, and {file} has {len(tokens)} pieces; "
            "the files are of different models",
        )
    more = range(len(tokens), count)
    tokens += [f"[unused {number}]" for number in more]
    scores += [0.0 for _ in more]
    types += [UNUSED for _ in more]
    for entry in listed:
        text, number = str(entry["content"]), numbers[str(entry["content"])]
        tokens[number], types[number] = text, CONTROL if entry["special"] else USER_DEFINED
    vocabulary = Vocabulary(CheckpointHeader(Path(file), "gguf", {}, metadata=metadata))
    values = gguf_document(vocabulary)
    if config.get("legacy") is False and _class_of(config) == "LlamaTokenizer":
        # A space before the text alone, not behind each special token in it.
        values["normalizer"] = None
        scheme = "first" if metadata["tokenizer.ggml.add_space_prefix"] else "never"
        values["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }
    # Found in the text as it is, before its spaces become underlines.
    flags = {str(entry["content"]): {**entry, "normalized": False} for entry in listed}
    own = vocabulary.added_tokens()
    values["added_tokens"] = [{**token, **flags.get(str(token["content"]), {})} for token in own]
    return _Found(values, file, vocabulary.special("bos"), vocabulary.special("eos"))
