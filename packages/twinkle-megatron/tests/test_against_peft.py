"""Tenants who train at once, on every layout of ranks: each one's numbers are those of PEFT on its data alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
import torch
from rank_processes import RankProcesses
from tiny_models import VOCAB_SIZE

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, Row

torch.set_num_threads(1)

# Ranks, alphas and flags of all kinds.
TENANTS = {
    "ada": AdapterSpec(rank=8, alpha=32.0, seed=1),
    "bob": AdapterSpec(rank=8, alpha=4.0, seed=2),
    "cyd": AdapterSpec(rank=3, alpha=16.0, seed=3, train_unembed=False),
    "dee": AdapterSpec(rank=3, alpha=16.0, seed=4, train_attn=False, train_mlp=False),
    "eve": AdapterSpec(rank=2, alpha=2.0, seed=5, train_attn=False, train_unembed=False),
}
# Gradients and losses, relative, in float32; and the weights after a step of Adam from the same weights.
TOLERANCE = 1e-5
AFTER_A_STEP = 1e-4
# Of Adam: above float32's errors in gradients. With 1e-8 an entry without any gradient moves by the sign of its error.
EPSILON = 1e-5

DENSE = ["TP1", "TP2", "PP2", "TP2xPP2", "TP2+SP"]
CASES = [
    *[("qwen3", layout) for layout in DENSE],
    *[("llama", layout) for layout in ("TP2", "TP2xPP2")],
    *[("qwen2", layout) for layout in ("TP2+SP", "PP2")],
    *[("qwen3_moe", layout) for layout in ("TP1", "EP2", "PP2", "TP2xEP2", "PP2xEP2", "DP2xEP2")],
    *[("qwen3", layout) for layout in ("DP2", "DP2xTP2", "DP2xPP2")],
    *[("qwen3_5", layout) for layout in DENSE],
    *[("qwen3_5, tied", layout) for layout in ("TP1", "TP2xPP2")],
    *[("qwen3_5_moe", layout) for layout in ("TP1", "EP2", "PP2", "TP2xEP2")],
    *[("qwen3_next", layout) for layout in ("TP2xEP2", "PP2")],
]


@pytest.mark.parametrize("tenants", [["ada", "cyd"], list(TENANTS)], ids=["two", "five"])
@pytest.mark.parametrize(("family", "layout"), CASES, ids=[f"{family}-{layout}" for family, layout in CASES])
def test_tenants_training_at_once_equal_peft_alone(
    family: str,
    layout: str,
    tenants: list[str],
    model: Callable[[str], Path],
    ranks: Callable[[Path, str], RankProcesses],
) -> None:
    backend = ranks(model(family), layout).backend()
    peft: dict[str, Any] = {}
    for who in tenants:
        backend.add_adapter(who, TENANTS[who])
        peft[who] = peft_alone.make(model(family), backend.export_adapter(who, with_optimizer=False))
    step = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=EPSILON, weight_decay=0.01)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": EPSILON, "weight_decay": 0.01}
    optimizers = {
        who: torch.optim.AdamW(peft_alone.parameters(m).values(), **settings) for who, m in peft.items()
    }
    for i in range(5):
        rows = _rows(tenants, i)
        mixed = [row for k in range(3) for who in tenants for row in rows[who][k : k + 1]]
        [results, more] = backend.forward_backward([mixed[:-1], mixed[-1:]])
        found = dict(zip(map(id, mixed), (*results, *more), strict=True))
        for who in tenants:
            optimizers[who].zero_grad()
            _compare_losses(peft[who], rows[who], [found[id(row)] for row in rows[who]])
            gradients = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
            expected = {n: p.grad.numpy() for n, p in peft_alone.parameters(peft[who]).items()}
            assert gradients is not None
            assert_close(gradients, expected, TOLERANCE)
            optimizers[who].step()
        backend.optim_step([AdamStep(who, step) for who in tenants])
        for who in tenants:
            parameters = peft_alone.parameters(peft[who])
            weights = backend.export_adapter(who, with_optimizer=False).weights
            assert_close(weights, {n: p.detach().numpy() for n, p in parameters.items()}, AFTER_A_STEP)
            with torch.no_grad():  # the next step begins at the same weights
                for name, parameter in parameters.items():
                    parameter.copy_(torch.from_numpy(weights[name]))
    backend.close()


def _rows(tenants: list[str], step: int) -> dict[str, list[Row]]:
    """One to three rows each, of lengths of all kinds."""
    counts = {who: 1 + (step + k) % 3 for k, who in enumerate(tenants)}
    return {
        who: [
            peft_alone.random_row(who, 5 + 9 * k + 2 * len(tenants), 100 * step + 10 * k + i, VOCAB_SIZE)
            for k in range(counts[who])
        ]
        for i, who in enumerate(tenants)
    }


def _compare_losses(peft: Any, rows: list[Row], found: list[Any]) -> None:
    """And have PEFT compute its gradient."""
    total = torch.zeros(())
    for row, result in zip(rows, found, strict=True):
        logprobs = peft_alone.logprobs(peft, row)
        np.testing.assert_allclose(result.logprobs, logprobs.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        loss = -(torch.from_numpy(row.loss_inputs["weights"]) * logprobs).sum()
        assert result.loss == pytest.approx(loss.item(), rel=TOLERANCE, abs=TOLERANCE)
        total = total + loss
    total.backward()
