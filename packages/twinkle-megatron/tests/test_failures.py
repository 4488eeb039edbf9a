"""What goes wrong on one rank is told by all, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft_alone
import pytest
from rank_processes import RankProcesses
from tiny_models import VOCAB_SIZE

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import assert_same_state
from twinkle.server.backends.lora.losses import custom_check
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, CustomLoss

SPEC = AdapterSpec(rank=4, seed=7)
LOGPROBS = CustomLossInput(name="logprobs", rank=1)
# It names nothing that isn't allowed; that there is no third dimension shows when it is run.
GRAPH = CustomLossGraph(
    nodes=[
        CustomLossNode(op="placeholder", name="lp", target="logprobs", args=[], kwargs={}),
        CustomLossNode(op="call_method", name="x", target="sum", args=[{"ref": "lp"}], kwargs={"dim": [3]}),
        CustomLossNode(
            op="output",
            name="output",
            target="output",
            args=[{"tuple": [{"ref": "x"}, {"dict": {}}]}],
            kwargs={},
        ),
    ]
)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2xPP2"])
def test_a_loss_that_fails_on_the_last_stage_fails_the_pass_on_all_ranks(
    layout: str, model: Callable[[str], Path], ranks: Callable[[Path, str], RankProcesses]
) -> None:
    backend = ranks(model("qwen3"), layout).backend()
    backend.add_adapter("a", SPEC)
    good = [peft_alone.random_row("a", 40, i, VOCAB_SIZE) for i in range(8)]
    [expected] = backend.forward_backward([good])
    before = backend.export_adapter("a", with_optimizer=True, with_gradients=True)
    loss = CustomLoss("l", "too deep", (LOGPROBS,), GRAPH)
    custom_check.check([LOGPROBS], GRAPH)
    bad = replace(good[3], loss_fn="custom", custom_loss=loss)
    with pytest.raises(InvalidRequest, match="sum"):
        backend.forward_backward([[*good[:3], bad, *good[4:]]])
    assert_same_state(backend.export_adapter("a", with_optimizer=True, with_gradients=True), before)
    [again] = backend.forward_backward([good])
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("layout", ["TP2", "TP2xPP2"])
def test_what_one_rank_finds_in_its_part_of_a_gradient_refuses_the_step_on_all(
    layout: str, model: Callable[[str], Path], ranks: Callable[[Path, str], RankProcesses]
) -> None:
    """An element whose square is no float32, which one rank has; no other sees anything amiss."""
    backend = ranks(model("qwen3"), layout).backend()
    backend.add_adapter("a", SPEC)
    backend.forward_backward([[peft_alone.random_row("a", 40, 1, VOCAB_SIZE)]])
    state = backend.export_adapter("a", with_optimizer=True, with_gradients=True)
    assert state.gradients is not None
    for name in (next(iter(state.gradients)), list(state.gradients)[-1]):
        changed = state.gradients[name].copy()
        changed[-1, -1] = 1e25
        backend.import_adapter("a", replace(state, gradients={**state.gradients, name: changed}))
        [outcome] = backend.optim_step([AdamStep("a", AdamParams())])
        assert isinstance(outcome, InvalidRequest) and "second moment" in outcome.message
        none = {name: np.zeros_like(matrix) for name, matrix in state.gradients.items()}
        after = backend.export_adapter("a", with_optimizer=True, with_gradients=True)
        assert_same_state(after, replace(state, gradients=none))
