"""tekken.json, Mistral's own tokenizer file, as tokenizer.json's object.

    config          pattern (how text is cut into words), default_vocab_size, default_num_special_tokens
    vocab           [{"rank": 0, "token_bytes": base64, …}, …]   byte-level BPE by rank, as tiktoken has it
    special_tokens  [{"rank": 0, "token_str": "<s>", …}, …]      newer files; older ones have a fixed list

Special tokens come first: token of rank r has id r + default_num_special_tokens, and only as many ranks count
as the vocabulary has room for. tiktoken joins the neighbours whose joint token has the lowest rank; here that
is a list of merges: every way to cut a token into two tokens, in the order of the whole's rank. On Mistral's
own tekken file the ids are tiktoken's.
"""

from __future__ import annotations

import base64
import binascii

from lowbit.errors import LowbitError, printable

MAX_TOKENS = 1 << 20
MAX_TOKEN_BYTES = 1024
# The first special tokens of files that do not list them.
_FIRST = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def tekken_source(values: dict[str, object]) -> dict[str, object]:
    """tokenizer.json's object."""
    config = values.get("config")
    if not isinstance(config, dict):
        raise LowbitError("E0254", "tekken.json: no config in it")
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= 2048:
        raise LowbitError("E0254", "tekken.json: config.pattern must be a regular expression")
    special = _number(config, "default_num_special_tokens")
    tokens = _tokens(values.get("vocab"), _number(config, "default_vocab_size") - special)
    characters = _byte_characters()
    texts = ["".join(characters[byte] for byte in token) for token in tokens]
    added = _special_tokens(values.get("special_tokens"), special)
    # The library takes a special token's id from the vocabulary: its name has to be there.
    vocabulary: dict[str, int] = {str(token["content"]): rank for rank, token in enumerate(added)}
    vocabulary |= {text: special + rank for rank, text in enumerate(texts)}
    if len(vocabulary) != special + len(texts):
        raise LowbitError("E0254", "tekken.json: a special token has the text of another token")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": _merges(texts),
            "ignore_merges": True,
        },
    }


def _number(config: dict[str, object], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise LowbitError(
            "E0254",
            f"tekken.json: config.{key} must be a whole number from 1 to {MAX_TOKENS}, found "
            f"{printable(repr(value))}",
        )
    return value


def _tokens(vocabulary: object, count: int) -> list[bytes]:
    """The bytes of ranks 0 to count - 1."""
    if not isinstance(vocabulary, list) or not 256 <= count <= len(vocabulary):
        found = len(vocabulary) if isinstance(vocabulary, list) else "no"
        raise LowbitError("E0254", f"tekken.json: {count} tokens are wanted, {found} are in vocab")
    tokens = []
    for rank, entry in enumerate(vocabulary[:count]):
        stored = entry.get("token_bytes") if isinstance(entry, dict) else None
        try:
            token = base64.b64decode(stored, validate=True) if isinstance(stored, str) else b""
        except (binascii.Error, ValueError):
            token = b""
        if not token or len(token) > MAX_TOKEN_BYTES or entry.get("rank") != rank:
            raise LowbitError("E0254", f"tekken.json: token {rank} of vocab has no bytes or another rank")
        tokens.append(token)
    if len(set(tokens)) != count:
        raise LowbitError("E0254", "tekken.json: two tokens of vocab have the same bytes")
    return tokens


def _special_tokens(listed: object, count: int) -> list[dict[str, object]]:
    names = [_FIRST[rank] if rank < len(_FIRST) else f"<SPECIAL_{rank}>" for rank in range(count)]
    for entry in listed if isinstance(listed, list) else []:
        rank, name = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not 0 <= rank < count or not isinstance(name, str) or not name:
            raise LowbitError("E0254", f"tekken.json: {printable(repr(entry))} is no special token")
        names[rank] = name
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": rank, "content": name, **flags} for rank, name in enumerate(names)]


def _merges(texts: list[str]) -> list[list[str]]:
    """Pairs in the order in which they are joined."""
    ranks = {text: rank for rank, text in enumerate(texts)}
    merges: list[list[str]] = []
    for text in texts:
        pairs = [
            (ranks[text[:at]], ranks[text[at:]], at)
            for at in range(1, len(text))
            if text[:at] in ranks and text[at:] in ranks
        ]
        merges += [[text[:at], text[at:]] for _, _, at in sorted(pairs)]
    return merges


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: printable ones for themselves."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
