"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

tokenizer.json is what ``gguf_tokenizer`` builds for the ``tokenizers`` library, with the special tokens that
GGUF's flags add as a post-processor; tokenizer_config.json names the specials, generation_config.json what
ends a turn, and the chat template is a file of its own.
"""

from __future__ import annotations

import json

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.tokenization.chat_template import TOOL_TEMPLATE
from lowbit.tokenization.gguf_tokenizer import GgufSource, gguf_source

_SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_documents(header: CheckpointHeader, context_length: int) -> dict[str, str]:
    """File name -> text, for the model in a GGUF file."""
    found = gguf_source(header)
    tokenizer = json.loads(found.text)
    if tokenizer.get("post_processor") is None:
        tokenizer["post_processor"] = _post_processor(found)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(found.specials.adds_bos),
        "add_eos_token": bool(found.specials.adds_eos),
    }
    config |= {name: token for key, name in _SPECIALS.items() if (token := found.special(key)) is not None}
    generation: dict[str, object] = {"eos_token_id": sorted(found.specials.stop_ids)}
    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (token := found.special(key)) is not None:
            generation[name] = found.ids[token]
    documents = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": _text(config),
        "generation_config.json": _text(generation),
    }
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        documents["chat_template.jinja"] = template
    with_tools = header.metadata.get("tokenizer.chat_template.tool_use")
    if isinstance(with_tools, str):
        documents[TOOL_TEMPLATE] = with_tools
    return documents


def _text(values: dict[str, object]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _post_processor(found: GgufSource) -> dict[str, object] | None:
    """Puts BOS before and EOS behind a text, where the flags say so."""
    before = found.special("bos") if found.specials.adds_bos else None
    after = found.special("eos") if found.specials.adds_eos else None
    if before is None and after is None:
        return None

    def sequence(name: str) -> list[dict[str, object]]:
        number = 0 if name == "A" else 1
        steps: list[dict[str, object]] = [{"Sequence": {"id": name, "type_id": number}}]
        if before is not None:
            steps.insert(0, {"SpecialToken": {"id": before, "type_id": number}})
        if after is not None:
            steps.append({"SpecialToken": {"id": after, "type_id": number}})
        return steps

    named = {token for token in (before, after) if token is not None}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": [*sequence("A"), *sequence("B")],
        "special_tokens": {
            token: {"id": token, "ids": [found.ids[token]], "tokens": [token]} for token in sorted(named)
        },
    }
