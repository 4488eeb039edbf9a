"""Where samples are drawn: beside training, in processes of their own, or nowhere. Imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plugins
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import SamplerSection, ServerConfig

NO_ENGINE = "none"

# Engines that plan the memory of a whole device, and so never share a process with a trainer.
_NEVER_BESIDE_TRAINING = ("vllm",)


@dataclass(frozen=True)
class SamplerPlan:
    """The samplers of a model.

    Attributes:
        engine: name of an entry point.
        processes: samplers of their own that are always there; 0: each copy of the model samples beside its training.
        model: of one such process; the parallel sizes are those of the engine.
        gpus: of one such process; 0 means CPU.
        python: of the environment that they run in; None: the server's own.
        max_processes: how many there may be while there is much to sample; `processes` if their number stays.
        target_sequences: that each of them is to draw, or have waiting.
    """

    engine: str
    processes: int
    model: ModelConfig
    gpus: int
    python: Path | None
    max_processes: int
    target_sequences: int

    @property
    def all_gpus(self) -> int:
        """Of as many as there may be."""
        return self.max_processes * self.gpus


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
        if section.num_gpus or replicas != "auto" or section.max_replicas or section.python is not None:
            raise InvalidRequest(
                "sampler.engine: none starts no samplers; leave out sampler.num_gpus, replicas, max_replicas and "
                "python, or name an engine"
            )
        return None
    _check_engine(section)
    if section.num_gpus and not gpus and not is_cpu_forced:
        raise InvalidRequest(
            f"sampler.num_gpus: {section.num_gpus} of no GPUs: ray.num_gpus is 0, or there are none; leave it out "
            "(sampler.replicas makes samplers of their own on a CPU too)"
        )
    never_beside = section.engine in _NEVER_BESIDE_TRAINING
    is_spread = backend == "megatron" or one_copy.num_ranks > 1 or one_copy.shard_base
    asked_apart = bool(section.num_gpus) or replicas != "auto" or section.python is not None
    if asked_apart or never_beside or (is_spread and not gpus):
        processes, max_processes = _processes(section)
    elif section.max_replicas is not None:
        raise InvalidRequest(
            f"sampler.max_replicas: {section.max_replicas}, but there would be 0 samplers of their own, which it is "
            "about; set sampler.replicas: 1 (or how many are always to be there), or leave max_replicas out"
        )
    elif is_spread:
        return None  # no rank holds the whole model, and there is no GPU for one that does
    else:
        processes = max_processes = 0
    model = _of_one_process(one_copy, tp)
    python = None if section.python is None else section.python.expanduser().absolute()
    gpus_of_one = tp if gpus else 0
    return SamplerPlan(
        section.engine, processes, model, gpus_of_one, python, max_processes, section.target_sequences
    )


def _check_engine(section: SamplerSection) -> None:
    """
    Raises:
        InvalidRequest: if the engine, or the environment that it runs in, is not there, or can't be spread over GPUs.
    """
    if section.python is None:
        plugins.look_up(plugins.SAMPLING_ENGINES, section.engine)
    elif not section.python.expanduser().is_file():
        raise InvalidRequest(
            f"sampler.python: {section.python} is not there; make the environment ('python -m venv DIR', then "
            f"'DIR/bin/pip install {_requirement(section.engine)}'), and give its DIR/bin/python"
        )
    if section.tensor_parallel_size > 1 and section.engine == "transformers":
        raise InvalidRequest(
            f"sampler.tensor_parallel_size: {section.tensor_parallel_size}: the transformers engine samples on one "
            "device; leave it out, or set sampler.engine: vllm"
        )


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


def _processes(section: SamplerSection) -> tuple[int, int]:
    """How many samplers of their own there always are, and how many there may be.

    Raises:
        InvalidRequest: if the numbers don't fit each other.
    """
    num_gpus, tp = section.num_gpus, section.tensor_parallel_size
    at_least, at_most = section.replicas, section.max_replicas
    if at_most is None and "target_sequences" in section.model_fields_set:
        raise InvalidRequest(
            f"sampler.target_sequences: {section.target_sequences} is for a number of samplers that follows the load; "
            "say with sampler.max_replicas how many there may be, or leave it out"
        )
    if isinstance(at_least, int) and at_most is not None and at_most < at_least:
        raise InvalidRequest(
            f"sampler.max_replicas: {at_most}, but sampler.replicas: {at_least} are always there; raise max_replicas, "
            "or lower replicas"
        )
    if at_most is not None or isinstance(at_least, int):
        key, most = ("max_replicas", at_most) if at_most is not None else ("replicas", int(at_least))
        if num_gpus and num_gpus != most * tp:
            raise InvalidRequest(
                f"sampler.num_gpus: {num_gpus}, but sampler.{key}: {most} with {tp} GPU{'s' * (tp > 1)} each "
                f"(tensor_parallel_size) take {most * tp}; leave one of them out"
            )
        return 1 if at_least == "auto" else at_least, most
    if not num_gpus:
        return 1, 1
    if num_gpus % tp:
        raise InvalidRequest(
            f"sampler.num_gpus: {num_gpus} is not a multiple of sampler.tensor_parallel_size: {tp}; some would be idle"
        )
    return num_gpus // tp, num_gpus // tp


def _requirement(engine: str) -> str:
    return "'twinkle-server[vllm]'" if engine == "vllm" else "twinkle-server"
