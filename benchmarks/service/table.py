"""The service against bare loops, as a table: every figure a ratio of one run, the median over rounds.

    python -m service.table [--rounds 5] [--model tiny] [--short] [--out FILE]

Each round measures every program once, one after the other, so that other load on the machine weighs on all alike.
Server, clients and bare loops share the machine's cores, as they would on a laptop; the bare loops have all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from service.models import MODELS, make_model
from service.programs import bare, load, server

Figures = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        value: of one round's figures.
    """

    name: str
    value: Callable[[Figures], float]
    unit: str = ""


ROWS = (
    Row("8 tenants x (4 x 128), SDK / bare loop of 32 x 128", lambda f: f["sdk 8x4x128"] / f["bare 32x128"]),
    Row("8 tenants x (4 x 128), native / bare", lambda f: f["native 8x4x128"] / f["bare 32x128"]),
    Row("8 tenants x (1 x 32), SDK", lambda f: f["sdk 8x1x32"], "tokens/s"),
    Row("8 tenants x (1 x 32), SDK / bare loop of 8 x 32", lambda f: f["sdk 8x1x32"] / f["bare 8x32"]),
    Row("8 tenants x (1 x 32), native / SDK", lambda f: f["native 8x1x32"] / f["sdk 8x1x32"]),
    Row(
        "64 tenants x (4 x 128) / 1 tenant x (256 x 128), SDK",
        lambda f: f["sdk 64x4x128"] / f["sdk 1x256x128"],
    ),
    Row("64 tenants / 1 tenant, native", lambda f: f["native 64x4x128"] / f["native 1x256x128"]),
    Row("ragged lengths / fixed, 8 tenants x 4, SDK", lambda f: f["sdk ragged"] / f["sdk 8x4x128"]),
    Row("sampling, 32 in flight, 8 adapters, SDK / padded generate", lambda f: f["sample 8"] / f["generate"]),
    Row("sampling, 8 adapters, native / padded generate", lambda f: f["native sample 8"] / f["generate"]),
    Row("sampling, 1 adapter / 8 adapters, native", lambda f: f["native sample 1"] / f["native sample 8"]),
    Row("empty step (1 x 1 token), SDK", lambda f: f["sdk empty ms"], "ms"),
    Row("empty step, SDK / empty request of uvicorn", lambda f: f["sdk empty ms"] / f["request ms"]),
    Row("empty step, native / empty request of uvicorn", lambda f: f["native empty ms"] / f["request ms"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--short", action="store_true", help="one round, few steps, without 64 tenants")
    parser.add_argument("--out", type=Path, help="write every round's figures here, as JSON")
    arguments = parser.parse_args()
    rounds = 1 if arguments.short else arguments.rounds
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(arguments.model, Path(directory))
        with server(model, Path(directory)) as served:
            plan = programs(served.base_url, model, arguments.short)
            figures: list[Figures] = []
            for i in range(rounds):
                stops = tqdm(plan.items(), desc=f"round {i + 1} of {rounds}")
                figures.append({name: work() for name, work in stops})
                if arguments.out:
                    arguments.out.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(table(arguments.model, figures, served.ready_seconds))


def programs(base_url: str, model: Path, short: bool) -> dict[str, Callable[[], float]]:
    """What a round measures, by name: tokens a second, or milliseconds where the name ends so.

    What is compared stands together, for a machine is not as fast at all times.
    """
    steps = 8 if short else 20
    requests = 128 if short else 512  # at the end fewer and fewer are in flight
    runs = iter(range(1_000_000))

    def train(client: str, tenants: int, sequences: int, tokens: int, **more: Any) -> dict[str, Any]:
        settings = {"client": client, "tenants": tenants, "sequences": sequences, "tokens": tokens}
        return load("train", base_url, **settings, **{"steps": steps, **more}, key=f"tml-{next(runs)}")

    def speed(*args: Any, **more: Any) -> Callable[[], float]:
        return lambda: train(*args, **more)["tokens_per_second"]

    def sampled(client: str, adapters: int) -> Callable[[], float]:
        return lambda: load(
            "sample", base_url, client=client, adapters=adapters, requests=requests, key=f"tml-{next(runs)}"
        )["tokens_per_second"]

    def bare_speed(kind: str, **settings: Any) -> Callable[[], float]:
        return lambda: bare(kind, model=model, **settings)["tokens_per_second"]

    def empty_step(client: str) -> Callable[[], float]:
        return lambda: train(client, 1, 1, 1, steps=60)["step_ms"]["p50"]

    plan: dict[str, Callable[[], float]] = {
        "bare 32x128": bare_speed("train"),
        "sdk 8x4x128": speed("sdk", 8, 4, 128),
        "sdk ragged": speed("sdk", 8, 4, 128, ragged=True),
        "native 8x4x128": speed("native", 8, 4, 128),
        "bare 8x32": bare_speed("train", sequences=8, tokens=32, repeats=30),
        "sdk 8x1x32": speed("sdk", 8, 1, 32, steps=2 * steps),
        "native 8x1x32": speed("native", 8, 1, 32, steps=2 * steps),
        "request ms": lambda: bare("request")["request_ms"],
        "sdk empty ms": empty_step("sdk"),
        "native empty ms": empty_step("native"),
        "generate": bare_speed("generate", repeats=3),
        "sample 8": sampled("sdk", 8),
        "native sample 8": sampled("native", 8),
        "native sample 1": sampled("native", 1),
    }
    if not short:
        for client in ("sdk", "native"):
            plan[f"{client} 64x4x128"] = speed(client, 64, 4, 128, steps=6)
            plan[f"{client} 1x256x128"] = speed(client, 1, 256, 128, steps=6)
    return plan


def table(model: str, figures: list[Figures], ready_seconds: float) -> str:
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; model {model}; "
        f"{len(figures)} rounds; `{' '.join(['python -m service.table', *sys.argv[1:]])}`",
        "",
        "| work | median | rounds |",
        "|---|---|---|",
    ]
    for row in ROWS:
        try:
            values = [row.value(of_round) for of_round in figures]
        except KeyError:  # not measured in the short form
            continue
        shown = ", ".join(f"{value:.3g}" for value in values)
        lines.append(f"| {row.name} | {statistics.median(values):.3g} {row.unit} | {shown} |")
    lines.append(f'| from the command to "Twinkle listens" | {ready_seconds:.1f} s | |')
    return "\n".join(lines)


if __name__ == "__main__":
    main()
