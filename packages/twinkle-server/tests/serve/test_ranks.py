"""Two ranks as real Ray actors, each with the fake backend: one model as far as the engine can tell."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.types import AdamParams, SamplingParams
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.config import ModelSection, ServerConfig
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ranks import RankGroup

pytestmark = pytest.mark.serve

CONFIG = ModelConfig(Path("fake"), tensor_parallel_size=2)
TOKENS = np.array([1, 2, 3])
ROW = Row("a", TOKENS, "cross_entropy", {"target_tokens": TOKENS, "weights": np.ones(3, np.float32)})
STEP = AdamStep("a", AdamParams(learning_rate=0.1))


def plan(model: ModelConfig = CONFIG, backend: str = "fake", **timeouts: float) -> Plan:
    section = ModelSection.model_validate({"model_id": "org/fake", **timeouts})
    samplers = SamplerPlan("fake", 0, model, 0, None, 0, 32)
    return Plan(ServerConfig(model=section), model, backend, samplers, gpus_per_rank=0)


@pytest.fixture(scope="module")
def placement() -> Iterator[PlacementGroup]:
    ray.init(
        address="local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    placement = placement_group([{"CPU": 2.0}], strategy="PACK")
    ray.get(placement.ready(), timeout=60)
    yield placement
    ray.shutdown()


def actors_of(group: RankGroup) -> list[Any]:
    return list(group.incarnation._actors)


def process_of(group: RankGroup, rank: int) -> int:
    return ray.get(actors_of(group)[rank].__ray_call__.remote(lambda _actor: os.getpid()))


async def train_and_compare(group: RankGroup) -> None:
    """Steps on the adapters "a" and "c", against the same backend without Ray."""
    alone = FakeBackend(ModelConfig(Path("fake")))
    for who in ("a", "c"):
        alone.add_adapter(who, AdapterSpec(rank=2))
        await group.add_adapter(who, AdapterSpec(rank=2))
    [[expected]] = alone.forward_backward([[ROW]])
    alone.optim_step([STEP])
    [[result]] = await group.forward_backward([[ROW]])
    np.testing.assert_array_equal(result.logprobs, expected.logprobs)
    await group.optim_step([STEP])

    [[expected]] = alone.forward_backward([[ROW]])
    expected_metrics = alone.optim_step([STEP])
    [[result]], metrics = await group.train([[ROW]], [STEP])
    np.testing.assert_array_equal(result.logprobs, expected.logprobs)
    assert metrics == expected_metrics

    calls: list[tuple[list[list[Row]], list[AdamStep]]] = [
        ([[replace(ROW, adapter_id=who)]], [replace(STEP, adapter_id=who)]) for who in ("a", "c")
    ]
    both = await asyncio.gather(
        *(group.train(*call) for call in calls)
    )  # the second is sent before the first is done
    for (rows, steps), ([[result]], metrics) in zip(calls, both, strict=True):
        [[expected]] = alone.forward_backward(rows)
        np.testing.assert_array_equal(result.logprobs, expected.logprobs)
        assert metrics == alone.optim_step(steps)
    for who in ("a", "c"):
        state = await group.export_adapter(who, with_optimizer=True)
        for name, weights in alone.export_adapter(who, with_optimizer=False).weights.items():
            np.testing.assert_array_equal(state.weights[name], weights)


async def test_a_group_computes_like_one_survives_its_users_errors_and_is_started_anew_when_a_rank_is_killed(
    placement: PlacementGroup,
):
    group = await RankGroup.start(plan(), placement)
    await train_and_compare(group)
    samples = ray.get(
        [
            actor.__ray_call__.remote(lambda actor: actor._loading.result()._sampler_or_none is not None)
            for actor in actors_of(group)
        ]
    )
    assert samples == [True, True]
    meeting = await actors_of(group)[0].find_rendezvous.remote(is_one_machine=True)
    path = Path(meeting.removeprefix("file://"))
    assert path.parent.stat().st_mode & 0o077 == 0 and not path.exists()

    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        await group.add_adapter("a", AdapterSpec(rank=2))
    with pytest.raises(InvalidRequest, match="rank"):
        await group.add_adapter("b", AdapterSpec(rank=1000))
    await group.publish("a", "published", await group.export_adapter("a", with_optimizer=False))
    request = GenerateRequest("alice", "published", TOKENS, SamplingParams(max_tokens=2))
    assert len((await group.generate(request)).sequences) == 1

    os.kill(process_of(group, 1), signal.SIGKILL)
    assert (await group.lost()).reason == "rank 1: its process ended, or the connection to it broke"
    for call in (group.optim_step([STEP]), group.generate(request)):
        with pytest.raises(WorkerLost):
            await call
    await group.cancel("a sample of the lost group")

    await group.restart()
    await group.available()
    with pytest.raises(NotFound, match="published"):
        await group.generate(request)
    await train_and_compare(group)

    os.kill(process_of(group, 0), signal.SIGKILL)
    with pytest.raises(WorkerLost):
        while True:
            await group.forward_backward([[ROW]])
    await group.restart()
    await train_and_compare(group)
    await group.close()
    group.incarnation.end()


async def block_training_thread(group: RankGroup, rank: int) -> None:
    """As a collective does that waits for another rank in vain; the process answers heartbeats all the same."""

    def block(actor: Any) -> None:
        actor._loading.result()._training_thread.submit(time.sleep, 3600)

    await actors_of(group)[rank].__ray_call__.remote(block)


async def test_ranks_that_hang_are_replaced_like_those_that_died(placement: PlacementGroup):
    # A rank that imports torch on a busy machine may answer no heartbeat for some seconds.
    group = await RankGroup.start(plan(heartbeat_timeout_seconds=10, call_timeout_seconds=3), placement)
    await train_and_compare(group)
    os.kill(process_of(group, 1), signal.SIGSTOP)
    with pytest.raises(WorkerLost) as loss:
        await group.forward_backward([[ROW]])
    assert loss.value.reason in {
        "rank 1: no heartbeat for 10 s",
        "forward_backward: rank 0 succeeded, rank 1 didn't answer within 3 s (model.call_timeout_seconds)",
    }
    await group.restart()
    await train_and_compare(group)

    stopped = process_of(group, 0)
    os.kill(stopped, signal.SIGSTOP)
    assert (await group.lost()).reason == "rank 0: no heartbeat for 10 s", "nothing was called"
    await group.restart()
    await train_and_compare(group)
    assert not is_running(stopped)

    await block_training_thread(group, 1)
    with pytest.raises(WorkerLost) as loss:
        await group.optim_step([STEP])
    said = "optim_step: rank 0 succeeded, rank 1 didn't answer within 3 s (model.call_timeout_seconds)"
    assert loss.value.reason == said
    await group.restart()
    await train_and_compare(group)
    await group.close()
    group.incarnation.end()


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.usefixtures("placement")
async def test_one_rank_takes_a_pass_and_steps_in_one_call():
    place = placement_group([{"CPU": 1.0}])
    ray.get(place.ready(), timeout=60)
    group = await RankGroup.start(plan(ModelConfig(Path("fake"))), place)
    await train_and_compare(group)
    with pytest.raises(KeyError):
        await group.train([[replace(ROW, adapter_id="b")]], [STEP])
    before = await group.export_adapter("a", with_optimizer=True, with_gradients=True)
    [[_]], metrics = await group.train([[ROW]], [STEP, replace(STEP, adapter_id="b")])
    assert metrics is None
    after = await group.export_adapter("a", with_optimizer=True, with_gradients=True)
    for name, weights in before.weights.items():
        np.testing.assert_array_equal(after.weights[name], weights)
    assert before.gradients is not None and after.gradients is not None
    assert not any(gradient.any() for gradient in before.gradients.values())
    assert any(gradient.any() for gradient in after.gradients.values()), "the pass stays done"
    await group.close()
    group.incarnation.end()
    remove_placement_group(place)


async def test_a_model_that_no_rank_can_load_is_said_as_the_ranks_said_it(placement: PlacementGroup):
    with pytest.raises(InvalidRequest, match="no_such"):
        await RankGroup.start(plan(backend="no_such"), placement)
