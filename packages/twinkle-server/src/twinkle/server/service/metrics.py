"""What an engine does, as Prometheus reads it. Nothing is counted for it in a request's way: it is read when asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from twinkle.server.engine.tally import BOUNDS
from twinkle.server.logs import short_hash
from twinkle.server.service.parts import Parts

# Tenants with numbers of their own, those that used most; the others are counted together.
MOST_TENANTS = 100
OTHERS = "others"


def render(parts: Parts) -> str:
    """In Prometheus' text format, with `# HELP` for each."""
    registry = CollectorRegistry()
    registry.register(_Engine(parts))
    ProcessCollector(namespace="twinkle", registry=registry)
    return generate_latest(registry).decode()


def merged(texts: Mapping[str, str]) -> str:
    """Several engines' metrics as one text.

    Args:
        texts: by the engine's name, which becomes a label.
    """
    families: dict[str, Metric] = {}
    for engine, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(
                    sample.name, {**sample.labels, "engine": engine}, sample.value, sample.timestamp
                )
    registry = CollectorRegistry()
    registry.register(_Fixed(families.values()))
    return generate_latest(registry).decode()


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Engine(Collector):
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        parts = self._parts
        yield _gauge("runs", "Runs that take requests.", sum(1 for _ in parts.live))
        yield _gauge(
            "runs_lost", "Runs that can't go on, whose clients haven't ended them.", len(parts.live.lost)
        )
        yield _gauge("runs_resident", "Runs whose adapters are in the model's memory.", parts.residency.count)
        yield _gauge(
            "adapter_bytes", "Of the adapters that are in the model's memory.", parts.residency.total_bytes
        )
        load = parts.futures.load
        yield _gauge("queued_requests", "Accepted, and not computed yet.", load.requests)
        yield _gauge("queued_tokens", "Of training passes among them.", load.tokens)
        yield _gauge("unfetched_bytes", "Results that no client has fetched yet.", load.unfetched_bytes)
        yield _gauge("results", "Results and requests that are kept.", len(parts.futures))
        yield _gauge(
            "tenants_waiting",
            "Tenants with a request that could be computed now.",
            len(parts.scheduler.ready_tenants),
        )
        yield _gauge("samples", "Samples that are drawn or wait for it.", len(parts.samples))
        journal = parts.run_log.journal
        if journal is not None:
            behind = len(journal.sealed())
            yield _gauge(
                "journal_segments", "Complete segments of the journal that are still needed.", behind
            )
        yield from self._work()
        yield self._tokens()

    def _work(self) -> Iterator[Metric]:
        tally = self._parts.engine.tally
        seconds = HistogramMetricFamily(
            "twinkle_call_seconds", "Calls to the ranks, by what they compute.", labels=["kind"]
        )
        for kind, histogram in tally.seconds.items():
            buckets: list[tuple[str, float]] = []
            so_far = 0
            for bound, count in zip([*map(str, BOUNDS), "+Inf"], histogram.counts, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            seconds.add_metric([kind], buckets, histogram.total)
        yield seconds
        jobs = CounterMetricFamily("twinkle_jobs", "Requests computed.", labels=["kind"])
        for kind, count in tally.jobs.items():
            jobs.add_metric([kind], count)
        yield jobs
        yield _counter("training_tokens", "In training passes.", tally.tokens)
        yield _counter("padding_tokens", "Computed beside them, to make rows of one length.", tally.padding)
        yield _counter("failed_calls", "Calls to the ranks that failed.", tally.failures)

    def _tokens(self) -> Metric:
        """Of each tenant."""
        used = self._parts.ledger.used
        of_tenants: Counter[str] = Counter()
        for (tenant, _kind), count in used.items():
            of_tenants[tenant] += count
        shown = {tenant: short_hash(tenant) for tenant, _ in of_tenants.most_common(MOST_TENANTS)}
        sums: Counter[tuple[str, str]] = Counter()
        for (tenant, kind), count in used.items():
            if kind != "checkpoint":
                sums[shown.get(tenant, OTHERS), kind] += count
        family = CounterMetricFamily(
            "twinkle_tokens", "Used, by tenant (a hash) and kind.", labels=["tenant", "kind"]
        )
        for labels, count in sums.items():
            family.add_metric(labels, count)
        return family


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"twinkle_{name}", help_, value=value)


def _counter(name: str, help_: str, value: float) -> Metric:
    return CounterMetricFamily(f"twinkle_{name}", help_, value=value)
