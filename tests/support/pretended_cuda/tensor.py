"""Tensors that say they are on `cuda:0`, and keep a CPU tensor inside; the dispatch mode that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from pretended_cuda.counts import COUNTS, line
from pretended_cuda.rules import aten, check_devices, check_limits, computes, name_of, wait_for

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")


class PretendedTensor(Tensor):
    """A tensor on the pretended device.

    Attributes:
        on_cpu: the same tensor, on the CPU.
    """

    on_cpu: Tensor

    # Subclasses are left alone by torch's functions; only operations are of interest.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> PretendedTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
        )
        made.on_cpu = on_cpu
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"pretended {self.on_cpu!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = PretendedTensor(self.on_cpu.detach().clone())
        made = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = made
        return made

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a tensor on cuda:0 can't be converted to numpy: use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self.numpy()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()


class PretendedCuda(TorchDispatchMode):
    """While it is entered, in this thread, what is asked for on a CUDA device becomes a pretended tensor."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the tensors inside, if a GPU would; its results are where a GPU would have them."""
    if (copy := _COPIES.get(func)) is not None:
        return copy(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    has_device = len(host) < len(tensors)
    if has_device and host:
        check_devices(func, args, host, line())
    if has_device:
        check_limits(func, args, kwargs)
    if has_device and (reason := wait_for(func, args, kwargs, host)) is not None:
        COUNTS.add_wait(reason)
    wanted = kwargs.get("device")
    on_device = has_device if wanted is None else torch.device(wanted).type == "cuda"
    if (on_device or has_device) and computes(func):
        COUNTS.add_operation(name_of(func))
    own_args, own_kwargs = tree_map(_on_cpu, (args, dict(kwargs)))
    if wanted is not None:
        own_kwargs["device"] = _CPU
    if func is aten.histc.default and has_device:
        # Of integers on GPUs only.
        result = func(own_args[0].double(), *own_args[1:], **own_kwargs).to(own_args[0].dtype)
    else:
        result = func(*own_args, **own_kwargs)
    if not on_device:
        return result
    result = tree_map(_pretended, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if has_device else result


def _on_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, PretendedTensor) else value


def _pretended(value: Any) -> Any:
    return PretendedTensor(value) if isinstance(value, Tensor) else value


def _to_copy(source: Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    is_there = isinstance(source, PretendedTensor)
    goes_there = is_there if device is None else torch.device(device).type == "cuda"
    _count_copy(is_there, goes_there, non_blocking, source)
    copied: Tensor = aten._to_copy.default(_on_cpu(source), **kwargs)
    return PretendedTensor(copied) if goes_there else copied


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    is_there, goes_there = (isinstance(tensor, PretendedTensor) for tensor in (source, target))
    _count_copy(is_there, goes_there, non_blocking, source)
    _on_cpu(target).copy_(_on_cpu(source))
    return target


def _count_copy(is_there: bool, goes_there: bool, non_blocking: bool, source: Tensor) -> None:
    if is_there or goes_there:
        COUNTS.add_operation("copy")
    if is_there == goes_there or source.numel() == 0 or (non_blocking and (is_there or source.is_pinned())):
        return
    # From pageable memory the driver waits too: it copies by way of memory of its own.
    COUNTS.add_wait("copy from the device" if is_there else "copy to the device")


_COPIES: dict[OpOverload, Callable[..., Tensor]] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
