"""The simulator of `benchmarks/`, in short: many tenants on the real scheduler and engine, in virtual time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from scheduled_jobs import a_pass, a_run, a_step

from twinkle.server.scheduling import runs, scheduler, turns
from twinkle.server.scheduling.runs import Run
from twinkle.server.scheduling.scheduler import Scheduler

PROGRAM = Path(__file__).resolve().parents[4] / "benchmarks" / "simulate_scheduler.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_scheduler", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("exponent", "ahead"), [(0.5, 2), (0.5, 1)])
def test_a_busy_server_is_used_and_no_tenant_gets_less_than_its_share(
    program: ModuleType, exponent: float, ahead: int
) -> None:
    costs = program.CostModel()
    arrivals = program.zipf_arrivals(
        100, exponent, load=1.5, steps=30, tokens_per_second=costs.tokens_per_second
    )
    outcome = program.simulate(arrivals, costs, ahead)
    assert outcome.figures["utilisation"] > 0.9
    assert outcome.figures["worst_share"] > 0.9
    assert outcome.figures["utilisation"] <= 1


def test_the_same_arrivals_end_the_same_also_when_they_were_recorded(
    program: ModuleType, tmp_path: Path
) -> None:
    costs = program.CostModel()
    arrivals = program.zipf_arrivals(30, 0.5, load=1.2, steps=5, tokens_per_second=costs.tokens_per_second)
    program.write_arrivals(tmp_path / "arrivals.jsonl", arrivals)
    recorded = program.read_arrivals(tmp_path / "arrivals.jsonl")
    assert recorded == arrivals
    first, second = program.simulate(arrivals, costs), program.simulate(recorded, costs)
    assert first.done == second.done
    assert sum(first.done.values()) > 0


def test_a_server_with_little_to_do_gives_each_tenant_what_it_asks_for(program: ModuleType) -> None:
    costs = program.CostModel()
    arrivals = program.zipf_arrivals(30, 0.5, load=0.3, steps=20, tokens_per_second=costs.tokens_per_second)
    figures = program.simulate(arrivals, costs).figures
    assert figures["utilisation"] == pytest.approx(0.3, rel=0.05)
    assert figures["worst_share"] > 0.9


def test_fair_shares_are_those_of_processor_sharing(program: ModuleType) -> None:
    """By hand, 10 tokens a second: a alone until 2 s, both until 6 s, then nobody; a from 7 s, both from 9 s."""
    arrivals = [
        program.Arrival(0.0, "a", (30, 10)),
        program.Arrival(2.0, "b", (20,)),
        program.Arrival(7.0, "a", (100,)),
        program.Arrival(9.0, "b", (3,)),
    ]
    assert program.fair_shares(arrivals, 10.0, 1.0) == pytest.approx({"a": 10})
    assert program.fair_shares(arrivals, 10.0, 5.0) == pytest.approx({"a": 35, "b": 15})
    assert program.fair_shares(arrivals, 10.0, 6.5) == pytest.approx({"a": 40, "b": 20})
    assert program.fair_shares(arrivals, 10.0, 9.4) == pytest.approx({"a": 62, "b": 22})
    assert program.fair_shares(arrivals, 10.0, 10.0) == pytest.approx({"a": 67, "b": 23})


class Instructions:
    """Counts the Python instructions that the scheduler executes."""

    FILES = frozenset({scheduler.__file__, turns.__file__, runs.__file__})

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Instructions:
        sys.settrace(self._called)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._executed

    def _executed(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "opcode"
        return self._executed


def instructions_per_operation(tenants: int) -> float:
    """All tenants have a step queued at any time, of sizes of their own."""
    busy = Scheduler(16_384, overhead_tokens=100)
    sizes = {a_run(f"run-{i}", f"tenant-{i}"): 200 + 7919 * i % 1500 for i in range(tenants)}
    sent = dict.fromkeys(sizes, 0)

    def send(run: Run) -> None:
        busy.submit(a_pass(run, sent[run], sizes[run]))
        busy.submit(a_step(run, sent[run] + 1))
        sent[run] += 2

    for run in sizes:
        send(run)
    operations, counted = 0, Instructions()
    for _ in range(40):
        with counted:
            tick = busy.take_tick()
            for job in tick.optim_steps:
                send(job.run)
        operations += len(tick.jobs)
    return counted.count / operations


def test_an_operation_costs_the_scheduler_as_much_with_100_tenants_as_with_10_000() -> None:
    assert instructions_per_operation(10_000) < 1.1 * instructions_per_operation(100)
