"""The first minutes on a device: whether it computes what it should, and how fast; one process, no server, no network.

    python benchmarks/gpu.py --out DIR [--minutes 8] [--toy]

With a GPU it runs there; otherwise, with `--toy`, on the CPU with tiny models, which is how the program itself is
tested. What is found is in `DIR/report.json` and `DIR/report.md`, written after each line, so that a run that is cut
off has left what it had. Parts that fail are reported, and the others go on; those for which there is no time any more
say so. The exit status is 1 if a part has failed. If the time is over and a part hangs, the process ends, and
`DIR/stacks.txt` says where it was.

    checks      the backends' contract suite and the sampler against trainer and whole model, in float32 and bfloat16;
                where the host waits for the device; what happens when memory runs out
    training    random weights in the shapes of published models: tokens/s and MFU (`on_gpu/reckoning.py` has the
                formula) of steps of 1, 8 and 32 tenants, and the time by class of kernel
    sampling    tokens/s of 64 and 256 sequences with 1 and 8 adapters beside the roofline; hand-over of new weights

What is measured is this source tree. Nothing of it need be installed, nor any web server, database or Ray: torch,
transformers, numpy, safetensors, tokenizers, pydantic, protobuf and jinja2 are enough.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# After this folder, and before whatever is installed.
sys.path[1:1] = [str(_ROOT / "packages" / name / "src") for name in ("twinkle-core", "twinkle-server")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from on_gpu import checks, device, memory, sampling, syncs, training  # noqa: E402
from on_gpu.models import SHAPES, Made, config_of, make  # noqa: E402
from on_gpu.reckoning import Work  # noqa: E402
from on_gpu.report import Part, Report  # noqa: E402

from twinkle.server.samplers.transformers import TransformersEngine  # noqa: E402

RANK = 32
# For a line of decoding; and for the drill, the last part, since a device on which it goes wrong may be of no more use.
_DECODE_SECONDS = 15
_DRILL_SECONDS = 45


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is measured."""

    made: Made
    work: Work
    trainer: training.Trainer
    ceiling: device.Ceiling


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found; made if missing")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default: 8)")
    parser.add_argument("--toy", action="store_true", help="tiny models, for a CPU")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.toy:
        parser.error("torch sees no GPU here; with --toy tiny models run on the CPU")
    where = torch.device("cuda:0" if on_gpu else "cpu")
    facts = {"commit": _commit(), "command": " ".join(sys.argv), **device.facts(where)}
    report = Report(arguments.out, 0.95 * arguments.minutes, facts)
    with (arguments.out / "stacks.txt").open("w", encoding="utf-8") as stacks:
        faulthandler.dump_traceback_later(60 * arguments.minutes, exit=True, file=stacks)
        _run(report, where, arguments.toy)
        faulthandler.cancel_dump_traceback_later()
    for name in report.failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if report.failed else 0


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True
        )
    except OSError:  # there is no git
        return "unknown"
    return found.stdout.strip() or "unknown"


def _run(report: Report, where: torch.device, is_toy: bool) -> None:
    ceiling = _measure_ceiling(report, where, is_toy)
    for dtype in ("float32", "bfloat16"):
        report.do(f"contract, {dtype}", _bound(checks.check_contract, report, where, dtype), needs_seconds=5)
    for dtype in ("float32", "bfloat16"):
        for name in ("Qwen3-4B", "Qwen3.5-4B"):
            work = _bound(checks.check_sampler, report, name, where, dtype)
            report.do(f"sampler, {name.partition('-')[0]}, {dtype}", work, needs_seconds=5)
    report.do("waits for the device", _bound(syncs.find_syncs, report, where), needs_seconds=5)
    for i, name in enumerate(SHAPES):
        seconds = (report.seconds_left - _DRILL_SECONDS) / (len(SHAPES) - i)
        _measure_model(report, name, where, ceiling, is_toy, seconds)
    report.do("out of memory", _bound(memory.drill, report, where), needs_seconds=20)


def _bound(work: Callable[..., None], report: Report, *arguments: Any) -> Callable[[Part], None]:
    return lambda part: work(report, part, *arguments)


def _measure_ceiling(report: Report, where: torch.device, is_toy: bool) -> device.Ceiling:
    """What shares are shares of; where it can't be measured, nothing."""
    found = [device.Ceiling(float("nan"), float("nan"), None)]

    def measure(part: Part) -> None:
        found.append(device.ceiling(where, is_toy))
        peak = found[-1].peak
        report.add(
            part,
            {
                "product, TFLOP/s": found[-1].flops / 1e12,
                "data sheet, TFLOP/s": None if peak is None else peak.flops / 1e12,
                "copy, TB/s": found[-1].bandwidth / 1e12,
                "data sheet, TB/s": None if peak is None else peak.bandwidth / 1e12,
            },
        )

    report.do("plain product and copy, bfloat16", measure)
    return found[-1]


def _measure_model(
    report: Report, name: str, where: torch.device, ceiling: device.Ceiling, is_toy: bool, seconds: float
) -> None:
    """The parts about one model, in so many seconds."""
    ends = report.seconds_left - seconds
    cases = training.TOY_CASES if is_toy else training.CASES
    few = [case for case in cases if case.tenants <= sampling.MOST_ADAPTERS]
    with ExitStack() as stack:
        found: list[Subject] = []
        report.do(
            f"{name}: model",
            lambda part: found.append(_begin(report, part, stack, name, where, ceiling, is_toy)),
            needs_seconds=20,
        )
        if not found:
            return
        [subject] = found

        def train(some: list[training.Case]) -> Callable[[Part], None]:
            def work(part: Part) -> None:
                for case in some:
                    left = report.seconds_left - ends
                    report.attempt(
                        part, str(case), partial(subject.trainer.measure, report, part, case, left)
                    )

            return work

        report.do(f"{name}: training", train(few), needs_seconds=10)
        profile = _bound(subject.trainer.profile, report, cases[0])
        report.do(f"{name}: training, time by kernel", profile, needs_seconds=10)
        _measure_sampling(report, name, subject, is_toy, ends)
        report.do(f"{name}: training, many tenants", train(cases[len(few) :]), needs_seconds=10)


def _begin(
    report: Report,
    part: Part,
    stack: ExitStack,
    name: str,
    where: torch.device,
    ceiling: device.Ceiling,
    is_toy: bool,
) -> Subject:
    made = make(stack, config_of(name, is_toy), where, "bfloat16")
    backend = made.backend()
    stack.callback(backend.close)
    work = Work.of(made.loaded.model)
    trainer = training.Trainer(backend, work, ceiling, 4 if is_toy else RANK)
    trainer.need_adapters(1)
    row = {
        "weights a token meets": work.weights,
        "numbers of an adapter": trainer.adapter_numbers,
        "rank": 4 if is_toy else RANK,
        "tokens in a micro-batch": backend.info.max_batch_tokens,
    }
    report.add(part, row)
    part.notes += backend.info.notes
    return Subject(made, work, trainer, ceiling)


def _measure_sampling(report: Report, name: str, subject: Subject, is_toy: bool, ends: float) -> None:
    """
    Args:
        ends: what the report has left when this model's time is over.
    """
    with ExitStack() as stack:
        found: list[sampling.Sampler] = []

        def hand_over(part: Part) -> None:
            engine = TransformersEngine(subject.made.loaded, subject.made.config)
            stack.callback(engine.close)
            found.append(sampling.Sampler(engine, subject.trainer, subject.work, subject.ceiling))
            found[0].hand_over(report, part, times=3)

        def decode(part: Part) -> None:
            lengths = sampling.TOY_LENGTHS if is_toy else sampling.LENGTHS
            for sequences in (8, 16) if is_toy else (64, 256):
                for adapters in (1, sampling.MOST_ADAPTERS):
                    if report.seconds_left - ends < _DECODE_SECONDS:
                        part.notes.append(
                            f"{sequences} sequences, {adapters} adapters: left out for lack of time"
                        )
                        continue
                    line = partial(found[0].decode, report, part, sequences, adapters, lengths)
                    report.attempt(part, f"{sequences} sequences, {adapters} adapters", line)

        report.do(f"{name}: hand-over", hand_over, needs_seconds=10)
        if found:
            report.do(f"{name}: decoding", decode, needs_seconds=20)


if __name__ == "__main__":
    sys.exit(main())
