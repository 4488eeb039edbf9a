"""A drill: memory runs out, in training and in sampling, and both must go on as if nothing had happened."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from on_gpu.models import config_of, make
from on_gpu.report import Part, Report, Skipped
from on_gpu.training import Case, adapter_name
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

# Bytes beside the weights: less than the large pass keeps, and than the keys and values of all sequences.
_ROOM = 2 * 2**30
SMALL = Case("cross_entropy", tenants=1, rows=2, length=64)
LARGE = Case("cross_entropy", tenants=1, rows=16, length=2048)
SEQUENCES, PROMPT, TOKENS = 64, 256, 256


def drill(report: Report, part: Part, device: torch.device) -> None:
    """With a limit that neither trainer nor sampler knows of, a pass that is too large must change nothing, and samples
    that together are too large must all be answered.
    """
    if device.type != "cuda":
        raise Skipped("a CPU's memory has no such limit")
    with ExitStack() as stack:
        made = make(stack, config_of("Qwen3-0.6B", is_toy=False), device, "bfloat16")
        backend = made.backend()
        stack.callback(backend.close)
        backend.add_adapter(adapter_name(0), AdapterSpec(rank=8))
        engine = TransformersEngine(made.loaded, made.config)
        stack.callback(engine.close)
        before = train(backend, SMALL)
        stack.enter_context(_limited(device))
        drill_training(report, part, backend, before)
        drill_sampling(report, part, engine)


@contextmanager
def _limited(device: torch.device) -> Generator[None]:
    """With `_ROOM` beside what is allocated now."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(device).total_memory
    limit = torch.cuda.memory_reserved(device) + _ROOM
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def train(backend: TransformersBackend, case: Case) -> np.ndarray:
    """Log-probabilities of all tokens of a micro-batch; its gradient is added."""
    [results] = backend.forward_backward([case.rows_of(0, backend.info.vocab_size)])
    return np.concatenate([result.logprobs for result in results])


def drill_training(report: Report, part: Part, backend: TransformersBackend, before: np.ndarray) -> None:
    gradient = _gradient(backend)
    with _counted("twinkle.backend") as counter:
        try:
            train(backend, LARGE)
            found = "computed in smaller pieces"
            if not counter.lacks:
                found = "it fitted into the memory there was: nothing was tried"
                part.problems.append(f"a pass of {LARGE.tokens:,} tokens: {found}")
        except (torch.OutOfMemoryError, TwinkleError) as error:
            found = f"{type(error).__name__}: {error}"[:200]
            unchanged = all(np.array_equal(one, gradient[name]) for name, one in _gradient(backend).items())
            if not unchanged:
                part.problems.append("the gradient has changed by a pass that failed")
            report.add(
                part, {"what": "the gradient after it", "found": "unchanged" if unchanged else "changed"}
            )
    report.add(part, {"what": f"a pass of {LARGE.tokens:,} tokens", "found": found})
    report.add(part, {"what": "times that memory ran out in it", "found": counter.lacks})
    off = float(np.abs(train(backend, SMALL) - before).max())
    if not off <= 0.05:
        part.problems.append(f"a small pass gives other log-probabilities than before, by up to {off:.3g}")
    report.add(part, {"what": "a small pass after it", "found": f"as before, within {off:.3g}"})


def _gradient(backend: TransformersBackend) -> dict[str, np.ndarray]:
    state = backend.export_adapter(adapter_name(0), with_optimizer=False, with_gradients=True)
    assert state.gradients is not None
    return dict(state.gradients)


class _Counter(logging.Handler):
    """Counts the messages that say that memory ran out."""

    def __init__(self) -> None:
        super().__init__()
        self.lacks = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lacks += "memory ran out" in record.getMessage()


@contextmanager
def _counted(name: str) -> Generator[_Counter]:
    log, counter = logging.getLogger(name), _Counter()
    level = log.level
    log.addHandler(counter)
    log.setLevel(logging.INFO)
    try:
        yield counter
    finally:
        log.removeHandler(counter)
        log.setLevel(level)


def drill_sampling(report: Report, part: Part, engine: TransformersEngine) -> None:
    with _counted("twinkle.sampler") as counter:
        draw = np.random.default_rng(0)
        params = SamplingParams(max_tokens=TOKENS, temperature=1.0, stop=[])
        futures = [
            engine.generate(GenerateRequest("tenant", None, draw.integers(0, 500, PROMPT), params))
            for _ in range(SEQUENCES)
        ]
        complete = 0
        for future in futures:
            try:
                [sample] = future.result(timeout=90).sequences
                complete += len(sample.tokens) == TOKENS and bool(
                    np.isfinite(np.array(sample.logprobs, float)).all()
                )
            except Exception as error:
                part.problems.append(f"a sample failed: {type(error).__name__}: {error}"[:300])
    if complete < SEQUENCES:
        part.problems.append(f"only {complete} of {SEQUENCES} samples are complete")
    report.add(part, {"what": f"{SEQUENCES} samples", "found": f"{complete} complete"})
    report.add(part, {"what": "samples preempted for lack of memory", "found": counter.lacks})
    if not counter.lacks:
        part.problems.append("the samples fitted into the memory there was: nothing was tried")
