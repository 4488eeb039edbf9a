"""What running out of memory looks like."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The only sign that the CPU's allocator gives.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
