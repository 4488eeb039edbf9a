"""What a model's configuration and the memory of its device say of the requests that it can take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora.losses.logprobs import MAX_CHUNK_LOGITS
from twinkle.server.backends.protocol import ModelConfig

# The share of free memory that a micro-batch may fill, and all adapters together; the rest is for the sampler and other
# programs.
_GPU_SHARE = 0.5
_CPU_SHARE = 0.25
_ADAPTERS_SHARE = 0.25
# What a sampler's keys and values may take at most. More than is left beside the others, since they seldom take theirs;
# where it is too much, samples are paused.
_CACHE_SHARE = 0.5
_MIN_BATCH_TOKENS = 512
# On a CPU larger micro-batches are not faster, or even slower, since activations leave the cache.
_MAX_BATCH_TOKENS_CPU = 2048
_MAX_BATCH_TOKENS_GPU = 65536
# Logits and what is computed from them, as many numbers each, in float32.
_HEAD_BYTES = 3 * 4 * MAX_CHUNK_LOGITS


def context_length(text: PretrainedConfig, config: ModelConfig) -> int:
    own = getattr(text, "max_position_embeddings", None)
    if config.max_context_length is None:
        if own is None:
            raise InvalidRequest(
                f"model: {config.path} does not say how long a sequence may be (max_position_embeddings); "
                "set max_context_length"
            )
        return int(own)
    if own is not None and not 1 <= config.max_context_length <= own:
        raise InvalidRequest(
            f"model.max_context_length: {config.max_context_length} is not between 1 and {own}, the model's own"
        )
    return config.max_context_length


def eos_token_ids(generation: GenerationConfig | None, text: PretrainedConfig) -> tuple[int, ...]:
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(text, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(int(token) for token in found) if isinstance(found, list) else (int(found),)


def max_batch_tokens(text: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> int:
    """What `bounded_batch_tokens` gives for a model that is known by its configuration only.

    A layer of a Llama or Qwen keeps about 8 vectors of the hidden size and 4 of the feed-forward size for the backward
    pass; twice that is reckoned with, for what the backward pass makes on its way. In a mixture of experts every copy
    of a token, one for each of its experts, adds 2 and 4.
    """
    hidden = int(text.hidden_size)
    intermediate = _largest(getattr(text, "intermediate_size", None)) or 4 * hidden
    copies = int(getattr(text, "num_experts_per_tok", None) or 0)
    of_experts = copies * (
        4 * hidden + 8 * (_largest(getattr(text, "moe_intermediate_size", None)) or intermediate)
    )
    numbers = 16 * hidden + 8 * intermediate + of_experts
    token_bytes = int(text.num_hidden_layers) * numbers * dtype.itemsize
    return bounded_batch_tokens(affordable_tokens(token_bytes, device), device)


def _largest(size: int | Sequence[int] | None) -> int:
    """Of a size that some models have once, and others for each layer; 0 if there is none."""
    return max(size, default=0) if isinstance(size, Sequence) else int(size or 0)


def _size(text: PretrainedConfig, name: str) -> int:
    """The largest of a size that may be the layers' own (Gemma 4's heads are); 0 if there is none."""
    try:
        return _largest(getattr(text, name, None))
    except RuntimeError:  # Transformers refuses to name one of several
        layers: Any = getattr(text, "per_layer_config", ())
        return max((_largest(getattr(layer, name, None)) for layer in layers), default=0)


def affordable_tokens(token_bytes: float, device: torch.device) -> int:
    """How many tokens a training pass can hold: a share of the memory that is free, once the weights are in it.

    Args:
        token_bytes: what the layers keep of a token, in bytes; what the output head takes is known.
    """
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    return int(max(0.0, share * _free_memory(device) - _HEAD_BYTES) / token_bytes)


def bounded_batch_tokens(affordable: int, device: torch.device) -> int:
    """Most tokens of a micro-batch, where so many can be held: no more than make it faster, nor too few."""
    most = _MAX_BATCH_TOKENS_GPU if device.type == "cuda" else _MAX_BATCH_TOKENS_CPU
    return max(_MIN_BATCH_TOKENS, min(most, affordable))


# For `overhead_tokens`: what a layer takes forward and backward whatever is in it (seconds of Python and of launching
# kernels), and how fast the rest is computed (floating-point operations a second). Orders of magnitude will do.
_LAYER_SECONDS_CPU = 6e-3
_LAYER_SECONDS_GPU = 3e-3
_SPEED_CPU = 5e10
_SPEED_GPU = 1.5e14


def overhead_tokens(layers: int, weights: int, device: torch.device) -> int:
    """What a micro-batch costs beside its tokens, in tokens: where cutting a batch into more of them begins to pay.

    A token takes 6 operations a weight, forward and backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    Reckoned and not measured, so that the same rows are cut alike on every start.

    Args:
        layers: decoder layers.
        weights: numbers in all matrices that a token goes through.
    """
    on_gpu = device.type == "cuda"
    seconds = layers * (_LAYER_SECONDS_GPU if on_gpu else _LAYER_SECONDS_CPU)
    speed = _SPEED_GPU if on_gpu else _SPEED_CPU
    return max(1, round(seconds * speed / (6 * weights)))


def affordable_adapter_bytes(device: torch.device, ranks: int = 1) -> int:
    """What all adapters may take together: a share of the memory that is free, once the weights are in it.

    Args:
        ranks: how many hold a part of each adapter; those on GPUs have a memory each.
    """
    return int(_ADAPTERS_SHARE * _free_memory(device)) * (ranks if device.type == "cuda" else 1)


def affordable_cache_tokens(text: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Of how many tokens a sampler can keep keys and values, in a share of the memory that is free: at least one."""
    # Where heads are unknown, as many as fill the hidden size.
    own_heads = _size(text, "num_attention_heads") or 1
    heads = _size(text, "num_key_value_heads") or own_heads
    width = _size(text, "head_dim") or int(text.hidden_size) // own_heads
    token_bytes = int(text.num_hidden_layers) * 2 * heads * width * dtype.itemsize
    return max(1, int(_CACHE_SHARE * _free_memory(device)) // token_bytes)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()


def _free_host_memory() -> int:
    """Bytes of memory that programs can have without swapping; where the system doesn't tell, 8 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):  # in kB; unlike free pages, with what caches would give back
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30
