"""The model as the HTTP process knows it: its tokenizer, chat template and sampling defaults; no tensor.

Tokenizing and templates run in worker threads under a deadline: a text made to be slow costs its
sender a 400 and the others nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.server.api_error import ApiError, bad_request
from lowbit.settings import Settings
from lowbit.tokenization import load_chat_template, load_tokenizer, sampling_defaults
from lowbit.tokenization.generation_config import object_of
from lowbit.tokenization.tokenizer import ChatTemplate, Tokenizer

Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]


RESERVED_VARIABLES = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
NO_TEMPLATE = "this model has no chat template; use /v1/completions or start with --chat-template chatml"


@dataclass(frozen=True)
class TextModel:
    """``root``: the resolved file or folder, what the engine loads. ``template``: None where the model has
    none. ``defaults``: the sampling fields of requests that do not set them. ``variables``: likewise those of
    the template."""

    root: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: dict[str, float] = field(default_factory=dict)
    variables: dict[str, object] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: Settings, on_progress: Progress | None = None) -> TextModel:
        """Resolve the model's name (downloading it if need be) and read its text parts."""
        header = open_checkpoint(
            settings.model, settings.revision, on_progress, load_format=settings.load_format
        )
        tokenizer = load_tokenizer(header, settings.tokenizer)
        template = load_chat_template(header, tokenizer, settings.chat_template)
        defaults = sampling_defaults(header, settings.sampling_defaults, settings.preferred_sampling_params)
        variables = template_variables(settings.default_chat_template_kwargs)
        return cls(str(header.root), tokenizer, template, defaults, variables)

    def require_template(self) -> ChatTemplate:
        """The chat template, or 400."""
        if self.template is None:
            raise bad_request("no_chat_template", NO_TEMPLATE, "messages")
        return self.template


def template_variables(text: str | None) -> dict[str, object]:
    """``--default-chat-template-kwargs``; E0103 where it is no JSON object."""
    flag = "--default-chat-template-kwargs"
    given = object_of(flag, text or "{}")
    if reserved := sorted(given.keys() & RESERVED_VARIABLES):
        raise LowbitError("E0103", f"{flag} may not set {reserved[0]!r}: requests do")
    return given


def served_name(settings: Settings) -> str:
    """The name the API serves the model under: as set, else the last part of the model's name."""
    if settings.served_model_name:
        return settings.served_model_name
    path = Path(settings.model)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return settings.model


class Workers:
    """A few threads for text work, with a deadline each.

    Daemon threads of our own, because a pool's threads are waited for when the process ends: one that is
    stuck in a hopeless text must not keep a stopped server alive.
    """

    def __init__(self, threads: int = 4) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"text-{number}", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    async def run(self, seconds: float | None, what: str, work: Callable[[], Result]) -> Result:
        """``work()``, or 400 when it takes too long, or 503 when no thread got to it in that time.

        ``seconds`` None: as long as it takes. A thread cannot be stopped: one that is late finishes unheard.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        began = threading.Event()

        def settle(result: Result | None, error: Exception | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            began.set()
            result, error = None, None
            if not done.cancelled():
                try:
                    result = work()
                except Exception as failure:  # handed to the request, whose handler knows what to do
                    error = failure
            with contextlib.suppress(RuntimeError):  # the loop may have ended meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        self._jobs.put(job)
        try:
            async with asyncio.timeout(seconds):
                return await done
        except TimeoutError:
            if began.is_set():
                text = f"{what} took longer than {seconds:g} s; shorten the input"
                raise bad_request("text_timeout", text) from None
            text = f"no thread free for {what}; retry after 1 s"
            raise ApiError(503, "overloaded", text, retry_after=1) from None
