"""AdamW on the rows of a bank, each adapter with its own hyperparameters.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, as `torch.optim.AdamW` has it: with g the gradient,

    p <- p - lr * decay * p
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

A step without a gradient is a step with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.transformers.banks import Bank

# Elements that are worked on at once: on a CPU what the cache holds, so that memory is gone through once and not for
# each operation; elsewhere a bound of the one temporary that a step needs.
_CPU_BLOCK = 2**16
_BLOCK = 2**24
# torch.nn.utils.clip_grad_norm_ has the same.
_CLIP_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """Steps of some of a bank's adapters, ready to be applied: what can fail (memory, mostly) has been done.

    Attributes:
        params, norms: by slot.
        workspace: float32, as long as a block.
    """

    bank: Bank
    params: dict[int, AdamParams]
    norms: Mapping[int, float]
    workspace: Tensor

    def grad_norms(self) -> dict[int, float]:
        """By slot, the L2 norm of the gradient before clipping."""
        return {slot: self.norms[slot] for slot in self.params}

    def apply(self) -> None:
        """Step, all in place, and let go of the gradients."""
        for slot, params in self.params.items():
            _apply(self.bank, slot, params, self.norms[slot], self.workspace)


def plan_steps(
    bank: Bank, params: dict[int, AdamParams], norms: Mapping[int, float] | None = None
) -> PlannedSteps:
    """Prepare a step for each slot in `params`; nothing changes yet.

    Args:
        norms: by slot, the L2 norm of the gradient, where the bank holds only a part of it.
    """
    block = _CPU_BLOCK if bank.device.type == "cpu" else _BLOCK
    workspace = torch.empty(min(block, bank.layout.size), device=bank.device)
    return PlannedSteps(bank, params, _norms(bank, params) if norms is None else norms, workspace)


def _norms(bank: Bank, slots: Iterable[int]) -> dict[int, float]:
    norms = dict.fromkeys(slots, 0.0)
    pending = [slot for slot in norms if slot in bank.grads]
    if pending:
        found = torch.stack([torch.linalg.vector_norm(bank.grads[slot]) for slot in pending])
        norms |= zip(
            pending, cast("list[float]", found.tolist()), strict=True
        )  # one transfer for all of them
    return norms


def _apply(bank: Bank, slot: int, s: AdamParams, norm: float, workspace: Tensor) -> None:
    bank.steps[slot] += 1
    root_correction = (1.0 - s.beta2 ** bank.steps[slot]) ** 0.5
    step_size = s.learning_rate / (1.0 - s.beta1 ** bank.steps[slot]) * root_correction
    clip = min(1.0, s.grad_clip_norm / (norm + _CLIP_EPS)) if s.grad_clip_norm else 1.0
    gradient = bank.grads.pop(slot, None)
    for start in range(0, bank.layout.size, max(1, len(workspace))):
        part = slice(start, start + len(workspace))
        p, m, v = bank.params[slot][part], bank.exp_avg[slot][part], bank.exp_avg_sq[slot][part]
        work = workspace[: len(p)]
        if gradient is None:
            m.mul_(s.beta1)
            v.mul_(s.beta2)
        else:
            g = gradient[part]
            if clip < 1.0:
                g.mul_(clip)
            m.lerp_(g, 1.0 - s.beta1)
            v.mul_(s.beta2).addcmul_(g, g, value=1.0 - s.beta2)
        torch.sqrt(v, out=work)
        work.add_(s.eps * root_correction)
        if s.eps == 0:
            work.clamp_(
                min=torch.finfo(work.dtype).tiny
            )  # 0 / 0, where there never was a gradient, is no step
        if s.learning_rate * s.weight_decay:
            p.mul_(1.0 - s.learning_rate * s.weight_decay)
        p.addcdiv_(m, work, value=-step_size)
