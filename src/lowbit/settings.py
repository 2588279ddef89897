"""Every option once: name, type, default, help. Flags, LOWBIT_* variables and docs/options.md derive from it.

Flag names are SGLang's where SGLang has the option. This module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """What ``option()`` stores beside a field."""

    help: str
    group: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further flag spellings: ("--model-path",)
    minimum: float | None = None
    maximum: float | None = None
    metavar: str = ""


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    """A settings field with what its flag needs."""
    metadata = {"option": Option(help, group, **more)}
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The settings of one server or engine. Field ``max_running_requests`` is ``--max-running-requests``
    and ``LOWBIT_MAX_RUNNING_REQUESTS``; a flag beats a variable beats the default."""

    model: str = option(
        "smollm2",
        "Model: a folder, a GGUF file, a hub id, or the embedded model 'smollm2'.",
        "model",
        aliases=("--model-path",),
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", "model")
    tokenizer: str | None = option(
        None, "Folder or hub id of the tokenizer, if not the model's own.", "model",
        aliases=("--tokenizer-path",),
    )  # fmt: skip
    chat_template: str | None = option(
        None, "File with a chat template to use instead of the model's.", "model"
    )
    served_model_name: str | None = option(None, "Name under which the API serves the model.", "model")
    context_length: int | None = option(
        None, "Longest sequence in tokens; default: the model's own.", "model",
        aliases=("--max-context", "--max-model-len"), minimum=1,
    )  # fmt: skip
    dtype: str = option(
        "auto", "Type of unquantized weights and activations.", "model",
        choices=("auto", "bfloat16", "float16", "float32"),
    )  # fmt: skip
    quantization: str | None = option(
        None, "Not needed for quantized checkpoints: their config says the method.", "model"
    )

    device: str = option("auto", "Where to run.", "engine", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        None, "CPU threads; default: the cores this process may use.", "engine", minimum=1
    )
    kv_cache_dtype: str = option(
        "auto", "Type of the KV cache; auto: bf16, or f32 for f32 models.", "engine",
        choices=("auto", "bf16", "f32"),
    )  # fmt: skip
    page_size: int = option(16, "Tokens in a KV page.", "engine", choices=("16",))
    mem_fraction_static: float = option(
        0.4, "Share of the free memory the KV pool may take.", "engine", minimum=0.01, maximum=0.95
    )
    max_total_tokens: int | None = option(
        None, "Tokens the KV pool holds; default: by memory.", "engine", minimum=16
    )
    max_running_requests: int = option(64, "Sequences that run at once.", "engine", minimum=1)
    max_queued_requests: int | None = option(
        None, "Requests that may wait; default: max(64, 4 x running).", "engine", minimum=1
    )
    chunked_prefill_size: int = option(512, "Prompt tokens computed in one step.", "engine", minimum=1)
    disable_radix_cache: bool = option(False, "Do not reuse the KV cache of shared prefixes.", "engine")
    disable_cuda_graph: bool = option(
        False, "Run every step eagerly (CUDA graphs, CPU step plans).", "engine"
    )
    random_seed: int | None = option(None, "Seed of requests that bring none.", "engine")

    host: str = option("127.0.0.1", "Address to listen on.", "server")
    port: int = option(30000, "Port to listen on.", "server", minimum=1, maximum=65535)
    api_key: str | None = option(None, "Key that requests must bring as a bearer token.", "server")
    api_key_file: str | None = option(None, "File with one API key a line.", "server")
    max_body_mb: int = option(8, "Largest request body in MiB.", "server", minimum=1)
    max_connections: int = option(1024, "Connections open at once.", "server", minimum=1)
    queue_timeout: float = option(60.0, "Seconds a request may wait before it gets 503.", "server", minimum=0)
    request_timeout: float = option(600.0, "Seconds a request may take in all.", "server", minimum=1)
    drain_timeout: float = option(30.0, "Seconds running requests get after SIGTERM.", "server", minimum=0)
    allowed_hosts: str = option(
        "", "Extra Host header values to accept, comma-separated; '*' accepts any.", "server"
    )
    log_level: str = option(
        "info", "How much to log.", "server", choices=("debug", "info", "warning", "error")
    )
    json_errors: bool = option(False, "Print start-up errors as JSON.", "server")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Field name -> its option."""
        return {f.name: f.metadata["option"] for f in fields(cls)}

    @property
    def queue_limit(self) -> int:
        """How many requests may wait."""
        return self.max_queued_requests or max(64, 4 * self.max_running_requests)
