"""Counts what a computation does, as a device would see it: operations, bytes and FLOPs, by kind.

Bytes are those of an operation's inputs and outputs, as if each were read and written once; views don't count. What
runs in other threads isn't seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind: TypeAlias = Literal["products", "attention", "other"]

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_"}
# Views, and what only makes room or looks at sizes.
_NOTHING = {
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_reshape_alias",
}


@dataclass
class Count:
    operations: int = 0
    bytes: int = 0
    flops: int = 0


class Traffic(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        of: by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[Kind, Count] = {"products": Count(), "attention": Count(), "other": Count()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = cast(str, func.overloadpacket.__name__)
        if func.is_view or name in _NOTHING:
            return found
        kind: Kind = "attention" if "attention" in name else "products" if name in _PRODUCTS else "other"
        count = self.of[kind]
        count.operations += 1
        count.bytes += sum(_bytes(args, kwargs)) + sum(_bytes(found))
        formulas = cast("dict[Any, Callable[..., int]]", flop_counter.flop_registry)
        flops = formulas.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
        if flops is not None:
            count.flops += flops(*args, **kwargs, out_val=found)
        return found


def _bytes(*values: object) -> Iterator[int]:
    """Of each tensor; what is expanded is there once."""
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            numbers = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                numbers *= size if stride else 1
            yield numbers * tensor.element_size()
