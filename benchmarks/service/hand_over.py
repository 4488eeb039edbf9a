"""How long new weights take to be sampled from: from the answer to optim_step to the first token drawn with them.

    python -m service.hand_over [--model smollm2-135m] [--rank 32] [--rounds 12]

Two servers of one model are measured by turns: one whose trainer samples itself, and one whose sampler has a process of
its own. Prints medians in milliseconds, and the bytes of an adapter, which its hand-over moves:

    published      optim_step's answer -> `save_weights_and_get_sampling_client` has returned
    first_token    optim_step's answer -> a sample of one token after a prompt of eight
    warm_token     the same sample again, with nothing to hand over
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from service import programs
from service.models import MODELS, make_model
from twinkle.protocol.types import Datum, ModelInput, SamplingParams
from twinkle_client import ServiceClient

LAYOUTS: dict[str, dict[str, Any]] = {"beside training": {}, "of its own": {"replicas": 1}}
PROMPT = list(range(1, 9))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.hand_over", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    seconds: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = make_model(given.model, Path(directory))
        runs: dict[str, Any] = {}
        for layout, sampler in LAYOUTS.items():
            served = stack.enter_context(programs.server(path, Path(directory), sampler=sampler))
            service = stack.enter_context(ServiceClient(served.base_url, api_key="bench"))
            runs[layout] = service.create_lora_training_client(f"{path}", rank=given.rank, seed=1)
        for round_number in range(given.rounds + 2):
            for layout, run in runs.items():
                for name, taken in measure(run).items():
                    if round_number >= 2:  # the first are slower
                        seconds[layout][name].append(taken)
        saved = runs["beside training"].save_weights_for_sampler("last").result().path.rpartition("/")[2]
        [weights] = Path(directory).glob(f"storage-*/checkpoints/*/*/{saved}/adapter_model.safetensors")
        figures = {
            layout: {name: round(1000 * statistics.median(taken), 1) for name, taken in named.items()}
            for layout, named in seconds.items()
        }
        print(json.dumps({"adapter_bytes": weights.stat().st_size, **figures}, indent=1))


def measure(run: Any) -> dict[str, float]:
    """One step, and what comes after it, in seconds."""
    tokens = np.arange(1, 17)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
    datum = Datum(ModelInput.from_ints(tokens[:-1]), inputs)
    run.forward_backward([datum]).result()
    run.optim_step(learning_rate=1e-4).result()
    stepped = time.perf_counter()
    sampler = run.save_weights_and_get_sampling_client()
    published = time.perf_counter()
    params = SamplingParams(max_tokens=1, temperature=0)
    sampler.sample(PROMPT, 1, params).result()
    drawn = time.perf_counter()
    sampler.sample(PROMPT, 1, params).result()
    again = time.perf_counter()
    return {
        "published": published - stepped,
        "first_token": drawn - stepped,
        "warm_token": again - drawn,
    }


if __name__ == "__main__":
    main()
