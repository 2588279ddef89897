"""FastTokenizer: lowbit's Tokenizer on top of the ``tokenizers`` library, whatever the vocabulary came from.

The library decides whether special tokens inside a text count by a switch on the object, so there are two
objects: one that parses them, and one, built when first asked for, that does not.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import tokenizers

from lowbit.errors import LowbitError, printable

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
MAX_ID = 1 << 24
MAX_ADDED = 1_000_000
MAX_LEFT_OUT = 64
_NOWHERE = "\U0010ffff"  # a code that is no character


@dataclass(frozen=True)
class Specials:
    """What a checkpoint says about its special tokens. ``adds_bos`` None: as its post-processor does."""

    bos: str | None = None
    eos: str | None = None
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    adds_bos: bool | None = None
    adds_eos: bool | None = None


@dataclass(frozen=True)
class Source:
    """What a tokenizer is built from: tokenizer.json's ``text``; ``place``: the file, for messages.

    ``largest``: of the vocabulary's ids, which may leave numbers out; ``left_out``: the added tokens that the
    embedding has no row for, which are not in ``text``.
    """

    text: str
    place: str
    largest: int = -1
    left_out: tuple[str, ...] = ()


class FastTokenizer:
    """See ``tokenizer.Tokenizer``."""

    def __init__(self, source: Source, specials: Specials) -> None:
        self.source = source
        self._tokenizer = _build(source)
        self._lock = threading.Lock()
        self._plain: tokenizers.Tokenizer | None = None
        self._bytes: dict[int, bytes] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._added = {number: token.content for number, token in added.items()}
        sample = self._sample()
        largest = max(*added, *sample, source.largest, -1)
        self.vocab_size = max(self._tokenizer.get_vocab_size(with_added_tokens=True), largest + 1)
        self.bos_id = self._id(specials.bos)
        self.eos_id = self._id(specials.eos)
        self.stop_ids = specials.stop_ids | ({self.eos_id} if self.eos_id is not None else set())
        self._forced_bos = specials.adds_bos
        self._forced_eos = specials.adds_eos
        self.adds_bos = bool(
            self.bos_id is not None and sample[:1] == [self.bos_id]
            if specials.adds_bos is None
            else specials.adds_bos and self.bos_id is not None
        )
        self._byte_level = _is_byte_level(self._tokenizer)
        decoder = str(self._tokenizer.decoder)
        self._byte_fallback = "ByteFallback" in decoder and not self._byte_level
        self._strips_space = 'Strip(content=" ", start=1' in decoder
        # Added tokens that the library takes for stand-ins of bytes: DeepSeek's "ö" is the letter itself.
        self._literal = frozenset(
            number
            for number, token in self._added.items()
            if self._byte_level
            and number not in self.special_ids
            and not token.isascii()
            and all(c in _byte_of() for c in token)
        )
        # Special tokens that a text is turned into without naming them: of unknown characters, and of bytes.
        unknown = self._id(getattr(self._tokenizer.model, "unk_token", None))
        self.made_ids = frozenset(
            number
            for number in self.special_ids
            if number == unknown or _BYTE_TOKEN.fullmatch(self._added[number])
        )
        self.special_texts = {self._added[number]: number for number in self.special_ids}

    def _sample(self) -> list[int]:
        """A letter and what the post-processor puts around it; nothing where the vocabulary has none."""
        try:
            ids: list[int] = self._one(self._tokenizer.encode_batch_fast, "a", True).ids
        except LowbitError:
            return []
        return ids

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of ``text``; the BOS that is added is not added before one that is there."""
        tokenizer = self._tokenizer if parse_special else self._without_specials()
        by_library = add_special and self._forced_bos is None and self._forced_eos is None
        ids: list[int] = self._one(tokenizer.encode_batch_fast, text, by_library).ids
        if add_special and not by_library:
            if self._forced_bos and self.bos_id is not None:
                ids = [self.bos_id, *ids]
            if self._forced_eos and self.eos_id is not None:
                ids = [*ids, self.eos_id]
        if add_special and self.adds_bos and len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            ids = ids[1:]  # the text itself began with it
        return ids

    def pieces(self, text: str) -> list[tuple[str, list[int], int | None]]:
        """``text`` cut at the special tokens written in it, which take spaces beside them along: what stands
        before one, its ids, and the token; None at the end."""
        encoded = self._one(self._tokenizer.encode_batch, text, False)
        found: list[tuple[str, list[int], int | None]] = []
        place = start = 0
        for index, (token, (begin, end)) in enumerate(zip(encoded.ids, encoded.offsets, strict=True)):
            if token in self.special_ids and text[begin:end].strip() == self._added[token].strip():
                found.append((text[place:begin], encoded.ids[start:index], token))
                place, start = end, index + 1
        return [*found, (text[place:], encoded.ids[start:], None)]

    def _one(
        self, encode_batch: Callable[..., list[tokenizers.Encoding]], text: str, add_special: bool
    ) -> tokenizers.Encoding:
        """By the batch call, which lets go of the interpreter lock: a long text must not stop the event
        loop."""
        try:
            (encoded,) = encode_batch([text], add_special_tokens=add_special)
        except BaseException as error:  # the library panics on some hostile files, past Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise LowbitError(
                "E0255", f"{self.source.place}: the tokenizer failed on this text: {printable(error)}"
            ) from None
        return encoded

    def _without_specials(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._plain is None:
                self._plain = _build(self._unnamed())
                self._plain.encode_special_tokens = True
            return self._plain

    def _unnamed(self) -> Source:
        """The source, without the special tokens' texts in a unigram vocabulary: there they are words, too,
        and the likeliest where a text has them."""
        if not isinstance(self._tokenizer.model, tokenizers.models.Unigram):
            return self.source
        values = json.loads(self.source.text)
        words = values["model"]["vocab"]
        for number in self.special_ids:
            if number < len(words):
                words[number][0] = f"{_NOWHERE}{number}"
        added = values.get("added_tokens") or []
        values["added_tokens"] = [token for token in added if not token.get("special")]
        return replace(self.source, text=json.dumps(values))

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``."""
        if not self._literal:
            return self._decode(ids, skip_special)
        pieces, start = [], 0
        for place, token in enumerate(ids):
            if token in self._literal:
                pieces += [self._decode(ids[start:place], skip_special), self._added[token]]
                start = place + 1
        return "".join([*pieces, self._decode(ids[start:], skip_special)])

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        # The library gives up all of a row of byte tokens for one byte that is no UTF-8.
        return self._from_bytes(ids, skip_special) if self._byte_fallback and "�" in text else text

    def _from_bytes(self, ids: list[int], skip_special: bool) -> str:
        """As the library's decoder, but what is no UTF-8 leaves the bytes beside it alone."""
        kept = (token for token in ids if not (skip_special and token in self.special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._strips_space else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._find_bytes(token)
        return known

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            table = _byte_of()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        if _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def token_text(self, token: int) -> str:
        """The token as OpenAI's logprobs print it."""
        return self.token_bytes(token).decode("utf-8", errors="replace")


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return "ByteLevel" in str(tokenizer.decoder)


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    if not _BYTES:
        printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable_bytes]
        _BYTES.update({chr(byte): byte for byte in printable_bytes})
        _BYTES.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return _BYTES


_BYTES: dict[str, int] = {}


def _build(source: Source) -> tokenizers.Tokenizer:
    """The library's object. It panics on some damaged files instead of raising, so everything is caught."""
    try:
        made = tokenizers.Tokenizer.from_str(source.text)
        # Of the training that saved the file: prompts are neither cut nor filled up, as in transformers.
        made.no_truncation()
        made.no_padding()
        return made
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise LowbitError("E0254", f"{source.place}: no usable tokenizer: {printable(error)}") from None


def added_numbers(added: list[object], place: str) -> dict[str, int]:
    """Text -> id of tokenizer.json's added tokens, checked."""
    if len(added) > MAX_ADDED:
        raise LowbitError("E0254", f"{place}: {len(added)} added tokens, limit {MAX_ADDED}")
    numbers: dict[str, int] = {}
    seen: set[int] = set()
    for token in added:
        number = token.get("id") if isinstance(token, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_ID:
            raise LowbitError("E0254", f"{place}: an added token has id {printable(number)}")
        if number in seen:
            raise LowbitError("E0254", f"{place}: two added tokens have id {number}")
        seen.add(number)
        assert isinstance(token, dict), "it has an id"
        numbers[str(token.get("content"))] = number
    return numbers


def check_source(
    values: dict[str, object], place: str, rows: int | None = None, needed: Collection[str | None] = ()
) -> Source:
    """tokenizer.json's object as text for the library, after what it does not check itself.

    ``rows``: of the embedding. Added tokens behind it are left out, so that their text is plain text: models
    are published with a padding token, or one for pictures, that they have no row for. Not where one of them
    is ``needed``, where they are many or where other tokens are behind it, too: such a tokenizer is another
    model's.
    """
    added = values.get("added_tokens")
    numbers = added_numbers(added, place) if isinstance(added, list) else {}
    model = values.get("model")
    if not isinstance(model, dict):
        raise LowbitError("E0254", f"{place}: no tokenizer model in it")
    vocabulary = model.get("vocab")
    words = vocabulary if isinstance(vocabulary, dict) else {}
    worst = max((n for n in words.values() if isinstance(n, int)), default=-1)
    if worst >= MAX_ID or len(words) > MAX_ID:
        raise LowbitError("E0254", f"{place}: a token has id {worst}, limit {MAX_ID}")
    if rows is not None and rows <= max(numbers.values(), default=-1) < rows + MAX_LEFT_OUT:
        behind = {text for text, number in numbers.items() if number >= rows}
        kept = {text: number for text, number in words.items() if text not in behind}
        worst_kept = max((n for n in kept.values() if isinstance(n, int)), default=-1)
        if worst_kept < rows and not behind & set(needed):
            assert isinstance(added, list), "numbers are its"
            tokens = [token for token in added if token["id"] < rows]
            model = {**model, "vocab": kept if words else vocabulary}
            text = json.dumps({**values, "added_tokens": tokens, "model": model})
            return Source(text, place, worst_kept, tuple(sorted(behind)))
    return Source(json.dumps(values), place, worst)
