"""Which ranks get what, and what is made of their answers. The connections are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig, Row, RowResult
from twinkle.server.config import ModelSection, ServerConfig
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ranks import Incarnation, RankGroup
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost

Answer = Callable[[str, tuple[Any, ...]], Any]

STATE = AdapterState(AdapterSpec(rank=1), [], {})


class StandIn(Connection):
    """To a process that answers as the test says.

    Attributes:
        calls: (method, arguments) that arrived.
    """

    def __init__(self, answer: Answer) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answer = answer

    def call(self, call: Call, wants_result: bool = True) -> asyncio.Future[Any]:
        self.calls.append((call.method, call.args))
        answer = asyncio.get_running_loop().create_future()
        try:
            result = self._answer(call.method, call.args)
        except Exception as error:
            answer.set_exception(error)
            answer.exception()
            return answer
        if isinstance(result, asyncio.Future):
            return result
        answer.set_result(result if wants_result else None)
        return answer

    async def lost(self) -> ConnectionLost:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        pass


def group_of(*stand_ins: StandIn) -> RankGroup:
    """Data-parallel ranks."""
    model = ModelConfig(Path("fake"), data_parallel_size=len(stand_ins))
    config = ServerConfig(model=ModelSection(model_id="org/fake"))
    backend = FakeBackend(model)
    return RankGroup(
        Plan(
            config,
            model,
            "transformers",
            SamplerPlan("transformers", 0, model, 0, None, 0, 32),
            gpus_per_rank=0,
        ),
        cast(Any, None),
        Incarnation(stand_ins, [], None),
        backend.info,
        backend.loss_fns,
    )


def row(number: int, length: int) -> Row:
    tokens = np.full(length, number)
    return Row("a", tokens, "cross_entropy", {"target_tokens": tokens})


def echo(method: str, args: tuple[Any, ...]) -> Any:
    """Of a pass, each row's number as its loss."""
    assert method == "forward_backward"
    return [[RowResult(np.zeros(1, np.float32), float(each.tokens[0])) for each in rows] for rows in args[0]]


@pytest.mark.parametrize("lengths", [[[64] * 5, [32] * 3], [[64]], [[]], [[128], [64, 64], [32]]])
async def test_each_rank_gets_rows_of_its_own_and_results_are_in_order(lengths: list[list[int]]):
    stand_ins = [StandIn(echo) for _ in range(3)]
    numbers = iter(range(100))
    micro_batches = [[row(next(numbers), length) for length in batch] for batch in lengths]
    results = await group_of(*stand_ins).forward_backward(micro_batches)
    sent = [
        each for stand_in in stand_ins for _, [share] in stand_in.calls for rows in share for each in rows
    ]
    assert [each.tokens[0] for each in sent] == list(range(sum(map(len, lengths)))), "each row once"
    assert [len(stand_in.calls) for stand_in in stand_ins] == [1, 1, 1], "a rank without rows takes part"
    assert [len(rows) for rows in results] == [len(rows) for rows in micro_batches]
    assert [result.loss for rows in results for result in rows] == list(range(sum(map(len, lengths))))


async def test_rows_go_to_the_rank_that_rank_0_says_owns_their_adapter():
    owners = {"a": 1, "b": 0}

    def answer(method: str, args: tuple[Any, ...]) -> Any:
        match method:
            case "owner_of":
                return owners[args[0]]
            case "forward_backward":
                return echo(method, args)
            case _:
                return None

    stand_ins = [StandIn(answer), StandIn(answer)]
    group = group_of(*stand_ins)

    async def sent() -> list[list[str]]:
        micro_batch = [row(0, 64), replace(row(1, 64), adapter_id="b")]
        [results] = await group.forward_backward([micro_batch])
        assert [result.loss for result in results] == [0, 1]
        shares = [stand_in.calls[-1][1][0] for stand_in in stand_ins]
        return [[each.adapter_id for rows in share for each in rows] for share in shares]

    for name in owners:
        await group.add_adapter(name, AdapterSpec(rank=1))
    assert await sent() == [["b"], ["a"]]
    for name in owners:
        await group.remove_adapter(name)
    assert await sent() == [["a"], ["b"]]


async def test_a_sample_goes_to_the_rank_that_draws_the_fewest_sequences():
    drawing: list[asyncio.Future[str]] = []

    def hang(method: str, _args: tuple[Any, ...]) -> Any:
        if method == "generate":
            drawing.append(asyncio.get_running_loop().create_future())
            return drawing[-1]
        return None

    stand_ins = [StandIn(hang), StandIn(hang)]
    group = group_of(*stand_ins)

    def sample(num_samples: int) -> asyncio.Task[Any]:
        request = GenerateRequest("t", None, np.array([1]), num_samples=num_samples)
        return asyncio.create_task(group.generate(request))

    samples = [sample(4)]
    for _ in range(3):
        await asyncio.sleep(0)
        samples.append(sample(1))
    await asyncio.sleep(0)
    assert [len(stand_in.calls) for stand_in in stand_ins] == [1, 3]
    drawing[0].set_result("done")
    assert await samples[0] == "done"
    samples.append(sample(1))
    await asyncio.sleep(0)
    assert [len(stand_in.calls) for stand_in in stand_ins] == [2, 3], "the first is free again"
    await group.cancel("request")
    assert [stand_in.calls[-1] for stand_in in stand_ins] == [("cancel", ("request",))] * 2
    for future in drawing[1:]:
        future.set_result("done")
    await asyncio.gather(*samples[1:])


async def test_an_adapter_that_one_sampler_refuses_is_on_none():
    answers: list[Exception | None] = [None, MemoryError("no room"), None]
    removed: list[int] = []

    def answer_of(rank: int) -> Answer:
        def answer(method: str, args: tuple[Any, ...]) -> Any:
            if method == "remove_sampler_adapter":
                removed.append(rank)
                return None
            assert (method, args) == ("try_publish", ("run", "published"))
            return answers[rank]

        return answer

    group = group_of(*(StandIn(answer_of(rank)) for rank in range(3)))
    with pytest.raises(MemoryError, match="no room"):
        await group.publish("run", "published", STATE)
    assert removed == [0, 2]
    answers[1] = None
    await group.publish("run", "published", STATE)
    assert removed == [0, 2]
