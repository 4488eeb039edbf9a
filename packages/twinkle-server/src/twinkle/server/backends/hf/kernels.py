"""Which code computes a model's layers, and whoever starts the server is told.

For recurrent layers (linear attention, and the short convolutions before it) Transformers takes the kernels of other
packages (flash-linear-attention, causal-conv1d), where they can be imported, and else its own reference code, which
gives the same numbers and on a GPU takes many times as long. The kernels run on GPUs only. Transformers decides when it
is imported, whatever the device: on a CPU its reference code is put back here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from twinkle.server.backends.hf.kernel_packages import KERNEL_PACKAGES, how_to_install
from twinkle.server.backends.lora.experts import has_grouped_product

# Transformers' names of what computes attention.
_ATTENTION = {"sdpa": "torch's scaled_dot_product_attention", "eager": "Transformers' plain products"}


@dataclass(frozen=True, eq=False)
class ReplaceableFunction:
    """A function of a modelling file for which some package has a kernel.

    Attributes:
        home, name: where it is, and is looked up in each call.
        reference: Transformers' own code.
        package: import name of the package.
        has_kernel: whether the package's kernel is called in its place.
    """

    home: ModuleType
    name: str
    reference: Callable[..., Any]
    package: str
    has_kernel: bool


def replaceable_functions(model: nn.Module) -> list[ReplaceableFunction]:
    """Those that layers of the model call; none for most models.

    They are told by what `transformers.integrations.use_kernel_func_from_hub_with_fallback` makes of them.
    """
    homes = {type(module).__module__: None for module in model.modules()}
    found: list[ReplaceableFunction] = []
    for home in (sys.modules[name] for name in homes if name.startswith("transformers.models.")):
        for name, function in vars(home).items():
            reference = getattr(function, "__wrapped__", None)
            if not inspect.isfunction(function) or reference is None:
                continue
            known = inspect.getclosurevars(function).nonlocals
            if "package" in known and "is_new_implementation" in known:
                has_kernel = bool(known["is_new_implementation"])
                found.append(ReplaceableFunction(home, name, reference, known["package"], has_kernel))
    return found


def choose_kernels(model: PreTrainedModel, device: torch.device) -> tuple[str, ...]:
    """Where `device` is a CPU, put Transformers' reference code in the place of kernels, for this whole process.

    Returns:
        Lines for whoever starts the server: what computes the model's recurrent layers, if it has any, and all others.
    """
    functions = replaceable_functions(model)
    return (*_recurrent_layers(functions, device), _other_layers(model, device))


def _recurrent_layers(functions: list[ReplaceableFunction], device: torch.device) -> tuple[str, ...]:
    if not functions:
        return ()
    layers = "recurrent layers (linear attention, convolutions)"
    if device.type == "cpu":
        for function in functions:
            if function.has_kernel:
                setattr(function.home, function.name, function.reference)
        return (f"Transformers' reference code computes {layers}: kernels for them run on GPUs only.",)
    missing = _once(function.package for function in functions if not function.has_kernel)
    if not missing:
        used = _distributions(_once(function.package for function in functions))
        return (f"Kernels of {' and '.join(used)} compute {layers}.",)
    return (
        f"WARNING: Transformers' reference code computes {layers}, which takes many times as long as the kernels of "
        f"{' and '.join(_distributions(missing))}. Install them where the server runs (pip install "
        f"{how_to_install(missing)}), and start it again.",
    )


def _other_layers(model: PreTrainedModel, device: torch.device) -> str:
    implementation = cast("Any", model.config)._attn_implementation
    parts = [f"attention by {_ATTENTION.get(implementation, implementation)}"]
    if any(hasattr(type(module), "_apply_gate") for module in model.modules()):
        grouped = has_grouped_product(device, model.dtype)
        parts.append(f"routed experts by {'torch.grouped_mm' if grouped else 'one product an expert'}")
    parts.append(
        "norms, rotary embedding and activations by Transformers' own code, log-probabilities by plain torch"
    )
    return f"Kernels: {'; '.join(parts)}."


def _once(packages: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(packages))


def _distributions(packages: list[str]) -> list[str]:
    return [
        KERNEL_PACKAGES[package].distribution if package in KERNEL_PACKAGES else package
        for package in packages
    ]
