"""A tokenizer from the files of a folder: tokenizer.json, vocab.json with merges.txt, or tekken.json."""

from __future__ import annotations

import json

from lowbit.checkpoint.documents import read_json, read_text
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization.fast_tokenizer import FastTokenizer, Specials, check_source
from lowbit.tokenization.pretokenizers import pre_tokenizer
from lowbit.tokenization.tekken import tekken_source


def folder_tokenizer(header: CheckpointHeader, stop_ids: frozenset[int]) -> FastTokenizer:
    """The tokenizer of a folder; ``stop_ids``: what generation_config.json names."""
    config = read_json(header, "tokenizer_config.json") or {}
    listed = read_json(header, "special_tokens_map.json") or {}
    specials = Specials(
        bos=_token_text(config.get("bos_token", listed.get("bos_token"))),
        eos=_token_text(config.get("eos_token", listed.get("eos_token"))),
        stop_ids=stop_ids,
    )
    whole = read_json(header, "tokenizer.json")
    if whole is not None:
        return FastTokenizer(check_source(whole, "tokenizer.json"), specials, "tokenizer.json")
    vocabulary, merges = read_json(header, "vocab.json"), read_text(header, "merges.txt")
    if vocabulary is not None and merges is not None:
        source = _byte_level(vocabulary, merges, config)
        return FastTokenizer(check_source(source, "vocab.json"), specials, "vocab.json")
    tekken = read_json(header, "tekken.json")
    if tekken is not None:
        named = Specials(bos="<s>", eos="</s>", stop_ids=stop_ids, adds_bos=True)
        return FastTokenizer(check_source(tekken_source(tekken), "tekken.json"), named, "tekken.json")
    found = " (tokenizer.model alone is not read: convert it to tokenizer.json)"
    has_model = (header.root / "tokenizer.model").exists()
    raise LowbitError(
        "E0250",
        f"no tokenizer in {header.root.name} (looked for tokenizer.json, vocab.json+merges.txt, tekken.json)"
        f"{found if has_model else ''}; pass --tokenizer <dir or repo> of the base model",
    )


def _token_text(value: object) -> str | None:
    """A token written as a string or as {"content": …}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _byte_level(vocabulary: dict[str, object], merges: str, config: dict[str, object]) -> dict[str, object]:
    """GPT-2's files of two, as tokenizer.json has them."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    added = config.get("added_tokens_decoder")
    tokens = []
    for number, token in (added if isinstance(added, dict) else {}).items():
        if isinstance(token, dict) and str(number).isdigit():
            tokens.append({"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                           "special": False, **token, "id": int(number)})  # fmt: skip
    return json.loads(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": tokens,
                "normalizer": None,
                "pre_tokenizer": pre_tokenizer("gpt-2", "vocab.json"),
                "post_processor": None,
                "decoder": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "model": {"type": "BPE", "vocab": vocabulary, "merges": lines},
            }
        )
    )
