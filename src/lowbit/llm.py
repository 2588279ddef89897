"""LLM: the engine inside a Python program.

from lowbit import LLM, SamplingParams

llm = LLM("smollm2")
print(llm.chat([{"role": "user", "content": "Hello!"}]).text)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from lowbit.engine.messages import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprob
from lowbit.errors import LowbitError
from lowbit.settings import Settings
from lowbit.tokenization.tokenizer import ChatTemplate

Prompt = str | list[int]


@dataclass
class Completion:
    """What one prompt was continued with. ``logprobs`` where they were asked for."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def take(self, event: TokenEvent) -> None:
        """Add an event of the request."""
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.cached_tokens += event.cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = list(event.prompt_logprobs)
        if event.finish_reason == "error":
            raise LowbitError("E0704", f"the engine ended the request: {event.error}")
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.prompt_tokens = event.prompt_tokens


class LLM:
    """A model in this process; ``options`` are fields of ``Settings``. One thread at a time."""

    def __init__(
        self,
        model: str | Settings = "smollm2",
        *,
        on_progress: Callable[[int, int, str], None] | None = None,
        **options: object,
    ) -> None:
        from lowbit.checkpoint import open_checkpoint
        from lowbit.engine.load import load_engine
        from lowbit.tokenization import load_chat_template, load_tokenizer, sampling_defaults

        self.settings = model if isinstance(model, Settings) else Settings(model=model, **options)  # type: ignore[arg-type]
        self._engine = load_engine(self.settings, on_progress)
        header = open_checkpoint(
            self.settings.model, self.settings.revision, load_format=self.settings.load_format
        )
        self.tokenizer = load_tokenizer(header, self.settings.tokenizer)
        self.chat_template: ChatTemplate | None = load_chat_template(
            header, self.tokenizer, self.settings.chat_template
        )
        defaults = sampling_defaults(
            header, self.settings.sampling_defaults, self.settings.preferred_sampling_params
        )
        self.default_sampling = SamplingParams(**defaults)  # type: ignore[arg-type]
        self._numbers = itertools.count()
        self._events: dict[str, list[TokenEvent]] = {}  # of requests that have not ended, not yet given out

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model's memory; states of delayed scales are kept where a file was named."""
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.close()

    def generate(
        self, prompts: Prompt | list[str] | list[list[int]], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids); all run together. One prompt gives a list of one."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        listed = [prompts] if single else prompts
        completions: dict[str, Completion] = {}
        try:
            for prompt in listed:
                completions[self._submit(prompt, sampling)] = Completion()  # type: ignore[arg-type]
            for event in self._follow(list(completions)):
                completions[event.id].take(event)
        finally:
            self._leave(completions)
        return list(completions.values())

    def chat(self, messages: list[dict[str, object]], sampling: SamplingParams | None = None) -> Completion:
        """The answer to a conversation in OpenAI's message form."""
        if self.chat_template is None:
            raise LowbitError(
                "E0252", "this model has no chat template; pass chat_template='chatml' or a file"
            )
        return self.generate(self.chat_template.render(messages), sampling)[0]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """The events of one prompt as they come; leaving the loop early cancels it."""
        name = self._submit(prompt, sampling)
        try:
            yield from self._follow([name])
        finally:
            self._leave([name])

    def _follow(self, names: list[str]) -> Iterator[TokenEvent]:
        """The events of these requests until all have ended. Those of others, whose loops stand still
        meanwhile, wait for them."""
        going = names
        while going := [name for name in going if name in self._events]:
            for name in going:
                while self._events.get(name):
                    event = self._events[name].pop(0)
                    if event.finish_reason is not None:
                        del self._events[name]
                    yield event
            if not any(map(self._events.get, going)):
                self._step()

    def _step(self) -> None:
        for event in self._engine.step():
            if event.id in self._events:
                self._events[event.id].append(event)

    def _leave(self, names: Iterable[str]) -> None:
        """Cancel those that have not ended: nobody waits for them."""
        left = [name for name in names if self._events.pop(name, None) is not None]
        for name in left:
            self._engine.cancel(name)
        if left:
            self._step()

    def _submit(self, prompt: Prompt, sampling: SamplingParams | None) -> str:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        name = f"llm-{next(self._numbers)}"
        params = sampling or self.default_sampling
        echo = params.max_tokens == 0
        if echo:
            params = msgspec.structs.replace(params, max_tokens=None)
        self._engine.submit(Request(id=name, prompt=tuple(tokens), sampling=params, echo_only=echo))
        self._events[name] = []
        return name
