"""Results on their way out: encoded once, large ones off the event loop, and in the form that is asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_service import MODEL, Tenant, make_service

from twinkle.protocol import codec, results
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.codec import Encoded
from twinkle.protocol.endpoints import JSON, PREFIX, PROTOBUF
from twinkle.protocol.types import Datum, ModelInput, SamplingParams
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import operations
from twinkle.server.gateway.app import create_app
from twinkle.server.samplers.fake import LOGPROB
from twinkle.server.service.service import Service
from twinkle.server.tokens import Signer, tenant_of_key


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    service = make_service(tmp_path)
    await service.start()
    yield service
    await service.close()


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(service, LimitsSection(), Signer("secret")))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield client


@pytest.fixture
def tenant(service: Service) -> Tenant:
    return Tenant(service, tenant_of_key(""))


async def sampled(tenant: Tenant, **more: Any) -> str:
    """The id of a sample that has been drawn."""
    request = m.CreateSamplingSessionRequest(
        session_id=await tenant.session(), sampling_session_seq_id=0, base_model=MODEL
    )
    sampler = (await tenant.ask(request)).sampling_session_id
    sample = m.SampleRequest(
        sampling_session_id=sampler, seq_id=0, prompt=ModelInput.from_ints([1, 2, 3]), **more
    )
    promise = await tenant.service.submit(tenant.name, sample)
    while tenant.service.parts.futures.is_pending(promise.request_id):  # pyright: ignore[reportPrivateUsage]
        await tenant.service.parts.futures.look(tenant.name, [promise.request_id], 10)  # pyright: ignore
    return promise.request_id


class Encodings:
    """Counts what is encoded, and how much of it where all others wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on_loop: list[int] = []
        self.in_threads: list[int] = []
        self._encode, self._main = codec.encode_sample, threading.current_thread()
        monkeypatch.setattr(codec, "encode_sample", self._count)

    def _count(self, response: Any) -> bytes:
        body = self._encode(response)
        where = self.on_loop if threading.current_thread() is self._main else self.in_threads
        where.append(len(body))
        return body


async def test_a_large_result_is_encoded_once_in_a_thread_however_often_it_is_asked_for(
    http: httpx.AsyncClient, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
):
    encodings = Encodings(monkeypatch)
    request_id = await sampled(
        tenant, num_samples=64, sampling_params=SamplingParams(max_tokens=32), topk_sample_logprobs=200
    )
    cells, size = 64 * 32 * 200, 0
    load = tenant.service.parts.futures.load_of(tenant.name)  # pyright: ignore[reportPrivateUsage]
    for _ in range(10):
        poll = await http.post(
            "/retrieve_future", json={"request_id": request_id, "allow_metadata_only": True}
        )
        size = poll.json()["response_payload_size"]
        assert poll.json()["status"] == "complete_metadata" and len(poll.content) < 100
        # It was announced, not fetched: it still counts as waiting, by its real bytes.
        assert size <= load.unfetched_bytes < size + 4096
    assert encodings.on_loop == [] and len(encodings.in_threads) == 1
    assert 8 * cells < size < 8 * cells + 64 * (32 * 8 + 100)
    result = await http.post("/retrieve_future", json={"request_id": request_id})
    assert len(result.content) == size and load.unfetched_bytes == 0
    assert encodings.on_loop == [] and len(encodings.in_threads) == 1
    table = pb.SampleResponse.FromString(result.content).sequences[63].topk_sampled_logprobs
    assert (table.length, table.k) == (32, 200)
    assert np.frombuffer(table.token_ids, "<i4").reshape(32, 200).tolist() == [list(range(200))] * 32
    assert set(np.frombuffer(table.logprobs, "<f4").tolist()) == {float(np.float32(LOGPROB))}


async def test_a_small_result_is_encoded_once_where_it_is(
    http: httpx.AsyncClient, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
):
    encodings = Encodings(monkeypatch)
    request_id = await sampled(tenant)
    replies = [
        await http.post("/retrieve_future", json={"request_id": request_id, "allow_metadata_only": polls})
        for polls in (True, False, True)
    ]
    assert {reply.headers["content-type"] for reply in replies} == {PROTOBUF}
    assert len({reply.content for reply in replies}) == 1
    assert len(encodings.on_loop) == 1 and encodings.in_threads == []


@pytest.mark.parametrize("accept", [None, "*/*", PROTOBUF, f"{PROTOBUF}, {JSON}", f"{JSON}, */*"])
async def test_who_reads_protobuf_gets_protobuf(http: httpx.AsyncClient, tenant: Tenant, accept: str | None):
    request_id = await sampled(tenant)
    headers = {} if accept is None else {"Accept": accept}
    reply = await http.post("/retrieve_future", json={"request_id": request_id}, headers=headers)
    assert reply.headers["content-type"] == PROTOBUF


async def test_a_sample_in_json_says_what_it_says_in_protobuf(http: httpx.AsyncClient, tenant: Tenant):
    request_id = await sampled(
        tenant,
        num_samples=2,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=1,
        prompt_alt_tokens_k=2,
    )
    body = {"request_id": request_id}
    plain = codec.decode_sample((await http.post("/retrieve_future", json=body)).content)
    reply = await http.post("/retrieve_future", json=body, headers={"Accept": JSON})
    assert reply.headers["content-type"] == JSON
    values = reply.json()
    assert values["type"] == "sample" and len(values["sequences"]) == 2
    for sequence, expected in zip(values["sequences"], plain.sequences, strict=True):
        assert sequence["tokens"] == expected.tokens and sequence["stop_reason"] == expected.stop_reason
        assert np.float32(sequence["logprobs"]).tolist() == expected.logprobs
        assert [[tuple(pair) for pair in row] for row in sequence["topk_logprobs"]] == expected.topk_logprobs
    assert values["prompt_logprobs"] == plain.prompt_logprobs
    assert values["topk_prompt_logprobs"][0] is None
    assert plain.prompt_alt_tokens is not None
    assert values["prompt_alt_tokens"]["tokens"]["data"] == plain.prompt_alt_tokens.tokens.data


async def test_a_training_pass_in_json_says_what_it_says_in_protobuf(http: httpx.AsyncClient, tenant: Tenant):
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    request = m.ForwardBackwardRequest(await tenant.run(), 1, [datum], "cross_entropy")
    promise = await tenant.service.submit(tenant.name, request)
    body = {"request_id": promise.request_id}
    plain = codec.decode_forward_backward_output((await http.post("/retrieve_future", json=body)).content)
    values = (await http.post("/retrieve_future", json=body, headers={"Accept": JSON})).json()
    assert values["metrics"] == plain.metrics
    logprobs = plain.loss_fn_outputs[0]["logprobs"]
    assert values["loss_fn_outputs"][0]["logprobs"] == {
        "data": logprobs.data,
        "dtype": "float32",
        "shape": [2],
    }


async def test_a_result_too_large_for_json_is_refused_as_such_and_there_in_protobuf(
    http: httpx.AsyncClient, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(operations, "MAX_JSON_BYTES", 10)
    request_id = await sampled(tenant)
    refused = await http.post("/retrieve_future", json={"request_id": request_id}, headers={"Accept": JSON})
    assert refused.status_code == 400 and PROTOBUF in refused.json()["error"]
    assert (await http.post("/retrieve_future", json={"request_id": request_id})).status_code == 200


def test_json_has_no_numbers_that_json_does_not_know():
    message = pb.ForwardBackwardOutput(metrics={"loss:sum": float("inf"), "grad:max": float("nan")})
    encoded = Encoded("ForwardBackwardOutput", message.SerializeToString())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = json.loads(results.result_as_json(encoded), parse_constant=refuse)
    assert values["metrics"] == {"loss:sum": None, "grad:max": None}
