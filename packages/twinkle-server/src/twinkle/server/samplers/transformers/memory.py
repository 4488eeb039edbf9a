"""Recognizes out-of-memory errors."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator's only sign.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
