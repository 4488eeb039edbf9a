"""vLLM's process ends, in an engine of its own; before that, tenants take turns in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sampling_contract import ask
from vllm_engines import kill, processes_of_vllm, require_vllm

from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.samplers.protocol import EngineDied
from twinkle.server.samplers.vllm import launch

require_vllm()


@pytest.fixture(scope="module")
def small_engine_and_processes(model_dir: Path) -> Iterator[tuple[Any, Any]]:
    """Five sequences at once, one of them for newcomers, and two adapters."""
    from twinkle.server.samplers.vllm import VllmEngine

    others = processes_of_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SEQUENCES_CPU", 5)
        engine = VllmEngine.create(ModelConfig(model_dir, max_lora_rank=8, max_sampler_adapters=2), None)
    yield engine, processes_of_vllm() - others
    engine.close()


@pytest.fixture
def small_engine(small_engine_and_processes) -> Any:
    return small_engine_and_processes[0]


class Ended:
    """The order in which requests end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._lock = threading.Lock()

    def note(self, name: str, future: Any) -> Any:
        def ended(_: Any) -> None:
            with self._lock:
                self.names.append(name)

        future.add_done_callback(ended)
        return future


def test_a_tenant_with_little_does_not_wait_for_one_with_much(small_engine):
    ended = Ended()
    much = [
        ended.note("much", ask(small_engine, [1, 2], max_tokens=40, stop=[], tenant="much"))
        for _ in range(60)
    ]
    little = [
        ended.note("little", ask(small_engine, [3, 4], max_tokens=40, stop=[], tenant="little"))
        for _ in range(4)
    ]
    for future in (*much, *little):
        assert len(future.result(120).sequences[0].tokens) == 40
    # First come, first served would have them last of all, behind the 60 that were there before.
    assert max(i for i, name in enumerate(ended.names) if name == "little") < 30


def test_a_newcomer_has_a_place_beside_long_samples(small_engine):
    ended = Ended()
    long = [ended.note("long", ask(small_engine, [1], max_tokens=250, stop=[], tenant="a")) for _ in range(5)]
    short = ended.note("short", ask(small_engine, [2], max_tokens=3, stop=[], tenant="b"))
    for future in (*long, short):
        future.result(120)
    assert ended.names[0] == "short"


def test_more_adapters_than_places_take_turns(small_engine, random_state):
    names = [f"turn-{i}" for i in range(4)]
    for i, name in enumerate(names):
        small_engine.add_adapter(name, random_state(AdapterSpec(rank=4, seed=40 + i)))
    ended = Ended()
    futures = [
        ended.note(name, ask(small_engine, [1, 2], name, max_tokens=30, stop=[], tenant=name))
        for _ in range(6)
        for name in names
    ]
    for future in futures:
        assert len(future.result(120).sequences[0].tokens) == 30
    # Nobody's last one ends before everybody's first one has: no adapter keeps the others out.
    firsts = [ended.names.index(name) for name in names]
    lasts = [len(ended.names) - 1 - ended.names[::-1].index(name) for name in names]
    assert max(firsts) < min(lasts)


def test_every_request_learns_that_vllms_process_has_ended(small_engine_and_processes, states):
    small_engine, processes = small_engine_and_processes
    running = [ask(small_engine, [1], max_tokens=250, num_samples=8, stop=[]) for _ in range(6)]
    assert len(processes) == 2  # the engine and its worker
    kill(processes)
    for future in running:
        with pytest.raises(EngineDied, match="must be started again"):
            future.result(60)
    with pytest.raises(EngineDied):
        ask(small_engine, [1], max_tokens=1).result(60)
    with pytest.raises(EngineDied):
        small_engine.add_adapter("late", states["small"])
