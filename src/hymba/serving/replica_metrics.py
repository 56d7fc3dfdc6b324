"""The metrics of several replicas as one page for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families


def join_metrics(told: Iterable[tuple[str, str]]) -> bytes:
    """Return the metrics of several replicas, each (name, text in Prometheus' format), with a label that names it."""
    families: dict[str, Metric] = {}
    for name, text in told:
        for family in text_string_to_metric_families(text):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                joined.add_sample(sample.name, sample.labels | {"replica": name}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Told(families.values()))
    return generate_latest(registry)


class _Told:
    """What prometheus_client takes for a source of metrics."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
