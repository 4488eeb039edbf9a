"""A base model of which each rank keeps a part of every parameter: cut while the files are read.

Transformers reads a model parameter by parameter, on the host. As each is set on its module, this rank's part goes to
the device, and a placeholder takes its place: a parameter of the whole shape on the meta device, without memory.
`transformers/sharding.py` gathers the parts when a layer is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@dataclass(eq=False)
class Shards:
    """This rank's parts of a model's parameters.

    Attributes:
        rank, count: which of how many equal parts, along the first dimension; the last ranks' may be shorter, or empty.
        device: where the parts are.
        parts: by placeholder.
    """

    rank: int
    count: int
    device: torch.device
    parts: dict[nn.Parameter, Tensor] = field(default_factory=dict[nn.Parameter, Tensor])

    @contextmanager
    def cutting(self, vocab_size: int) -> Generator[None]:
        """Cut each parameter that this thread sets on a module from a file.

        Args:
            vocab_size: matrices with as many rows are left whole: Transformers looks whether embedding and head are the
                same before it ties them. `cut_rest` cuts them.
        """
        thread = threading.get_ident()

        def replace(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
            if parameter is None or parameter.is_meta or threading.get_ident() != thread:
                return None
            # Set by Transformers on what it has read; the rest gets its values later.
            is_read = getattr(parameter, "_is_hf_initialized", False)
            if not is_read or parameter.ndim == 0 or parameter.shape[0] == vocab_size:
                return None
            return self._cut(parameter)

        # Annotated as if hooks returned nothing; a parameter that they return is set instead.
        hook = register_module_parameter_registration_hook(cast("Callable[..., None]", replace))
        try:
            yield
        finally:
            hook.remove()

    def cut_rest(self, model: nn.Module) -> None:
        """Cut the parameters of `model` that are whole; those that modules share stay shared."""
        placeholders: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not parameter.is_meta:
                    if parameter not in placeholders:
                        placeholders[parameter] = self._cut(parameter)
                    setattr(module, name, placeholders[parameter])

    def _cut(self, parameter: nn.Parameter) -> nn.Parameter:
        whole = parameter.detach()
        if whole.ndim == 0:
            raise ValueError("a parameter without dimensions can't be cut")
        placeholder = nn.Parameter(
            torch.empty(whole.shape, dtype=whole.dtype, device="meta"), requires_grad=False
        )
        # Else Transformers would initialise it.
        placeholder._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        start, end = part_of(whole.shape[0], self.rank, self.count)
        # A copy, since the whole may be a file that is mapped.
        part = whole[start:end]
        self.parts[placeholder] = part.to(self.device, copy=True, memory_format=torch.contiguous_format)
        return placeholder


def part_of(rows: int, rank: int, count: int) -> tuple[int, int]:
    """Which of `rows` are a rank's: [start, end)."""
    most = -(-rows // count)
    return min(rows, rank * most), min(rows, (rank + 1) * most)
