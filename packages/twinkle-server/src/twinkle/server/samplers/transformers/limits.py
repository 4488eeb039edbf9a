"""How many sequences a sampler runs at a time, and how much of them it caches."""

from __future__ import annotations

from twinkle.server.backends.hf.base_model import LoadedModel
from twinkle.server.backends.hf.model_facts import affordable_cache_bytes
from twinkle.server.backends.hf.rope import rope_boundaries
from twinkle.server.samplers.cache_usage import Limits, RowCost

MAX_ROWS_CPU = 64
MAX_ROWS_GPU = 256
# Most tokens that are cached, as `CacheUsage` counts them, if there is memory.
MAX_CACHED_TOKENS_CPU = 2**17
MAX_CACHED_TOKENS_GPU = 2**20


def make_limits(
    loaded: LoadedModel, max_rows: int | None, max_cached_tokens: int | None, cost: RowCost
) -> Limits:
    """
    Args:
        max_rows: default: by the device.
        max_cached_tokens: default: by device, context and free memory.
        cost: of a sequence.
    """
    on_gpu = loaded.device.type == "cuda"
    rows = max_rows or (MAX_ROWS_GPU if on_gpu else MAX_ROWS_CPU)
    context = loaded.info.max_context_length
    if max_cached_tokens is None:
        wanted = max(
            MAX_CACHED_TOKENS_GPU if on_gpu else MAX_CACHED_TOKENS_CPU, rows * cost.tokens(0) + context
        )
        max_cached_tokens = min(wanted, cost.affordable(affordable_cache_bytes(loaded.device)))
    return Limits(
        rows, max(rows, max_cached_tokens), rope_boundaries(loaded.model.config, context), cost=cost
    )
