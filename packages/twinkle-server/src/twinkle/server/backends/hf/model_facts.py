"""Limits that follow from a model's configuration and its device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PretrainedConfig

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora.losses.logprobs import max_chunk_logits
from twinkle.server.backends.protocol import ModelConfig

_MIN_BATCH_TOKENS = 512
# Larger micro-batches are no faster on a CPU, or even slower, since activations no longer fit in the cache.
_MAX_BATCH_TOKENS_CPU = 2048
_MAX_BATCH_TOKENS_GPU = 65536
# A logit in float32, twice more for what is made of it, and in the model's dtype with its gradient.
_LOGIT_BYTES = 3 * 4 + 2 * 2


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


def max_batch_tokens(
    text: PretrainedConfig, dtype: torch.dtype, device: torch.device, pass_bytes: int
) -> int:
    """`bounded_batch_tokens`, estimated from the configuration alone."""
    token_bytes = estimated_token_bytes(text, dtype, int(text.num_hidden_layers))
    affordable = affordable_tokens(token_bytes, pass_bytes, head_bytes(int(text.vocab_size), device))
    return bounded_batch_tokens(affordable, device)


def estimated_token_bytes(text: PretrainedConfig, dtype: torch.dtype, layers: int) -> int:
    """Bytes that one more token costs a training pass in this many of a model's layers.

    A layer of a Llama or Qwen keeps about 8 vectors of the hidden size and 4 of the feed-forward size for the backward
    pass; that is doubled for the backward pass's own temporaries. In a mixture of experts, each expert of a token adds
    2 and 4.
    """
    hidden = int(text.hidden_size)
    intermediate = _largest(getattr(text, "intermediate_size", None)) or 4 * hidden
    copies = int(getattr(text, "num_experts_per_tok", None) or 0)
    of_experts = copies * (
        4 * hidden + 8 * (_largest(getattr(text, "moe_intermediate_size", None)) or intermediate)
    )
    numbers = 16 * hidden + 8 * intermediate + of_experts
    return layers * numbers * dtype.itemsize


def _largest(size: int | Sequence[int] | None) -> int:
    """The largest of a size that may be given per layer; 0 if missing."""
    return max(size, default=0) if isinstance(size, Sequence) else int(size or 0)


def head_bytes(vocab_size: int, device: torch.device) -> int:
    """What the output head holds: a chunk's logits, and what is made of them."""
    return _LOGIT_BYTES * max_chunk_logits(device, vocab_size)


def affordable_tokens(token_bytes: float, pass_bytes: int, head: int) -> int:
    """Tokens that a training pass has room for, without adapters.

    Args:
        token_bytes: bytes that the layers keep per token.
        pass_bytes: see `MemoryAccount.passes`.
        head: see `head_bytes`.
    """
    return int(max(0, pass_bytes - head) / token_bytes)


def bounded_batch_tokens(affordable: int, device: torch.device) -> int:
    """The token budget of a micro-batch: what fits, between a minimum and the size beyond which it gets no faster."""
    most = _MAX_BATCH_TOKENS_GPU if device.type == "cuda" else _MAX_BATCH_TOKENS_CPU
    return max(_MIN_BATCH_TOKENS, min(most, affordable))


# For `overhead_tokens`: a layer's fixed cost, forward and backward (seconds of Python and kernel launches), and the
# device's speed (FLOP/s). Orders of magnitude are enough.
_LAYER_SECONDS_CPU = 6e-3
_LAYER_SECONDS_GPU = 3e-3
_SPEED_CPU = 5e10
_SPEED_GPU = 1.5e14


def overhead_tokens(layers: int, weights: int, device: torch.device) -> int:
    """A micro-batch's fixed cost, as a number of tokens: splitting pays only if it saves more padding than this.

    A token takes 6 operations per weight, forward and backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    Estimated rather than measured, so that the same rows are split alike after each restart.

    Args:
        layers: number of decoder layers.
        weights: number of weights that a token is multiplied with.
    """
    on_gpu = device.type == "cuda"
    seconds = layers * (_LAYER_SECONDS_GPU if on_gpu else _LAYER_SECONDS_CPU)
    speed = _SPEED_GPU if on_gpu else _SPEED_CPU
    return max(1, round(seconds * speed / (6 * weights)))
