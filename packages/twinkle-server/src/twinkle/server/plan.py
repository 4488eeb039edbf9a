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
from twinkle.server.fit import check_fits, memory_of_gpu, memory_of_machine
from twinkle.server.sampler_plan import NO_ENGINE, SamplerPlan, plan_samplers

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
        backend: name of an entry point.
        samplers: None for a server that only trains.
        gpus_per_rank: 0 means CPU.
    """

    config: ServerConfig
    model: ModelConfig
    backend: str
    samplers: SamplerPlan | None
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
        """Those that sample beside training: a whole copy of the model shares it with a sampler."""
        return range(self.num_ranks if self.samplers and not self.samplers.processes else 0)

    def sampler_of(self, rank: int) -> str | None:
        return self.samplers.engine if self.samplers and rank in self.sampler_ranks else None

    def describe(self) -> list[str]:
        """What is started where, a line for each rank, in columns."""
        model = self.model
        copies = model.data_parallel_size
        node = "by Ray" if self.joins_cluster else "this machine"
        whole = weight_bytes(model.path, model.torch_dtype)
        # About: stages differ by embedding and head, and routed experts may be spread further than the rest.
        table = [("RANK", "NODE", "DEVICE", "HOLDS", "WEIGHTS, ABOUT")]
        for rank in range(self.num_ranks):
            if model.shard_base:
                holds = f"part {rank + 1} of {copies} of the model"
            elif copies == self.num_ranks:
                holds = "the model" if copies == 1 else f"copy {rank + 1} of {copies}"
            else:
                holds = "a part of the model" if copies == 1 else f"a part of one of {copies} copies"
            parts = copies if model.shard_base else model.tensor_parallel_size * model.pipeline_parallel_size
            weights = whole // parts
            if (sampler := self.sampler_of(rank)) is not None:
                holds += f", {sampler} sampler"  # it shares the weights
            device = "GPU" if self.gpus_per_rank else "CPU"
            table.append((str(rank), node, device, holds, _in_bytes(weights)))
        if self.samplers is not None:
            gpus, always = self.samplers.gpus, self.samplers.processes
            device = ("GPU" if gpus == 1 else f"{gpus} GPUs") if gpus else "CPU"
            holds = f"the model, {self.samplers.engine} sampler of its own"
            for number in range(self.samplers.max_processes):
                when = (
                    "" if number < always else f", while there is load (up to {self.samplers.max_processes})"
                )
                table.append((f"sampler {number}", node, device, holds + when, _in_bytes(whole)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        head = f"{model.path} in {model.torch_dtype}, {self.backend} backend:"
        lines = [head, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]
        return lines if self.samplers else [*lines, f"It only trains: {self.why_no_samples}."]

    @property
    def why_no_samples(self) -> str:
        """For a server that only trains."""
        if self.config.sampler.engine == NO_ENGINE:
            return "sampler.engine is none"
        return (
            "the trainer takes all GPUs, and none of them holds the whole model; with sampler.num_gpus, some are for "
            "samplers"
        )

    @property
    def joins_cluster(self) -> bool:
        """Whether Ray runs already, perhaps on several machines."""
        return self.config.ray.address is not None

    @property
    def call_timeout_seconds(self) -> float | None:
        """How long a training call may run before its ranks count as lost; None: no limit."""
        default = _CALL_TIMEOUT_SECONDS if self.gpus_per_rank else None
        return self.config.model.call_timeout_seconds or default

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Ray resources, each on one machine, of what is always there: for the ranks that share layers, and then for
        each sampler of its own.
        """
        together = self.model.tensor_parallel_size
        ranks = [_bundle(together, together * self.gpus_per_rank)] * (self.num_ranks // together)
        if self.samplers is None:
            return ranks
        return ranks + [self.sampler_bundle] * self.samplers.processes

    @property
    def sampler_bundle(self) -> dict[str, float]:
        """Of one sampler of its own."""
        assert self.samplers is not None, "only a plan with samplers has bundles of them"
        return _bundle(1, self.samplers.gpus)

    @property
    def most_bundles(self) -> list[dict[str, float]]:
        """`bundles` together with those of samplers that come and go."""
        if self.samplers is None:
            return self.bundles
        return self.bundles + [self.sampler_bundle] * (self.samplers.max_processes - self.samplers.processes)

    def bundle_of_rank(self, rank: int) -> int:
        return rank // self.model.tensor_parallel_size

    def bundle_of_sampler(self, number: int) -> int:
        return self.num_ranks // self.model.tensor_parallel_size + number


def _bundle(cpus: int, gpus: int) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})


def _in_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


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


def make_plan(config: ServerConfig, gpus_of_cluster: int | None = None) -> Plan:
    """Find the model's files, downloading them if need be, and the devices.

    Args:
        gpus_of_cluster: those of all machines of the cluster that is joined. If one is to be joined and this is None,
            `ray.num_gpus` is taken for true.

    Raises:
        InvalidRequest, NotFound: if the model, the backend or the GPUs are missing.
    """
    backend = "megatron" if config.model.use_megatron else "transformers"
    _check_parallelism(config)
    plugins.look_up(plugins.TRAINING_BACKENDS, backend)
    path = resolve(config.model.model_id, kind="model", allow_patterns=MODEL_FILES)
    gpus = num_gpus(config, gpus_of_cluster)
    has_gpu = gpus > 0
    one_copy = ModelConfig(
        path=Path(path),
        torch_dtype=_dtype(config, has_gpu),
        device="cuda" if has_gpu else "cpu",
        shard_base=config.model.shard_base,
        max_lora_rank=config.model.max_lora_rank,
        max_context_length=config.model.max_context_length,
        tensor_parallel_size=config.model.tensor_parallel_size,
        pipeline_parallel_size=config.model.pipeline_parallel_size,
        expert_parallel_size=config.model.expert_parallel_size,
        sequence_parallel=config.model.sequence_parallel,
        max_sampler_adapters=config.sampler.max_resident_adapters,
        deterministic=config.model.deterministic,
    )
    samplers = plan_samplers(config, one_copy, backend, gpus, is_cpu_forced=_is_cpu_forced())
    for_samplers = samplers.all_gpus if samplers else 0
    if has_gpu and gpus <= for_samplers:
        raise InvalidRequest(
            f"sampler: its samplers take {for_samplers} GPUs, but {gpus} can be used here, and training needs some; "
            "lower sampler.num_gpus, replicas or max_replicas, raise ray.num_gpus if there are more, or set "
            "ray.num_gpus: 0 to compute on the CPU"
        )
    copies = _num_copies(config, one_copy.num_ranks, gpus, for_samplers)
    _check_sharding(config, copies, has_gpu)
    model = replace(one_copy, data_parallel_size=copies)
    if not config.ray.address:  # other machines' memory isn't known here
        memory = memory_of_gpu() if has_gpu else memory_of_machine()
        check_fits(model, samplers, weight_bytes(model.path, model.torch_dtype), memory, has_gpu)
    return Plan(config, model, backend, samplers, gpus_per_rank=1 if has_gpu else 0)


def _check_parallelism(config: ServerConfig) -> None:
    """
    Raises:
        InvalidRequest: if the configuration asks for what the backend doesn't have.
    """
    if config.model.shard_base and config.model.use_megatron:
        raise InvalidRequest(
            "model.shard_base: Megatron spreads a model by sizes of its own; leave shard_base out and set "
            "model.tensor_parallel_size or model.pipeline_parallel_size, or set model.use_megatron: false"
        )
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
    asked = [f"model.{name}: {size}" for name in sizes if (size := getattr(config.model, name)) > 1]
    if config.model.sequence_parallel:
        asked.append("model.sequence_parallel: true")
    if asked and not config.model.use_megatron:
        raise InvalidRequest(
            f"{', '.join(asked)}: the Transformers backend computes whole layers on each rank; leave that out (and set "
            "model.shard_base: true for a model that doesn't fit one device), or set model.use_megatron: true"
        )


def _num_copies(config: ServerConfig, ranks: int, all_gpus: int, for_samplers: int) -> int:
    """
    Args:
        ranks: of one copy of the model.
        all_gpus: 0 is the CPU.
        for_samplers: how many of them samplers of their own take.

    Raises:
        InvalidRequest: if they don't fit the GPUs, or leave some idle that were asked for.
    """
    wanted = config.model.data_parallel_size
    if not all_gpus:
        return 1 if wanted == "auto" else wanted
    gpus = all_gpus - for_samplers
    left = f"{gpus} can be used here"
    if for_samplers:
        left = f"{all_gpus} can be used here, {for_samplers} of them by samplers"
    if gpus < ranks:
        raise InvalidRequest(
            f"model.tensor_parallel_size, pipeline_parallel_size, expert_parallel_size: they make {ranks} ranks, which "
            f"take a GPU each, but {left}; lower them, raise ray.num_gpus if there are more, or set "
            "ray.num_gpus: 0 to compute on the CPU"
        )
    copies = gpus // ranks if wanted == "auto" else wanted
    used = copies * ranks
    if used > gpus:
        raise InvalidRequest(
            f"model.data_parallel_size: {copies} copies of the model, of {ranks} ranks each, take {used} GPUs, but "
            f"{left}; lower it, raise ray.num_gpus if there are more, or set ray.num_gpus: 0 to compute on the CPU"
        )
    if used < gpus and config.ray.num_gpus is not None:
        raise InvalidRequest(
            f"ray.num_gpus: {all_gpus} GPUs are to be used, but model.data_parallel_size: {wanted} with {ranks} ranks "
            f"for each copy of the model uses {used}{f', and samplers {for_samplers}' * bool(for_samplers)}; set "
            f"ray.num_gpus: {used + for_samplers}, or sizes whose product is {gpus}"
        )
    return copies


def _check_sharding(config: ServerConfig, copies: int, has_gpu: bool) -> None:
    """
    Raises:
        InvalidRequest: if there is nothing to spread the model over.
    """
    if config.model.shard_base and copies == 1:
        is_auto = config.model.data_parallel_size == "auto"
        cure = "ray.num_gpus" if is_auto and has_gpu else "model.data_parallel_size"
        raise InvalidRequest(
            f"model.shard_base: it spreads the model over data-parallel ranks, and here is only one; raise {cure}, or "
            "leave shard_base out"
        )


def num_gpus(config: ServerConfig, gpus_of_cluster: int | None = None) -> int:
    """The number of GPUs to use: `ray.num_gpus`, or all that are found. 0 is the CPU. For the argument see `make_plan`.

    Raises:
        InvalidRequest: if there are fewer than that.
    """
    asked = config.ray.num_gpus
    if _is_cpu_forced() or asked == 0:
        return 0
    where = "this machine"
    if config.ray.address is None:
        found = _found_gpus()
    else:
        where = f"the Ray cluster at {config.ray.address}"
        found = gpus_of_cluster if gpus_of_cluster is not None else asked or 0
    if asked is not None and asked > found:
        raise InvalidRequest(
            f"ray.num_gpus: {asked} GPUs are to be used, but {where} has {found}; leave it out to use those that "
            "there are, or compute on the CPU: with ray.num_gpus: 0, or TWINKLE_DEVICE=cpu in the environment"
        )
    return found if asked is None else asked


def _is_cpu_forced() -> bool:
    """
    Raises:
        InvalidRequest: if the environment names another device.
    """
    device = os.environ.get("TWINKLE_DEVICE")
    if device not in (None, "", "cpu"):
        raise InvalidRequest(
            f"TWINKLE_DEVICE: {device!r} in the environment is not known; use 'cpu', or none"
        )
    return device == "cpu"


def _found_gpus() -> int:
    if sys.platform == "linux" and not any(Path(device).exists() for device in _GPU_DEVICES):
        return 0
    import torch  # takes seconds, so only if there may be a GPU

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dtype(config: ServerConfig, has_gpu: bool) -> str:
    if config.model.torch_dtype is not None:
        return config.model.torch_dtype
    return "bfloat16" if has_gpu else "float32"
