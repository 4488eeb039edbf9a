"""What a GPU refuses, and what it has to be waited for, by operation.

Torch's own tags say which operations give a result whose value or shape the host needs: for those it waits until the
device has come so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten

_INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
_JOINING = {aten.cat.default, aten.stack.default}
_GROUPS_END = 1024  # the limit in ATen/native/cuda/GroupMM.cu
_ALLOCATING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "detach",
}


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


def check_devices(func: OpOverload, args: Sequence[Any], host: Sequence[Tensor], where: str) -> None:
    """
    Args:
        host: the tensors among the arguments that are not on the device, where at least one is.

    Raises:
        MixedDevices: if a GPU would refuse them. It takes scalars from the host, and indices.
    """
    if all(tensor.ndim == 0 for tensor in host) and func not in _JOINING:
        return
    if func in _INDEXING and all(any(tensor is index for index in args[1]) for tensor in host):
        return
    shapes = ", ".join(str(list(tensor.shape)) for tensor in host)
    raise MixedDevices(f"{func}: tensors on cuda:0, and on the CPU those of shape {shapes}; at {where}")


def check_limits(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        RuntimeError: if torch's kernels for GPUs refuse what those for CPUs compute.
    """
    if name_of(func) == "_grouped_mm":
        ends = kwargs["offs"] if "offs" in kwargs else args[2]
        if len(ends) >= _GROUPS_END:
            raise RuntimeError(f"{func}: {len(ends)} groups; it takes fewer than {_GROUPS_END}")


def wait_for(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], host: Sequence[Tensor]
) -> str | None:
    """Why the host waits for the device in this operation, whose arguments are there; None: it doesn't."""
    if func in _INDEXING:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "a mask as index"
        return "an index copied to the device" if any(index.ndim for index in host) else None
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return None
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name_of(func) if tags & set(func.tags) else None


def name_of(func: OpOverload) -> str:
    return func.overloadpacket.__name__


@cache
def computes(func: OpOverload) -> bool:
    """Whether it is more than a view or an allocation."""
    is_view = any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )
    return not is_view and name_of(func) not in _ALLOCATING
