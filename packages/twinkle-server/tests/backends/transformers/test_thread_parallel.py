"""A pass on several networks: what each of them gets, and the numbers of one."""

import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf import threads
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.shares import micro_batch_tokens, share_out
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.passes import PassLimits
from twinkle.server.backends.transformers.thread_parallel import ParallelNetworks

SPECS = {
    "ada": AdapterSpec(rank=4, seed=1),
    "bob": AdapterSpec(rank=4, seed=2),
    "cyd": AdapterSpec(rank=2, seed=3, train_attn=False),
}


def rows_of(lengths: list[int]) -> list[Row]:
    return [Row("ada", np.zeros(length, np.int64), "cross_entropy", {}) for length in lengths]


# ---------------------------------------------------------------- shares


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([1, 20, 10_000]),
)
def test_all_rows_are_in_one_network_each_in_order_and_no_network_has_much_more_than_the_mean(
    lengths: list[list[int]], networks: int, overhead: int
) -> None:
    micro_batches = [rows_of(some) for some in lengths]
    shares = share_out(micro_batches, networks, overhead)
    assert 1 <= len(shares) <= networks
    assert all(piece for share in shares for piece in share)
    found = [id(row) for share in shares for piece in share for row in piece]
    assert found == [id(row) for rows in micro_batches for row in rows]
    # No share goes beyond the mean by more than a row and what is too small to be cut off; what the others were short
    # of ends up in the last.
    most = 50 + overhead
    mean = sum(micro_batch_tokens(rows, packs=False) for rows in micro_batches) / networks
    for share in shares[:-1]:
        assert sum(micro_batch_tokens(rows, packs=False) for rows in share) <= mean + most
    assert sum(micro_batch_tokens(rows, packs=False) for rows in shares[-1]) <= mean + most * networks


def test_one_micro_batch_falls_into_equal_parts() -> None:
    shares = share_out([rows_of([8] * 6)], 3, overhead_tokens=1)
    assert [[len(piece) for piece in share] for share in shares] == [[2], [2], [2]]


def test_three_equal_micro_batches_on_two_networks_are_one_and_a_half_each() -> None:
    shares = share_out([rows_of([8] * 4) for _ in range(3)], 2, overhead_tokens=1)
    assert [[len(piece) for piece in share] for share in shares] == [[4, 2], [2, 4]]


def test_no_micro_batch_is_cut_where_a_part_would_cost_more_than_it_saves() -> None:
    shares = share_out([rows_of([8] * 4) for _ in range(3)], 2, overhead_tokens=17)
    assert [[len(piece) for piece in share] for share in shares] == [[4, 4], [4]]


def test_rows_of_several_lengths_are_cut_so_that_the_fullest_network_has_least() -> None:
    # Half of what they take as one micro-batch would be four and a half long rows.
    [long], [short] = share_out([rows_of([8, 8, 8, 2, 2, 2, 2, 2, 2])], 2, overhead_tokens=1)
    assert [len(row.tokens) for row in long] == [8] * 3
    assert [len(row.tokens) for row in short] == [2] * 6


def test_nothing_small_is_cut_off_though_it_would_make_the_fullest_network_less_full() -> None:
    shares = share_out([rows_of([8, 7, 7, 7])], 2, overhead_tokens=17)
    assert [[len(piece) for piece in share] for share in shares] == [[4]]


@pytest.mark.parametrize("micro_batches", [[], [[]]])
def test_no_rows_are_one_empty_share(micro_batches: list[list[Row]]) -> None:
    assert share_out(micro_batches, 2, 1) == [[]]


# ---------------------------------------------------------------- networks


def test_networks_work_at_the_same_time() -> None:
    networks, meeting = ParallelNetworks(["a", "b", "c"]), threading.Barrier(3)

    def work(network: str, share: int) -> tuple[str, int]:
        meeting.wait(30)
        return network, share

    assert networks.run(work, [1, 2, 3]) == [("a", 1), ("b", 2), ("c", 3)]
    networks.close()


def test_an_error_comes_when_all_networks_have_ended() -> None:
    networks, first_failed, ended = ParallelNetworks([0, 1]), threading.Event(), threading.Event()

    def work(network: int, share: str) -> None:
        if network == 0:
            first_failed.set()
            raise ValueError(share)
        first_failed.wait(30)
        ended.set()

    with pytest.raises(ValueError, match="one"):
        networks.run(work, ["one", "other"])
    assert ended.is_set()
    networks.close()


# ---------------------------------------------------------------- passes


@pytest.fixture
def backends(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, add_trained: Any
) -> tuple[TransformersBackend, ...]:
    """With one network, and with three."""
    monkeypatch.setattr(threads, "_ENOUGH", 1)
    made: list[TransformersBackend] = []
    for count in (1, 3):
        torch.set_num_threads(count)
        backend = TransformersBackend(ModelConfig(tiny_model_dir))
        torch.set_num_threads(1)
        backend._limits = PassLimits(backend._limits.affordable_tokens, overhead_tokens=1)
        add_trained(backend, SPECS)
        made.append(backend)
    return tuple(made)


def gradients(backend: TransformersBackend) -> dict[str, Any]:
    return {
        who: backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients for who in SPECS
    }


def check_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for who in SPECS:
        assert set(found[who]) == set(expected[who])
        for name, gradient in expected[who].items():
            error = np.linalg.norm(found[who][name] - gradient)
            assert error <= 1e-5 * np.linalg.norm(gradient) != 0, (who, name)


def test_gradients_of_networks_are_those_of_peft_alone(
    backends: tuple[TransformersBackend, ...],
    tiny_model_dir: Path,
    random_row: Any,
    make_peft: Any,
    peft_loss: Any,
    peft_parameters: Any,
) -> None:
    _, backend = backends
    rows = [random_row(who, 5 + 2 * i, seed=i) for i, who in enumerate(["ada", "bob", "cyd"] * 3)]
    backend.forward_backward([rows[:1], rows[1:7], rows[7:]])
    expected: dict[str, Any] = {}
    for who in SPECS:
        model = make_peft(tiny_model_dir, backend.export_adapter(who, with_optimizer=False))
        peft_loss(model, [row for row in rows if row.adapter_id == who]).backward()
        expected[who] = {name: matrix.grad.numpy() for name, matrix in peft_parameters(model).items()}
    check_close(gradients(backend), expected)


def test_networks_give_the_numbers_of_one(backends: tuple[TransformersBackend, ...], random_row: Any) -> None:
    one, three = backends
    rows = [random_row(who, 5 + 2 * i, seed=i) for i, who in enumerate(["ada", "bob", "cyd"] * 3)]
    micro_batches = [rows[:1], rows[1:7], [], rows[7:]]
    for _ in range(2):  # the second pass adds to what there is
        found, expected = (backend.forward_backward(micro_batches) for backend in (three, one))
        assert [len(results) for results in found] == [1, 6, 0, 2]
        for results, wanted in zip(found, expected, strict=True):
            for result, want in zip(results, wanted, strict=True):
                np.testing.assert_allclose(result.logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
                assert result.loss == pytest.approx(want.loss, rel=1e-5)
    check_close(gradients(three), gradients(one))


def test_networks_that_only_look_leave_gradients_to_those_that_train(
    backends: tuple[TransformersBackend, ...], random_row: Any
) -> None:
    one, three = backends
    rows = [random_row(who, 9, seed=i) for i, who in enumerate(["ada", "bob", "cyd"] * 3)]
    looking = [replace(row, forward_only=True) for row in rows]
    for micro_batches in ([looking[:6], rows[6:]], [looking]):
        found, expected = (backend.forward_backward(micro_batches) for backend in (three, one))
        for result, want in zip(chain(*found), chain(*expected), strict=True):
            np.testing.assert_allclose(result.logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
    check_close(gradients(three), gradients(one))


def test_the_same_pass_gives_the_same_bits(
    backends: tuple[TransformersBackend, ...], random_row: Any
) -> None:
    _, backend = backends
    rows = [random_row(who, 9, seed=i) for i, who in enumerate(["ada", "bob", "cyd"] * 4)]
    backend.forward_backward([rows])
    first = gradients(backend)
    for _ in range(5):
        for who in SPECS:
            backend.import_adapter(who, backend.export_adapter(who, with_optimizer=False))
        backend.forward_backward([rows])
        for who, again in gradients(backend).items():
            for name, gradient in again.items():
                np.testing.assert_array_equal(gradient, first[who][name])


def test_a_network_that_fails_leaves_all_gradients_as_they_were(
    backends: tuple[TransformersBackend, ...], random_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend = backends
    rows = [random_row(who, 9, seed=i) for i, who in enumerate(["ada", "bob", "cyd"] * 4)]
    backend.forward_backward([rows])
    before = gradients(backend)
    last = backend._networks._networks[2]
    monkeypatch.setattr(last.body, "forward", lambda **_: (_ for _ in ()).throw(InvalidRequest("no")))
    with pytest.raises(InvalidRequest, match="no"):
        backend.forward_backward([rows])
    for who, after in gradients(backend).items():
        for name, gradient in after.items():
            np.testing.assert_array_equal(gradient, before[who][name])
    monkeypatch.undo()
    backend.forward_backward([rows])  # the next one works
