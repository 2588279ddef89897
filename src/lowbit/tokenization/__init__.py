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
    "load_chat_template",
    "load_generation_config",
    "load_tokenizer",
    "sampling_defaults",
]


def load_tokenizer(header: CheckpointHeader, override: str | None = None) -> FastTokenizer:
    """The checkpoint's tokenizer, or the one of another checkpoint (``--tokenizer``)."""
    if override is not None:
        from lowbit.checkpoint import open_checkpoint

        header = open_checkpoint(override)
    if header.container == "gguf":
        from lowbit.tokenization.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(header)
    from lowbit.tokenization.folder_tokenizer import folder_tokenizer

    return folder_tokenizer(header, load_generation_config(header).stop_ids)


def load_chat_template(
    header: CheckpointHeader, tokenizer: FastTokenizer, override_file: str | None = None
) -> ChatTemplate | None:
    """The checkpoint's chat template, another file's, or the built-in ``chatml``; None where it has none."""
    from lowbit.tokenization.chat_template import JinjaTemplate, find_template

    found = find_template(header, override_file)
    if found is None:
        return None
    return JinjaTemplate(found.source, found.place, tokenizer, found.variables, found.with_tools)


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Refuse a tokenizer that can make ids the model has no embedding for."""
    if tokenizer.vocab_size > embedding_rows:
        raise LowbitError(
            "E0251",
            f"tokenizer has {tokenizer.vocab_size} ids but the embedding has {embedding_rows} rows; this "
            "tokenizer belongs to another model",
        )
