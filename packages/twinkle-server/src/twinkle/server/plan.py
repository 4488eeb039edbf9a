"""Decisions made before start-up. The launcher imports this, so it must not pull in torch or a backend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from twinkle.hub import resolve
from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plugins
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import ServerConfig

# Many repositories also hold the weights in other formats.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")

# Device files of NVIDIA, AMD and the Windows Subsystem for Linux.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

# GPUs only: a CPU can take hours for a large batch, and gloo, which connects its ranks, has its own timeout.
_CALL_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Plan:
    """The configuration together with the devices and files found on this machine.

    Attributes:
        backend, sampler: names of entry points.
        gpus_per_rank: 0 means CPU.
    """

    config: ServerConfig
    model: ModelConfig
    backend: str
    sampler: str
    gpus_per_rank: int

    @property
    def num_ranks(self) -> int:
        return self.model.num_ranks

    @property
    def call_timeout_seconds(self) -> float | None:
        """How long a training call may run before its ranks count as lost; None: no limit."""
        default = _CALL_TIMEOUT_SECONDS if self.gpus_per_rank else None
        return self.config.model.call_timeout_seconds or default

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Ray resources of each rank."""
        rank: dict[str, float] = {"CPU": 1.0}
        if self.gpus_per_rank:
            rank["GPU"] = float(self.gpus_per_rank)
        return [rank] * self.num_ranks


def make_plan(config: ServerConfig) -> Plan:
    """Find the model's files, downloading them if need be, and the devices.

    Raises:
        InvalidRequest, NotFound: if the model, the backend or the GPUs are missing.
    """
    backend = "megatron" if config.model.use_megatron else "transformers"
    _check_parallelism(config)
    plugins.look_up(plugins.TRAINING_BACKENDS, backend)
    plugins.look_up(plugins.SAMPLING_ENGINES, config.sampler.engine)
    path = resolve(config.model.model_id, kind="model", allow_patterns=MODEL_FILES)
    has_gpu = num_gpus(config) > 0
    model = ModelConfig(
        path=Path(path),
        torch_dtype=_dtype(config, has_gpu),
        device="cuda" if has_gpu else "cpu",
        max_lora_rank=config.model.max_lora_rank,
        max_context_length=config.model.max_context_length,
        tensor_parallel_size=config.model.tensor_parallel_size,
        pipeline_parallel_size=config.model.pipeline_parallel_size,
        expert_parallel_size=config.model.expert_parallel_size,
        sequence_parallel=config.model.sequence_parallel,
    )
    if has_gpu and num_gpus(config) < model.num_ranks:
        raise InvalidRequest(
            f"model.tensor_parallel_size, pipeline_parallel_size, expert_parallel_size: they make {model.num_ranks} "
            f"ranks, which take a GPU each, but {num_gpus(config)} can be used here; lower them, raise ray.num_gpus if "
            "there are more, or set ray.num_gpus: 0 to compute on the CPU"
        )
    return Plan(config, model, backend, config.sampler.engine, gpus_per_rank=1 if has_gpu else 0)


def _check_parallelism(config: ServerConfig) -> None:
    """
    Raises:
        InvalidRequest: if the configuration needs several ranks and the backend has only one.
    """
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
    asked = [f"model.{name}: {size}" for name in sizes if (size := getattr(config.model, name)) > 1]
    if config.model.sequence_parallel:
        asked.append("model.sequence_parallel: true")
    if asked and not config.model.use_megatron:
        raise InvalidRequest(
            f"{', '.join(asked)}: the Transformers backend runs on one rank; leave that out, or set "
            "model.use_megatron: true"
        )


def num_gpus(config: ServerConfig) -> int:
    """The number of GPUs found, at most `ray.num_gpus`."""
    if config.ray.num_gpus == 0 or not _may_have_gpu():
        return 0
    import torch  # takes seconds, so only if there may be a GPU

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return found if config.ray.num_gpus is None else min(found, config.ray.num_gpus)


def _dtype(config: ServerConfig, has_gpu: bool) -> str:
    if config.model.torch_dtype is not None:
        return config.model.torch_dtype
    return "bfloat16" if has_gpu else "float32"


def _may_have_gpu() -> bool:
    return sys.platform != "linux" or any(Path(device).exists() for device in _GPU_DEVICES)
