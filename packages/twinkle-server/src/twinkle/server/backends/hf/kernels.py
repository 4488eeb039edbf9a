"""Which code computes recurrent layers: linear attention, and the short convolutions before it.

For these Transformers takes the kernels of other packages (flash-linear-attention, causal-conv1d), where they can be
imported, and else its own reference code, which gives the same numbers and on a GPU takes many times as long. The
kernels run on GPUs only. Transformers decides when it is imported, whatever the device: on a CPU its reference code is
put back here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

# Import name -> what is installed.
_DISTRIBUTIONS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


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


def choose_kernels(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Where `device` is a CPU, put Transformers' reference code in the place of kernels, for this whole process.

    Returns:
        A line for whoever starts the server that says what computes the model's recurrent layers; none if there are no
        such layers.
    """
    functions = replaceable_functions(model)
    if not functions:
        return ()
    layers = "recurrent layers (linear attention, convolutions)"
    if device.type == "cpu":
        for function in functions:
            if function.has_kernel:
                setattr(function.home, function.name, function.reference)
        return (f"Transformers' reference code computes {layers}: kernels for them run on GPUs only.",)
    missing = _distributions([function.package for function in functions if not function.has_kernel])
    if not missing:
        used = _distributions([function.package for function in functions])
        return (f"Kernels of {' and '.join(used)} compute {layers}.",)
    return (
        f"WARNING: Transformers' reference code computes {layers}, which takes many times as long as the kernels of "
        f"{' and '.join(missing)}. Install them where the server runs (pip install 'twinkle-server[gpu]'), and start "
        "it again.",
    )


def _distributions(packages: list[str]) -> list[str]:
    return [_DISTRIBUTIONS.get(package, package) for package in dict.fromkeys(packages)]
