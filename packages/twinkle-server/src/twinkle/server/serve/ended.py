"""By which errors one sees that a process has ended, or can't compute any more."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from twinkle.server.samplers.protocol import EngineDied

# What Ray raises when a process is gone; OutOfMemoryError means that Ray killed it because the machine ran out.
PROCESS_ENDED = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)

# Errors after which a process can't compute any more, though it is alive. PyTorch raises them as RuntimeErrors.
_BEYOND_REPAIR = (
    "CUDA error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "device-side assert",
)
_COLLECTIVE = ("NCCL", "gloo")  # other ranks may have gone on

# Two of CUDA's errors say no more than that memory has run out (`backends.hf.device_memory`).
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_beyond_repair(error: BaseException) -> bool:
    """Whether the process that raised it can't compute any more."""
    if isinstance(error, EngineDied):
        return True
    said = str(error)
    if any(sign in said for sign in _OUT_OF_MEMORY) and not any(sign in said for sign in _COLLECTIVE):
        return False
    return isinstance(error, RuntimeError) and any(sign in said for sign in (*_BEYOND_REPAIR, *_COLLECTIVE))
