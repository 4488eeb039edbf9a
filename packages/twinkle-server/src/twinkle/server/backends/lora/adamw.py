"""AdamW on the rows of a bank, each adapter with its own hyperparameters.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, as `torch.optim.AdamW` has it: with g the gradient,

    p <- p - lr * decay * p
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Without a gradient, g is zero. A step whose result would not be finite is refused.
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

# Elements per block. On a CPU a block fits in the cache, so that memory is read once, not once per operation;
# elsewhere this bounds the workspace.
_CPU_BLOCK = 2**16
_BLOCK = 2**24
# As in torch.nn.utils.clip_grad_norm_.
_CLIP_EPS = 1e-6
# The smallest divisor: with eps = 0, a weight that never had a gradient would become 0 / 0 = NaN.
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max
# Outside of this range the squares underflow or overflow float32, and the norm is wrong.
_SURE_NORMS = (1e-12, 1e18)
# Slightly less than half the distance between the two largest float32 numbers: a smaller number added to any finite
# weight leaves it finite.
_HARMLESS = 1e31
# Operations on lists of tensors have no public API; torch's own optimizers use these.
_torch: Any = torch


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """Steps of some of a bank's adapters, ready to apply: whatever can fail (mostly allocation) has been done.

    Attributes:
        params: by slot.
        norms: by slot, the L2 norm of the gradient before clipping.
        faults: by slot, why a step is refused.
        is_suspicious: whether any step needed the exact check. Equal on all ranks if the norms are of whole gradients.
        workspace: float32 [block].
    """

    bank: Bank
    params: dict[int, AdamParams]
    norms: Mapping[int, float]
    workspace: Tensor
    faults: dict[int, Fault] = field(default_factory=dict[int, Fault])
    is_suspicious: bool = False

    def apply(self) -> None:
        """Step in place, and drop all gradients, those of refused steps too."""
        for slot in self.faults:
            self.bank.grads.pop(slot, None)
        if self.bank.device.type == "cpu":
            self.apply_by_block()
        else:
            self.apply_together()

    def outcome(self, slot: int) -> StepOutcome:
        if slot in self.faults:
            return refusal(self.faults[slot], self.norms[slot])
        return {"grad_norm:mean": self.norms[slot]}

    def _next_steps(self) -> dict[int, _Step]:
        """The steps that are not refused; their counts are incremented."""
        made = {slot: params for slot, params in self.params.items() if slot not in self.faults}
        steps = {slot: _Step.next(self.bank, slot, params, self.norms[slot]) for slot, params in made.items()}
        for slot in steps:
            self.bank.steps[slot] += 1
        return steps

    def apply_by_block(self) -> None:
        """Adapter by adapter, block by block: for CPUs, where the cache matters."""
        for slot, step in self._next_steps().items():
            _apply(self.bank, slot, step, self.workspace)

    def apply_together(self) -> None:
        """Many adapters per operation: for GPUs, where each operation is a kernel launch."""
        steps = self._next_steps()
        size, block = self.bank.layout.size, max(1, len(self.workspace))
        a_group = max(1, block // max(1, size))
        # A foreach operation has the same operands for all its adapters, so those without a gradient go apart.
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
    """Prepare a step for each slot in `params` without changing anything.

    Args:
        norms: by slot, the L2 norm of the whole gradient, if the bank holds only a part of it.
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
    """Whether a norm computed in float32 is right; otherwise compute it in float64."""
    return _SURE_NORMS[0] < norm < _SURE_NORMS[1]


def _norms(bank: Bank, slots: Iterable[int]) -> dict[int, float]:
    norms = dict.fromkeys(slots, 0.0)
    pending = [slot for slot in norms if slot in bank.grads]
    if pending:
        found = torch.stack([torch.linalg.vector_norm(bank.grads[slot]) for slot in pending])
        # One transfer from the device for all norms.
        norms |= zip(pending, cast("list[float]", found.tolist()), strict=True)
    for slot in pending:
        if not is_sure_norm(norms[slot]):
            norms[slot] = float(torch.linalg.vector_norm(bank.grads[slot], dtype=torch.float64))
    return norms


def _fault(bank: Bank, slot: int, step: _Step, norm: float, workspace: Tensor) -> Fault:
    """Whether a suspicious step is really a fault, and which."""
    if not math.isfinite(norm):
        return Fault.GRADIENT
    gradient = bank.grads.get(slot)
    if gradient is not None and len(gradient) and float(gradient.abs().max()) * step.clip > LARGEST_GRADIENT:
        return Fault.SQUARE
    if not step.fits_float32:
        return Fault.RESULT
    trial = Bank(bank.layout, bank.device)  # take the step on a copy
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
        clip: factor of the gradient, at most 1.
        decay: factor of the parameters.
        eps: added to sqrt(v): AdamW's eps times sqrt(1 - beta2^t).
        size: factor of m / (sqrt(v) + eps), with both bias corrections.
    """

    beta1: float
    beta2: float
    clip: float
    decay: float
    eps: float
    size: float

    @classmethod
    def next(cls, bank: Bank, slot: int, s: AdamParams, norm: float) -> _Step:
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
        """Whether this might overflow, judged from the scalars alone.

        Weights change by size * m / (sqrt(v) + eps), in which m is bounded. They stay finite if that is too small to
        change the largest float32 number.
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
    """As `_apply`, on `part` of several adapters' rows; all of them have a gradient, or none has."""
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
        # Instead of lerp, whose foreach form takes a list of scalars only since torch 2.7. Overwrites the gradient.
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
