"""AdamW on the rows of a bank: many adapters in one go, each with its own hyperparameters.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, as `torch.optim.AdamW` has it: with g the gradient,

    p <- p - lr * decay * p
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

A step without a gradient is a step with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.transformers.banks import Bank

# Elements that are worked on at once, unless one adapter alone has more: bounds the one temporary that a step needs.
_MAX_RUN = 2**24
# torch.nn.utils.clip_grad_norm_ has the same.
_CLIP_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbouring slots that step together; [n, 1] tensors of what each of them needs."""

    start: int
    params: list[AdamParams]
    norms: Tensor
    clip: Tensor
    kept: Tensor
    beta1_complement: Tensor
    beta2_complement: Tensor
    root_correction2: Tensor
    eps: Tensor
    step_size: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.params))


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """Steps of some of a bank's adapters, ready to be applied: what can fail (memory, mostly) has been done."""

    bank: Bank
    runs: list[_Run]
    workspace: Tensor

    def grad_norms(self) -> dict[int, float]:
        """By slot, the L2 norm of the gradient before clipping. Only before `apply`."""
        return {
            run.start + i: norm for run in self.runs for i, norm in enumerate(run.norms.flatten().tolist())
        }

    def apply(self) -> None:
        """Step, and zero the gradients. All in place."""
        for run in self.runs:
            _apply(self.bank, run, self.workspace[: len(run.params)])


def plan_steps(
    bank: Bank, params: dict[int, AdamParams], norms: dict[int, float] | None = None
) -> PlannedSteps:
    """Prepare a step for each slot in `params`; nothing changes yet.

    Args:
        norms: by slot, the L2 norm of the gradient, where the bank holds only a part of it.
    """
    runs = [
        _plan(bank, start, group, _row_norms(bank, start, len(group), norms))
        for start, group in _neighbours(params, max(1, bank.layout.size))
    ]
    longest = max(len(run.params) for run in runs)
    return PlannedSteps(bank, runs, bank.params.new_empty(longest, bank.layout.size))


def _neighbours(params: dict[int, AdamParams], size: int) -> list[tuple[int, list[AdamParams]]]:
    """Slots in rising order, cut where a slot is missing or a run grows too long."""
    longest = max(1, _MAX_RUN // size)
    runs: list[tuple[int, list[AdamParams]]] = []
    for slot in sorted(params):
        if runs and runs[-1][0] + len(runs[-1][1]) == slot and len(runs[-1][1]) < longest:
            runs[-1][1].append(params[slot])
        else:
            runs.append((slot, [params[slot]]))
    return runs


def _row_norms(bank: Bank, start: int, count: int, norms: dict[int, float] | None) -> Tensor:
    """float32 [count, 1]."""
    grads = bank.grads[start : start + count]
    if norms is None:
        return torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    return grads.new_tensor([[norms[start + i]] for i in range(count)])


def _plan(bank: Bank, start: int, params: list[AdamParams], norms: Tensor) -> _Run:
    steps = [bank.steps[start + i] + 1 for i in range(len(params))]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=norms.device).unsqueeze(1)

    limits = column([p.grad_clip_norm or float("inf") for p in params])
    return _Run(
        start=start,
        params=params,
        norms=norms,
        clip=(limits / (norms + _CLIP_EPS)).clamp(max=1.0),
        kept=column([1.0 - p.learning_rate * p.weight_decay for p in params]),
        beta1_complement=column([1.0 - p.beta1 for p in params]),
        beta2_complement=column([1.0 - p.beta2 for p in params]),
        root_correction2=column([(1.0 - p.beta2**t) ** 0.5 for p, t in zip(params, steps, strict=True)]),
        eps=column([p.eps for p in params]),
        step_size=column([p.learning_rate / (1.0 - p.beta1**t) for p, t in zip(params, steps, strict=True)]),
    )


def _apply(bank: Bank, run: _Run, work: Tensor) -> None:
    p, g, m, v = (tensor[run.rows] for tensor in (bank.params, bank.grads, bank.exp_avg, bank.exp_avg_sq))
    if any(params.grad_clip_norm for params in run.params):
        g.mul_(run.clip)
    m.lerp_(g, run.beta1_complement)
    torch.mul(g, g, out=work)
    v.lerp_(work, run.beta2_complement)
    torch.sqrt(v, out=work)
    work.div_(run.root_correction2).add_(run.eps)
    if any(params.eps == 0 for params in run.params):
        work.clamp_(min=torch.finfo(work.dtype).tiny)  # 0 / 0, where there never was a gradient, is no step
    torch.div(m, work, out=work)
    p.mul_(run.kept).sub_(work.mul_(run.step_size))
    g.zero_()
    for i in range(len(run.params)):
        bank.steps[run.start + i] += 1
