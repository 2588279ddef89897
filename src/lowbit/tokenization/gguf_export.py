"""A folder's tokenizer as GGUF metadata, in the keys llama.cpp's converter writes.

Byte-level BPE (``gpt2``) is written with the name of its pre-tokenizer, found by its patterns; SentencePiece
BPE (``llama``) with scores that put its merges in their order. What was made is read back, and must cut
sample texts as the folder's tokenizer does; a tokenizer that GGUF cannot say is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization import load_tokenizer
from lowbit.tokenization.chat_template import find_template
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from lowbit.tokenization.gguf_tokenizer import gguf_tokenizer
from lowbit.tokenization.pretokenizers import DIGITS, GPT2, IGNORES_MERGES, PRE_TOKENIZERS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SAMPLES = (
    "Hello world",
    "  two  spaces and\ttabs\n\nlines \n",
    "it's 12345 dogs, we'll CAN'T'VE",
    "naïve Ünïcode: 你好，世界 🙂 Привет",
    "def f(x):\n    return x**2  # 3.14\r\n",
)

Json = dict[str, object]


def tokenizer_metadata(header: CheckpointHeader, rows: int) -> Json:
    """The ``tokenizer.*`` keys; ``rows``: of the embedding, as many tokens are listed."""
    if header.container == "gguf":
        return {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.")}
    tokenizer = load_tokenizer(header, rows=rows)
    # Where there is no such file, what was made of tokenizer.model, vocab.json or tekken.json.
    whole = read_json(header, "tokenizer.json") or json.loads(tokenizer.source.text)
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise _unsaid(header, "only BPE models can be written")
    common = _tokens(header, whole, model, rows, tokenizer.source.left_out)
    common |= _specials(header, tokenizer, common["tokenizer.ggml.tokens"])
    template = find_template(header)
    if template is not None:
        common["tokenizer.chat_template"] = template.source
        if template.with_tools is not None:
            common["tokenizer.chat_templates"] = ["tool_use"]
            common["tokenizer.chat_template.tool_use"] = template.with_tools
    for candidate in _candidates(whole, model, common):
        metadata = common | candidate
        if _reads_the_same(header, tokenizer, metadata):
            return metadata
    raise _unsaid(header, "its pre-tokenizer or normalizer has no name in GGUF")


def _unsaid(header: CheckpointHeader, why: str) -> LowbitError:
    return LowbitError(
        "E0450",
        f"{header.root.name}: GGUF metadata cannot say what its tokenizer does: {why}. Use llama.cpp's "
        "convert_hf_to_gguf.py",
    )


def _tokens(header: CheckpointHeader, whole: Json, model: Json, rows: int, left_out: tuple[str, ...]) -> Json:
    vocabulary = model.get("vocab")
    added = whole.get("added_tokens")
    if not isinstance(vocabulary, dict):
        raise _unsaid(header, "its vocabulary is no object")
    tokens: list[str | None] = [None] * rows
    types = [_UNUSED] * rows
    for token, number in vocabulary.items():
        if token in left_out:
            continue
        if not isinstance(number, int) or number >= rows:
            raise _unsaid(header, f"token {number} is beyond the {rows} rows of the embedding")
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, _BYTE if is_byte else _NORMAL
    for entry in added if isinstance(added, list) else []:
        number, token = entry["id"], entry["content"]
        if token in left_out:
            continue
        if number >= rows:
            raise _unsaid(header, f"token {number} is beyond the {rows} rows of the embedding")
        tokens[number], types[number] = token, _CONTROL if entry.get("special") else _USER_DEFINED
        if token == model.get("unk_token"):
            types[number] = _UNKNOWN
    merges = model.get("merges")
    pairs = [m if isinstance(m, str) else " ".join(m) for m in (merges if isinstance(merges, list) else [])]
    named = [f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)]
    return {"tokenizer.ggml.tokens": named, "tokenizer.ggml.token_type": types, "merges": pairs}


def _specials(header: CheckpointHeader, tokenizer: FastTokenizer, tokens: object) -> Json:
    assert isinstance(tokens, list), "made by _tokens"
    config = read_json(header, "tokenizer_config.json") or {}
    found: Json = {"tokenizer.ggml.add_bos_token": tokenizer.adds_bos}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for key, name in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = config.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        ids[key] = tokens.index(text) if text in tokens else None
    return found | {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items() if v is not None}


def _candidates(whole: Json, model: Json, common: Json) -> Iterator[Json]:
    """Metadata that may say what this tokenizer does."""
    merges = common.pop("merges")
    if model.get("byte_fallback"):
        tokens = common["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list), "made above"
        # A token's rank is its score: SentencePiece numbers its pieces in the order of merging.
        scores = [-float(number) for number in range(len(tokens))]
        for prefix in (True, False):
            yield {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": prefix,
            }
        return
    patterns = _patterns(whole.get("pre_tokenizer"))
    ignores = bool(model.get("ignore_merges"))
    names = [name for name, known in PRE_TOKENIZERS.items() if known == patterns and name != "default"]
    for name in (name for name in names if (name in IGNORES_MERGES) == ignores):
        yield {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": merges,
        }


def _patterns(node: object) -> tuple[str, ...]:
    """The regular expressions of a pre-tokenizer, in their order; "?" for what has none."""
    if not isinstance(node, dict):
        return ("?",)
    match node.get("type"):
        case "Sequence":
            steps = node.get("pretokenizers")
            return tuple(p for step in (steps if isinstance(steps, list) else []) for p in _patterns(step))
        case "ByteLevel":
            return (GPT2,) if node.get("use_regex", True) else ()
        case "Digits":
            return (DIGITS,) if node.get("individual_digits") else ("?",)
        case "Split":
            pattern = node.get("pattern")
            found = pattern.get("Regex") if isinstance(pattern, dict) else None
            return (found if isinstance(found, str) else "?",)
    return ("?",)


def _reads_the_same(header: CheckpointHeader, tokenizer: FastTokenizer, metadata: Json) -> bool:
    made = gguf_tokenizer(CheckpointHeader(Path(header.root.name), "gguf", {}, metadata=metadata))
    return all(made.encode(text) == tokenizer.encode(text) for text in _SAMPLES)
