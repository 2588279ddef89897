"""Is it alive, is it ready, does it generate?

/livez              the process answers: 200, also while the model loads
/health             200 when the model is served, else 503, as with SGLang; the state either way
/readyz             requests are answered: 200, else 503 with the reason
/health_generate    a real token came out of the engine since somebody asked
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lowbit.engine.messages import SamplingParams
from lowbit.server.api_error import ApiError
from lowbit.server.generation import Generation
from lowbit.server.http import Exchange
from lowbit.server.stream import Stream

if TYPE_CHECKING:
    from lowbit.server.app import App

_LOOK_SECONDS = 0.2  # how often it is looked whether another request's token came


def state(app: App) -> str:
    """What the server is doing, in a word."""
    return "draining" if app.draining else app.client.state


async def live(app: App, exchange: Exchange) -> None:
    """The process is alive; what it is doing is said, not judged."""
    await exchange.send_json({"status": state(app)})


async def health(app: App, exchange: Exchange) -> None:
    """Scripts for SGLang and vLLM wait for a 200 here before they send requests."""
    now = state(app)
    await exchange.send_json({"status": now}, 200 if now == "ready" else 503)


async def ready(app: App, exchange: Exchange) -> None:
    """Whether to send requests here."""
    if app.draining:
        raise ApiError(503, "draining", "the server is shutting down")
    app.client.require_ready()
    if app.client.hung:
        raise ApiError(503, "engine_hung", "the engine has not answered for a while")
    await exchange.send_json({"status": "ready"})


async def generate(app: App, exchange: Exchange) -> None:
    """One token, through the whole engine; any will do, so that a busy server is no broken one."""
    app.client.require_ready()
    tokenizer, before = app.text.tokenizer, app.client.news
    prompt = (tokenizer.bos_id if tokenizer.bos_id is not None else 0,)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    # A salt of its own: the probe must compute, not read the prefix cache.
    generation = Generation.plan(app.new_id("health"), [prompt], [sampling], 1, app.new_id("health"))
    stream: Stream | None = None
    try:
        stream = app.client.open(generation.requests)
    except ApiError as error:
        if error.code != "overloaded":
            raise
    try:
        async with asyncio.timeout(app.limits.health_seconds):
            while app.client.news == before:
                if stream is None:
                    await asyncio.sleep(_LOOK_SECONDS)
                    continue
                for index, event in await stream.next(_LOOK_SECONDS):
                    generation.add(index, event, exchange.request_id)
    except TimeoutError:
        text = f"no token within {app.limits.health_seconds:g} s"
        raise ApiError(503, "health_timeout", text) from None
    finally:
        if stream is not None:
            stream.close()
    await exchange.send_json({"status": "ok"})
