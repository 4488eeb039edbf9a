"""Load on any server of the Tinker protocol, through Tinker's SDK or through the native client. Prints JSON.

    python -m service.load train  --base-url http://127.0.0.1:8000 --client sdk --tenants 8 --sequences 4 --tokens 128
    python -m service.load sample --base-url http://127.0.0.1:8000 --requests 64 --in-flight 32 --adapters 8

Every tenant has a key, a client and a thread of its own, and sends its next step when it has the results of the last.
Sequences are random tokens, so that the speed is of the server and not of the data.

    tokens_per_second    of all tenants, over the time from the first counted step to the last
    step_ms              median, and the 95th percentile, of a tenant's step as the tenant sees it
    client_cpu_ms        of this process, per step (or request)
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from service.clients import CLIENTS, LOSS_FNS, Tenant, connect, make_datum, make_run, model_of, stepper, value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    train_arguments(kinds.add_parser("train", help="training steps of many tenants"))
    sample_arguments(kinds.add_parser("sample", help="samples of many adapters"))
    arguments = vars(parser.parse_args())
    kind = {"train": train, "sample": sample}[arguments.pop("kind")]
    print(json.dumps({"settings": arguments, **kind(**arguments)}, indent=2))


def common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--client", choices=CLIENTS, default="sdk")
    parser.add_argument("--key", default="tml-bench", help="beginning of the tenants' API keys")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--vocab-size", type=int, default=512, help="token ids are drawn below it")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4, help="of each tenant in a step")
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence")
    parser.add_argument("--ragged", action="store_true", help="lengths from a quarter of --tokens up to it")
    parser.add_argument("--steps", type=int, default=20, help="of each tenant, counted")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those that count")
    parser.add_argument("--loss", choices=LOSS_FNS, default="cross_entropy")


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8, help="0 samples the base model")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="drawn for each request")


# ---------------------------------------------------------------- training


def train(
    base_url: str,
    client: str,
    key: str,
    rank: int,
    vocab_size: int,
    tenants: int,
    sequences: int,
    tokens: int,
    ragged: bool,
    steps: int,
    warm_up: int,
    loss: str,
) -> dict[str, Any]:
    """Steps of all tenants at once; what comes out is described at the top of the module."""
    everyone = in_parallel(tenants, lambda i: connect(client, base_url, f"{key}-{i}"))
    model = model_of(everyone[0])
    batches = [
        random_batch(t, i, sequences, tokens, ragged, vocab_size, loss) for i, t in enumerate(everyone)
    ]
    clients = in_parallel(tenants, lambda i: make_run(everyone[i], model, rank, seed=i))
    steppers = [stepper(t, c, b, loss) for t, c, b in zip(everyone, clients, batches, strict=True)]
    for _ in range(warm_up):
        in_parallel(tenants, lambda i: steppers[i]())
    began, cpu = time.perf_counter(), time.process_time()
    times = in_parallel(tenants, lambda i: timed(steppers[i], steps))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    in_parallel(tenants, lambda i: everyone[i].close())
    real = sum(datum.model_input.length for batch in batches for datum in batch)
    return {
        "tokens_per_second": round(real * steps / seconds, 1),
        "tokens_a_step_of_all": real,
        "step_ms": percentiles([step for tenant in times for step in tenant]),
        "client_cpu_ms": round(1000 * cpu / (tenants * steps), 2),
        "seconds": round(seconds, 2),
    }


def random_batch(
    tenant: Tenant, seed: int, sequences: int, tokens: int, ragged: bool, vocab_size: int, loss: str
) -> list[Any]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(max(1, tokens // 4), tokens + 1, sequences) if ragged else [tokens] * sequences
    return [
        make_datum(tenant.types, draw.integers(0, vocab_size, int(length) + 1), loss) for length in lengths
    ]


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each step."""
    seconds: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


# ---------------------------------------------------------------- sampling


def sample(
    base_url: str,
    client: str,
    key: str,
    rank: int,
    vocab_size: int,
    requests: int,
    in_flight: int,
    adapters: int,
    prompt_tokens: int,
    tokens: int,
) -> dict[str, Any]:
    """Requests of one tenant, spread over adapters, so many in flight at a time."""
    tenant = connect(client, base_url, f"{key}-samples")
    model = model_of(tenant)
    samplers = make_samplers(tenant, model, adapters, rank)
    types = tenant.types
    params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
    draw = np.random.default_rng(0)
    prompts = [
        types.ModelInput.from_ints(draw.integers(0, vocab_size, prompt_tokens).tolist())
        for _ in range(requests)
    ]

    def one(i: int) -> tuple[float, int]:
        began = time.perf_counter()
        sampler = samplers[i % len(samplers)]
        response = sampler.sample(prompt=prompts[i], num_samples=1, sampling_params=params).result()
        return time.perf_counter() - began, len(response.sequences[0].tokens)

    in_parallel(in_flight, lambda i: one(i % requests))
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(in_flight) as pool:
        answers = list(pool.map(one, range(requests)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    tenant.close()
    drawn = sum(count for _, count in answers)
    return {
        "tokens_per_second": round(drawn / seconds, 1),
        "tokens_drawn": drawn,
        "request_ms": percentiles([took for took, _ in answers]),
        "client_cpu_ms": round(1000 * cpu / requests, 2),
        "seconds": round(seconds, 2),
    }


def make_samplers(tenant: Tenant, model: str, adapters: int, rank: int) -> list[Any]:
    if not adapters:
        return [value(tenant.service.create_sampling_client(base_model=model))]
    return in_parallel(
        adapters,
        lambda i: value(make_run(tenant, model, rank, seed=i).save_weights_and_get_sampling_client()),
    )


# ---------------------------------------------------------------- both


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(i)` for i below `count`, each in a thread of its own, all started at the same moment."""
    gate = threading.Barrier(count)

    def one(i: int) -> Any:
        gate.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds."""
    ranked = sorted(seconds)
    return {
        "p50": round(1000 * statistics.median(ranked), 2),
        "p95": round(1000 * ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))], 2),
    }


if __name__ == "__main__":
    main()
