"""Decisions made before start-up. The launcher imports this, so it must not pull in torch or a backend."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from math import prod
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
    def shares_rows(self) -> bool:
        """Whether each rank is sent rows of its own. (Megatron's ranks take theirs out of all.)"""
        return self.backend == "transformers" and self.model.data_parallel_size > 1

    @property
    def sampler_ranks(self) -> range:
        """Those that sample beside training: a whole copy of the model shares it with a sampler. Where the model is
        spread over ranks, rank 0 holds it once more for that.
        """
        return range(self.num_ranks if self.shares_rows else 1)

    def sampler_of(self, rank: int) -> str | None:
        return self.sampler if rank in self.sampler_ranks else None

    def describe(self) -> list[str]:
        """What is started where, a line for each rank, in columns."""
        model = self.model
        copies = model.data_parallel_size
        whole = weight_bytes(model.path, model.torch_dtype)
        # About: stages differ by embedding and head, and routed experts may be spread further than the rest.
        table = [("RANK", "NODE", "DEVICE", "HOLDS", "WEIGHTS, ABOUT")]
        for rank in range(self.num_ranks):
            if copies == self.num_ranks:
                holds = "the model" if copies == 1 else f"copy {rank + 1} of {copies}"
            else:
                holds = "a part of the model" if copies == 1 else f"a part of one of {copies} copies"
            # A sampler shares the weights of a whole copy, and has its own beside a part.
            weights = whole // (model.tensor_parallel_size * model.pipeline_parallel_size)
            if (sampler := self.sampler_of(rank)) is not None:
                holds += f", {sampler} sampler"
                weights += 0 if self.backend == "transformers" else whole
            device = "GPU" if self.gpus_per_rank else "CPU"
            size = f"{weights / 1e9:.1f} GB" if weights >= 1e8 else f"{weights / 1e6:.1f} MB"
            table.append((str(rank), "this machine", device, holds, size))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        head = f"{model.path} in {model.torch_dtype}, {self.backend} backend:"
        return [head, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]

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


def weight_bytes(model: Path, dtype: str) -> int:
    """Of all tensors in the model's safetensors, as they are held: by their headers, which say their shapes.

    Raises:
        InvalidRequest: if a file is not safetensors.
    """
    elements = 0
    for file in model.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")) or b"{}")
            elements += sum(
                prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InvalidRequest(
                f"{file}: not a safetensors file ({error}); download the model again"
            ) from error
    return elements * (2 if dtype == "bfloat16" else 4)


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
    gpus = num_gpus(config)
    has_gpu = gpus > 0
    one_copy = ModelConfig(
        path=Path(path),
        torch_dtype=_dtype(config, has_gpu),
        device="cuda" if has_gpu else "cpu",
        max_lora_rank=config.model.max_lora_rank,
        max_context_length=config.model.max_context_length,
        tensor_parallel_size=config.model.tensor_parallel_size,
        pipeline_parallel_size=config.model.pipeline_parallel_size,
        expert_parallel_size=config.model.expert_parallel_size,
        sequence_parallel=config.model.sequence_parallel,
        max_sampler_adapters=config.sampler.max_resident_adapters,
    )
    model = replace(one_copy, data_parallel_size=_num_copies(config, one_copy.num_ranks, gpus))
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
            f"{', '.join(asked)}: the Transformers backend holds the whole model on each rank; leave that out, or set "
            "model.use_megatron: true"
        )


def _num_copies(config: ServerConfig, ranks: int, gpus: int) -> int:
    """
    Args:
        ranks: of one copy of the model.
        gpus: 0 is the CPU.

    Raises:
        InvalidRequest: if they don't fit the GPUs, or leave some idle that were asked for.
    """
    wanted = config.model.data_parallel_size
    if not gpus:
        return 1 if wanted == "auto" else wanted
    if gpus < ranks:
        raise InvalidRequest(
            f"model.tensor_parallel_size, pipeline_parallel_size, expert_parallel_size: they make {ranks} ranks, which "
            f"take a GPU each, but {gpus} can be used here; lower them, raise ray.num_gpus if there are more, or set "
            "ray.num_gpus: 0 to compute on the CPU"
        )
    copies = gpus // ranks if wanted == "auto" else wanted
    used = copies * ranks
    if used > gpus:
        raise InvalidRequest(
            f"model.data_parallel_size: {copies} copies of the model, of {ranks} ranks each, take {used} GPUs, but "
            f"{gpus} can be used here; lower it, raise ray.num_gpus if there are more, or set ray.num_gpus: 0 to "
            "compute on the CPU"
        )
    if used < gpus and config.ray.num_gpus is not None:
        raise InvalidRequest(
            f"ray.num_gpus: {gpus} GPUs are to be used, but model.data_parallel_size: {wanted} with {ranks} ranks for "
            f"each copy of the model uses {used}; set ray.num_gpus: {used}, or sizes whose product is {gpus}"
        )
    return copies


def num_gpus(config: ServerConfig) -> int:
    """The number of GPUs to use: `ray.num_gpus`, or all that are found. 0 is the CPU.

    Raises:
        InvalidRequest: if there are fewer than that.
    """
    device, asked = os.environ.get("TWINKLE_DEVICE"), config.ray.num_gpus
    if device not in (None, "", "cpu"):
        raise InvalidRequest(
            f"TWINKLE_DEVICE: {device!r} in the environment is not known; use 'cpu', or none"
        )
    if asked == 0 or device == "cpu":
        return 0
    found = _found_gpus()
    if asked is not None and asked > found:
        raise InvalidRequest(
            f"ray.num_gpus: {asked} GPUs are to be used, but this machine has {found}; leave it out to use those that "
            "there are, or compute on the CPU: with ray.num_gpus: 0, or TWINKLE_DEVICE=cpu in the environment"
        )
    return found if asked is None else asked


def _found_gpus() -> int:
    if sys.platform == "linux" and not any(Path(device).exists() for device in _GPU_DEVICES):
        return 0
    import torch  # takes seconds, so only if there may be a GPU

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dtype(config: ServerConfig, has_gpu: bool) -> str:
    if config.model.torch_dtype is not None:
        return config.model.torch_dtype
    return "bfloat16" if has_gpu else "float32"
