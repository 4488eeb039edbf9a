"""Where the host waits for the device: in a pass, in a decode step, and when tokens are drawn.

Training and sampling in one process share a stream, so that each of these waits for whatever the other has queued.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from on_gpu.checks import SPECS
from on_gpu.models import Made, config_of, make, trained_adapter
from on_gpu.report import Part, Report, Skipped
from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.hf.base_model import copy_sharing_weights
from twinkle.server.backends.lora.experts import ExpertsWithLora
from twinkle.server.backends.lora.linear import wrap_modules
from twinkle.server.backends.protocol import AdapterState, Row
from twinkle.server.samplers.cache_usage import RowCost
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.batches import SlotBatch
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds
from twinkle.server.samplers.transformers.limits import make_limits
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RoutedLinear
from twinkle.server.samplers.transformers.model_runner import ModelRunner
from twinkle.server.samplers.transformers.next_tokens import NextTokens
from twinkle.server.samplers.transformers.running import RunningSamples
from twinkle.server.samplers.transformers.sequences import make_task

_ROWS = 16
# What torch says of each, in either mode.
_SAID = "synchronizing CUDA operation"


def find_syncs(report: Report, part: Part, device: torch.device) -> None:
    """A line for each line of code that waits, with how often; and the first one of each kind of work.

    It is a measurement: none of them is a failure.
    """
    if device.type != "cuda":
        raise Skipped("only a GPU is waited for")
    with ExitStack() as stack:
        made = make(stack, config_of("Qwen3-4B", is_toy=True), device, "bfloat16")
        backend = made.backend()
        stack.callback(backend.close)
        states = {name: trained_adapter(backend, name, spec) for name, spec in SPECS.items()}
        batches = [[_row(name, seed) for name in SPECS for seed in range(4)]]
        _, step, draw = decoding(made, list(states.values()))
        for what, work in (
            ("pass", lambda: backend.forward_backward(batches)),
            ("decode step", step),
            ("draw", draw),
        ):
            report.attempt(part, what, partial(_find, report, part, what, work))


def _find(report: Report, part: Part, what: str, work: Callable[[], object]) -> None:
    work()
    torch.cuda.synchronize()
    for place, count in waits(work).most_common():
        report.add(part, {"in a": what, "line": place, "times": count})
    part.notes.append(f"{what}: the first is at {first_wait(work)}")


def _row(adapter: str, seed: int) -> Row:
    draw = np.random.default_rng(seed)
    inputs = {"target_tokens": draw.integers(0, 500, 32), "weights": np.ones(32, np.float32)}
    return Row(adapter, draw.integers(0, 500, 32), "cross_entropy", inputs)


def decoding(
    made: Made, states: list[AdapterState]
) -> tuple[RunningSamples, Callable[[], None], Callable[[], None]]:
    """A decode step of some sequences with several adapters, as the engine makes it, and the draw after it.

    Returns:
        What runs, and the two, to be called by turns.
    """
    loaded = made.loaded
    model, route = copy_sharing_weights(loaded.model), Route()
    wrap_modules(model, loaded.linears, lambda base, name: RoutedLinear(base, name, route))
    wrap_modules(model, loaded.experts, lambda base, name: ExpertsWithLora(base, name, route))
    limits = make_limits(loaded, _ROWS, _ROWS * 256, RowCost())
    runner = ModelRunner(model, route, LayerKinds.of(model.config, loaded.info.max_context_length))
    with torch.inference_mode():
        running = RunningSamples(SlotBatch(runner, replace(limits, prefix_tokens=0)))
        adapters = [ResidentAdapter.of(state, loaded.dtype, loaded.device) for state in states]
        for i in range(_ROWS):
            request = GenerateRequest("tenant", None, np.arange(8 + i), SamplingParams(stop=[]))
            future: Future[SampleResponse] = Future()
            adapter = adapters[i % len(adapters)]
            task = make_task(request, future, adapter, i, loaded.info, limits.longest, has_tokenizer=False)
            running.admit({task.prompt(1): task})
        next_tokens = NextTokens()
        while running.prefilling:
            if (begun := running.prefill()) is not None:
                next_tokens.append(*begun)
        latest = torch.empty(0)

    @torch.inference_mode()
    def step() -> None:
        nonlocal latest
        latest = running.batch.step([sequence.tokens[-1] for sequence in running.sequences])

    @torch.inference_mode()
    def draw() -> None:
        next_tokens.append(running.sequences, latest)

    return running, step, draw


def waits(work: Callable[[], object]) -> Counter[str]:
    """How often each line waits."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = (one for one in found if _SAID in str(one.message))
    return Counter(f"{_short(one.filename)}:{one.lineno}" for one in told)


def first_wait(work: Callable[[], object]) -> str:
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if _SAID not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        return " < ".join(f"{_short(frame.filename)}:{frame.lineno}" for frame in reversed(frames[-3:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no line"


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
