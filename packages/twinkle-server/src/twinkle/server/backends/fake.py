"""A training backend in numpy alone, for tests of everything around it: milliseconds, no torch, no files.

It is a real model with exact gradients, only a very small one. With phi(x) a fixed vector [8] for a token x, and
M + (alpha / rank) B A in place of each of three matrices M (attention, feed-forward, output head),

    z = (M3 + ..)(M2 + ..)(M1 + ..) phi(x),      log p(y | x) = log_softmax(z)[y mod 16] - log(vocab_size / 16)

so that every token has a probability and all of them sum to one; tokens do not see their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, Float32Array
from twinkle.server.backends.lora.adapter_state import check_fits, peft_names
from twinkle.server.backends.lora.finite import LARGEST_GRADIENT, Fault, refusal
from twinkle.server.backends.lora.losses.formulas import FORMULAS, LOSS_SPECS, check_row
from twinkle.server.backends.lora.module_groups import module_group, wanted_groups
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    OptimizerState,
    Row,
    RowResult,
    StepOutcome,
)

VOCAB_SIZE = 2**18
CONTEXT_LENGTH = 1024
EOS_TOKEN_ID = 1

_HIDDEN = 8
_CLASSES = 16
# The layers from first to last, with their output sizes.
_LAYERS = {
    "model.layers.0.self_attn.o_proj": _HIDDEN,
    "model.layers.0.mlp.down_proj": _HIDDEN,
    "lm_head": _CLASSES,
}
_PEFT_NAMES = {module: peft_names(module) for module in _LAYERS}

_Floats: TypeAlias = npt.NDArray[np.float64]
_Matrices: TypeAlias = dict[str, Float32Array]


def _base_matrices() -> dict[str, _Floats]:
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=(rows, _HIDDEN)) / math.sqrt(_HIDDEN) for name, rows in _LAYERS.items()}


@dataclass
class _Adapter:
    """Matrices by PEFT name."""

    spec: AdapterSpec
    modules: list[str]
    weights: _Matrices
    grads: _Matrices = field(init=False)
    exp_avg: _Matrices = field(init=False)
    exp_avg_sq: _Matrices = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.grads, self.exp_avg, self.exp_avg_sq = (_zeros(self.weights) for _ in range(3))


class _Forward(NamedTuple):
    inputs: list[_Floats]  # of each layer, [T, 8]
    log_softmax: _Floats  # [T, classes]
    at: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # the targets' indices in it, [T, 1] and [T, K]
    logprobs: _Floats  # in the shape of the targets


class FakeBackend:
    """See `twinkle.server.backends.protocol.TrainingBackend`. `config.path` is not looked at.

    An unknown adapter id is a `KeyError`, one that is taken a `ValueError`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._info = BaseModelInfo(
            vocab_size=VOCAB_SIZE,
            max_context_length=config.max_context_length or CONTEXT_LENGTH,
            max_lora_rank=config.max_lora_rank,
            max_batch_tokens=4096,
            eos_token_ids=(EOS_TOKEN_ID,),
            architecture="FakeForCausalLM",
        )
        self._base = _base_matrices()
        self._adapters: dict[str, _Adapter] = {}

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return LOSS_SPECS

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        if adapter_id in self._adapters:
            raise ValueError(f"there is an adapter {adapter_id!r} already")
        if not 1 <= spec.rank <= self._info.max_lora_rank:
            raise InvalidRequest(f"rank: {spec.rank} is not between 1 and {self._info.max_lora_rank}")
        groups = wanted_groups(spec)
        modules = [name for name in _LAYERS if module_group(name) in groups]
        if not modules:
            raise InvalidRequest(
                "train_attn, train_mlp, train_unembed: no linear layer is left to train; set one"
            )
        draw = np.random.default_rng(spec.seed % 2**63)
        bound = 1 / math.sqrt(_HIDDEN)
        weights: _Matrices = {}
        for module in modules:
            a_name, b_name = _PEFT_NAMES[module]
            weights[a_name] = draw.uniform(-bound, bound, (spec.rank, _HIDDEN)).astype(np.float32)
            weights[b_name] = np.zeros((_LAYERS[module], spec.rank), np.float32)
        self._adapters[adapter_id] = _Adapter(spec, modules, weights)

    def remove_adapter(self, adapter_id: str) -> None:
        del self._adapters[adapter_id]

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        flat = [row for rows in micro_batches for row in rows]
        # Row by row onto what is there already, so that sums don't depend on which calls the rows came in.
        active = {row.adapter_id for row in flat}
        sums = {adapter_id: _copy(self._adapters[adapter_id].grads) for adapter_id in active}
        for row in flat:
            check_row(row, VOCAB_SIZE)
        with np.errstate(over="ignore", invalid="ignore"):  # the step looks at what comes of it
            forwards = [self._forward(row) for row in flat]
            configs = [{**LOSS_SPECS[row.loss_fn].config, **row.loss_config} for row in flat]
            losses = [
                FORMULAS[row.loss_fn](forward.logprobs, row.loss_inputs, config)
                for row, forward, config in zip(flat, forwards, configs, strict=True)
            ]
            for row, forward, (_, grad) in zip(flat, forwards, losses, strict=True):
                if not row.forward_only:
                    self._backward(self._adapters[row.adapter_id], forward, grad, sums[row.adapter_id])
        for adapter_id, grads in sums.items():
            self._adapters[adapter_id].grads = grads
        computed = zip(forwards, losses, strict=True)
        results = (RowResult(forward.logprobs.astype(np.float32), loss) for forward, (loss, _) in computed)
        return [[next(results) for _ in rows] for rows in micro_batches]

    def _forward(self, row: Row) -> _Forward:
        inputs: list[_Floats] = []
        x = np.cos(np.outer(row.tokens + 1.0, np.arange(1.0, _HIDDEN + 1)))  # phi
        for module in _LAYERS:
            inputs.append(x)
            x = x @ self._effective(self._adapters[row.adapter_id], module).T
        log_softmax = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        targets = row.loss_inputs["target_tokens"]
        at = np.arange(len(targets))[:, None], targets.reshape(len(targets), -1) % _CLASSES
        logprobs = (log_softmax[at] - math.log(VOCAB_SIZE / _CLASSES)).reshape(targets.shape)
        return _Forward(inputs, log_softmax, at, logprobs)

    def _effective(self, adapter: _Adapter, module: str) -> _Floats:
        if module not in adapter.modules:
            return self._base[module]
        scale = adapter.spec.alpha / adapter.spec.rank
        a, b = _in_float64(adapter, module)
        return self._base[module] + scale * b @ a

    def _backward(self, adapter: _Adapter, forward: _Forward, loss_grad: _Floats, grads: _Matrices) -> None:
        """Add to `grads`; `loss_grad` is with respect to the log-probabilities."""
        # Of a log-probability with respect to z: one-hot - softmax, summed over candidates.
        per_target = loss_grad.reshape(forward.at[1].shape)
        grad = -np.exp(forward.log_softmax) * per_target.sum(axis=1, keepdims=True)
        np.add.at(grad, forward.at, per_target)
        scale = adapter.spec.alpha / adapter.spec.rank
        for module, x in reversed(list(zip(_LAYERS, forward.inputs, strict=True))):
            if module in adapter.modules:
                grad_matrix = scale * grad.T @ x  # of B A
                a, b = _in_float64(adapter, module)
                a_name, b_name = _PEFT_NAMES[module]
                grads[a_name] += (b.T @ grad_matrix).astype(np.float32)
                grads[b_name] += (grad_matrix @ a.T).astype(np.float32)
            grad = grad @ self._effective(adapter, module)

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        if len({step.adapter_id for step in steps}) < len(steps):
            raise ValueError("an adapter can take one step a call")
        adapters = [self._adapters[step.adapter_id] for step in steps]
        return [_adamw(adapter, step.params) for adapter, step in zip(adapters, steps, strict=True)]

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        adapter = self._adapters[adapter_id]
        optimizer = OptimizerState(adapter.step, _copy(adapter.exp_avg), _copy(adapter.exp_avg_sq))
        return AdapterState(
            spec=adapter.spec,
            target_modules=list(adapter.modules),
            weights=_copy(adapter.weights),
            optimizer=optimizer if with_optimizer else None,
            gradients=_copy(adapter.grads) if with_gradients else None,
        )

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        old = self._adapters[adapter_id]
        shapes = {name: matrix.shape for name, matrix in old.weights.items()}
        check_fits(state, old.spec, old.modules, shapes)
        new = _Adapter(replace(old.spec, alpha=state.spec.alpha), old.modules, _copy(state.weights))
        if state.optimizer is not None:
            new.step = state.optimizer.step
            new.exp_avg, new.exp_avg_sq = _copy(state.optimizer.exp_avg), _copy(state.optimizer.exp_avg_sq)
        if state.gradients is not None:
            new.grads = _copy(state.gradients)
        self._adapters[adapter_id] = new

    def close(self) -> None:
        self._adapters.clear()


def _adamw(adapter: _Adapter, params: AdamParams) -> StepOutcome:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; then the gradient is zero."""
    grads, adapter.grads = adapter.grads, _zeros(adapter.grads)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(sum(float((grad.astype(np.float64) ** 2).sum()) for grad in grads.values()))
        if not math.isfinite(norm):
            return refusal(Fault.GRADIENT, norm)
        clip = min(1.0, params.grad_clip_norm / (norm + 1e-6)) if params.grad_clip_norm else 1.0
        if any((np.abs(grad) * clip > LARGEST_GRADIENT).any() for grad in grads.values()):
            return refusal(Fault.SQUARE, norm)
        stepped = _stepped(adapter, {name: grad * clip for name, grad in grads.items()}, params)
    if not all(np.isfinite(matrix).all() for matrices in stepped for matrix in matrices.values()):
        return refusal(Fault.RESULT, norm)
    adapter.weights, adapter.exp_avg, adapter.exp_avg_sq = stepped
    adapter.step += 1
    return {"grad_norm:mean": norm}


def _stepped(
    adapter: _Adapter, grads: _Matrices, params: AdamParams
) -> tuple[_Matrices, _Matrices, _Matrices]:
    """Weights and moments behind a step."""
    weights, means, squares = _copy(adapter.weights), _copy(adapter.exp_avg), _copy(adapter.exp_avg_sq)
    correction1, correction2 = 1 - params.beta1 ** (adapter.step + 1), 1 - params.beta2 ** (adapter.step + 1)
    for name, p in weights.items():
        g, m, v = grads[name], means[name], squares[name]
        m += (1 - params.beta1) * (g - m)
        v += (1 - params.beta2) * (g * g - v)
        denominator = np.maximum(np.sqrt(v / correction2) + params.eps, np.finfo(np.float32).tiny)
        p *= 1 - params.learning_rate * params.weight_decay
        p -= params.learning_rate * (m / correction1) / denominator
    return weights, means, squares


def _in_float64(adapter: _Adapter, module: str) -> list[_Floats]:
    """A and B."""
    return [adapter.weights[name].astype(np.float64) for name in _PEFT_NAMES[module]]


def _zeros(like: _Matrices) -> _Matrices:
    return {name: np.zeros_like(matrix) for name, matrix in like.items()}


def _copy(matrices: _Matrices) -> _Matrices:
    return {name: matrix.copy() for name, matrix in matrices.items()}
