"""`twinkle`: commands for a client's machine, which need no server. (The server's command is `twinkle-server`.)"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from twinkle._version import __version__
from twinkle.merge import merge
from twinkle.protocol.errors import NotFound, TwinkleError
from twinkle.runs.plot import plot_runs
from twinkle.runs.records import METRICS, STATE, read_metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors meant for people are printed without a traceback, with exit code 1."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except TwinkleError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twinkle", description="Look at training runs on this machine.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    runs = commands.add_parser("runs", help="training runs: list, show, plot").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )

    listed = runs.add_parser("list", help="all runs of a folder, newest last, with their last metrics")
    listed.add_argument(
        "root", nargs="?", type=Path, default=Path("runs"), help="folder of runs (%(default)s)"
    )
    listed.set_defaults(run=_list)

    shown = runs.add_parser("show", help="the metrics of a run, step by step")
    shown.add_argument("directory", type=Path, help="folder of the run")
    shown.add_argument(
        "--last", type=int, default=20, metavar="N", help="only the last N steps (%(default)s)"
    )
    shown.set_defaults(run=_show)

    plotted = runs.add_parser("plot", help="draw the curves of one or several runs to a PNG")
    plotted.add_argument("directories", nargs="+", type=Path, metavar="directory", help="folder of a run")
    plotted.add_argument("-o", "--output", type=Path, default=Path("runs.png"), help="picture (%(default)s)")
    plotted.add_argument("--metrics", help="names, with commas between them (all)")
    plotted.add_argument(
        "--smoothing", type=float, default=0.0, help="0 is none, towards 1 more (%(default)s)"
    )
    plotted.set_defaults(run=_plot)
    checkpoints = commands.add_parser("checkpoints", help="downloaded checkpoints: merge").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    merged = checkpoints.add_parser("merge", help="write the base model with an adapter added to its weights")
    merged.add_argument("base", type=Path, help="folder of the base model: config.json and safetensors")
    merged.add_argument("adapter", type=Path, help='folder of a downloaded checkpoint, layout "peft"')
    merged.add_argument("target", type=Path, help="folder to write, which isn't there yet")
    merged.set_defaults(run=_merge)
    return parser


def _merge(args: argparse.Namespace) -> None:
    print(merge(args.base, args.adapter, args.target))


def _list(args: argparse.Namespace) -> None:
    folders = sorted(args.root.glob(f"*/{METRICS}"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise NotFound(f"{args.root}: no runs there; give the folder that holds them")
    for path in folders:
        rows = read_metrics(path)
        last = rows[-1] if rows else {"step": 0}
        state = "can be resumed" if (path.parent / STATE).is_file() else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        print(f"{path.parent}  {when}  step {last['step']}  {_numbers(last)}  {state}".rstrip())


def _show(args: argparse.Namespace) -> None:
    for row in read_metrics(args.directory)[-args.last :]:
        print(f"step {row['step']}  {_numbers(row)}")


def _plot(args: argparse.Namespace) -> None:
    metrics = args.metrics.split(",") if args.metrics else None
    print(plot_runs(args.directories, args.output, metrics=metrics, smoothing=args.smoothing))


def _numbers(row: Mapping[str, float | None]) -> str:
    shown = {name: value for name, value in row.items() if name not in ("step", "time")}
    return "  ".join(f"{name} {'nan' if value is None else f'{value:.4g}'}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
