"""Data-parallel ranks: the same numbers as one rank, each adapter's moments on one of them, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import replica_ranks
from rank_processes import RankProcesses

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends import contract
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    ModelConfig,
    Row,
)
from twinkle.server.backends.transformers import TransformersBackend

# A large eps: AdamW divides by it what is zero but for rounding, instead of blowing that up.
STEP = AdamParams(learning_rate=0.01, eps=1e-3)
SPECS = {"a": AdapterSpec(rank=4, seed=1), "b": AdapterSpec(rank=8, seed=2), "c": AdapterSpec(rank=4, seed=3)}


# Number of ranks, and whether they share one base. `hatch run layouts` has all.
CHOSEN = [(3, False), (2, True)]
ALL = [*CHOSEN, (2, False), (3, True)]


@pytest.fixture(
    scope="module", params=ALL if os.environ.get("TWINKLE_ALL_LAYOUTS") == "1" else CHOSEN, ids=str
)
def group(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Iterator[RankProcesses]:
    ranks, shard_base = request.param
    config = ModelConfig(tiny_model_dir, data_parallel_size=ranks, shard_base=shard_base)
    with replica_ranks.start(config) as started:
        yield started


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(check: contract.Check, group: RankProcesses) -> None:
    check(cast("contract.Factory", group.backend))


def train(backend: Any, random_row: Callable[..., Row], calls: int = 3) -> list[list[Any]]:
    """Passes of uneven rows of some adapters, forward-only ones among them, each with a step; all results."""
    for name, spec in SPECS.items():
        backend.add_adapter(name, spec)
    found: list[list[Any]] = []
    for call in range(calls):
        lengths = {"a": (5, 17, 3), "b": (9,), "c": (4, 4)} if call != 1 else {"b": (11, 2)}
        rows = [
            random_row(name, length, seed=100 * call + length)
            for name, of_adapter in lengths.items()
            for length in of_adapter
        ]
        found += backend.forward_backward([rows[:2], rows[2:]])
        found.append(backend.optim_step([AdamStep(name, STEP) for name in lengths]))
    found += backend.forward_backward([[random_row("a", 8, seed=1), random_row("b", 6, seed=2)]])
    return found


def states(backend: Any) -> list[AdapterState]:
    return [backend.export_adapter(name, with_optimizer=True, with_gradients=True) for name in SPECS]


def assert_close(one: AdapterState, other: AdapterState, tolerance: float) -> None:
    """Within so much of each matrix's norm."""
    assert one.optimizer is not None and other.optimizer is not None
    assert one.optimizer.step == other.optimizer.step
    for mine, theirs in (
        (one.weights, other.weights),
        (one.optimizer.exp_avg, other.optimizer.exp_avg),
        (one.optimizer.exp_avg_sq, other.optimizer.exp_avg_sq),
        (one.gradients or {}, other.gradients or {}),
    ):
        assert mine.keys() == theirs.keys()
        for name, matrix in mine.items():
            difference = np.linalg.norm(matrix - theirs[name])
            assert difference <= tolerance * np.linalg.norm(theirs[name]), name


def assert_close_results(found: list[list[Any]], expected: list[list[Any]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            if isinstance(one, dict):
                assert one == pytest.approx(other, rel=1e-5)
            else:
                assert one.loss == pytest.approx(other.loss, rel=1e-5)
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)


def test_mixed_tenants_get_the_numbers_of_one_rank(
    group: RankProcesses, tiny_model_dir: Path, random_row: Callable[..., Row], add_trained: Any
) -> None:
    alone, backend = TransformersBackend(ModelConfig(tiny_model_dir)), group.backend()
    rows = [
        random_row(name, length, seed=length)
        for name, length in zip("abacaa", (5, 9, 17, 4, 3, 12), strict=True)
    ]
    rows[4] = replace(rows[4], forward_only=True)
    for one in (alone, backend):
        add_trained(one, SPECS)
    assert_close_results(backend.forward_backward([rows]), alone.forward_backward([rows]))
    for mine, theirs in zip(states(backend), states(alone), strict=True):
        assert_close(mine, theirs, 1e-5)
    for one in (alone, backend):
        for name in SPECS:
            one.remove_adapter(name)
    assert_close_results(train(backend, random_row), train(alone, random_row))
    for mine, theirs in zip(states(backend), states(alone), strict=True):
        # AdamW divides by the root of squares: rounding counts for more.
        assert_close(mine, theirs, 1e-4)
    backend.close()


def test_the_same_run_ends_with_the_same_bits(group: RankProcesses, random_row: Callable[..., Row]) -> None:
    ends: list[list[AdapterState]] = []
    for _ in range(2):
        backend = group.backend()
        train(backend, random_row)
        ends.append(states(backend))
        backend.close()
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 0.0)


def test_moments_are_held_once_and_gradients_travel_to_where_they_are_needed(
    group: RankProcesses, random_row: Callable[..., Row]
) -> None:
    backend = group.backend()
    for name, spec in SPECS.items():
        backend.add_adapter(name, spec)
    sizes = {
        name: sum(
            matrix.size for matrix in backend.export_adapter(name, with_optimizer=False).weights.values()
        )
        for name in SPECS
    }

    def sent(first: str, second: str) -> list[int]:
        """By each rank, in a pass of a row of `first` and one of `second`."""
        before = [held.gradient_bytes_sent for held in group.held_by_each_rank()]
        backend.forward_backward([[random_row(first, 7, seed=1), random_row(second, 7, seed=2)]])
        after = [held.gradient_bytes_sent for held in group.held_by_each_rank()]
        return [end - start for start, end in zip(before, after, strict=True)][:2]

    # The first adapter is rank 0's and the second, which is larger, rank 1's: the fewest elements.
    assert sent("a", "b") == sent("b", "a") == [0, 0], "rows go where their adapter is"
    backend.owners.clear()
    assert sent("a", "b") == [0, 0]
    assert sent("b", "a") == [4 * sizes["b"], 4 * sizes["a"]], "float32"
    moments = [held.moments for held in group.held_by_each_rank()]
    assert sum(moments) == sum(sizes.values()), "each adapter's on one rank"
    if len(moments) == 2:
        assert moments == [sizes["a"] + sizes["c"], sizes["b"]]
    backend.close()


def test_where_rows_are_computed_changes_no_number(
    group: RankProcesses, random_row: Callable[..., Row]
) -> None:
    ends: list[list[AdapterState]] = []
    for knows_owners in (True, False):
        backend = group.backend()
        for name, spec in SPECS.items():
            backend.add_adapter(name, spec)
        if not knows_owners:
            backend.owners.clear()
        rows = [random_row(name, 9, seed=i) for i, name in enumerate("bacbcaab")]
        for _ in range(2):
            backend.forward_backward([rows])
            backend.optim_step([AdamStep(name, STEP) for name in SPECS])
        backend.forward_backward([rows])
        ends.append(states(backend))
        backend.close()
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-4)


def test_a_row_that_one_rank_refuses_leaves_no_gradient_on_any(
    group: RankProcesses, random_row: Callable[..., Row]
) -> None:
    backend = group.backend()
    train(backend, random_row)
    before = states(backend)
    good, bad = random_row("a", 6, seed=1), random_row("b", 6, seed=2)
    bad.loss_inputs["target_tokens"] = bad.loss_inputs["target_tokens"] + 10**6
    for micro_batches in ([[good], [bad]], [[bad], [good]]):
        with pytest.raises(InvalidRequest, match="token ids must be between"):
            backend.forward_backward(micro_batches)
    for mine, theirs in zip(states(backend), before, strict=True):
        assert_close(mine, theirs, 0.0)
    backend.forward_backward([[good]])
    backend.close()
