"""Text <-> token ids, and chat templates. Imports no torch."""

from __future__ import annotations

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from lowbit.tokenization.generation_config import GenerationConfig, load_generation_config, sampling_defaults
from lowbit.tokenization.tokenizer import ChatTemplate, Tokenizer

__all__ = [
    "ChatTemplate",
    "GenerationConfig",
    "Tokenizer",
    "check_vocabulary",
    "embedding_rows",
    "load_chat_template",
    "load_generation_config",
    "load_tokenizer",
    "sampling_defaults",
]


def load_tokenizer(
    header: CheckpointHeader, override: str | None = None, rows: int | None = None
) -> FastTokenizer:
    """The checkpoint's tokenizer, or the one of another checkpoint (``--tokenizer``), without the few added
    tokens behind the last row of the model's embedding; ``rows``: where ``header`` is not the model's."""
    rows = embedding_rows(header) if rows is None else rows
    if override is not None:
        from lowbit.checkpoint import open_checkpoint

        header = open_checkpoint(override)
    if header.container == "gguf":
        from lowbit.tokenization.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(header)
    from lowbit.tokenization.folder_tokenizer import folder_tokenizer

    return folder_tokenizer(header, load_generation_config(header).stop_ids, rows)


def load_chat_template(
    header: CheckpointHeader, tokenizer: FastTokenizer, override_file: str | None = None
) -> ChatTemplate | None:
    """The checkpoint's chat template, another file's, or the built-in ``chatml``; None where it has none."""
    from lowbit.tokenization.chat_template import JinjaTemplate, find_template

    found = find_template(header, override_file)
    if found is None:
        return None
    known = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}  # tekken.json names none
    variables = {name: tokenizer.token_text(token) for name, token in known.items() if token is not None}
    return JinjaTemplate(found.source, found.place, tokenizer, variables | found.variables, found.with_tools)


def embedding_rows(header: CheckpointHeader) -> int | None:
    """Rows of the embedding as stored, or what the config says where they cannot be told."""
    for prefix in ("", "model.", "language_model.model.", "model.language_model."):
        entry = header.tensors.get(f"{prefix}embed_tokens.weight")
        if entry is not None and len(entry.shape) == 2 and entry.dtype != "U8":
            return entry.shape[0]
    entry = header.tensors.get("token_embd.weight")
    if entry is not None and len(entry.shape) == 2:
        return entry.shape[0]
    text = header.config.get("text_config")
    told = header.config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return told if isinstance(told, int) and not isinstance(told, bool) else None


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer that can make ids the model's embedding has no row for."""
    if tokenizer.vocab_size <= rows:
        return
    ends = {"eos_token": tokenizer.eos_id, "bos_token": tokenizer.bos_id}
    named = next((f" (its {name} is {n})" for name, n in ends.items() if n is not None and n >= rows), "")
    raise LowbitError(
        "E0251",
        f"tokenizer has {tokenizer.vocab_size} ids{named} but the embedding has {rows} rows; this tokenizer "
        "belongs to another model",
    )
