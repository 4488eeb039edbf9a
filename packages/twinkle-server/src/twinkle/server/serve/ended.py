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
    "NCCL",
    "gloo",
)


def is_beyond_repair(error: BaseException) -> bool:
    """Whether the process that raised it can't compute any more."""
    if isinstance(error, EngineDied):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _BEYOND_REPAIR)
