"""A frozen base that is spread over ranks, computed by all of them at once: PyTorch's FSDP2 over its parameters.

Each decoder layer is a group: it is gathered before it is computed, forward and backward, and given back after that.
All else (embedding, norm, head) is one more group, gathered for a whole micro-batch. The adapters are no parameters of
the model, so they are not FSDP's: `lora/replicas.py` adds up their gradients.

Gathering is collective. So every rank computes as many micro-batches, and goes backward through the same ones, whatever
rows it has: see `sharded_pass.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf.shards import Shards

T = TypeVar("T")


class ShardedModel(nn.Module):
    """Computes with a model of which each rank has a part. Collective: every rank calls it as often."""

    def __init__(self, model: PreTrainedModel, shards: Shards) -> None:
        """
        Args:
            model: a module tree of its own, whose parameters are the placeholders of `shards`.
            shards: whose parts move into the model.

        Raises:
            InvalidRequest: if layers share parameters.
        """
        super().__init__()
        self.model = model
        homes = [
            (module, name, placeholder)
            for module in self.modules()
            for name, placeholder in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        mesh = init_device_mesh(shards.device.type, (shards.count,))
        layers = decoder_layers(model)
        check_shared(model, layers)
        for layer in layers:
            layer.register_forward_hook(_copy_view)
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, placeholder in homes:
            if placeholder not in filled:
                empty = cast("DTensor", getattr(module, name))
                part = DTensor.from_local(
                    shards.parts.pop(placeholder),
                    empty.device_mesh,
                    empty.placements,
                    run_check=False,
                    shape=empty.shape,
                    stride=empty.stride(),
                )
                filled[placeholder] = nn.Parameter(part, requires_grad=False)
            setattr(module, name, filled[placeholder])
        # A group is only gathered for the backward pass if its output has a gradient. So that all ranks gather the
        # same ones, whatever layers their adapters are on, the first one's input has one.
        model.get_input_embeddings().register_forward_hook(_require_gradient)

    def forward(self, compute: Callable[[], T]) -> T:
        """`compute` with embedding, norm and head gathered, until its backward pass if there is one."""
        return compute()

    def run(self, compute: Callable[[], T]) -> T:
        """`forward`, after which nothing is left gathered, but for a backward pass."""
        result = cast("T", self(compute))
        if not torch.is_grad_enabled():
            cast("FSDPModule", self).reshard()
        return result

    @property
    def held_bytes(self) -> int:
        """Bytes of this rank's parts, while nothing is gathered."""
        return sum(cast("DTensor", parameter).to_local().nbytes for parameter in self.parameters())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one by one, in the order of the module tree."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def check_shared(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """
    Raises:
        InvalidRequest: if a parameter would be in two groups.
    """
    owner = {module: layer for layer in layers for module in layer.modules()}
    seen: dict[nn.Parameter, nn.Module | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if seen.setdefault(parameter, owner.get(module)) is not owner.get(module):
                raise InvalidRequest(
                    f"model.shard_base: {type(model).__name__} has layers that share a parameter ({name} of "
                    f"{type(module).__name__}), and can't be spread over ranks; set model.shard_base: false"
                )


def _copy_view(_module: nn.Module, _args: Any, output: Any) -> Any:
    """FSDP hooks onto a layer's output, and a view (OPT's) loses its hooks when it is changed in place."""
    if isinstance(output, tuple):
        return tuple(_copy_view(_module, _args, part) for part in cast("tuple[Any, ...]", output))
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _require_gradient(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded
