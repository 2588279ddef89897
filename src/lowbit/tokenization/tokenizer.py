"""Tokenizer: what the server and the engine ask of any tokenizer."""

from __future__ import annotations

from typing import Protocol


class Tokenizer(Protocol):
    """Text <-> ids. Thread-safe; imports no torch."""

    vocab_size: int  # 1 + the largest id
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]  # every id that ends a turn: eos, eot, eom, generation_config's
    special_ids: frozenset[int]  # control tokens: hidden from text, never made from message contents
    adds_bos: bool  # encode(add_special=True) prepends bos

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of ``text``. ``parse_special`` False: "<|im_end|>" becomes ordinary text tokens."""

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for (a special token: its name)."""

    def token_text(self, token: int) -> str:
        """The token as OpenAI's logprobs print it."""


class ChatTemplate(Protocol):
    """A checkpoint's chat template, run in an immutable sandbox with a deadline and an output cap."""

    source: str

    def render(
        self,
        messages: list[dict[str, object]],
        *,
        tools: list[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, object] | None = None,
    ) -> list[int]:
        """Token ids of the conversation, equal to transformers' apply_chat_template, except that
        special tokens written inside message contents stay ordinary text (they never become control)."""
