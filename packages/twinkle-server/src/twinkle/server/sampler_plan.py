"""Where samples are drawn: beside training, in processes of their own, or nowhere. Imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plugins
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import ServerConfig

NO_ENGINE = "none"

# Engines that plan the memory of a whole device, and so never share a process with a trainer.
_NEVER_BESIDE_TRAINING = ("vllm",)


@dataclass(frozen=True)
class SamplerPlan:
    """The samplers of a model.

    Attributes:
        engine: name of an entry point.
        processes: samplers of their own; 0: each copy of the model samples beside its training.
        model: of one such process; the parallel sizes are those of the engine.
        gpus: of one such process; 0 means CPU.
        python: of the environment that they run in; None: the server's own.
    """

    engine: str
    processes: int
    model: ModelConfig
    gpus: int
    python: Path | None

    @property
    def all_gpus(self) -> int:
        return self.processes * self.gpus


def plan_samplers(
    config: ServerConfig, one_copy: ModelConfig, backend: str, gpus: int, is_cpu_forced: bool
) -> SamplerPlan | None:
    """
    Args:
        one_copy: the model as it is trained, once.
        gpus: of trainer and samplers together; 0 is the CPU.
        is_cpu_forced: whether GPUs are counted in the configuration, but the CPU takes their place.

    Returns:
        None if nothing is sampled.

    Raises:
        InvalidRequest: if the section `sampler` contradicts itself or doesn't fit.
    """
    section = config.sampler
    tp, replicas = section.tensor_parallel_size, section.replicas
    if section.engine == NO_ENGINE:
        if section.num_gpus or replicas != "auto" or section.python is not None:
            raise InvalidRequest(
                "sampler.engine: none starts no samplers; leave out sampler.num_gpus, replicas and python, or name an "
                "engine"
            )
        return None
    if section.python is None:
        plugins.look_up(plugins.SAMPLING_ENGINES, section.engine)
    elif not section.python.expanduser().is_file():
        raise InvalidRequest(
            f"sampler.python: {section.python} is not there; make the environment ('python -m venv DIR', then "
            f"'DIR/bin/pip install {_requirement(section.engine)}'), and give its DIR/bin/python"
        )
    if tp > 1 and section.engine == "transformers":
        raise InvalidRequest(
            f"sampler.tensor_parallel_size: {tp}: the transformers engine samples on one device; leave it out, or set "
            "sampler.engine: vllm"
        )
    if section.num_gpus and not gpus and not is_cpu_forced:
        raise InvalidRequest(
            f"sampler.num_gpus: {section.num_gpus} of no GPUs: ray.num_gpus is 0, or there are none; leave it out "
            "(sampler.replicas makes samplers of their own on a CPU too)"
        )
    never_beside = section.engine in _NEVER_BESIDE_TRAINING
    is_spread = backend == "megatron" or one_copy.num_ranks > 1 or one_copy.shard_base
    asked_apart = bool(section.num_gpus) or replicas != "auto" or section.python is not None
    if asked_apart or never_beside or (is_spread and not gpus):
        processes = _processes(section.num_gpus, replicas, tp)
    elif is_spread:
        return None  # no rank holds the whole model, and there is no GPU for one that does
    else:
        processes = 0
    model = _of_one_process(one_copy, tp)
    python = None if section.python is None else section.python.expanduser().absolute()
    return SamplerPlan(section.engine, processes, model, tp if gpus else 0, python)


def _of_one_process(one_copy: ModelConfig, tp: int) -> ModelConfig:
    return replace(
        one_copy,
        data_parallel_size=1,
        shard_base=False,
        tensor_parallel_size=tp,
        pipeline_parallel_size=1,
        expert_parallel_size=1,
        sequence_parallel=None,
    )


def _processes(num_gpus: int | None, replicas: int | str, tp: int) -> int:
    """
    Raises:
        InvalidRequest: if the numbers don't fit each other.
    """
    if isinstance(replicas, int):
        if num_gpus and num_gpus != replicas * tp:
            raise InvalidRequest(
                f"sampler.num_gpus: {num_gpus}, but sampler.replicas: {replicas} with {tp} GPU{'s' * (tp > 1)} each "
                f"(tensor_parallel_size) take {replicas * tp}; leave one of them out"
            )
        return replicas
    if not num_gpus:
        return 1
    if num_gpus % tp:
        raise InvalidRequest(
            f"sampler.num_gpus: {num_gpus} is not a multiple of sampler.tensor_parallel_size: {tp}; some would be idle"
        )
    return num_gpus // tp


def _requirement(engine: str) -> str:
    return "'twinkle-server[vllm]'" if engine == "vllm" else "twinkle-server"
