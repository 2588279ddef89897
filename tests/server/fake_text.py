"""A byte tokenizer and a line template: the text side of the fake model. No file, no torch."""

from __future__ import annotations

import time
from typing import Any

from lowbit.errors import LowbitError
from lowbit.server.text import TextModel, template_variables
from lowbit.settings import Settings

BOS, END = 256, 257
SPECIAL = {"<bos>": BOS, "<end>": END}


class ByteTokenizer:
    """Token = byte; two specials."""

    vocab_size = 258
    bos_id: int | None = BOS
    eos_id: int | None = END
    stop_ids = frozenset({END})
    special_ids = frozenset({BOS, END})
    adds_bos = True

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        if "SLOWTEXT" in text:
            time.sleep(0.5)
        if "BADTEXT" in text:
            raise LowbitError("E0255", "the tokenizer failed on this text")
        ids = [BOS] if add_special else []
        while text:
            name = next((name for name in SPECIAL if parse_special and text.startswith(name)), None)
            if name:
                ids.append(SPECIAL[name])
                text = text[len(name) :]
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        shown = [b"" if skip_special and token > 255 else self.token_bytes(token) for token in ids]
        return b"".join(shown).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.token_text(token).encode()

    def token_text(self, token: int) -> str:
        if token < 128:
            return chr(token)
        return {BOS: "<bos>", END: "<end>"}.get(token, f"bytes:\\x{token:02x}")


class LineTemplate:
    """<bos>role: content\\n … assistant:"""

    source = "lines; reads reasoning_effort"

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer

    def render(
        self,
        messages: list[dict[str, object]],
        *,
        tools: list[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        ids = [BOS]
        for name, value in (variables or {}).items():
            ids += self._tokenizer.encode(f"{name}={value}\n", add_special=False, parse_special=False)
        for tool in tools or []:
            ids += self._tokenizer.encode(f"tool {tool}\n", add_special=False, parse_special=False)
        for message in messages:
            if message["content"] == "TEMPLATE ERROR":
                raise LowbitError(
                    "E0256", "the chat template refuses this conversation: roles must alternate"
                )
            content = message["content"]
            text = content if isinstance(content, str) else "|".join(part["text"] for part in content)
            line = f"{message['role']}: {text}"
            ids += self._tokenizer.encode(line, add_special=False, parse_special=False)
            ids += [ord("\n")]
        if continue_final_message:
            return ids[:-1]
        return ids + (list(b"assistant:") if add_generation_prompt else [])


def load_fake_text(settings: Settings, on_progress: object = None) -> TextModel:
    """Stands in for TextModel.load."""
    tokenizer = ByteTokenizer()
    if settings.model == "no-template":
        return TextModel("/fake", tokenizer, None)
    if settings.model == "missing":
        raise LowbitError("E0201", "there is no model 'missing'")
    variables = template_variables(settings.default_chat_template_kwargs)
    defaults = {"temperature": 0.5, "top_k": 7}
    return TextModel("/fake", tokenizer, LineTemplate(tokenizer), defaults, variables)


def answer(prompt: list[int] | tuple[int, ...], count: int, seed: int = 0) -> str:
    """What the fake engine generates: depends on every prompt token and its place."""
    start = sum(token * (place + 1) for place, token in enumerate(prompt)) + (seed or 0)
    return "".join(chr(ord("a") + (start + 7 * index) % 26) for index in range(count))
