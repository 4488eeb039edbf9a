"""What Prometheus reads of the server, by Prometheus' own reader of its text format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from fake_service import Tenant, make_service
from prometheus_client.parser import text_string_to_metric_families

from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.config import LimitsSection
from twinkle.server.gateway.app import create_app
from twinkle.server.logs import short_hash
from twinkle.server.service import metrics
from twinkle.server.service.service import Service
from twinkle.server.tokens import Signer


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def forward_backward(run: str, lengths: Sequence[int]) -> m.ForwardBackwardRequest:
    data = [
        Datum(
            ModelInput.from_ints(list(range(1, length + 1))),
            {"target_tokens": [1] * length, "weights": [1.0] * length},
        )
        for length in lengths
    ]
    return m.ForwardBackwardRequest(run, 1, data, "cross_entropy")


async def scrape(service: Service) -> str:
    app = create_app(service, LimitsSection(), Signer("secret"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        reply = await http.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain; version=")
    return reply.text


async def test_what_was_done_is_counted(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    await service.start()
    ada, bob = Tenant(service, "ada"), Tenant(service, "bob")
    for tenant, lengths in ((ada, (5, 9)), (bob, (4,))):
        run = await tenant.run()
        await tenant.do(forward_backward(run, lengths))
        await tenant.do(m.OptimStepRequest(model_id=run, seq_id=2))
    found = read(await scrape(service))

    def value(name: str, **labels: str) -> float:
        return found[f"twinkle_{name}", frozenset(labels.items())]

    assert value("runs") == value("runs_resident") == 2
    assert value("queued_requests") == value("queued_tokens") == value("samples") == 0
    # Two passes, each a micro-batch: 5 is padded to 9.
    assert value("training_tokens_total") == 5 + 9 + 4
    assert value("padding_tokens_total") == 4
    assert value("tokens_total", tenant=short_hash("ada"), kind="training") == 14
    assert value("tokens_total", tenant=short_hash("bob"), kind="training") == 4
    assert value("jobs_total", kind="ForwardBackward") == value("jobs_total", kind="OptimStep") == 2
    assert (
        value("call_seconds_count", kind="pass") == value("call_seconds_bucket", kind="pass", le="+Inf") == 2
    )
    assert value("failed_calls_total") == 0
    assert value("process_resident_memory_bytes") > 2**20
    await service.close()


async def test_tenants_beyond_a_number_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MOST_TENANTS", 2)
    service = make_service(tmp_path)
    for number, name in enumerate("abcd"):
        service.parts.ledger.record(name, "s", "training", 10 - number)
    found = read(metrics.render(service.parts))
    tokens = {
        dict(labels)["tenant"]: value
        for (name, labels), value in found.items()
        if name == "twinkle_tokens_total"
    }
    assert tokens == {short_hash("a"): 10, short_hash("b"): 9, metrics.OTHERS: 8 + 7}


async def test_engines_are_told_apart(tmp_path: Path) -> None:
    texts: dict[str, str] = {}
    for name, count in (("e0", 3), ("e1", 4)):
        (tmp_path / name).mkdir()
        service = make_service(tmp_path / name)
        service.parts.ledger.record("a", "s", "training", count)
        texts[name] = metrics.render(service.parts)
    found = read(metrics.merged({**texts, "e2": ""}))
    for name, count in (("e0", 3), ("e1", 4)):
        labels = {"tenant": short_hash("a"), "kind": "training", "engine": name}
        assert found["twinkle_tokens_total", frozenset(labels.items())] == count
        assert found["twinkle_runs", frozenset({("engine", name)})] == 0
