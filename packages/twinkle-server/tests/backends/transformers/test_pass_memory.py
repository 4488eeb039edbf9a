"""Training passes for which memory runs out: the same numbers in smaller pieces, and whose fault it is if none fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
import tiny_moe
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server.backends import transformers
from twinkle.server.backends.lora.banks import Adapter, Bank, Layout, LinearShape
from twinkle.server.backends.lora.linear import Gradients
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend, passes
from twinkle.server.backends.transformers.activations import SavedBytes
from twinkle.server.backends.transformers.network import LoraNetwork
from twinkle.server.backends.transformers.packed_rows import PackedRows
from twinkle.server.backends.transformers.pass_memory import PassLimits, gradient_bytes, stack_bytes

SPECS = {
    "ada": AdapterSpec(rank=4, alpha=8.0, seed=1),
    "bob": AdapterSpec(rank=4, alpha=4.0, seed=2),
    "cyd": AdapterSpec(rank=2, alpha=16.0, seed=3, train_attn=False),
}


@pytest.fixture(params=["plain", "experts"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_dir: Path) -> Path:
    return tiny_model_dir if request.param == "plain" else tiny_moe.save(tmp_path)


@pytest.fixture
def backend(tiny_model_dir: Path, add_trained: Any) -> TransformersBackend:
    made = TransformersBackend(ModelConfig(tiny_model_dir))
    add_trained(made, SPECS)
    return made


def run_out(
    monkeypatch: pytest.MonkeyPatch, is_too_much: Callable[[int, bool], bool], where: str = "backward"
) -> list[tuple[int, int, bool]]:
    """Memory runs out, by the tokens of a call and whether activations are recomputed: in the forward pass, or in the
    backward pass after some gradients have been added. Returns each call's rows, tokens and whether it recomputed.
    """
    logprobs, add = LoraNetwork.logprobs, Gradients.add
    calls, left = list[tuple[int, int, bool]](), [-1]

    def failing(
        self: LoraNetwork, tokens: torch.Tensor, targets: torch.Tensor, packed_rows: PackedRows | None
    ) -> torch.Tensor:
        rows = len(tokens) if packed_rows is None else len(packed_rows.lengths)
        calls.append((rows, tokens.numel(), self.recomputation.is_on))
        left[0] = -1
        if is_too_much(tokens.numel(), self.recomputation.is_on):
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            left[0] = 3
        return logprobs(self, tokens, targets, packed_rows)

    def adding(self: Gradients, target: torch.Tensor, gradient: torch.Tensor) -> None:
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left[0] -= 1
        add(self, target, gradient)

    monkeypatch.setattr(LoraNetwork, "logprobs", failing)
    monkeypatch.setattr(Gradients, "add", adding)
    return calls


def gradients(backend: TransformersBackend) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for who in SPECS:
        state = backend.export_adapter(who, with_optimizer=False, with_gradients=True)
        found[who] = dict(state.gradients or {})
    return found


def many_rows() -> list[Row]:
    whose = ("ada", "bob", "bob", "cyd", "ada", "cyd", "bob")
    return [peft_alone.random_row(who, 24 - 2 * i, seed=i, vocab_size=100) for i, who in enumerate(whose)]


@pytest.mark.parametrize("most", [100, 40, 24])
def test_a_pass_beyond_the_memory_gives_pefts_numbers_from_smaller_pieces(
    model_dir: Path, add_trained: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    backend = TransformersBackend(ModelConfig(model_dir))
    add_trained(backend, SPECS)
    rows = many_rows()
    calls = run_out(monkeypatch, lambda tokens, _: tokens > most, where="forward")
    [results] = backend.forward_backward([rows])
    monkeypatch.undo()
    assert any(tokens > most for _, tokens, _ in calls), "else memory has not run out"
    found = gradients(backend)
    for who in SPECS:
        model = peft_alone.make(model_dir, backend.export_adapter(who, with_optimizer=False))
        own = [row for row in rows if row.adapter_id == who]
        peft_alone.loss(model, own).backward()
        for name, parameter in peft_alone.parameters(model).items():
            np.testing.assert_allclose(found[who][name], parameter.grad, rtol=1e-4, atol=1e-5)
        for row, result in zip(rows, results, strict=True):
            if row.adapter_id == who:
                expected = peft_alone.logprobs(model, row).detach()
                np.testing.assert_allclose(result.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_the_next_pass_knows_what_fits_and_tries_more_after_a_while(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = peft_alone.random_row("ada", 8, seed=0)
    calls = run_out(monkeypatch, lambda tokens, _: tokens > 16, where="forward")
    backend._limits.overhead_tokens = 8
    with caplog.at_level(logging.WARNING, "twinkle.backend"):
        backend.forward_backward([[row] * 4])
    assert [call[:2] for call in calls] == [(4, 32), (2, 16), (2, 16)]
    [said] = caplog.messages
    assert "at most 16 tokens at once" in said
    calls.clear()
    backend.forward_backward([[row] * 4])
    assert [call[:2] for call in calls] == [(2, 16), (2, 16)]
    monkeypatch.undo()
    for _ in range(64):
        backend._limits.worked()
    calls = run_out(monkeypatch, lambda *_: False)
    backend.forward_backward([[row] * 4])
    assert [call[:2] for call in calls] == [(4, 32)]


@pytest.mark.parametrize(("fits", "found"), [(10**6, 96), (50, 48), (30, 24)])
def test_the_largest_micro_batch_is_tried_and_what_fits_is_the_limit(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch, fits: int, found: int
) -> None:
    """As on a GPU at the start, with 4 rows of 24 tokens in place of thousands."""
    monkeypatch.setattr(transformers, "_TRIAL_LENGTH", 24)
    backend._info = replace(backend.info, max_batch_tokens=96 + 23)
    before = backend.export_adapter("ada", with_optimizer=False)
    with monkeypatch.context() as patch:
        calls = run_out(patch, lambda tokens, _: tokens > fits, where="backward")
        backend._try_full_pass(beside=2**20)
    assert calls[0] == (4, 96, False)
    assert backend.info.max_batch_tokens == (96 + 23 if found == 96 else found)
    with pytest.raises(KeyError):
        backend.export_adapter(transformers._TRIAL, with_optimizer=False)
    after = backend.export_adapter("ada", with_optimizer=False)
    assert all(np.array_equal(after.weights[name], array) for name, array in before.weights.items())


def test_a_row_that_does_not_fit_is_recomputed(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = peft_alone.random_row("ada", 30, seed=0)
    [[expected]] = backend.forward_backward([[row]])
    once = gradients(backend)["ada"]
    calls = run_out(monkeypatch, lambda tokens, recomputes: tokens > 10 and not recomputes)
    [[found]] = backend.forward_backward([[row]])
    assert calls == [(1, 30, False), (1, 30, True)]
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    for name, gradient in gradients(backend)["ada"].items():
        np.testing.assert_allclose(gradient, 2 * once[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_never_fits_changes_nothing_and_is_the_servers_fault_if_it_should_fit(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rows = many_rows()
    [[expected]] = backend.forward_backward([rows[:1]])
    before = gradients(backend)
    with monkeypatch.context() as patch:
        calls = run_out(patch, lambda tokens, _: tokens > 23, where)
        with pytest.raises(ServerFault, match="should have room for"):
            backend.forward_backward([rows])
        assert (1, 24, True) in calls
    after = gradients(backend)
    for who in SPECS:
        for name, gradient in before[who].items():
            np.testing.assert_array_equal(after[who][name], gradient)
    [[found]] = backend.forward_backward([rows[:1]])
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


def test_a_row_that_can_not_fit_is_the_clients_mistake(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, lambda tokens, _: tokens > 23, "forward")
    backend._limits.affordable_tokens = 3
    with pytest.raises(InvalidRequest, match="a sequence of 24 tokens with an adapter of rank 4 takes about"):
        backend.forward_backward([many_rows()])


def test_host_memory_that_runs_out_is_seen_too(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "row_losses", lambda *_: torch.empty(2**60))
    with pytest.raises(ServerFault):
        backend.forward_backward([many_rows()[:1]])


# ---------------------------------------------------------------- what is reckoned


def test_adapters_take_what_is_reckoned(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd keeps of a piece, with adapters of other sizes and without; and the scratches of the pass."""
    kept, scratches = list[int](), list[int]()
    begin, logprobs = passes.Computed.begin, LoraNetwork.logprobs

    def noting(*arguments: Any) -> torch.Tensor:
        with (saved := SavedBytes()).hooks:
            found = logprobs(*arguments)
        kept.append(saved.total)
        return found

    def begun(*args: Any) -> Any:
        found = begin(*args)
        scratches.append(sum(scratch.grads.nbytes for scratch in found.scratches.values()))
        return found

    monkeypatch.setattr(LoraNetwork, "logprobs", noting)
    monkeypatch.setattr(passes.Computed, "begin", begun)
    small, large = SPECS["ada"], AdapterSpec(rank=64, seed=5)
    backend.add_adapter("large", large)
    for who in ("ada", "large"):
        own = [peft_alone.random_row(who, 24, seed=i) for i in range(3)]
        backend.forward_backward([own])
    (bank, slot), (wide, place) = (
        (backend._adapters[who].bank, backend._adapters[who].slot) for who in ("ada", "large")
    )
    assert scratches == [gradient_bytes([backend._adapters[who]]) for who in ("ada", "large")]
    low = 4 * (large.rank - small.rank) * len(bank.layout.a) * 3 * 24  # of each layer, [rank, tokens]
    more = stack_bytes(wide, [place] * 3, 4) - stack_bytes(bank, [slot] * 3, 4) + low
    # Of A no copy is made where the arithmetic is float32, which is about half of an adapter.
    assert 0.6 * more < kept[1] - kept[0] <= more


def test_a_stack_and_its_copy_have_each_adapter_once() -> None:
    bank = Bank(Layout.of([LinearShape("up", 3, 5), LinearShape("down", 5, 3)], 2), torch.device("cpu"))
    size = 2 * (3 + 5) * 2  # two layers, rank 2
    assert stack_bytes(bank, [7], itemsize=2) == (4 + 2) * size
    assert stack_bytes(bank, [7, 7, 9], itemsize=2) == 2 * (4 + 2) * size
    adapters = [Adapter(AdapterSpec(rank=2), bank, slot) for slot in (7, 9)]
    assert gradient_bytes(adapters) == 2 * 4 * size


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    affordable=st.integers(0, 400),
    most=st.integers(1, 400),
    overhead=st.integers(1, 50),
)
def test_pieces_are_the_rows_in_order_and_no_larger_than_fits(
    lengths: Sequence[int], affordable: int, most: int, overhead: int
) -> None:
    rows = [peft_alone.random_row("ada", n, seed=0) for n in sorted(lengths, reverse=True)]
    limits = PassLimits(affordable, overhead, most_tokens=most)
    pieces = limits.cut(rows, {}, ())
    assert [row for piece in pieces for row in piece.rows] == rows
    for piece in pieces:
        size = len(piece.rows) * len(piece.rows[0].tokens)
        assert len(piece.rows) == 1 or size <= most
        assert piece.recomputes == (size > affordable)
        assert len(piece.rows) == 1 or size <= affordable or affordable < overhead


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), overhead=st.integers(1, 50))
def test_each_try_is_smaller_and_the_last_is_single_rows_recomputed(
    lengths: Sequence[int], overhead: int
) -> None:
    rows = [peft_alone.random_row("ada", n, seed=0) for n in sorted(lengths, reverse=True)]
    limits = PassLimits(10**6, overhead)
    tries = [limits.cut(rows, {}, ())]
    while limits.tighten(tries[-1]):
        tries.append(limits.cut(rows, {}, ()))
        assert len(tries) < 20
        assert (len(tries[-1]), tries[-1][0].recomputes) > (len(tries[-2]), tries[-2][0].recomputes)
    assert all(len(piece.rows) == 1 and piece.recomputes for piece in tries[-1])
