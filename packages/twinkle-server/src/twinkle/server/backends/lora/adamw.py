"""AdamW on the rows of a bank, each adapter with its own hyperparameters.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, as `torch.optim.AdamW` has it: with g the gradient,

    p <- p - lr * decay * p
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

A step without a gradient is a step with a gradient of zero. A step that would not leave finite numbers is not made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.lora.banks import Bank
from twinkle.server.backends.lora.finite import LARGEST_GRADIENT, LARGEST_MEAN, Fault, refusal
from twinkle.server.backends.protocol import StepOutcome

# Elements that are worked on at once: on a CPU what the cache holds, so that memory is gone through once and not for
# each operation; elsewhere a bound of the one temporary that the steps need.
_CPU_BLOCK = 2**16
_BLOCK = 2**24
# torch.nn.utils.clip_grad_norm_ has the same.
_CLIP_EPS = 1e-6
# Where eps is 0, or as good as that, the least that is divided by: 0 / 0, where there never was a gradient, is no step.
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max
# Between these a norm in float32 is right: squares of smaller and larger numbers are none of float32's.
_SURE_NORMS = (1e-12, 1e18)
# A little less than half of the distance between float32's two largest numbers: a number below it that is added to
# a finite weight leaves it finite.
_HARMLESS = 1e31
# The operations on lists of tensors have no public names; torch's own optimizers use them.
_torch: Any = torch


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """Steps of some of a bank's adapters, ready to be applied: what can fail (memory, mostly) has been done.

    Attributes:
        params: by slot.
        norms: by slot, the L2 norm of the gradient before clipping.
        faults: by slot, why a step is not made; only of those that are not.
        is_suspicious: whether a step had to be looked at more closely. Where the norms are of the whole gradients it is
            the same on all ranks.
        workspace: float32, as long as a block.
    """

    bank: Bank
    params: dict[int, AdamParams]
    norms: Mapping[int, float]
    workspace: Tensor
    faults: dict[int, Fault] = field(default_factory=dict[int, Fault])
    is_suspicious: bool = False

    def apply(self) -> None:
        """Step, all in place, and let go of the gradients, also of steps that are not made."""
        for slot in self.faults:
            self.bank.grads.pop(slot, None)
        if self.bank.device.type == "cpu":
            self.apply_by_block()
        else:
            self.apply_together()

    def outcome(self, slot: int) -> StepOutcome:
        """What is said of a step."""
        if slot in self.faults:
            return refusal(self.faults[slot], self.norms[slot])
        return {"grad_norm:mean": self.norms[slot]}

    def _next_steps(self) -> dict[int, _Step]:
        """Those that are made, which are counted up."""
        made = {slot: params for slot, params in self.params.items() if slot not in self.faults}
        steps = {slot: _Step.next(self.bank, slot, params, self.norms[slot]) for slot, params in made.items()}
        for slot in steps:
            self.bank.steps[slot] += 1
        return steps

    def apply_by_block(self) -> None:
        """Adapter by adapter, block by block: on a CPU, where the cache counts."""
        for slot, step in self._next_steps().items():
            _apply(self.bank, slot, step, self.workspace)

    def apply_together(self) -> None:
        """A block's worth of adapters in each operation: elsewhere, where each operation is a launch."""
        steps = self._next_steps()
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
    norms = _norms(bank, params) if norms is None else norms
    suspicious = {
        slot: step
        for slot, s in params.items()
        if (step := _Step.next(bank, slot, s, norms[slot])).is_suspicious(norms[slot])
    }
    faults = {
        slot: fault
        for slot, step in suspicious.items()
        if (fault := _fault(bank, slot, step, norms[slot], workspace)) is not Fault.NONE
    }
    return PlannedSteps(bank, params, norms, workspace, faults, bool(suspicious))


def is_sure_norm(norm: float) -> bool:
    """Whether a norm that was computed in float32 is right; else it is to be computed in float64."""
    return _SURE_NORMS[0] < norm < _SURE_NORMS[1]


def _norms(bank: Bank, slots: Iterable[int]) -> dict[int, float]:
    norms = dict.fromkeys(slots, 0.0)
    pending = [slot for slot in norms if slot in bank.grads]
    if pending:
        found = torch.stack([torch.linalg.vector_norm(bank.grads[slot]) for slot in pending])
        # One transfer for all of them.
        norms |= zip(pending, cast("list[float]", found.tolist()), strict=True)
    for slot in pending:
        if not is_sure_norm(norms[slot]):
            norms[slot] = float(torch.linalg.vector_norm(bank.grads[slot], dtype=torch.float64))
    return norms


def _fault(bank: Bank, slot: int, step: _Step, norm: float, workspace: Tensor) -> Fault:
    """What is wrong with a suspicious step, if anything is."""
    if not math.isfinite(norm):
        return Fault.GRADIENT
    gradient = bank.grads.get(slot)
    if gradient is not None and len(gradient) and float(gradient.abs().max()) * step.clip > LARGEST_GRADIENT:
        return Fault.SQUARE
    if not step.fits_float32:
        return Fault.RESULT
    trial = Bank(bank.layout, bank.device)  # the step on a copy, which is thrown away
    place = trial.take()
    for rows, own in (
        (trial.params, bank.params),
        (trial.exp_avg, bank.exp_avg),
        (trial.exp_avg_sq, bank.exp_avg_sq),
    ):
        rows[place].copy_(own[slot])
    if gradient is not None:
        trial.grads[place] = gradient.clone()
    _apply(trial, place, step, workspace)
    is_finite = all(
        bool(rows[place].isfinite().all()) for rows in (trial.params, trial.exp_avg, trial.exp_avg_sq)
    )
    return Fault.NONE if is_finite else Fault.RESULT


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
        """The next one of `slot`."""
        count = bank.steps[slot] + 1
        root_correction = (1.0 - s.beta2**count) ** 0.5
        return cls(
            beta1=s.beta1,
            beta2=s.beta2,
            clip=min(1.0, s.grad_clip_norm / (norm + _CLIP_EPS)) if s.grad_clip_norm else 1.0,
            decay=1.0 - s.learning_rate * s.weight_decay,
            eps=min(s.eps * root_correction, _LARGEST),
            size=s.learning_rate / (1.0 - s.beta1**count) * root_correction,
        )

    @property
    def fits_float32(self) -> bool:
        return self.size <= _LARGEST and abs(self.decay) <= _LARGEST

    def is_suspicious(self, norm: float) -> bool:
        """Whether this could make a number infinite; told without looking at the numbers themselves.

        Weights are safe if no step is longer than what rounding swallows beside the largest float32: they change by
        size * m / (sqrt(v) + eps), in which m is bounded.
        """
        if not (math.isfinite(norm) and norm * self.clip <= LARGEST_GRADIENT):
            return True
        if not self.fits_float32:
            return True
        return not (abs(self.decay) <= 1.0 and self.size * LARGEST_MEAN <= _HARMLESS * max(self.eps, _TINY))


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
        if s.eps < _TINY:
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
    if any(s.eps < _TINY for s in scalars):
        _torch._foreach_clamp_min_(work, [_TINY if s.eps < _TINY else 0.0 for s in scalars])
    if any(s.decay != 1.0 for s in scalars):
        _torch._foreach_mul_(p, [s.decay for s in scalars])
    _torch._foreach_addcdiv_(p, m, work, [-s.size for s in scalars])
