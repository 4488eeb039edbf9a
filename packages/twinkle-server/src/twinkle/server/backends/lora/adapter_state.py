"""Whether a state fits an adapter: the checks that every backend makes before importing one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array
from twinkle.server.backends.lora.finite import check_finite
from twinkle.server.backends.protocol import AdapterSpec, AdapterState


def peft_names(module: str) -> tuple[str, str]:
    """PEFT's names of a layer's A and B."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def check_fits(
    state: AdapterState, spec: AdapterSpec, modules: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare a state with the adapter that is to be set to it.

    Args:
        spec: the adapter's.
        modules: the layers that it acts on.
        shapes: of its matrices, by PEFT name.

    Raises:
        InvalidRequest: naming what differs.
    """
    if state.spec.rank != spec.rank:
        raise InvalidRequest(
            f"rank: the saved adapter has rank {state.spec.rank}, this one {spec.rank}; "
            f"load it into a run of rank {state.spec.rank}"
        )
    if not 0 < state.spec.alpha < float("inf"):
        raise InvalidRequest(f"alpha: the saved adapter's is {state.spec.alpha}; it must be a number above 0")
    if set(state.target_modules) != set(modules):
        raise InvalidRequest(
            f"target modules: {_difference(set(state.target_modules), set(modules))}; load it into a run with the same "
            "train_attn, train_mlp and train_unembed on the same base model"
        )
    check_arrays("weights", state.weights, shapes)
    if state.optimizer is not None:
        if state.optimizer.step < 0:
            raise InvalidRequest(f"optimizer: step {state.optimizer.step} is below 0")
        check_arrays("optimizer exp_avg", state.optimizer.exp_avg, shapes)
        check_arrays("optimizer exp_avg_sq", state.optimizer.exp_avg_sq, shapes)
    if state.gradients is not None:
        check_arrays("gradients", state.gradients, shapes)
    check_finite(state)


def check_arrays(what: str, arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, shapes and dtype (float32) of matrices.

    Raises:
        InvalidRequest: naming the first difference.
    """
    if set(arrays) != set(shapes):
        raise InvalidRequest(f"{what}: {_difference(set(arrays), set(shapes))}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise InvalidRequest(
                f"{what}: {name} has shape {list(arrays[name].shape)}, expected {list(shape)}"
            )
        if arrays[name].dtype != np.float32:
            raise InvalidRequest(f"{what}: {name} is {arrays[name].dtype}, expected float32")


def _difference(given: set[str], expected: set[str]) -> str:
    """Some of the names that the saved adapter has or lacks."""
    parts: list[str] = []
    for verb, names in (("lacks", expected - given), ("has the unknown", given - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            parts.append(f"{verb} {shown}")
    return "the saved adapter " + " and ".join(parts)
