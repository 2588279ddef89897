"""/metrics in Prometheus' text format.

What the HTTP process sees itself (answers, times) is counted as it happens; what the engine knows (pages,
steps, cache) is read from its last status when somebody asks. Counters never fall, also over restarts.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from lowbit.errors import printable
from lowbit.server.engine_client import EngineClient, Hooks

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lowbit_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )
        self._duration = Histogram(
            "lowbit_request_duration_seconds",
            "From a request's headers to its last byte.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = self._times(
            "lowbit_time_to_first_token_seconds", "From acceptance to a sequence's first token.", _SECONDS
        )
        self._token_gap = self._times(
            "lowbit_inter_token_latency_seconds", "Between tokens of a sequence.", _GAP_SECONDS
        )
        self._queue_wait = self._times(
            "lowbit_queue_wait_seconds", "From submission to the step that begins with a sequence.", _SECONDS
        )

    def _times(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)

    def hooks(self) -> Hooks:
        """What the engine client reports to."""
        return Hooks(
            on_first_token=self._first_token.observe,
            on_token_gap=self._observe_gap,
            on_queue_wait=self._queue_wait.observe,
        )

    def _observe_gap(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):  # several tokens of one event share the time they took together
            self._token_gap.observe(seconds / tokens)

    def watch(self, client: EngineClient, model: str) -> None:
        """Read this client's engine at every scrape; ``model``: the name it is served under."""
        self._registry.register(_EngineCollector(client))
        self._registry.register(_ModelCollector(client, model))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one HTTP answer. ``path`` is a route's, never the client's text."""
        self._requests.labels(path, str(status)).inc()
        self._duration.labels(path).observe(seconds)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


_COUNTERS = {
    "lowbit_steps": ("steps", "Forward passes."),
    "lowbit_captured_steps": ("captured_steps", "Forward passes replayed from a graph or step plan."),
    "lowbit_prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "lowbit_cached_prompt_tokens": ("cached_prompt_tokens", "Prompt tokens taken from the prefix cache."),
    "lowbit_generated_tokens": ("generated_tokens", "Tokens generated."),
    "lowbit_draft_tokens": ("draft_tokens", "Guessed tokens that were computed."),
    "lowbit_accepted_draft_tokens": ("accepted_draft_tokens", "Guessed tokens that were right."),
    "lowbit_preemptions": ("preemptions", "Sequences retracted for want of KV pages."),
    "lowbit_invariant_violations": ("invariant_violations", "Page accounting checks that failed."),
}


class _EngineCollector(Collector):
    """The engine's status as metrics."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        """All of them, from one status."""
        client = self._client
        status = client.total_status()
        for name, (attribute, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(name, help_text, value=getattr(status, attribute))
        yield CounterMetricFamily(
            "lowbit_engine_restarts", "Engine restarts.", value=client.counters.restarts
        )
        yield GaugeMetricFamily("lowbit_running_requests", "Sequences being computed.", value=status.running)
        yield GaugeMetricFamily("lowbit_queue_requests", "Sequences waiting to run.", value=status.waiting)
        yield GaugeMetricFamily("lowbit_ready", "1 when requests are served.", value=client.state == "ready")
        pages = GaugeMetricFamily("lowbit_kv_pages", "Pages of the KV pool.", labels=["state"])
        used = status.pages_total - status.pages_free - status.pages_cached
        for state, count in (("free", status.pages_free), ("cached", status.pages_cached), ("used", used)):
            pages.add_metric([state], count)
        yield pages
        yield GaugeMetricFamily("lowbit_kv_pages_total", "Pages in the KV pool.", value=status.pages_total)
        known = status.cached_prompt_tokens + status.prompt_tokens
        rate = status.cached_prompt_tokens / known if known else 0.0
        yield GaugeMetricFamily(
            "lowbit_cache_hit_rate", "Share of prompt tokens taken from the prefix cache.", value=rate
        )


class _ModelCollector(Collector):
    """What is served, once the engine has loaded it."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Names as labels of a 1, numbers as gauges; quality only where somebody measured it."""
        ready = self._client.ready
        if ready is None:
            return
        labels = {
            "model": self._model,
            "architecture": ready.architecture,
            "quantization": ready.quantization,
        }
        yield InfoMetricFamily(
            "lowbit_model", "The served model.", {name: printable(text) for name, text in labels.items()}
        )
        yield GaugeMetricFamily(
            "lowbit_weight_bytes", "Bytes of the model's packed weights.", value=ready.weight_bytes
        )
        if (quality := ready.quality) is None:
            return
        measured = {
            "lowbit_quality_mean_kl": ("Mean KL divergence in nats, as measured.", quality.mean_kl),
            "lowbit_quality_top1_agreement": ("Share of equal first tokens.", quality.top1_agreement),
            "lowbit_quality_positions": ("Tokens both were measured over.", quality.positions),
        }
        for name, (help_text, value) in measured.items():
            gauge = GaugeMetricFamily(name, help_text, labels=["against"])
            gauge.add_metric([printable(quality.against)], value)
            yield gauge
