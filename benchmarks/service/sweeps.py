"""How a step's time grows: with tenants, with idle adapters, with the length of sequences, with requests that are past.

    python -m service.sweeps [tenants] [adapters] [context] [requests] [--model tiny]

Each sweep is one run against one server, through the native client, and prints a table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from service.clients import connect, make_run, model_of, stepper
from service.load import in_parallel, percentiles, random_batch, timed
from service.models import MODELS, make_model
from service.programs import load, server

# In all, in a step of the sweeps over tenants and context.
TOKENS = 8192
CHUNK = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.sweeps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], help="all of them if none is named")
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(arguments.model, Path(directory))
        for name in arguments.sweeps or SWEEPS:
            with server(model, Path(directory)) as served:
                rows = list(tqdm(SWEEPS[name](served.base_url), desc=name))
            columns = list(rows[0])
            print(f"\n{name}, model {arguments.model}\n\n| {' | '.join(columns)} |")
            print("|" + "---|" * len(columns))
            for row in rows:
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


def tenants(base_url: str) -> Iterator[dict[str, Any]]:
    """The same tokens, from 1 to 64 tenants."""
    for count in (1, 2, 4, 8, 16, 32, 64):
        figures = load(
            "train",
            base_url,
            client="native",
            tenants=count,
            sequences=TOKENS // 128 // count,
            tokens=128,
            steps=8,
            key=f"tml-tenants-{count}",
        )
        yield {"tenants": count, "tokens/s": figures["tokens_per_second"], **step_columns(figures["step_ms"])}


def context(base_url: str) -> Iterator[dict[str, Any]]:
    """The same tokens, in sequences of 128 to 8192."""
    for length in (128, 512, 2048, 8192):
        figures = load(
            "train",
            base_url,
            client="native",
            tenants=1,
            sequences=TOKENS // length,
            tokens=length - 1,
            steps=4,
            warm_up=1,
            key=f"tml-context-{length}",
        )
        yield {"tokens a sequence": length, "tokens/s": figures["tokens_per_second"]}


def adapters(base_url: str) -> Iterator[dict[str, Any]]:
    """One tenant's steps of 4 x 128 while up to 512 adapters are idle."""
    tenant = connect("native", base_url, "tml-idle")
    model = model_of(tenant)
    own = make_run(tenant, model, rank=8, seed=0)
    step = stepper(tenant, own, random_batch(tenant, 0, 4, 128, False, 512, "cross_entropy"), "cross_entropy")
    made = 1
    for count in (1, 64, 128, 256, 512):
        while made < count:
            more = min(CHUNK, count - made)
            in_parallel(more, lambda i: make_run(tenant, model, rank=8, seed=i))
            made += more
        timed(step, 3)
        yield {"adapters": count, **step_columns(percentiles(timed(step, 20)))}
    tenant.close()


def requests(base_url: str) -> Iterator[dict[str, Any]]:
    """One tenant's steps of 1 x 8, up to 10,000 requests."""
    tenant = connect("native", base_url, "tml-past")
    run = make_run(tenant, model_of(tenant), rank=8, seed=0)
    batch = random_batch(tenant, 0, 1, 8, False, 512, "cross_entropy")
    step = stepper(tenant, run, batch, "cross_entropy")
    timed(step, 20)
    for past in (0, 2500, 5000, 7500, 10_000):
        yield {"requests before": past, **step_columns(percentiles(timed(step, 50)))}
        timed(step, 1200)
    tenant.close()


def step_columns(step_ms: dict[str, float]) -> dict[str, float]:
    return {"step p50, ms": step_ms["p50"], "p95": step_ms["p95"]}


SWEEPS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    "tenants": tenants,
    "adapters": adapters,
    "context": context,
    "requests": requests,
}


if __name__ == "__main__":
    main()
