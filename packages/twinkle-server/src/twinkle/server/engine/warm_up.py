"""Proves that a worker works before it is reported ready."""

import time

import numpy as np

from twinkle.protocol.types import AdamParams, SamplingParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, Row
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.samplers.protocol import GenerateRequest


async def warm_up(worker: WorkerPort) -> float:
    """Run training passes, an optimizer step and a sampled token (if anything samples) on a temporary adapter.

    Returns:
        How long a pass with next to nothing to compute takes, in seconds.

    Raises:
        Exception: whatever went wrong.
    """
    # Not 0: that may be padding, whose embedding is zeros, and then no finite gradient comes back.
    tokens = np.array([1, 2], np.int64)
    row = Row(
        "warm-up", tokens, "cross_entropy", {"target_tokens": tokens, "weights": np.ones(2, np.float32)}
    )
    await worker.add_adapter("warm-up", AdapterSpec(rank=1))
    try:
        await worker.forward_backward([[row]])  # the first is slower
        began = time.perf_counter()
        await worker.forward_backward([[row]])
        seconds = time.perf_counter() - began
        await worker.optim_step([AdamStep("warm-up", AdamParams())])
        if worker.samplers != "nowhere":
            state = await worker.export_adapter("warm-up", with_optimizer=False)
            await worker.publish("warm-up", "warm-up", state)
            await worker.generate(GenerateRequest("warm-up", "warm-up", tokens, SamplingParams(max_tokens=1)))
            await worker.remove_sampler_adapter("warm-up")
    finally:
        await worker.remove_adapter("warm-up")
    return seconds
