"""Many operations at speed, and what the server's memory, handles and disk do meanwhile.

    python -m service.soak [--minutes 10] [--tenants 8] [--model tiny]

Each tenant begins a run, takes 200 small steps with snapshots and samples in between, saves over one checkpoint now and
then, ends its session, and begins anew. Every 15 seconds: operations so far, resident memory and open files of the
engine's process and of the one that computes, and bytes on disk. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from service import programs
from service.clients import connect, make_datum, model_of, value
from service.models import MODELS, make_model

STEPS_A_SESSION, TOKENS, SECONDS = 200, 32, 15.0
PROCESSES = {"engine": "ray::ServeReplica:twinkle:engine", "rank": "ray::Rank"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(given.model, Path(directory))
        with programs.server(path, Path(directory)) as served:
            soak(served, Path(directory), given.tenants, given.minutes)


def soak(served: programs.Served, directory: Path, tenants: int, minutes: float) -> None:
    done: Counter[str] = Counter()
    over = threading.Event()
    threads = [
        threading.Thread(target=live, args=(served.base_url, number, done, over)) for number in range(tenants)
    ]
    for thread in threads:
        thread.start()
    print(
        "| minutes | operations | engine MB | files | rank MB | files | disk MB | of it journal, live, checkpoints |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    began = time.monotonic()
    pids = {name: programs.process_of(served.pid, command) for name, command in PROCESSES.items()}
    while time.monotonic() - began < 60 * minutes:
        time.sleep(SECONDS)
        cells = [f"{(time.monotonic() - began) / 60:.1f}", f"{done.total():,}"]
        for pid in pids.values():
            cells += [f"{resident_bytes(pid) / 1e6:.0f}", str(len(list(Path(f"/proc/{pid}/fd").iterdir())))]
        parts = [disk_bytes(directory, name) for name in ("journal", "runs", "checkpoints")]
        cells += [f"{disk_bytes(directory) / 1e6:.1f}"]
        cells += [", ".join(f"{size / 1e6:.1f}" for size in parts)]
        print("| " + " | ".join(cells) + " |", flush=True)
    over.set()
    for thread in threads:
        thread.join()
    print(f"\n{dict(done)}")


def live(base_url: str, number: int, done: Counter[str], over: threading.Event) -> None:
    """One tenant: session after session."""
    while not over.is_set():
        tenant = connect("native", base_url, f"tml-{number}")
        types = tenant.types
        client = tenant.service.create_lora_training_client(base_model=model_of(tenant), rank=8, seed=number)
        tokens = np.random.default_rng(number).integers(0, 512, TOKENS + 1)
        batch = [make_datum(types, tokens, "cross_entropy")]
        prompt = types.ModelInput.from_ints(tokens[:8].tolist())
        for step in range(STEPS_A_SESSION):
            passed = client.forward_backward(batch, "cross_entropy")
            stepped = client.optim_step(types.AdamParams(learning_rate=1e-4))
            passed.result()
            stepped.result()
            done.update(("forward_backward", "optim_step"))
            if step % 20 == 19:
                sampler = value(client.save_weights_and_get_sampling_client())
                value(
                    sampler.sample(prompt, num_samples=2, sampling_params=types.SamplingParams(max_tokens=4))
                )
                done.update(("save_weights_for_sampler", "sample"))
            if step % 50 == 49:
                value(client.save_state("soak", overwrite=True))
                done.update(("save_weights",))
            if over.is_set():
                break
        tenant.close()
        done.update(("session",))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def disk_bytes(directory: Path, name: str | None = None) -> int:
    """Of all files in the server's storage, or of those below the folders of that name."""
    total = 0
    for folder, _, files in os.walk(directory):  # goes on where something has just been deleted
        if "storage-" in folder and (name is None or name in Path(folder).parts):
            for file in files:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, file)).st_size
    return total


if __name__ == "__main__":
    main()
