"""`twinkle-server models`: which base models a running server has, and in how many engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import yaml

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.cli_common import ConfigOption, open_database, print_table
from twinkle.server.config import ModelEntry, load_config, parse_config

if TYPE_CHECKING:
    from twinkle.server.store.database import Database
    from twinkle.server.store.tables import Engine

models = typer.Typer(
    help="The base models of a server whose file has a list `models`: list, add, drain and remove engines while it "
    "runs.",
    no_args_is_help=True,
)

Named = Annotated[
    str,
    typer.Argument(
        metavar="ENGINE|MODEL", help="An engine, as `models list` shows it, or a model.", show_default=False
    ),
]
WaitOption = Annotated[bool, typer.Option(help="Wait until it is done, and say how it goes.")]


@models.command(name="list")
def list_engines(config: ConfigOption) -> None:
    """List the engines: name, model, state, number of training runs, and what went wrong."""
    from twinkle.server.serve.models_command import listed

    loaded = load_config(config)
    with open_database(loaded) as database:
        rows = listed(loaded, database)
    table = [("ENGINE", "MODEL", "STATE", "RUNS", "IN FILE", "MESSAGE")]
    table += [
        (
            row.name,
            row.base_model,
            row.state,
            str(row.runs),
            "no" if row.is_added else "yes",
            f"its runs are in {row.moved_to}" if row.moved_to else row.message,
        )
        for row in rows
    ]
    print_table(table)


@models.command(name="add")
def add_model(
    model_id: Annotated[str, typer.Argument(help="As `model_id` in the file.", show_default=False)],
    config: ConfigOption,
    replicas: Annotated[int, typer.Option(min=1, help="Engines to start.")] = 1,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each; needed on a server that has some.")
    ] = None,
    settings: Annotated[
        str,
        typer.Option(help="Further keys of an entry of `models`, as YAML: '{max_lora_rank: 64}'."),
    ] = "{}",
    wait: WaitOption = True,
) -> None:
    """Start engines with a model, one that the server has or a new one. The others go on meanwhile.

    They are started again with the server until they are removed: they need not be in its file.
    """
    from twinkle.server.serve.models_command import add

    loaded = load_config(config)
    entry = _entry(model_id, replicas, num_gpus, settings)
    with open_database(loaded) as database:
        rows = add(loaded, database, entry)
        print(f"Engines to start: {', '.join(row.name for row in rows)}.")
        if wait:
            _wait(database, rows, ["running"])


def _entry(model_id: str, replicas: int, num_gpus: int | None, settings: str) -> ModelEntry:
    try:
        more = yaml.safe_load(settings)
        if not isinstance(more, dict):
            raise InvalidRequest("--settings: must be a YAML mapping, such as '{max_lora_rank: 64}'")
    except yaml.YAMLError as error:
        raise InvalidRequest(f"--settings: not YAML ({error})") from error
    keys = cast("dict[str, Any]", more)
    given = {"model_id": model_id, "replicas": replicas, **({"num_gpus": num_gpus} if num_gpus else {})}
    [entry] = parse_config({"models": [{**keys, **given}]}, where="--settings").models
    return entry


@models.command(name="drain")
def drain(named: Named, config: ConfigOption, wait: WaitOption = True) -> None:
    """Give an engine's runs to the others with its model, and stop it. No client notices more than a moment's pause.

    Without another engine it takes no new runs, and stops when those that it has are over.
    """
    _end(named, config, "drain", wait)


@models.command(name="remove")
def remove(named: Named, config: ConfigOption, wait: WaitOption = True) -> None:
    """Stop an engine, or all engines of a model. Runs go to others with the model; without any they are kept, and go on
    when the model is added again.

    One that the server's file lists comes back when the server is started anew.
    """
    _end(named, config, "remove", wait)


def _end(named: str, config: ConfigOption, wanted: str, wait: bool) -> None:
    from twinkle.server.serve.models_command import set_wanted

    loaded = load_config(config)
    with open_database(loaded) as database:
        rows = set_wanted(loaded, database, named, wanted)
        if wait:
            _wait(database, rows, ["stopped"])


def _wait(database: Database, rows: Sequence[Engine], states: Sequence[str]) -> None:
    from twinkle.server.serve.models_command import wait

    def show(row: Engine) -> None:
        print(f"{row.name} ({row.base_model}): {row.state}{': ' * bool(row.message)}{row.message}")
        sys.stdout.flush()

    wait(database, rows, states, show)
