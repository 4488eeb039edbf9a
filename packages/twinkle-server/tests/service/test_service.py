"""Order, idempotency, isolation and failure, through the service's own face, on the fake backend."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_service import MODEL, Tenant, make_service

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest, NotFound
from twinkle.protocol.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.scheduling import runs
from twinkle.server.store.checkpoint_files import CheckpointFiles


def a_pass(
    run: str, seq_id: int, tokens=(1, 2, 3), loss_fn: str = "cross_entropy", **more
) -> m.ForwardBackwardRequest:
    datum = Datum(
        ModelInput.from_ints(list(tokens)), {"target_tokens": list(tokens), "weights": [1.0] * len(tokens)}
    )
    return m.ForwardBackwardRequest(run, seq_id, [datum], loss_fn, **more)


def a_step(run: str, seq_id: int, lr: float = 0.1) -> m.OptimStepRequest:
    return m.OptimStepRequest(model_id=run, seq_id=seq_id, adam_params=AdamParams(learning_rate=lr))


async def test_chunks_that_arrive_out_of_order_are_applied_in_order(alice: Tenant):
    run = await alice.run()
    later = [await alice.service.submit("alice", r) for r in (a_pass(run, 2), a_pass(run, 3), a_step(run, 4))]
    await asyncio.sleep(0.02)
    waiting = await alice.service.retrieve("alice", later[0].request_id, timeout=0)
    why = "it has seq_id 2, and seq_id 1 of this run has not arrived yet; 0 tenants have requests ready"
    assert waiting == m.TryAgain(request_id=later[0].request_id, queue_state_reason=why)
    first = await alice.do(a_pass(run, 1))
    norm = (await alice.outcome(later[2])).metrics["grad_norm:mean"]
    assert isinstance(first, ForwardBackwardOutput)
    other = await alice.run()
    for seq_id in (1, 2, 3):
        await alice.do(a_pass(other, seq_id))
    assert (await alice.do(a_step(other, 4))).metrics["grad_norm:mean"] == pytest.approx(norm)


async def test_an_unload_with_a_place_waits_for_what_goes_before_it(alice: Tenant):
    run = await alice.run()
    unload = m.UnloadModelRequest(model_id=run, seq_id=3)
    ended = await alice.service.submit("alice", unload)
    assert (await alice.service.submit("alice", unload)).request_id == ended.request_id
    assert isinstance(await alice.do(a_pass(run, 1)), ForwardBackwardOutput)
    assert isinstance(await alice.do(a_step(run, 2)), m.OptimStepResponse)
    assert await alice.outcome(ended) == m.UnloadModelResponse(model_id=run)


async def test_a_rejected_request_consumes_its_id_and_the_next_one_runs(alice: Tenant):
    run = await alice.run()
    with pytest.raises(InvalidRequest, match="loss_fn"):
        await alice.service.submit("alice", a_pass(run, 1, loss_fn="nonsense"))
    assert isinstance(await alice.do(a_pass(run, 2)), ForwardBackwardOutput)


async def test_a_retry_is_answered_from_the_first_and_applied_once(alice: Tenant):
    run = await alice.run()
    first = await alice.service.submit("alice", a_pass(run, 1))
    again = await alice.service.submit("alice", a_pass(run, 1))
    assert again.request_id == first.request_id
    with pytest.raises(Conflict, match="seq_id: 1 was used before"):
        await alice.service.submit("alice", a_pass(run, 1, tokens=(9, 9, 9, 9)))
    norm = (await alice.do(a_step(run, 2))).metrics["grad_norm:mean"]
    other = await alice.run()
    await alice.do(a_pass(other, 1))
    assert (await alice.do(a_step(other, 2))).metrics["grad_norm:mean"] == pytest.approx(norm)


async def test_creating_a_run_twice_makes_one(alice: Tenant):
    session = await alice.session()
    request = m.CreateModelRequest(session_id=session, model_seq_id=0, base_model=f"ms://{MODEL}")
    first, again = [await alice.service.submit("alice", request) for _ in range(2)]
    assert first.request_id == again.request_id
    assert (await alice.outcome(first)).model_id == f"{session}:train:0"


async def test_a_runs_number_that_was_used_long_ago_is_refused_by_name(
    alice: Tenant, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runs, "MAX_REMEMBERED", 4)
    session = await alice.session()
    request = m.CreateModelRequest(session_id=session, model_seq_id=0, base_model=MODEL)
    run = (await alice.do(request)).model_id
    for seq_id in range(1, 5):
        await alice.service.submit(alice.name, a_step(run, seq_id))
    with pytest.raises(InvalidRequest, match="model_seq_id: 0 was used before in this session"):
        await alice.service.submit(alice.name, request)


async def test_what_a_model_can_not_train_is_reported_as_not_trained_or_refused(tmp_path: Path):
    """As GPT-OSS, whose experts get no low-rank term: clients that say nothing ask for all."""

    class WithoutMlp(FakeBackend):
        @property
        def info(self):
            return replace(super().info, trainable=("attn", "unembed"))

    service = make_service(tmp_path, WithoutMlp(ModelConfig(Path("fake"))))
    await service.start()
    alice = Tenant(service, "alice")
    run = await alice.run()
    assert alice.service.parts.live.find("alice", run).spec == AdapterSpec(rank=2, seed=0, train_mlp=False)
    for save in (
        m.SaveWeightsRequest(model_id=run, path="a", seq_id=1),
        m.SaveWeightsForSamplerRequest(model_id=run, path="b", seq_id=2),
    ):
        path = (await alice.do(save)).path
        info = await alice.ask(m.WeightsInfoRequest(tinker_path=path))
        assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)
    with pytest.raises(
        InvalidRequest, match="no layer of FakeForCausalLM that train_mlp asks for.*set train_attn or"
    ):
        await alice.run(train_attn=False, train_unembed=False)
    await service.close()


async def test_a_job_that_fails_in_company_fails_alone(tmp_path: Path):
    class Explosive(FakeBackend):
        def forward_backward(self, micro_batches):
            if any(666 in row.tokens for rows in micro_batches for row in rows):
                raise MemoryError("too much")
            return super().forward_backward(micro_batches)

    service = make_service(tmp_path, Explosive(ModelConfig(Path("fake"))))
    await service.start()
    tenants = [Tenant(service, name) for name in ("a", "b", "c")]
    runs = [await tenant.run() for tenant in tenants]
    tokens = [(1, 2), (666, 2), (1, 2)]
    promises = [
        await service.submit(tenant.name, a_pass(run, 1, tokens=some))
        for tenant, run, some in zip(tenants, runs, tokens, strict=True)
    ]
    good, bad, also_good = [await t.outcome(p) for t, p in zip(tenants, promises, strict=True)]
    assert isinstance(good, ForwardBackwardOutput) and isinstance(also_good, ForwardBackwardOutput)
    assert isinstance(bad, m.Failure)
    assert "memory ran out" in bad.error and bad.category == "server"
    norms = [(await t.do(a_step(r, 2))).metrics["grad_norm:mean"] for t, r in zip(tenants, runs, strict=True)]
    assert norms[0] == pytest.approx(norms[2]) and norms[0] > 0 and norms[1] == 0
    await service.close()


class Fragile(FakeBackend):
    """Notes its calls; `breaks` is asked whether one with these adapters can't be done."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.calls: list[str] = []
        self.breaks: Callable[[str, set[str]], bool] = lambda _call, _adapters: False

    def forward_backward(self, micro_batches):
        self._note("pass", {row.adapter_id for rows in micro_batches for row in rows})
        return super().forward_backward(micro_batches)

    def optim_step(self, steps):
        self._note("step", {step.adapter_id for step in steps})
        return super().optim_step(steps)

    def _note(self, call: str, adapters: set[str]) -> None:
        self.calls.append(call)
        if self.breaks(call, adapters):
            raise RuntimeError("it can't be done")


@pytest.mark.parametrize(
    ("broken", "calls"),
    [
        (None, ["pass", "step"]),
        ("pass", ["pass", *["pass"] * 3, "step"]),
        ("step", ["pass", "step", "step", *["step"] * 3]),
    ],
)
async def test_passes_and_steps_that_are_one_call_fail_as_if_each_were_its_own(
    tmp_path: Path, broken: str | None, calls: list[str]
):
    backend = Fragile(ModelConfig(Path("fake")))
    service = make_service(tmp_path, backend)
    await service.start()
    tenants = [Tenant(service, name) for name in ("a", "b", "c")]
    runs = [await tenant.run() for tenant in tenants]
    backend.calls.clear()
    backend.breaks = lambda call, adapters: call == broken and runs[1] in adapters
    promises = [
        [await service.submit(tenant.name, request) for request in (a_pass(run, 1), a_step(run, 2))]
        for tenant, run in zip(tenants, runs, strict=True)
    ]
    outcomes = [
        [await tenant.outcome(promise) for promise in pair]
        for tenant, pair in zip(tenants, promises, strict=True)
    ]
    assert backend.calls == calls
    backend.breaks = lambda _call, _adapters: False

    alone = Tenant(service, "d")
    run = await alone.run()
    expected = [await alone.do(request) for request in (a_pass(run, 1), a_step(run, 2), a_pass(run, 3))]
    for i, tenant in enumerate(tenants):
        outcome = [*outcomes[i], await tenant.do(a_pass(runs[i], 3))]
        if i != 1 or broken is None:
            assert [one.metrics for one in outcome] == [pytest.approx(one.metrics) for one in expected]
            continue
        assert [isinstance(one, m.Failure) for one in outcome] == [broken == "pass", broken == "step", False]
        assert outcome[2].metrics == pytest.approx(expected[0].metrics), (
            "no step was made, or without a gradient"
        )
        gradients = 1 if broken == "pass" else 2  # of two passes the first failed, or neither
        norm = (await tenant.do(a_step(runs[i], 4))).metrics["grad_norm:mean"]
        assert norm == pytest.approx(gradients * expected[1].metrics["grad_norm:mean"])
    await service.close()


async def test_an_unexpected_error_reaches_the_client_as_an_id_and_no_traceback(tmp_path: Path):
    class Broken(FakeBackend):
        broken = False

        def optim_step(self, steps):
            if self.broken:
                raise RuntimeError("secret detail")
            return super().optim_step(steps)

    backend = Broken(ModelConfig(Path("fake")))
    service = make_service(tmp_path, backend)
    await service.start()
    alice = Tenant(service, "alice")
    run = await alice.run()
    backend.broken = True
    failure = await alice.do(a_step(run, 1))
    assert isinstance(failure, m.Failure) and failure.category == "server"
    assert "error id" in failure.error and "secret" not in failure.error
    backend.broken = False
    assert isinstance(await alice.do(a_step(run, 2)), m.OptimStepResponse)
    await service.close()


async def test_everything_of_another_tenant_is_not_there(alice: Tenant, bob: Tenant):
    run = await alice.run()
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="mine"))
    session = await bob.session()
    for operation in (
        a_pass(run, 2),
        a_step(run, 2),
        m.SaveWeightsRequest(model_id=run, seq_id=2, path="x"),
        m.UnloadModelRequest(model_id=run),
        m.LoadWeightsRequest(path=f"tinker://{run}/weights/mine", session_id=session, model_seq_id=0),
        m.LoadWeightsRequest(path="twinkle://mine", session_id=session, model_seq_id=0),
        m.CreateModelRequest(session_id=run.split(":")[0], model_seq_id=1, base_model=MODEL),
    ):
        with pytest.raises(NotFound):
            await bob.service.submit("bob", operation)
    for query in (
        m.GetInfoRequest(model_id=run),
        m.GetTrainingRun(run_id=run),
        m.ListCheckpoints(run_id=run),
        m.WeightsInfoRequest(tinker_path=f"twinkle://{run}/weights/mine"),
        m.DeleteCheckpoint(run_id=run, kind="weights", name="mine"),
        m.SessionHeartbeatRequest(session_id=run.split(":")[0]),
        m.CreateSamplingSessionRequest(
            session_id=session, sampling_session_seq_id=0, model_path="twinkle://mine"
        ),
    ):
        with pytest.raises(NotFound):
            await bob.ask(query)
    assert (await bob.ask(m.ListTrainingRuns())).training_runs == []
    assert isinstance(await alice.do(a_pass(run, 2)), ForwardBackwardOutput)


async def test_a_save_and_a_load_that_follows_at_once_keep_their_order(alice: Tenant):
    run = await alice.run()
    await alice.do(a_pass(run, 1))
    promises = [
        await alice.service.submit("alice", request)
        for request in (
            a_step(run, 2),
            m.SaveWeightsRequest(model_id=run, seq_id=3, path="here"),
            a_pass(run, 4),
            a_step(run, 5),
            m.LoadWeightsRequest(model_id=run, seq_id=6, path="twinkle://here", optimizer=True),
            a_pass(run, 7, forward_only=True),
        )
    ]
    outcomes = [await alice.outcome(promise) for promise in promises]
    assert not [o for o in outcomes if isinstance(o, m.Failure)]
    saved = await alice.do(
        m.LoadWeightsRequest(
            path="twinkle://here", session_id=await alice.session(), model_seq_id=0, optimizer=True
        )
    )
    loss = (await alice.do(a_pass(saved.model_id, 1, forward_only=True))).metrics["loss:sum"]
    assert outcomes[-1].metrics["loss:sum"] == pytest.approx(loss)


async def test_nobody_else_waits_while_a_checkpoint_is_read(
    alice: Tenant, bob: Tenant, monkeypatch: pytest.MonkeyPatch
):
    run, other = await alice.run(), await bob.run()
    await alice.do(a_pass(run, 1))
    await alice.do(a_step(run, 2))
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=3, path="here"))
    before = (await alice.do(a_pass(run, 4, forward_only=True))).metrics["loss:sum"]
    read, has_come = CheckpointFiles.read, threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> AdapterState:
        assert has_come.wait(20)
        return read(*args, **kwargs)

    monkeypatch.setattr(CheckpointFiles, "read", slowly)
    requests = [
        a_pass(run, 5),
        a_step(run, 6, lr=1.0),
        m.LoadWeightsRequest(model_id=run, seq_id=7, path="twinkle://here", optimizer=True),
        a_pass(run, 8, forward_only=True),
        m.LoadWeightsRequest(model_id=run, seq_id=9, path="twinkle://not-there"),
        a_pass(run, 10, forward_only=True),
    ]
    promises = [await alice.service.submit("alice", request) for request in requests]
    for seq_id in range(1, 6):
        assert isinstance(await bob.do(a_pass(other, seq_id)), ForwardBackwardOutput)
    waiting = await alice.service.retrieve("alice", promises[2].request_id, timeout=0.1)
    assert isinstance(waiting, m.TryAgain)
    assert (waiting.queue_state_reason or "").startswith("its checkpoint is being read")
    assert isinstance(await alice.service.retrieve("alice", promises[3].request_id, timeout=0.1), m.TryAgain)
    has_come.set()
    outcomes = [await alice.outcome(promise) for promise in promises]
    assert isinstance(outcomes[2], m.LoadWeightsResponse)
    assert outcomes[3].metrics["loss:sum"] == outcomes[5].metrics["loss:sum"] == pytest.approx(before)
    assert isinstance(outcomes[4], m.Failure) and "not-there" in outcomes[4].error
    assert all(run.reading is None for run in alice.service.parts.live)


async def test_many_snapshots_go_through_a_small_sampler(alice: Tenant):
    run = await alice.run()
    samplers = []
    for i in range(10):
        reply = await alice.do(
            m.SaveWeightsForSamplerRequest(model_id=run, seq_id=i + 1, sampling_session_seq_id=i)
        )
        samplers.append(reply.sampling_session_id)
    for seq_id, sampler in enumerate(samplers):
        request = m.SampleRequest(
            sampling_session_id=sampler, seq_id=seq_id, prompt=ModelInput.from_ints([1])
        )
        promise = await alice.service.submit("alice", request)
        assert len(promise.sample_sequence_ids or []) == 1
        outcome = await alice.outcome(promise)
        assert not isinstance(outcome, m.Failure), outcome
    listed = await alice.ask(m.ListCheckpoints(run_id=run))
    assert listed.checkpoints == []  # unnamed snapshots are nobody's business


async def test_finishing_a_session_ends_its_runs_and_deletes_its_unnamed_snapshots(
    alice: Tenant, tmp_path: Path
):
    run = await alice.run()
    await alice.do(m.SaveWeightsForSamplerRequest(model_id=run, seq_id=1, sampling_session_seq_id=0))
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=2, path="kept"))
    await alice.service.submit("alice", a_step(run, 9))  # its predecessors never come
    await alice.ask(m.FinishSessionRequest(session_id=run.split(":")[0]))
    with pytest.raises(NotFound):
        await alice.service.submit("alice", a_pass(run, 3))
    kinds = [path.name for path in (tmp_path / "checkpoints" / run).iterdir() if any(path.iterdir())]
    assert kinds == ["weights"]


async def test_a_checkpoint_expires(alice: Tenant, monkeypatch: pytest.MonkeyPatch):
    import time

    run = await alice.run()
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="brief", ttl_seconds=60))
    assert await alice.ask(m.WeightsInfoRequest(tinker_path="twinkle://brief"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(NotFound):
        await alice.ask(m.WeightsInfoRequest(tinker_path="twinkle://brief"))


async def test_an_overwritten_checkpoint_is_not_mistaken_for_the_old_one(alice: Tenant):
    run = await alice.run()
    session = await alice.session()
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="again"))
    old = await alice.ask(
        m.CreateSamplingSessionRequest(
            session_id=session, sampling_session_seq_id=0, model_path="twinkle://again"
        ),
    )
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=2, path="again", overwrite=True))
    sample = m.SampleRequest(
        sampling_session_id=old.sampling_session_id, seq_id=0, prompt=ModelInput.from_ints([1])
    )
    failure = await alice.do(sample)
    assert isinstance(failure, m.Failure) and "was overwritten" in failure.error


async def test_a_service_whose_first_step_fails_is_never_ready(tmp_path: Path):
    class Broken(FakeBackend):
        def optim_step(self, steps):
            raise RuntimeError("no such kernel")

    service = make_service(tmp_path, Broken(ModelConfig(Path("fake"))))
    with pytest.raises(RuntimeError, match="no such kernel"):
        await service.start()
    with pytest.raises(RuntimeError):
        service.check()


async def test_the_warm_up_leaves_nothing_behind(tmp_path: Path):
    backend = FakeBackend(ModelConfig(Path("fake")))
    service = make_service(tmp_path, backend)
    await service.start()
    service.check()
    with pytest.raises(KeyError):
        backend.export_adapter("warm-up", with_optimizer=False)
    await service.close()


async def test_a_checkpoint_of_another_base_model_is_refused_though_its_shapes_fit(tmp_path: Path):
    first = make_service(tmp_path, model="org/base")
    await first.start()
    writer = Tenant(first, "alice")
    session = await writer.session()
    config = m.LoraConfig(rank=2)
    created = m.CreateModelRequest(
        session_id=session, model_seq_id=0, base_model="org/base", lora_config=config
    )
    run = (await writer.do(created)).model_id
    await writer.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="of-the-base"))
    await first.close()

    second = make_service(tmp_path)
    await second.start()
    alice = Tenant(second, "alice")
    other = await alice.run()
    failure = await alice.do(m.LoadWeightsRequest(model_id=other, seq_id=1, path="twinkle://of-the-base"))
    assert isinstance(failure, m.Failure) and "trained on 'org/base'" in failure.error
    with pytest.raises(InvalidRequest, match="org/base"):
        await alice.do(
            m.LoadWeightsRequest(
                path="twinkle://of-the-base", session_id=await alice.session(), model_seq_id=0
            )
        )
    with pytest.raises(InvalidRequest, match="org/base"):
        await alice.ask(
            m.CreateSamplingSessionRequest(
                session_id=await alice.session(),
                sampling_session_seq_id=0,
                model_path="twinkle://of-the-base",
            )
        )
    await second.close()


async def test_an_unnamed_save_that_is_sent_again_under_the_next_sampling_number_gets_the_first_result(
    alice: Tenant,
):
    """As the SDK does when its connection breaks: it counts the sampling session up before each try."""
    run = await alice.run()
    first, again = [
        await alice.service.submit(
            "alice", m.SaveWeightsForSamplerRequest(model_id=run, seq_id=1, sampling_session_seq_id=number)
        )
        for number in (0, 1)
    ]
    assert again == first
    saved = await alice.outcome(again)
    assert saved.sampling_session_id.endswith(":sample:0")
