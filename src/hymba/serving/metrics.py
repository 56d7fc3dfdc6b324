"""What Prometheus reads at /metrics. Counts are kept by the engine and read when asked for; times are kept here."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hymba.inference import Engine, Sequence, Update

BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TO_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Field of EngineStats → metric, and what it tells.
GAUGES = {
    "running": ("requests_running", "Texts that hold a row."),
    "waiting": ("requests_waiting", "Texts that wait for a row."),
    "cache_bytes": ("cache_bytes", "Bytes of the rows' cache."),
    "prefix_entries": ("prefix_cache_entries", "Prompts kept in the prefix cache."),
    "prefix_bytes": ("prefix_cache_bytes", "Bytes of the prefix cache."),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("prompt_tokens_cached", "Those of them that the prefix cache held."),
    "new_tokens": ("generation_tokens", "Tokens generated."),
    "steps": ("engine_steps", "Steps of the engine."),
    "prefix_queries": ("prefix_cache_queries", "Prompts looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", "Those of them of which it held some."),
    "drafted_tokens": ("drafted_tokens", "Tokens that speculation proposed."),
    "accepted_tokens": ("accepted_tokens", "Those of them that were right."),
}


class EngineCollector:
    """Reads an engine's counts at the moment they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield every count."""
        stats = self._engine.stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"hymba_{name}", text, getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"hymba_{name}", text, getattr(stats, field))
        use = stats.running / self._engine.options.max_rows
        yield GaugeMetricFamily("hymba_cache_use_ratio", "Rows of the cache in use, of all.", use)
        yield GaugeMetricFamily("hymba_engine_alive", "1 while the engine works, else 0.", float(not self._engine.dead))
        ended = CounterMetricFamily("hymba_requests", "Texts that ended, by reason.", labels=["finish"])
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self.first_token = self._histogram(
            "time_to_first_token", "From a text's arrival to its first token.", TO_FIRST_TOKEN
        )
        self.between_tokens = self._histogram("inter_token_latency", "From a token to the next.", BETWEEN_TOKENS)
        self.whole = self._histogram("request_duration", "From a text's arrival to its end.", WHOLE)
        self.errors = Counter(
            "hymba_errors", "Requests that failed, by HTTP status.", ["status"], registry=self._registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hymba_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self._registry)


class Watch:
    """Takes the times of one text."""

    def __init__(self, metrics: Metrics, sequence: Sequence) -> None:
        self._metrics, self._sequence = metrics, sequence
        self._last: float | None = None

    def see(self, update: Update) -> None:
        """Note an update as it comes."""
        now, begun = time.monotonic(), self._sequence.arrived
        if update.tokens and self._last is None and begun is not None:
            self._metrics.first_token.observe((self._sequence.first_token_at or now) - begun)
        elif update.tokens and self._last is not None:
            for _ in update.tokens:
                self._metrics.between_tokens.observe((now - self._last) / len(update.tokens))
        if update.tokens:
            self._last = now
        if update.finish and begun is not None:
            self._metrics.whole.observe((self._sequence.finished_at or now) - begun)
