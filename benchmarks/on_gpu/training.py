"""Training steps of many tenants: tokens a second, MFU, and where the time goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from on_gpu.device import Ceiling, time_by_class
from on_gpu.models import synchronize
from on_gpu.reckoning import Work
from on_gpu.report import Part, Report, Row
from twinkle.protocol.types import AdamParams
from twinkle.server.backends import protocol
from twinkle.server.backends.hf.device_memory import is_out_of_memory
from twinkle.server.backends.protocol import AdamStep, AdapterSpec
from twinkle.server.backends.transformers import TransformersBackend

_STEP = AdamParams(learning_rate=1e-4)
# A case is done twice if there is time, since the first step finds kernels and takes memory, and more often within
# some seconds.
_MOST_ROUNDS = 4
_ROUNDS_SECONDS = 6.0


@dataclass(frozen=True)
class Case:
    """A step of each tenant's adapter, with so many rows each."""

    loss: str
    tenants: int
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.loss}, {self.tenants} x {self.rows} x {self.length}"

    @property
    def tokens(self) -> int:
        return self.tenants * self.rows * self.length

    def rows_of(self, tenant: int, vocab_size: int) -> list[protocol.Row]:
        draw = np.random.default_rng(tenant)
        rows: list[protocol.Row] = []
        for _ in range(self.rows):
            inputs: dict[str, Any] = {"target_tokens": draw.integers(0, vocab_size, self.length)}
            if self.loss == "cross_entropy":
                inputs["weights"] = np.ones(self.length, np.float32)
            else:
                inputs["logprobs"] = draw.normal(-2, 0.1, self.length).astype(np.float32)
                inputs["advantages"] = draw.normal(size=self.length).astype(np.float32)
            tokens = draw.integers(0, vocab_size, self.length)
            rows.append(protocol.Row(adapter_name(tenant), tokens, self.loss, inputs))
        return rows


# In the order in which they are measured; supervised rows are long and few, those of RL short and many.
CASES = [
    Case(loss, tenants, rows, length)
    for tenants in (1, 8, 32)
    for loss, rows, length in (("cross_entropy", 4, 2048), ("importance_sampling", 32, 256))
]
TOY_CASES = [
    Case(loss, tenants, rows, length)
    for tenants in (1, 9)
    for loss, rows, length in (("cross_entropy", 2, 48), ("importance_sampling", 4, 16))
]


def adapter_name(tenant: int) -> str:
    return f"adapter-{tenant}"


class Trainer:
    """A backend, and its adapters, which are added as cases need them."""

    def __init__(self, backend: TransformersBackend, work: Work, ceiling: Ceiling, rank: int) -> None:
        self.backend = backend
        self.adapters = 0
        self.adapter_numbers = 0
        self._work = work
        self._ceiling = ceiling
        self._rank = rank
        self._device = backend.loaded.device
        self._seconds_per_token: float | None = None

    def need_adapters(self, count: int) -> None:
        for i in range(self.adapters, count):
            self.backend.add_adapter(adapter_name(i), AdapterSpec(rank=self._rank, seed=i))
        self.adapters = max(self.adapters, count)
        if not self.adapter_numbers:
            weights = self.backend.export_adapter(adapter_name(0), with_optimizer=False).weights
            self.adapter_numbers = sum(matrix.size for matrix in weights.values())

    def measure(self, report: Report, part: Part, case: Case, seconds_left: float) -> None:
        """A line for a case; one that would take longer than there is time says so."""
        expected = 0.0 if self._seconds_per_token is None else 1.5 * self._seconds_per_token * case.tokens
        if seconds_left < max(5, expected):
            found = f"left out: {max(0, seconds_left):.0f} s left, and it may take {expected:.0f}"
            report.add(part, {"case": str(case), "result": found})
            return
        began = time.perf_counter()
        self.need_adapters(case.tenants)
        adapters_seconds = time.perf_counter() - began
        micro_batch = self.backend.info.max_batch_tokens
        while True:
            try:
                row = self._rounds(case, micro_batch, seconds_left)
                break
            except Exception as error:
                if not is_out_of_memory(error) or micro_batch < 2 * case.length:
                    raise
            part.notes.append(f"{case}: out of memory with micro-batches of {micro_batch:,} tokens; halved")
            micro_batch //= 2
        more = {"tokens in a micro-batch": micro_batch, "adapters made in, s": adapters_seconds}
        report.add(part, {"case": str(case), "result": "measured", **row, **more})

    def _rounds(self, case: Case, micro_batch: int, seconds_left: float) -> Row:
        batches, steps = self._batches(case, micro_batch)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        seconds: list[float] = []
        while not seconds or _once_more(seconds, seconds_left):
            began = time.perf_counter()
            self.backend.forward_backward(batches)
            self.backend.optim_step(steps)
            synchronize(self._device)
            seconds.append(time.perf_counter() - began)
        step = statistics.median(seconds[1:] or seconds)
        self._seconds_per_token = step / case.tokens
        flops = self._work.training_flops(self.adapter_numbers, case.length) * case.tokens / step
        peak = self._ceiling.peak
        return {
            "tokens/s": case.tokens / step,
            "TFLOP/s": flops / 1e12,
            "MFU": None if peak is None else flops / peak.flops,
            "of a plain product's": flops / self._ceiling.flops,
            "step, s": step,
            "first, s": seconds[0],
            "rounds": len(seconds),
            "micro-batches": len(batches),
            "memory, GiB": self._peak_memory(),
        }

    def _batches(self, case: Case, micro_batch: int) -> tuple[list[list[protocol.Row]], list[AdamStep]]:
        """All tenants' rows in micro-batches of at most so many tokens (at least a row each), and their steps."""
        vocab_size = self.backend.info.vocab_size
        rows = [row for tenant in range(case.tenants) for row in case.rows_of(tenant, vocab_size)]
        most = max(1, micro_batch // case.length)
        steps = [AdamStep(adapter_name(tenant), _STEP) for tenant in range(case.tenants)]
        return [rows[i : i + most] for i in range(0, len(rows), most)], steps

    def _peak_memory(self) -> float | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) / 2**30

    def profile(self, report: Report, part: Part, case: Case) -> None:
        """Where the time of a pass and its step goes, by class of kernel."""
        self.need_adapters(case.tenants)
        batches, steps = self._batches(case, self.backend.info.max_batch_tokens)

        def work() -> None:
            self.backend.forward_backward(batches)
            self.backend.optim_step(steps)

        work()
        by_class, count, seconds = time_by_class(self._device, work)
        whole = sum(by_class.values())
        for label, spent in by_class.items():
            report.add(part, {"kernels": label, "ms": spent, "share": spent / whole})
        part.notes.append(
            f"{case}: {count:,} kernels in {len(batches)} micro-batches; the device was busy for {whole:.0f} of "
            f"{1000 * seconds:.0f} ms, with the profiler on"
        )


def _once_more(seconds: list[float], seconds_left: float) -> bool:
    """
    Args:
        seconds: that each round has taken so far.
        seconds_left: there were before the first.
    """
    with_another = sum(seconds) + seconds[-1]
    if with_another > seconds_left / 2:
        return False
    return len(seconds) < 2 or (len(seconds) < _MOST_ROUNDS and with_another < _ROUNDS_SECONDS)
