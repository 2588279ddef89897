"""What the server says about itself: models, settings, metrics, the web page; and the cache's flush."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata, resources
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from lowbit.server.health import state
from lowbit.server.http import Exchange

if TYPE_CHECKING:
    from lowbit.server.app import App

# path -> (file in static/, media type)
STATIC_FILES = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/chat.css": ("chat.css", b"text/css; charset=utf-8"),
    "/chat.js": ("chat.js", b"text/javascript; charset=utf-8"),
}
# The page may load its own two files and talk to this server; nothing else, and no inline script.
_PAGE_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    (b"cache-control", b"no-cache"),
)
_SECRETS = ("api_key", "api_key_file")


def _card(app: App) -> dict[str, object]:
    """The model's entry; 503 until it is served: clients wait for the list before they send requests."""
    ready = app.client.require_ready()
    return {
        "id": app.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "lowbit",
        "root": app.settings.model,
        "max_model_len": ready.context_length,
        "architecture": ready.architecture,
        "quantization": ready.quantization,
        "weight_bytes": ready.weight_bytes,
        "quality": msgspec.to_builtins(ready.quality),
    }


async def models(app: App, exchange: Exchange) -> None:
    """GET /v1/models: the one that is served."""
    await exchange.send_json({"object": "list", "data": [_card(app)]})


async def model(app: App, exchange: Exchange) -> None:
    """GET /v1/models/NAME."""
    app.check_model(unquote(exchange.path.removeprefix("/v1/models/")))
    await exchange.send_json(_card(app))


async def model_info(app: App, exchange: Exchange) -> None:
    """GET /get_model_info, as SGLang has it."""
    ready = app.client.require_ready()
    await exchange.send_json(
        {
            "model_path": app.settings.model,
            "tokenizer_path": app.settings.tokenizer or app.settings.model,
            "is_generation": True,
            "preferred_sampling_params": app.text.defaults or None,
            "served_model_name": app.model_name,
            "context_length": ready.context_length,
            "vocab_size": ready.vocab_size,
            "architecture": ready.architecture,
            "weight_bytes": ready.weight_bytes,
            "quality": msgspec.to_builtins(ready.quality),
            **ready.details,
        }
    )


async def server_info(app: App, exchange: Exchange) -> None:
    """GET /get_server_info: settings without secrets, limits, and the engine's counters."""
    ready = app.client.ready
    settings = {name: value for name, value in asdict(app.settings).items() if name not in _SECRETS}
    await exchange.send_json(
        {
            **settings,
            "version": version(),
            "state": state(app),
            "api_keys": len(app.guard.keys),
            "max_total_num_tokens": ready.pool_tokens if ready else None,
            "engine": msgspec.structs.asdict(ready) if ready else None,
            "status": msgspec.structs.asdict(app.client.total_status()),
            "restarts": app.client.counters.restarts,
            "requests_active": app.active,
            "sequences_held": app.client.places_held,
            "body_bytes_held": app.queued.held,
        }
    )


def version() -> str:
    """lowbit's version."""
    try:
        return metadata.version("lowbit")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


async def metrics(app: App, exchange: Exchange) -> None:
    """GET /metrics."""
    await exchange.send_bytes(app.metrics.text(), b"text/plain; version=0.0.4; charset=utf-8")


async def flush_cache(app: App, exchange: Exchange) -> None:
    """POST /flush_cache: forget the prefixes that no running request uses."""
    await exchange.read_body()
    app.client.require_ready()
    app.client.flush_cache()
    await exchange.send_json({"status": "ok"})


async def static_file(app: App, exchange: Exchange) -> None:
    """The chat page and its files."""
    name, kind = STATIC_FILES[exchange.path]
    body = resources.files("lowbit.server").joinpath("static", name).read_bytes()
    await exchange.send_bytes(body, kind, headers=_PAGE_HEADERS)
