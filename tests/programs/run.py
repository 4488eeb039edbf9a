"""Runs programs of the Tinker cookbook, unmodified and offline, against a Twinkle server that it starts.

    scripts/hatch run cookbook:run                      all of them
    scripts/hatch run cookbook:run --only chat_sl       one of them (may be repeated)
    scripts/hatch run cookbook:run --list               their names

The programs run in the environment of this script, the server in that of --server-python.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import live_server
import processes
import tiny_model
from recipes import PROGRAMS, Bench

REPOSITORY = Path(__file__).resolve().parents[2]
# prompt_distillation/create_data names this model itself.
MODEL = "Qwen/Qwen3.6-35B-A3B"
SENTENCES = 8
TAIL_LINES = 40


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    ok: bool
    note: str


def main() -> int:
    options = _parse()
    if options.list:
        print("\n".join(PROGRAMS))
        return 0
    if shutil.which(options.server_python) is None:
        print(
            f"{options.server_python} does not exist: `scripts/hatch env create` makes the default environment"
        )
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    processes.adopt_orphans()
    directory = Path(tempfile.mkdtemp(prefix="twinkle-programs-"))
    try:
        return _run_in(directory, options.server_python, options.only or list(PROGRAMS))
    except processes.ProgramFailed as error:
        print(error)
        return 1
    finally:
        left = processes.end_descendants()
        if left:
            print(f"ended what was left running: {left} processes")
        if options.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _run_in(directory: Path, server_python: str, names: list[str]) -> int:
    started = time.monotonic()
    _prepare(directory)
    server = live_server.launch(server_python, MODEL, hub_root=directory, directory=directory)
    print(f"{server.base_url} listens after {time.monotonic() - started:.0f} s", flush=True)
    try:
        bench = Bench(sys.executable, MODEL, directory, _environment(server.base_url, directory))
        outcomes = [_run_one(name, bench) for name in names]
        if not all(outcome.ok for outcome in outcomes):
            _print_tail("server", server.log)
    finally:
        server.stop()
    _print_table(outcomes, time.monotonic() - started)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _prepare(directory: Path) -> None:
    """What the programs find in the directory that they run in.

    The model, which is there under its name: the server takes it as a hub root, and to Transformers the model's name
    is a local directory with a tokenizer. And the sentences of the prompt_distillation recipe, which it reads from a
    path in a checkout of the cookbook: the first few.
    """
    specification = importlib.util.find_spec("tinker_cookbook")
    if specification is None or specification.origin is None:
        raise SystemExit("tinker-cookbook is not installed here: use `scripts/hatch run cookbook:run`")
    cookbook = Path(specification.origin).parent
    recipes = sorted((cookbook / "recipes" / "prompt_distillation").glob("*.py"))
    tiny_model.save(directory / MODEL, [path.read_text(encoding="utf-8") for path in recipes])
    source = Path("example_data", "multilingual.txt")
    sentences = (cookbook / source).read_text(encoding="utf-8").splitlines()[:SENTENCES]
    target = directory / "tinker_cookbook" / source
    target.parent.mkdir(parents=True)
    target.write_text("\n".join(sentences), encoding="utf-8")


def _environment(base_url: str, directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "TINKER_BASE_URL": base_url,
        "TINKER_API_KEY": "tml-cookbook",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _run_one(name: str, bench: Bench) -> Outcome:
    started = time.monotonic()
    try:
        note, ok = PROGRAMS[name](bench), True
    # Whatever a program leaves or does not leave is its result, and no reason not to run the next one.
    except Exception as error:
        note, ok = f"{type(error).__name__}: {error}", False
    outcome = Outcome(name, time.monotonic() - started, ok, note)
    print(f"{name}: {'ok' if ok else 'FAILED'} after {outcome.seconds:.0f} s: {note}", flush=True)
    if not ok:
        _print_tail(name, bench.log_of(name))
    return outcome


def _print_tail(name: str, log: Path) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    print(f"---- end of the log of {name} ----", *lines[-TAIL_LINES:], "----", sep="\n", flush=True)


def _print_table(outcomes: list[Outcome], seconds: float) -> None:
    width = max(len(outcome.name) for outcome in outcomes)
    print()
    for outcome in outcomes:
        state = "ok" if outcome.ok else "FAILED"
        print(f"{outcome.name:{width}}  {outcome.seconds:5.0f} s  {state:6}  {outcome.note}")
    failed = sum(not outcome.ok for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} programs ok, {seconds:.0f} s in all")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=list(PROGRAMS), metavar="NAME", help="run this one"
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--keep", action="store_true", help="keep logs, metrics and the server's storage")
    parser.add_argument(
        "--server-python",
        default=str(REPOSITORY / ".venv" / "bin" / "python"),
        metavar="PYTHON",
        help="of the environment with twinkle-server (default: that of the repository, .venv)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
