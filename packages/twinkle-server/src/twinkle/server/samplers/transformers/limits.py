"""How many sequences a sampler runs at a time, and how much of them it caches."""

from __future__ import annotations

from twinkle.server.backends.hf.base_model import LoadedModel
from twinkle.server.backends.hf.model_facts import estimated_token_bytes
from twinkle.server.backends.hf.rope import rope_boundaries
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.samplers.cache_usage import Limits, RowCost

MAX_ROWS_CPU = 64
MAX_ROWS_GPU = 256
# On a CPU, whose memory belongs to other programs too, most tokens that are cached, as `CacheUsage` counts them.
MAX_CACHED_TOKENS_CPU = 2**17
# Tokens whose keys and values are kept after their sequences have ended, for prompts with the same beginning: so many,
# if that is no more than a share of the cache (as a divisor).
_PREFIX_TOKENS, _FOR_PREFIXES = 2**14, 8

# Of the sampler's memory at most this share (as a divisor) is set aside for each of two: its adapters, were all of them
# of a usual rank, and what a step works with.
_SET_ASIDE = 4
_USUAL_RANK = 32
# A step holds the logits of all rows in float32 with their log-probabilities, probabilities and a copy.
_STEP_BYTES = 4 * 4
# Of prompts in one pass, and those that a pass's padding, blocks of lengths, and a tensor that grows take beside.
_PASS_TOKENS = 2048
_SPARE_TOKENS = _PASS_TOKENS + 256

# What running sequences are charged for, as a share of the cache: a quarter more may be short ones, and prompts are
# there twice for a moment. If it is not enough, samples are preempted.
_CHARGED = 0.7


def cache_bytes(loaded: LoadedModel, rows: int, max_adapters: int) -> int:
    """What the sampler's part of the memory leaves for caches.

    Args:
        rows: of a step.
        max_adapters: see `ModelConfig.max_sampler_adapters`.
    """
    numbers = 0
    for name in loaded.targets:
        experts, out_features, in_features = _sizes(loaded, name)
        numbers += experts * _USUAL_RANK * (out_features + in_features)
    text = loaded.model.config.get_text_config()
    whole, itemsize = loaded.memory.sampling, loaded.dtype.itemsize
    adapters = max_adapters * numbers * itemsize
    step = rows * loaded.info.vocab_size * _STEP_BYTES + _PASS_TOKENS * estimated_token_bytes(
        text, loaded.dtype, 1
    )
    return whole - min(adapters, whole // _SET_ASIDE) - min(step, whole // _SET_ASIDE)


def _sizes(loaded: LoadedModel, name: str) -> tuple[int, int, int]:
    """Experts (1 if there are none), output and input features."""
    weight = name if name.rpartition(".")[0] in loaded.experts else f"{name}.weight"
    shape = loaded.model.get_parameter(weight).shape
    return (1, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def make_limits(
    loaded: LoadedModel,
    max_rows: int | None,
    max_cached_tokens: int | None,
    cost: RowCost,
    max_adapters: int = ModelConfig.max_sampler_adapters,
) -> Limits:
    """
    Args:
        max_rows: default: by the device.
        max_cached_tokens: default: by device, context and memory.
        cost: of a sequence.
    """
    on_gpu = loaded.device.type == "cuda"
    rows = max_rows or (MAX_ROWS_GPU if on_gpu else MAX_ROWS_CPU)
    context = loaded.info.max_context_length
    whole = cache_bytes(loaded, rows, max_adapters)
    prefixes = min(_PREFIX_TOKENS, cost.affordable(whole) // _FOR_PREFIXES)
    left = cost.affordable(whole) - prefixes
    if max_cached_tokens is None:
        all_long = rows * cost.tokens(context)
        wanted = all_long if on_gpu else max(MAX_CACHED_TOKENS_CPU, rows * cost.tokens(0) + context)
        max_cached_tokens = min(wanted, int(_CHARGED * left))
    return Limits(
        rows,
        max(rows, max_cached_tokens),
        rope_boundaries(loaded.model.config, context),
        cost=cost,
        alone=max(1, (left - _SPARE_TOKENS) * 4 // 9),
        bytes=whole - cost.size(prefixes),
        prefix_tokens=prefixes,
    )
