"""vLLM's settings, and starting it."""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass
from typing import Any

import psutil

from twinkle.protocol.errors import InvalidRequest, words_of
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.samplers.vllm.api import VllmApi
from twinkle.server.samplers.vllm.served import ServedModel

_WORKER = "twinkle.server.samplers.vllm.worker.TwinkleWorker"

# Ranks that vLLM has room for; the next one above the highest rank of an adapter is taken.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Sequences that run at once.
SEQUENCES_CPU = 80
SEQUENCES_GPU = 320

# Different adapters in a batch, if their places take no more than this share of the memory, as a divisor.
_ADAPTERS_AT_ONCE = 16
_ADAPTERS_SHARE = 10

# On a CPU: bytes for keys and values.
_MOST_CACHE_CPU = 4 * 2**30
_CACHE_SHARE_CPU = 4

# How long vLLM may take to end by itself.
_SHUTDOWN_SECONDS = 15.0


@dataclass(frozen=True)
class RunningVllm:
    """
    Attributes:
        llm: vLLM's `AsyncLLM`.
        sequences: how many it runs at once.
        adapters: different ones among them.
        cached_tokens: of its KV cache.
        scores_tokens: whether it has `prompt_logprob_token_ids`.
    """

    llm: Any
    sequences: int
    adapters: int
    cached_tokens: int
    scores_tokens: bool


def set_environment(config: ModelConfig) -> None:
    """What vLLM reads from the environment when it is imported; what the user has set stays."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # A fork would have this process's threads and open files.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # For a prompt that fills the context there must be room for the token drawn after it.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if config.device == "cpu":
        # Not on cores of its own: the server's other processes need them too. A core less than there are: each product
        # waits for the slowest thread, and one whose core another process has taken is very slow.
        threads = max(1, (len(os.sched_getaffinity(0)) - 1) // config.tensor_parallel_size)
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        # Compiling takes longer than it saves.
        settings["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


async def start(api: VllmApi, config: ModelConfig, model: ServedModel) -> RunningVllm:
    """Start vLLM, and draw a token: what a device can't compute shows there.

    Raises:
        InvalidRequest: if the model can't be served as `config` says.
    """
    on_cpu = config.device == "cpu"
    if on_cpu != api.current_platform.is_cpu():
        raise InvalidRequest(
            f"sampler.engine: this vllm ({api.version}) computes on {api.current_platform.device_type}, and the "
            f"model is to be on {config.device}; a GPU needs the package vllm, a CPU a CPU build of it"
        )
    sequences = SEQUENCES_CPU if on_cpu else SEQUENCES_GPU
    adapters = _adapters_at_once(api, config, model)
    try:
        llm = api.AsyncLLM.from_engine_args(_arguments(api, config, model, sequences, adapters))
    except (ValueError, RuntimeError, OSError) as error:
        raise InvalidRequest(
            f"sampler.engine: vllm can't serve {config.path} ({words_of(error)}); its own log says more. If memory "
            "is short, lower model.max_context_length or model.max_lora_rank, or use sampler.engine: transformers"
        ) from error
    try:
        await llm.collective_rpc("prepare_for_twinkle")
        await _draw_one(api, llm)
    except BaseException:
        await stop(llm)
        raise
    cache = llm.vllm_config.cache_config
    tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size)
    scores_tokens = bool(llm.vllm_config.use_v2_model_runner)
    return RunningVllm(llm, sequences, adapters, tokens, scores_tokens)


async def stop(llm: Any) -> None:
    """End vLLM's processes, and what it has running on this event loop."""
    llm.shutdown(_SHUTDOWN_SECONDS)
    current = asyncio.current_task()
    others = [task for task in asyncio.all_tasks() if task is not current]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _arguments(api: VllmApi, config: ModelConfig, model: ServedModel, sequences: int, adapters: int) -> Any:
    settings: dict[str, Any] = {
        "model": str(config.path),
        "skip_tokenizer_init": True,
        "dtype": config.torch_dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        # Also within Ray: vLLM would place processes itself, and this one has been placed.
        "distributed_executor_backend": "mp",
        "max_model_len": model.max_context_length + 1,
        "max_num_seqs": sequences,
        "enable_lora": True,
        "max_lora_rank": _room_for_rank(config.max_lora_rank),
        "max_loras": adapters,
        "max_cpu_loras": max(adapters, config.max_sampler_adapters),
        "lora_target_modules": model.layer_kinds,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "worker_extension_cls": _WORKER,
        "generation_config": "vllm",
        "language_model_only": True,
        "disable_log_stats": True,
        # The same on all of its ranks, another one at each start.
        "seed": secrets.randbits(31),
    }
    if config.device == "cpu":
        free = psutil.virtual_memory().available // _CACHE_SHARE_CPU
        cache = min(_MOST_CACHE_CPU, free) // config.tensor_parallel_size
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": cache}
    return api.AsyncEngineArgs(**settings)


def _room_for_rank(rank: int) -> int:
    if rank > _RANKS[-1]:
        raise InvalidRequest(f"model.max_lora_rank: {rank}; vllm takes up to {_RANKS[-1]}")
    return next(room for room in _RANKS if room >= rank)


def _adapters_at_once(api: VllmApi, config: ModelConfig, model: ServedModel) -> int:
    total = int(api.current_platform.get_device_total_memory()) * config.tensor_parallel_size
    place = max(1, model.rank_bytes * _room_for_rank(config.max_lora_rank))
    return max(1, min(_ADAPTERS_AT_ONCE, config.max_sampler_adapters, total // _ADAPTERS_SHARE // place))


async def _draw_one(api: VllmApi, llm: Any) -> None:
    params = api.SamplingParams(
        max_tokens=1, logprobs=0, flat_logprobs=True, ignore_eos=True, detokenize=False
    )
    try:
        async for _ in llm.generate(api.tokens_input([0]), params, "first"):
            pass
    except api.EngineDeadError as error:
        raise InvalidRequest(
            "sampler.engine: vllm has loaded the model, but can't compute with it on this device; its own log says "
            "why. Use another model, or sampler.engine: transformers"
        ) from error
