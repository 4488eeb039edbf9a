"""Whether a model's weights fit the devices that are planned for it: said before anything is loaded."""

from __future__ import annotations

import os
import sys

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.sampler_plan import SamplerPlan


def check_fits(
    model: ModelConfig, samplers: SamplerPlan | None, weights: int, memory: int | None, has_gpus: bool
) -> None:
    """
    Args:
        model: as it is trained, on all ranks.
        weights: of the whole model, in bytes.
        memory: of one GPU, or of this machine where the CPU computes, in bytes; None if it isn't known.
        has_gpus: whether each rank has a GPU of its own.

    Raises:
        InvalidRequest: if the weights alone are more than there is room for. (What fits by this may still leave too
            little for training, which the ranks find out when they have read their parts.)
    """
    if memory is None:
        return
    # At least: a part of what is not shared out evenly (embedding, head) is on some ranks alone.
    parts = model.data_parallel_size if model.shard_base else model.num_ranks // model.data_parallel_size
    of_rank = weights // parts
    spread = f"1/{parts} on each of {model.num_ranks} ranks" if parts > 1 else "all on each rank"
    whole = f"model: its weights take {_gb(weights)} in {model.torch_dtype}"
    if not has_gpus:
        number = samplers.processes if samplers is not None else 0
        total = of_rank * model.num_ranks + weights * number
        if total > memory:
            apart = f" and all in each of {number} samplers" if number else ""
            raise InvalidRequest(
                f"{whole}, {spread}{apart}, together {_gb(total)}; but this machine has {_gb(memory)}. Take a smaller "
                "model, or fewer ranks and samplers"
            )
        return
    if of_rank > memory:
        raise InvalidRequest(
            f"{whole}, {spread}: {_gb(of_rank)}; but a GPU here has {_gb(memory)}. Spread it further: "
            "model.shard_base: true with more model.data_parallel_size, or model.use_megatron: true with more "
            "tensor_parallel_size or pipeline_parallel_size"
        )
    if samplers is not None and samplers.processes and weights // samplers.gpus > memory:
        raise InvalidRequest(
            f"sampler: a sampler holds the whole model, {_gb(weights)} in {model.torch_dtype} on {samplers.gpus} of "
            f"the GPUs, but each has {_gb(memory)}; give it more with sampler.engine: vllm and "
            "sampler.tensor_parallel_size, or set sampler.engine: none for a server that only trains"
        )


def memory_of_machine() -> int | None:
    """Of all programs together, in bytes; None where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def memory_of_gpu() -> int | None:
    """Of the smallest GPU that torch sees, in bytes; None if it sees none."""
    torch = sys.modules.get("torch")  # whoever has counted the GPUs has imported it
    if torch is None or not torch.cuda.is_available():
        return None
    return min(
        torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
