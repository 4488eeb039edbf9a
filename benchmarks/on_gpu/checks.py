"""Whether a device computes what it should: the backends' contract, and samples scored in two further ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from on_gpu.models import Made, config_of, make, trained_adapter
from on_gpu.report import Part, Report
from twinkle.protocol.types import Int64Array, SampledSequence, SamplingParams
from twinkle.server.backends import contract
from twinkle.server.backends.protocol import AdapterSpec, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

SPECS = {
    "a": AdapterSpec(rank=4, seed=1),
    "b": AdapterSpec(rank=4, seed=2, train_unembed=False),
    "c": AdapterSpec(rank=16, seed=3),
}
# Between the sampler's log-probabilities and those of whole sequences; in bfloat16 logits of about 1 have 8 bits.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
_TOKENS = 12


def check_contract(report: Report, part: Part, device: torch.device, dtype: str) -> None:
    """The backends' contract, check by check.

    Its bounds are those of float32. In bfloat16 a check that finds other numbers than it expects is reported, but only
    an error of another kind is a failure.
    """
    with ExitStack() as stack:
        made = make(stack, config_of("Qwen3-0.6B", is_toy=True), device, dtype)
        passed = 0
        for check in contract.CHECKS:
            try:
                check(made.backend)
            except AssertionError as error:
                found = f"other numbers: {' '.join(str(error).split())[:200]}"
                if dtype == "float32":
                    part.problems.append(f"{check.__name__}: {found}")
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
                part.problems.append(f"{check.__name__}: {found}")
            else:
                passed += 1
                continue
            report.add(part, {"check": check.__name__, "found": found})
    part.notes.append(f"{passed} of {len(contract.CHECKS)} checks passed")


def check_sampler(report: Report, part: Part, name: str, device: torch.device, dtype: str) -> None:
    """Samples of the base and of three adapters in one batch, prompts of many lengths, greedy and drawn.

    The log-probability of each of their tokens must be the trainer's for the same adapter; of samples of the base, that
    of Transformers' model, whole and without a cache. Greedy tokens must be its likeliest.
    """
    with ExitStack() as stack:
        made = make(stack, config_of(name, is_toy=True), device, dtype)
        backend = made.backend()
        stack.callback(backend.close)
        engine = TransformersEngine(made.loaded, made.config)
        stack.callback(engine.close)
        for adapter, spec in SPECS.items():
            engine.add_adapter(adapter, trained_adapter(backend, adapter, spec))
        asked = list(_requests())
        futures = [engine.generate(request) for request in asked]
        answers = [future.result(timeout=120).sequences for future in futures]
        off: dict[str, float] = {"trainer": 0.0, "whole model": 0.0, "likeliest": 0.0}
        for request, samples in zip(asked, answers, strict=True):
            for sample in samples:
                _compare(made, backend, request, sample, off)
    for other, difference in off.items():
        report.add(part, {"against": other, "largest difference": difference, "allowed": _TOLERANCE[dtype]})
        if not difference <= _TOLERANCE[dtype]:
            part.problems.append(f"{other}: log-probabilities differ by up to {difference:.3g}")


def _requests() -> Iterator[GenerateRequest]:
    draw = np.random.default_rng(0)
    for i in range(12):
        prompt = draw.integers(0, 500, 3 + 11 * i)
        params = SamplingParams(max_tokens=_TOKENS, temperature=float(i % 2), seed=i, stop=[])
        adapter = (None, *SPECS)[i // 2 % 4]
        yield GenerateRequest(f"tenant {i % 3}", adapter, prompt, params, num_samples=1 + i % 3)


def _compare(
    made: Made,
    backend: TransformersBackend,
    request: GenerateRequest,
    sample: SampledSequence,
    off: dict[str, float],
) -> None:
    """Raise the differences in `off` to those of this sample."""
    tokens = np.concatenate([request.prompt, np.array(sample.tokens, np.int64)])
    start = len(request.prompt) - 1
    theirs = np.array(sample.logprobs)
    if request.adapter_id is not None:
        inputs: dict[str, Any] = {
            "target_tokens": tokens[1:],
            "weights": np.ones(len(tokens) - 1, np.float32),
        }
        row = Row(request.adapter_id, tokens[:-1], "cross_entropy", inputs, forward_only=True)
        [[result]] = backend.forward_backward([[row]])
        off["trainer"] = _largest(off["trainer"], result.logprobs[start:] - theirs)
        return
    whole = _of_whole_model(made, tokens[:-1])[start:]
    chosen = whole[np.arange(len(theirs)), sample.tokens]
    off["whole model"] = _largest(off["whole model"], chosen - theirs)
    if request.params.temperature == 0:
        off["likeliest"] = _largest(off["likeliest"], whole.max(1) - chosen)


def _largest(before: float, differences: np.ndarray) -> float:
    """NaN, which every comparison refuses, if any of them is."""
    return float(np.max([before, *np.abs(differences)]))


@torch.inference_mode()
def _of_whole_model(made: Made, tokens: Int64Array) -> np.ndarray:
    """Log-probabilities float32 [tokens, vocabulary] of each next token, of the base."""
    model: Any = made.loaded.model
    logits = model(input_ids=torch.from_numpy(tokens).unsqueeze(0).to(model.device), use_cache=False).logits
    return logits[0].float().log_softmax(-1).cpu().numpy()
