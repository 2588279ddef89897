"""Paths that nothing answers here: endpoints other servers have and what to use instead, and near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NO_VECTORS = "lowbit generates text and gives no embeddings, scores or classes; serve such a model elsewhere"
_NO_MEDIA = "lowbit reads and writes text only"
_FIXED = "weights do not change while serving; start another server"
_STREAMS_END = "close the connection of a request to end it"

# Endpoints of OpenAI, SGLang, vLLM, llama.cpp and Ollama -> why they are not here, and the way out.
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/embeddings", "/embed", "/encode", "/classify", "/v1/classify"),
            *("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling"),
            "/v1/moderations",
        ),
        _NO_VECTORS,
    ),
    **dict.fromkeys(
        (
            *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"),
            *("/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
        ),
        _NO_MEDIA,
    ),
    **dict.fromkeys(("/v1/responses", "/v1/messages"), "send the conversation to /v1/chat/completions"),
    "/v1/messages/count_tokens": "use /tokenize",
    **dict.fromkeys(("/api/chat", "/v1/assistants", "/v1/threads"), "use /v1/chat/completions"),
    **dict.fromkeys(("/api/generate", "/completion", "/infill", "/invocations"), "use /v1/completions"),
    **dict.fromkeys(("/api/tags", "/api/show"), "use /v1/models"),
    **dict.fromkeys(
        ("/props", "/slots", "/load", "/get_load", "/v1/loads"), "use /get_server_info or /metrics"
    ),
    "/ready": "use /readyz",
    "/reset_prefix_cache": "use /flush_cache",
    "/apply-template": "use /tokenize with 'messages', and /detokenize",
    **dict.fromkeys(("/v1/files", "/v1/batches"), "send the requests themselves; as many run at once as fit"),
    **dict.fromkeys(("/v1/fine_tuning/jobs", "/start_profile", "/stop_profile"), "lowbit has no such thing"),
    **dict.fromkeys(
        (
            *("/update_weights_from_disk", "/update_weights_from_tensor", "/load_lora_adapter"),
            *("/update_weights_from_distributed", "/update_weights_from_ipc", "/lora-adapters"),
            *("/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
            *("/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up"),
        ),
        _FIXED,
    ),
    "/abort_request": _STREAMS_END,
    "/open_session": "send the whole conversation each time; its beginning comes from the prefix cache",
    "/separate_reasoning": "answers are not parsed; look for the model's own marks in the text",
    "/parse_function_call": "answers are not parsed; look for the model's own marks in the text",
    "/version": "/get_server_info says the version",
    "/ping": "use /health",
    "/docs": "requests are those of OpenAI's API",
    "/openapi.json": "requests are those of OpenAI's API",
}


def what_instead(path: str, served: Iterable[str]) -> str:
    """What to say of ``path``, which is none of ``served``: one line with the way out."""
    part = path.rstrip("/")
    while part:  # also of what lies under one of them: /v1/responses/ID
        if reason := NOT_HERE.get(part):
            return f"there is no {path} here: {reason}"
        part = part.rpartition("/")[0]
    # Cut: comparing takes the product of the lengths.
    names = [known.removesuffix("/*") for known in served if len(known) > 1]
    close = difflib.get_close_matches(path[:64], names, 1, 0.75)
    hint = f"did you mean {close[0]}?" if close else "the API is under /v1"
    return f"there is no {path} here; {hint}"
