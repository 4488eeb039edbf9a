"""What refuses names its limit, changes nothing, and takes what it refused once there is room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fake_service import MODEL, Tenant, make_service
from random_client import a_pass, a_step

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, LimitReached, NotFound, QuotaReached
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput, SamplingParams
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.checkpoints.checkpoints import Save
from twinkle.server.config import LimitsSection
from twinkle.server.service.service import Service
from twinkle.server.service.session_expiry import release_vanished
from twinkle.server.store.checkpoint_files import CheckpointFiles

T = TypeVar("T")
Begin = Callable[..., Any]


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Begin]:
    """Starts a service with limits; tenants are made of it."""
    services: list[Service] = []

    async def start(**limits: Any) -> Service:
        service = make_service(tmp_path, limits=LimitsSection(**limits))
        services.append(service)
        await service.start()
        return service

    yield start
    for service in services:
        await service.close()


async def test_a_run_too_many_is_refused_until_another_ends(begin: Begin):
    service = await begin(max_runs_per_tenant=1, max_runs=2)
    alice, bob, carol = (Tenant(service, name) for name in ("alice", "bob", "carol"))
    run = await alice.run()
    with pytest.raises(QuotaReached, match=r"limits\.max_runs_per_tenant: 1 .* allows 1"):
        await alice.run()
    await bob.run()
    with pytest.raises(QuotaReached, match=r"limits\.max_runs: 2 .* allows 2"):
        await carol.run()
    assert await alice.do(m.UnloadModelRequest(model_id=run)) == m.UnloadModelResponse(model_id=run)
    assert isinstance(await carol.do(a_pass(await carol.run(), 1)), ForwardBackwardOutput)


async def test_a_full_queue_takes_what_all_in_it_waits_for_and_the_rest_when_it_has_emptied(begin: Begin):
    service = await begin(max_queued_tokens_per_tenant=9)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    run = await alice.run()
    waiting = [await service.submit("alice", a_pass(run, seq_id)) for seq_id in (2, 3, 4)]  # 3 tokens each
    with pytest.raises(LimitReached, match=r"limits\.max_queued_tokens_per_tenant"):
        await service.submit("alice", a_pass(run, 5))
    assert isinstance(await bob.do(a_pass(await bob.run(), 1)), ForwardBackwardOutput)
    first = await service.submit("alice", a_pass(run, 1))
    for promise in (first, *waiting):
        assert isinstance(await alice.outcome(promise), ForwardBackwardOutput)
    assert isinstance(await alice.do(a_pass(run, 5)), ForwardBackwardOutput), "its id was not used up"
    assert isinstance(await alice.do(a_step(run, 6)), m.OptimStepResponse)


async def test_who_never_fetches_is_stopped_also_one_request_after_the_other(begin: Begin):
    service = await begin(max_unfetched_bytes_per_tenant=5000)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    run = await alice.run()
    promises: list[m.Promise] = []
    with pytest.raises(LimitReached, match="max_unfetched_bytes_per_tenant"):
        for seq_id in range(1, 20):
            promises.append(await service.submit("alice", a_pass(run, seq_id)))
            while service.parts.futures.is_pending(promises[-1].request_id):
                await asyncio.sleep(0.001)
    assert isinstance(await bob.do(a_pass(await bob.run(), 1)), ForwardBackwardOutput)
    for promise in promises:
        await alice.outcome(promise)
    assert isinstance(await alice.do(a_pass(run, len(promises) + 1)), ForwardBackwardOutput)


async def test_tokens_a_minute_count_passes_prompts_and_what_is_sampled(begin: Begin):
    service = await begin(max_tokens_per_minute_per_tenant=10)
    alice = Tenant(service, "alice")
    run = await alice.run()
    await alice.do(a_pass(run, 1))
    sampler = await alice.ask(
        m.CreateSamplingSessionRequest(
            session_id=await alice.session(), sampling_session_seq_id=0, base_model=MODEL
        )
    )

    def sample(number: int) -> m.SampleRequest:
        return m.SampleRequest(
            sampling_session_id=sampler.sampling_session_id,
            seq_id=number,
            prompt=ModelInput.from_ints([1, 2]),
            sampling_params=SamplingParams(max_tokens=3, stop=[]),
            num_samples=2,
        )

    drawn = await alice.do(sample(0))
    assert 3 + 2 + sum(len(s.tokens) for s in drawn.sequences) == 11
    for refused in (a_pass(run, 2), sample(1)):
        with pytest.raises(LimitReached, match=r"limits\.max_tokens_per_minute_per_tenant"):
            await service.submit("alice", refused)
    assert isinstance(await alice.do(a_step(run, 2)), m.OptimStepResponse), "it costs no tokens"


async def test_checkpoints_too_many_or_too_large_are_refused_by_name_and_snapshots_without_one_are_not(
    begin: Begin,
):
    service = await begin(max_checkpoints_per_tenant=2)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    run = await alice.run()
    for seq_id, name in enumerate(("a", "b"), start=1):
        await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=seq_id, path=name))
    refused = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=3, path="c"))
    assert isinstance(refused, m.Failure) and refused.category == "user"
    assert refused.error.startswith("limits.max_checkpoints_per_tenant: checkpoints take 2 already")
    again = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=4, path="b", overwrite=True))
    assert isinstance(again, m.SaveWeightsResponse)
    snapshot = m.SaveWeightsForSamplerRequest(model_id=run, seq_id=5, sampling_session_seq_id=1)
    assert isinstance(await alice.do(snapshot), m.SaveWeightsForSamplerResponse)
    other = await bob.run()
    saved = await bob.do(m.SaveWeightsRequest(model_id=other, seq_id=1, path="a"))
    with pytest.raises(QuotaReached, match="max_checkpoints_per_tenant"):
        await alice.ask(m.CopyWeightsRequest(source_path=f"twinkle://{run}/weights/a"))
    await alice.ask(m.DeleteCheckpoint(run_id=run, kind="weights", name="a"))
    assert isinstance(
        await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=6, path="c")), m.SaveWeightsResponse
    )
    assert isinstance(saved, m.SaveWeightsResponse)


async def test_checkpoints_that_are_being_written_count(begin: Begin, monkeypatch: pytest.MonkeyPatch):
    service = await begin(max_checkpoints_per_tenant=3)
    alice = Tenant(service, "alice")
    run = await alice.run()
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="before"))
    write = CheckpointFiles.write

    def slowly(*args: Any) -> int:
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(CheckpointFiles, "write", slowly)
    saves = [m.SaveWeightsRequest(model_id=run, seq_id=2 + i, path=f"at-once-{i}") for i in range(5)]
    promises = [await service.submit("alice", save) for save in saves]
    outcomes = [await alice.outcome(promise) for promise in promises]
    refused = [outcome.error for outcome in outcomes if isinstance(outcome, m.Failure)]
    assert len(refused) == 3 and all(
        error.startswith("limits.max_checkpoints_per_tenant: ") for error in refused
    )
    listed = (await alice.ask(m.ListCheckpoints(run_id=run))).checkpoints
    assert len(listed) == 3
    # A place whose save has ended is free, be it by deletion or by a failure.
    await alice.ask(m.DeleteCheckpoint(run_id=run, kind="weights", name="before"))

    def failing(*args: Any) -> int:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(CheckpointFiles, "write", failing)
    assert isinstance(await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=7, path="fails")), m.Failure)
    monkeypatch.setattr(CheckpointFiles, "write", write)
    assert not isinstance(
        await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=8, path="last")), m.Failure
    )
    refused = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=9, path="one-too-many"))
    assert isinstance(refused, m.Failure)


async def test_bytes_of_checkpoints_count_in_all(begin: Begin):
    service = await begin(max_checkpoint_bytes=1)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    await alice.do(m.SaveWeightsRequest(model_id=await alice.run(), seq_id=1, path="a"))
    refused = await bob.do(m.SaveWeightsRequest(model_id=await bob.run(), seq_id=1, path="a"))
    assert isinstance(refused, m.Failure) and "limits.max_checkpoint_bytes: " in refused.error


async def test_a_checkpoint_is_kept_no_longer_than_allowed(begin: Begin):
    service = await begin(max_checkpoint_ttl_seconds=3600)
    alice = Tenant(service, "alice")
    run = await alice.run()
    too_long = m.SaveWeightsRequest(model_id=run, seq_id=1, path="a", ttl_seconds=3601)
    with pytest.raises(InvalidRequest, match=r"3601 .* at most 3600 \(limits\.max_checkpoint_ttl_seconds\)"):
        await service.submit("alice", too_long)
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=2, path="a"))
    with pytest.raises(InvalidRequest, match="max_checkpoint_ttl_seconds"):
        await alice.ask(m.SetCheckpointTtl(run_id=run, kind="weights", name="a", ttl_seconds=7200))
    [listed] = (await alice.ask(m.ListCheckpoints(run_id=run))).checkpoints
    assert listed.expires_at is not None and listed.expires_at > listed.time


async def test_of_the_snapshots_for_sampling_the_newest_stay(begin: Begin, monkeypatch: pytest.MonkeyPatch):
    service = await begin(max_sampler_snapshots_per_run=2)
    alice = Tenant(service, "alice")
    run = await alice.run()
    write = CheckpointFiles.write

    def later(
        files: CheckpointFiles, uri: CheckpointUri, *args: Any
    ) -> int:  # those that are to go are the last to be written
        time.sleep(0.3 if uri.name in ("unnamed-1", "unnamed-2") else 0.0)
        return write(files, uri, *args)

    monkeypatch.setattr(CheckpointFiles, "write", later)
    samplers = [
        (
            await alice.do(
                m.SaveWeightsForSamplerRequest(model_id=run, seq_id=number, sampling_session_seq_id=number)
            )
        ).sampling_session_id
        for number in range(1, 9)
    ]
    await asyncio.wait_for(service.parts.checkpoints.settle(), 20)
    rows = service.parts.database.unnamed_checkpoints("alice", run)
    assert [row.name for row in rows] == ["unnamed-7", "unnamed-8"]

    def sample(sampler: str) -> m.SampleRequest:
        return m.SampleRequest(
            sampling_session_id=sampler,
            seq_id=0,
            prompt=ModelInput.from_ints([1]),
            sampling_params=SamplingParams(max_tokens=1),
            num_samples=1,
        )

    assert not isinstance(await alice.do(sample(samplers[-1])), m.Failure)
    service.parts.samples._sampler_adapters._adapters.clear()  # it has left the sampler long ago
    gone = await alice.do(sample(samplers[0]))
    assert isinstance(gone, m.Failure) and "limits.max_sampler_snapshots_per_run" in gone.error


def be_silent(service: Service, session: str) -> None:
    """For 1001 seconds."""
    lease = service.parts.leases.get(session)
    assert lease is not None
    lease.renewed_at -= 1001


async def test_the_runs_of_a_client_that_has_vanished_are_saved_and_end_and_it_can_come_back(begin: Begin):
    service = await begin(max_session_idle_seconds=1000)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    run, others = await alice.run(), await bob.run()
    for tenant, name in ((alice, run), (bob, others)):
        await tenant.do(a_pass(name, 1))
        await tenant.do(a_step(name, 2))
    before = await service.parts.worker.export_adapter(run, with_optimizer=True)
    session = run.split(":")[0]
    be_silent(service, session)
    await release_vanished(service.parts)
    assert [run.run_id for run in service.parts.live] == [others], "who has been heard of goes on"
    with pytest.raises(NotFound, match="was saved as 'twinkle-released'"):
        await service.submit("alice", a_pass(run, 3))
    back = m.LoadWeightsRequest(
        model_id=None,
        session_id=session,
        model_seq_id=1,
        path=f"twinkle://{run}/weights/twinkle-released",
        optimizer=True,
    )
    again = (await alice.do(back)).model_id
    after = await service.parts.worker.export_adapter(again, with_optimizer=True)
    assert before.optimizer is not None and after.optimizer is not None
    for mine, theirs in (
        (after.weights, before.weights),
        (after.optimizer.exp_avg, before.optimizer.exp_avg),
        (after.optimizer.exp_avg_sq, before.optimizer.exp_avg_sq),
    ):
        assert {n: a.tobytes() for n, a in mine.items()} == {n: a.tobytes() for n, a in theirs.items()}
    assert after.optimizer.step == 1


async def test_a_heartbeat_keeps_a_session_and_what_could_not_be_saved_stays(begin: Begin):
    service = await begin(max_session_idle_seconds=1000)
    alice = Tenant(service, "alice")
    run = await alice.run()
    session = run.split(":")[0]
    be_silent(service, session)
    await alice.ask(m.SessionHeartbeatRequest(session_id=session))
    await release_vanished(service.parts)
    assert [run.run_id for run in service.parts.live] == [run]
    be_silent(service, session)

    async def fails(*_args: object) -> int:
        raise PermissionError("not writable")

    write, service.parts.checkpoints.write = service.parts.checkpoints.write, fails  # pyright: ignore
    await release_vanished(service.parts)
    assert [run.run_id for run in service.parts.live] == [run]
    service.parts.checkpoints.write = write
    await release_vanished(service.parts)
    assert [run.run_id for run in service.parts.live] == []


@pytest.fixture
async def busy(begin: Begin) -> AsyncIterator[tuple[Service, Tenant, str]]:
    """Another tenant's checkpoint takes for ever to write; alice has a run with a snapshot and one checkpoint."""
    service = await begin(max_session_idle_seconds=1000)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    theirs, run = await bob.run(), await alice.run()
    held, write = asyncio.Event(), service.parts.checkpoints.write

    async def slow(save: Save, *args: Any) -> int:
        if save.tenant == "bob":
            await held.wait()
        return await write(save, *args)

    service.parts.checkpoints.write = slow
    saving = [
        await service.submit("bob", m.SaveWeightsRequest(model_id=theirs, seq_id=1, path="name")),
        await service.submit(
            "bob", m.SaveWeightsForSamplerRequest(model_id=theirs, seq_id=2, sampling_session_seq_id=0)
        ),
    ]
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="name", ttl_seconds=60))
    await alice.do(m.SaveWeightsForSamplerRequest(model_id=run, seq_id=2, sampling_session_seq_id=0))
    yield service, alice, run
    outcome = await service.retrieve("bob", saving[0].request_id, timeout=0)
    assert isinstance(outcome, m.TryAgain), "it is being written still"
    held.set()
    assert isinstance(await bob.outcome(saving[0]), m.SaveWeightsResponse)


async def in_few_turns(work: Coroutine[Any, Any, T]) -> T:
    """What comes of `work`, which waits for threads of its own, and for nothing that never ends."""
    return await asyncio.wait_for(work, 20)


async def test_a_session_ends_while_another_tenant_saves(busy: tuple[Service, Tenant, str]):
    service, alice, run = busy
    await in_few_turns(alice.ask(m.FinishSessionRequest(session_id=run.split(":")[0])))
    assert run not in service.parts.live
    assert service.parts.database.unnamed_checkpoints("alice", run) == []


async def test_who_has_vanished_is_let_go_of_while_another_tenant_saves(busy: tuple[Service, Tenant, str]):
    service, _alice, run = busy
    be_silent(service, run.split(":")[0])
    await in_few_turns(release_vanished(service.parts))
    assert run not in service.parts.live
    assert service.parts.database.unnamed_checkpoints("alice", run) == []


async def test_a_checkpoint_is_found_while_another_tenant_saves_one_of_that_name(
    busy: tuple[Service, Tenant, str],
):
    service, alice, run = busy
    theirs = next(other.run_id for other in service.parts.live if other.run_id != run)
    for path in ("twinkle://name", f"twinkle://{run}/weights/name"):
        await in_few_turns(alice.ask(m.WeightsInfoRequest(tinker_path=path)))
    with pytest.raises(NotFound):
        await in_few_turns(alice.ask(m.WeightsInfoRequest(tinker_path=f"twinkle://{theirs}/weights/name")))


async def test_a_name_of_the_servers_own_can_not_be_taken(begin: Begin):
    service = await begin()
    run = await Tenant(service, "alice").run()
    with pytest.raises(InvalidRequest, match="a name of the server's own"):
        await service.submit("alice", m.SaveWeightsRequest(model_id=run, seq_id=1, path="twinkle-released"))
    await asyncio.sleep(0)
