"""Norms, rotary embeddings and gated activations by one kernel each on a GPU, made by `torch.compile`.

Transformers computes them operation by operation, each of which reads and writes all of its tensors: in a 4B model a
quarter of a training step. What holds adapters is not compiled.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

log = logging.getLogger("twinkle.backend")

_ROTARY = "apply_rotary_pos_emb"
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Of the largest number of a result: kernels round where operations do, or less often.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


def fuse_layers(model: nn.Module, device: torch.device, backend: str = "inductor") -> tuple[str, ...]:
    """Replace what can be fused, if that works on this machine and gives the same numbers; else nothing is changed.

    Args:
        device: where the model is; on a CPU nothing is done (unless by another backend, in tests).
        backend: of `torch.compile`.

    Returns:
        A line for whoever starts the server; none if nothing is done.
    """
    is_built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    if backend == "inductor" and (device.type != "cuda" or not is_built_for_gpus):
        return ()
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    mlps = [module for module in model.modules() if _is_gated_mlp(module)]
    homes = {type(module).__module__ for module in model.modules()}
    rotary = [sys.modules[home] for home in homes if hasattr(sys.modules[home], _ROTARY)]
    before = {home: getattr(home, _ROTARY) for home in rotary}
    try:
        _check_together(norms, mlps, backend)
        for home in rotary:
            setattr(home, _ROTARY, _compiled(before[home], backend))
    except Exception as error:  # no compiler, say: torch.compile raises whatever its parts do
        for module in (*norms, *mlps):
            module.__dict__.pop("forward", None)
        for home in rotary:
            setattr(home, _ROTARY, before[home])
        log.warning("layers could not be fused", exc_info=error)
        return ("WARNING: norms and activations are computed operation by operation: see the log.",)
    return ("torch.compile fuses norms, rotary embeddings and activations.",)


def _check_together(norms: list[nn.Module], mlps: list[nn.Module], backend: str) -> None:
    """Replace the methods, one of each class and size after the other, and hold each to what it gave before."""
    seen: set[tuple[Any, ...]] = set()
    forwards: dict[Any, Any] = {}
    for module in norms:
        plain = type(module).forward
        forward = forwards.setdefault(plain, _compiled(plain, backend))
        _replace(module, forward, seen)
    gated = _compiled(_gated, backend)

    def gated_mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))

    for module in mlps:
        _replace(module, gated_mlp, seen)


def _replace(module: nn.Module, forward: Callable[..., Tensor], seen: set[tuple[Any, ...]]) -> None:
    weight = next(module.parameters(), None)
    if weight is None:
        return
    kind = (type(module), weight.shape)
    is_new = kind not in seen
    seen.add(kind)
    inputs = _inputs(module, weight) if is_new else None
    expected = None if inputs is None else _run(module, inputs)
    module.forward = MethodType(forward, module)
    if inputs is None or expected is None:
        return
    for found, wanted in zip(_run(module, inputs), expected, strict=True):
        if (found - wanted).abs().max() > _TOLERANCE[weight.dtype] * (1 + wanted.abs().max()):
            raise ValueError(f"{type(module).__name__} gives other numbers when it is fused")


def _inputs(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """Some hidden states, and a gate where the norm takes one."""
    count = 2 if type(module).__name__.endswith("Gated") else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [torch.randn(1, 3, weight.shape[-1]) for _ in range(count)]
    return [each.to(weight.device, weight.dtype).requires_grad_() for each in made]


def _run(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """A pass, forward and backward: the output and the inputs' gradients."""
    with torch.enable_grad():
        output = module(*inputs)
        return [output.detach(), *torch.autograd.grad(output.sum(), inputs)]


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether it is `down(act(gate(x)) * up(x))`, which some with these parts are not."""
    if not all(hasattr(module, name) for name in _MLP) or not isinstance(
        getattr(module, "gate_proj", None), nn.Linear
    ):
        return False
    parts = cast(Any, module)
    [x] = _inputs(module, parts.gate_proj.weight)
    with torch.no_grad():
        try:
            return torch.equal(
                parts(x), parts.down_proj(_gated(parts.act_fn, parts.gate_proj(x), parts.up_proj(x)))
            )
        except (RuntimeError, TypeError):  # takes something else
            return False


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return cast(Any, torch.compile)(function, dynamic=True, backend=backend)
