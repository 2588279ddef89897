"""A tokenizer from GGUF metadata: byte-level BPE (gpt2), SentencePiece BPE (llama) or unigram (t5).

The vocabulary is put into the form of tokenizer.json, so that the ``tokenizers`` library does the work.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.tokenization.fast_tokenizer import FastTokenizer, Source, Specials
from lowbit.tokenization.pretokenizers import ADDS_BOS, IGNORES_MERGES, pre_tokenizer

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

# Tokens that end a turn, by text, as ggml's vocabulary knows them: many files name only one of theirs.
END_OF_TURN = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|eom_id|>", "<EOT>", "_<EOT>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>"),
        *("<｜end▁of▁sentence｜>", "<|eot|>", "<turn|>", "[EOT]", "[EOS]", "<end_of_utterance>"),
    }
)
# Pre-tokenizers of models (architecture, and tokens where it has several) with GGUF files before May 2024.
_UNNAMED: dict[tuple[object, int | None], str] = {
    ("llama", 128256): "llama-bpe",  # Llama 3
    ("llama", 32256): "deepseek-coder",
    ("llama", 102400): "deepseek-llm",
    ("qwen2", None): "qwen2",
    ("qwen2moe", None): "qwen2",
    ("falcon", None): "falcon",
    ("starcoder2", None): "starcoder",
    ("command-r", None): "command-r",
    ("stablelm", 100352): "stablelm2",
}
_HARMONY = frozenset({"<|return|>", "<|call|>"})
_KEEP_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})  # of Phi-3's special tokens


class Vocabulary:
    """The tokenizer keys of the metadata, checked."""

    def __init__(self, header: CheckpointHeader) -> None:
        self.file = header.root.name
        self.metadata = header.metadata
        tokens = self._get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
            raise LowbitError("E0250", f"{self.file}: no tokenizer in its metadata (tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens
        types = self._get("token_type")
        if types is not None and (not isinstance(types, list) or len(types) != len(tokens)):
            raise LowbitError("E0254", f"{self.file}: tokenizer.ggml.token_type does not fit its tokens")
        self.types: list[int] = types if isinstance(types, list) else [1] * len(tokens)
        self.ids: dict[str, int] = {}
        for number, token in enumerate(tokens):
            self.ids.setdefault(token, number)

    def _get(self, name: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def text(self, name: str, default: str = "") -> str:
        value = self._get(name)
        return value if isinstance(value, str) else default

    def flag(self, name: str) -> bool | None:
        value = self._get(name)
        return value if isinstance(value, bool) else None

    def special(self, name: str) -> str | None:
        """The text of a token named by id."""
        number = self._get(f"{name}_token_id")
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise LowbitError(
                "E0254",
                f"{self.file}: tokenizer.ggml.{name}_token_id is {printable(number)}, the vocabulary has "
                f"{len(self.tokens)} tokens",
            )
        return self.tokens[number]

    def pre(self) -> str:
        """The pre-tokenizer's name; what the model's kind implies in files from before there were names."""
        name, kind = self.text("pre", "default"), self.metadata.get("general.architecture")
        if name != "default":
            return name
        return _UNNAMED.get((kind, len(self.tokens))) or _UNNAMED.get((kind, None), name)

    def scores(self) -> list[float]:
        values = self._get("scores")
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise LowbitError("E0254", f"{self.file}: tokenizer.ggml.scores does not fit its tokens")
        return values

    def merges(self) -> list[str]:
        values = self._get("merges")
        if not isinstance(values, list) or not all(isinstance(m, str) for m in values):
            raise LowbitError("E0254", f"{self.file}: tokenizer.ggml.merges is missing")
        return values

    def added_tokens(self) -> list[dict[str, object]]:
        """Control and user-defined tokens, which are found in text before anything else."""
        specials = {self.special(name) for name in ("bos", "eos", "unknown", "padding")}
        # GGUF does not say that special tokens of Phi-3 swallow the spaces behind them.
        strips = self.metadata.get("general.architecture") == "phi3" and self.text("model") == "llama"
        listed = []
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            control = kind == CONTROL or (kind == UNKNOWN and token in specials)
            if (control or kind == USER_DEFINED) and token:
                listed.append(
                    {
                        "id": number,
                        "content": token,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": strips and token not in _KEEP_SPACES,
                        "normalized": False,
                        "special": control,
                    }
                )
        return listed

    def stop_ids(self) -> frozenset[int]:
        """Every token that ends a turn: named by id, or known by its text."""
        named = {self.special(name) for name in ("eos", "eot", "eom")}
        by_text = {
            token
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token in END_OF_TURN
        }
        found = named | by_text
        if found >= _HARMONY:  # gpt-oss ends each message of a turn with it, its thoughts first
            found -= {"<|end|>"}
        return frozenset(self.ids[token] for token in found if token is not None)


@dataclass(frozen=True)
class GgufSource:
    """What a GGUF file's tokenizer is made of: tokenizer.json as ``text``, and what its flags say."""

    text: str
    specials: Specials
    vocabulary: Vocabulary

    def special(self, name: str) -> str | None:
        """The text of ``bos``, ``eos``, ``unknown`` or ``padding``."""
        return self.vocabulary.special(name)

    @property
    def ids(self) -> dict[str, int]:
        """Token -> number."""
        return self.vocabulary.ids


def gguf_tokenizer(header: CheckpointHeader) -> FastTokenizer:
    """The tokenizer a GGUF file carries."""
    found = gguf_source(header)
    vocabulary = found.vocabulary
    return FastTokenizer(Source(found.text, vocabulary.file, len(vocabulary.tokens) - 1), found.specials)


def gguf_source(header: CheckpointHeader) -> GgufSource:
    """The tokenizer's parts, checked."""
    whole = header.metadata.get("tokenizer.huggingface.json")
    vocabulary = Vocabulary(header)
    model = vocabulary.text("model")
    source = whole if isinstance(whole, str) else json.dumps(gguf_document(vocabulary))
    adds_bos = vocabulary.flag("add_bos_token")
    if adds_bos is None:
        adds_bos = model == "llama" or (model == "gpt2" and vocabulary.pre() in ADDS_BOS)
    specials = Specials(
        bos=vocabulary.special("bos"),
        eos=vocabulary.special("eos"),
        stop_ids=vocabulary.stop_ids(),
        adds_bos=adds_bos,
        adds_eos=bool(vocabulary.flag("add_eos_token")),
    )
    return GgufSource(source, specials, vocabulary)


def gguf_document(vocabulary: Vocabulary) -> dict[str, object]:
    """tokenizer.json's object."""
    model = vocabulary.text("model")
    if model == "gpt2":
        return _byte_level(vocabulary)
    if model == "llama":
        return _sentencepiece(vocabulary)
    if model == "t5":
        return _unigram(vocabulary)
    raise LowbitError(
        "E0254",
        f"{vocabulary.file}: tokenizer model {printable(model)!r} is not supported (gpt2, llama, t5); "
        "pass --tokenizer <folder or repo> of the base model",
    )


def _document(vocabulary: Vocabulary, **parts: object) -> dict[str, object]:
    empty = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    empty |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    return {**empty, "added_tokens": vocabulary.added_tokens(), **parts}


def _byte_level(vocabulary: Vocabulary) -> dict[str, object]:
    name = vocabulary.pre()
    return _document(
        vocabulary,
        pre_tokenizer=pre_tokenizer(name, vocabulary.file),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={
            "type": "BPE",
            "vocab": vocabulary.ids,
            "merges": vocabulary.merges(),
            "ignore_merges": name in IGNORES_MERGES,
        },
    )


def _sentencepiece(vocabulary: Vocabulary) -> dict[str, object]:
    """SentencePiece BPE: merges follow from the scores; a higher score merges first."""
    ids, scores = vocabulary.ids, vocabulary.scores()
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN, BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return _document(
        vocabulary,
        normalizer=_normalizer(vocabulary),
        decoder=_underline_decoder(strips_space=_prepends(vocabulary)),
        model={
            "type": "BPE",
            "vocab": ids,
            "merges": [(left, right) for *_, left, right in merges],
            "unk_token": vocabulary.special("unknown") or "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    )


def _prepends(vocabulary: Vocabulary) -> bool:
    """Whether a space is put before the text."""
    return vocabulary.flag("add_space_prefix") is not False


def _normalizer(vocabulary: Vocabulary) -> dict[str, object]:
    """SentencePiece's: letters replaced, spaces to underlines, one more in front. Not the library's
    Metaspace, which leaves out the one in front of a text that begins with a space."""
    steps: list[dict[str, object]] = []
    charsmap = vocabulary.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, list) and charsmap:
        packed = base64.b64encode(bytes(byte & 255 for byte in charsmap)).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": packed})
    if vocabulary.flag("remove_extra_whitespaces"):
        extra = {"Regex": "^ +| +$| (?= )"}
        steps.append({"type": "Replace", "pattern": extra, "content": ""})
    if _prepends(vocabulary):
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def _underline_decoder(strips_space: bool) -> dict[str, object]:
    """Underlines to spaces, byte tokens to bytes, without the space that was put before the text."""
    steps: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strips_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(vocabulary: Vocabulary) -> dict[str, object]:
    unknown = vocabulary.special("unknown")
    return _document(
        vocabulary,
        normalizer=_normalizer(vocabulary),
        decoder=_underline_decoder(strips_space=_prepends(vocabulary)),
        model={
            "type": "Unigram",
            "unk_id": None if unknown is None else vocabulary.ids[unknown],
            "vocab": list(zip(vocabulary.tokens, vocabulary.scores(), strict=True)),
            "byte_fallback": BYTE in vocabulary.types,
        },
    )
