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
from typing import Any, cast

import torch
from torch import Tensor

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.transformers.banks import Bank

# Elements that are worked on at once: on a CPU what the cache holds, so that memory is gone through once and not for
# each operation; elsewhere a bound of the one temporary that the steps need.
_CPU_BLOCK = 2**16
_BLOCK = 2**24
# torch.nn.utils.clip_grad_norm_ has the same.
_CLIP_EPS = 1e-6
# Where eps is 0 the least that is divided by: 0 / 0, where there never was a gradient, is no step.
_TINY = torch.finfo(torch.float32).tiny
# The operations on lists of tensors have no public names; torch's own optimizers use them.
_torch: Any = torch


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
        if self.bank.device.type == "cpu":
            self.apply_by_block()
        else:
            self.apply_together()

    def apply_by_block(self) -> None:
        """Adapter by adapter, block by block: on a CPU, where the cache counts."""
        for slot, params in self.params.items():
            _apply(self.bank, slot, _Step.next(self.bank, slot, params, self.norms[slot]), self.workspace)

    def apply_together(self) -> None:
        """A block's worth of adapters in each operation: elsewhere, where each operation is a launch."""
        steps = {slot: _Step.next(self.bank, slot, s, self.norms[slot]) for slot, s in self.params.items()}
        size, block = self.bank.layout.size, max(1, len(self.workspace))
        a_group = max(1, block // max(1, size))
        having = [slot for slot in steps if slot in self.bank.grads]
        for slots in (having, [slot for slot in steps if slot not in self.bank.grads]):
            for first in range(0, len(slots), a_group):
                group = {slot: steps[slot] for slot in slots[first : first + a_group]}
                for start in range(0, size, block):
                    _apply_together(self.bank, group, slice(start, start + block), self.workspace)
                for slot in group:
                    self.bank.grads.pop(slot, None)


def plan_steps(
    bank: Bank, params: dict[int, AdamParams], norms: Mapping[int, float] | None = None
) -> PlannedSteps:
    """Prepare a step for each slot in `params`; nothing changes yet.

    Args:
        norms: by slot, the L2 norm of the gradient, where the bank holds only a part of it.
    """
    size = bank.layout.size
    needed = min(_CPU_BLOCK, size) if bank.device.type == "cpu" else min(_BLOCK, size * len(params))
    workspace = torch.empty(needed, device=bank.device)
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


@dataclass(frozen=True)
class _Step:
    """The scalars of one adapter's step.

    Attributes:
        clip: what the gradient is multiplied by, at most 1.
        decay: what the parameters are multiplied by.
        eps: what is added to sqrt(v), that is `eps` times the root of v's correction.
        size: what m / (sqrt(v) + eps) is multiplied by: both corrections are in it.
    """

    beta1: float
    beta2: float
    clip: float
    decay: float
    eps: float
    size: float

    @classmethod
    def next(cls, bank: Bank, slot: int, s: AdamParams, norm: float) -> _Step:
        """Of `slot`, whose steps are counted up."""
        bank.steps[slot] += 1
        root_correction = (1.0 - s.beta2 ** bank.steps[slot]) ** 0.5
        return cls(
            beta1=s.beta1,
            beta2=s.beta2,
            clip=min(1.0, s.grad_clip_norm / (norm + _CLIP_EPS)) if s.grad_clip_norm else 1.0,
            decay=1.0 - s.learning_rate * s.weight_decay,
            eps=s.eps * root_correction,
            size=s.learning_rate / (1.0 - s.beta1 ** bank.steps[slot]) * root_correction,
        )


def _apply(bank: Bank, slot: int, s: _Step, workspace: Tensor) -> None:
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
            if s.clip < 1.0:
                g.mul_(s.clip)
            m.lerp_(g, 1.0 - s.beta1)
            v.mul_(s.beta2).addcmul_(g, g, value=1.0 - s.beta2)
        torch.sqrt(v, out=work)
        work.add_(s.eps)
        if s.eps == 0:
            work.clamp_(min=_TINY)
        if s.decay != 1.0:
            p.mul_(s.decay)
        p.addcdiv_(m, work, value=-s.size)


def _apply_together(bank: Bank, steps: Mapping[int, _Step], part: slice, workspace: Tensor) -> None:
    """A part of each adapter's row, which has a gradient in all of them or in none."""
    scalars = list(steps.values())
    p, m, v = ([rows[slot][part] for slot in steps] for rows in (bank.params, bank.exp_avg, bank.exp_avg_sq))
    work = list(workspace[: len(p) * len(p[0])].view(len(p), -1).unbind())
    _torch._foreach_mul_(m, [s.beta1 for s in scalars])
    _torch._foreach_mul_(v, [s.beta2 for s in scalars])
    if all(slot in bank.grads for slot in steps):
        g = [bank.grads[slot][part] for slot in steps]
        if any(s.clip < 1.0 for s in scalars):
            _torch._foreach_mul_(g, [s.clip for s in scalars])
        _torch._foreach_addcmul_(v, g, g, [1.0 - s.beta2 for s in scalars])
        # The gradient is used up: in the place of lerp, which takes a scalar for each since torch 2.7 only.
        _torch._foreach_mul_(g, [1.0 - s.beta1 for s in scalars])
        _torch._foreach_add_(m, g)
    _torch._foreach_copy_(work, v)
    _torch._foreach_sqrt_(work)
    _torch._foreach_add_(work, [s.eps for s in scalars])
    if any(s.eps == 0 for s in scalars):
        _torch._foreach_clamp_min_(work, [_TINY if s.eps == 0 else 0.0 for s in scalars])
    if any(s.decay != 1.0 for s in scalars):
        _torch._foreach_mul_(p, [s.decay for s in scalars])
    _torch._foreach_addcdiv_(p, m, work, [-s.size for s in scalars])
