"""The ranks that hold a model together, and their groups.

    tensor      ranks that share each layer of a stage
    pipeline    one rank of each stage, first stage first
    data        ranks with copies of the same weights except routed experts: each takes its own rows
    expert      ranks that share out the routed experts of a stage
    copies      ranks with copies of the same routed experts

There is data parallelism only if a mixture of experts is spread over more ranks than share a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.meeting import meet
from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron import cpu

# A rank that waits this long for another has lost it.
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class Group:
    """Some ranks, and which of them this one is."""

    ranks: ProcessGroup
    size: int
    index: int

    @classmethod
    def of(cls, ranks: object) -> Group:
        assert isinstance(ranks, ProcessGroup)
        return cls(ranks, dist.get_world_size(ranks), dist.get_rank(ranks))


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's groups.

    Attributes:
        world: all ranks, for tensors on `device`.
        control: all ranks, for Python objects, always through the host.
    """

    world: Group
    control: Group
    tensor: Group
    pipeline: Group
    data: Group
    expert: Group
    copies: Group
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.index == self.pipeline.size - 1


def join(config: ModelConfig) -> Groups:
    """Meet the other ranks. Once per process: waits until all are there.

    Raises:
        InvalidRequest: if the configured GPU isn't there.
    """
    device = _device(config)
    if device.type == "cpu":
        cpu.install()
    else:
        torch.cuda.set_device(device)
    meet(config, "gloo" if device.type == "cpu" else "nccl", _TIMEOUT)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        expert_model_parallel_size=config.expert_parallel_size,
        expert_tensor_parallel_size=1,  # each expert is whole on its rank
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
    )
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0)
    world = dist.group.WORLD
    assert world is not None, "init_process_group made it"
    return Groups(
        world=Group.of(world),
        control=Group.of(world if device.type == "cpu" else dist.new_group(backend="gloo", timeout=_TIMEOUT)),
        tensor=Group.of(parallel_state.get_tensor_model_parallel_group()),
        pipeline=Group.of(parallel_state.get_pipeline_model_parallel_group()),
        data=Group.of(parallel_state.get_data_parallel_group()),
        expert=Group.of(parallel_state.get_expert_model_parallel_group()),
        copies=Group.of(parallel_state.get_expert_data_parallel_group()),
        device=device,
    )


def leave() -> None:
    """Undo `join`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _device(config: ModelConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidRequest(
            f"model: device {config.device!r} was asked for, but torch sees no GPU; use 'cpu'"
        )
    device = torch.device(config.device)
    return torch.device("cuda", 0) if config.device == "cuda" else device  # a rank sees only its own GPU
