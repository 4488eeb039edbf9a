"""`twinkle-server`: start a server, check its configuration, or say who may use it."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
import yaml
from pydantic import BaseModel

from twinkle.protocol.errors import TwinkleError
from twinkle.server._version import __version__
from twinkle.server.config import ServerConfig, load_config
from twinkle.server.store.private import private_directory

if TYPE_CHECKING:
    from twinkle.server.plan import Plan
    from twinkle.server.store.database import Database

app = typer.Typer(
    name="twinkle-server",
    help="Training as a service for LoRA: one base model, many tenants' adapters, over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

keys = typer.Typer(
    help="Who may use the server: make, list and revoke API keys, also while it runs.", no_args_is_help=True
)
app.add_typer(keys, name="keys")

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", help="YAML file with at least `model: {model_id: ...}`.", show_default=False
    ),
]


@app.command()
def launch(config: ConfigOption) -> None:
    """Start the server and serve until Ctrl-C; start it again when Ray or its own process has ended."""
    from twinkle.server.serve.launch import TwinkleServer  # what no other command needs

    TwinkleServer.from_config(config).run()


@app.command(name="check-config")
def check_config(
    config: ConfigOption,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Look at the file alone: not for the model, GPUs or a free port."),
    ] = False,
) -> None:
    """Check a configuration and show every setting, defaults included, with what it means.

    Then plan what `launch` would start on this machine, and make its checks: one fault a line, exit code 1.
    """
    loaded = load_config(config)
    print(describe(loaded), end="")
    if offline:
        return
    from twinkle.server.plan import make_plan
    from twinkle.server.serve.launch import checks

    faults: list[str] = []
    for check in [*checks(loaded), lambda: _print_plan(make_plan(loaded))]:
        try:
            check()
        except TwinkleError as error:
            faults.append(error.message)
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def _print_plan(plan: Plan) -> None:
    """As comments, so that all that is printed is YAML."""
    print("\n".join(f"# {line}" for line in plan.describe()))


@keys.command(name="create")
def create_key(
    config: ConfigOption,
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose key it is. Keys of one tenant see the same runs; default: a new tenant."),
    ] = None,
    role: Annotated[
        Literal["user", "admin"],
        typer.Option(help="An admin sees usage, storage and the audit log of all tenants."),
    ] = "user",
    label: Annotated[str | None, typer.Option(help="To tell it from others in the list.")] = None,
) -> None:
    """Make a key and print it. It is shown this once: the server keeps only its hash.

    A running server that checks keys takes it at once; one in open mode has to be started again.
    """
    from twinkle.server.keys import create_key

    with _database(config) as database:
        row, key = create_key(database, tenant, role, label)
    print(f"Key {row.id} of tenant {row.tenant}. It is not shown again:", file=sys.stderr)
    print(key)


@keys.command(name="list")
def list_keys(config: ConfigOption) -> None:
    """List all keys that were ever made, revoked ones too: id, tenant, role, times, label."""
    with _database(config) as database:
        rows = database.keys()
    table = [("ID", "TENANT", "ROLE", "CREATED", "REVOKED", "LABEL")]
    table += [
        (str(row.id), row.tenant, row.role, _day(row.created_at), _day(row.revoked_at), row.label or "")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@keys.command(name="revoke")
def revoke_key(
    key_id: Annotated[int, typer.Argument(metavar="ID", help="As `keys list` shows it.", show_default=False)],
    config: ConfigOption,
) -> None:
    """Revoke a key, and the tokens that were given for it. A running server knows within seconds."""
    from twinkle.server.keys import revoke_key

    with _database(config) as database:
        row = revoke_key(database, key_id)
        left = database.keys(valid_only=True)
    print(f"Key {row.id} of tenant {row.tenant} is revoked.")
    if not left:
        print(
            "That was the last one: nobody is let in until another is made (or `auth: {mode: open}` is in the "
            "configuration).",
            file=sys.stderr,
        )


@contextmanager
def _database(path: Path) -> Generator[Database]:
    from twinkle.server.store.database import Database  # imports sqlalchemy, which takes a moment

    storage = load_config(path).storage
    private_directory(storage.directory)
    database = Database(storage.url)
    try:
        yield database
    finally:
        database.close()


def _day(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def describe(config: ServerConfig) -> str:
    """The configuration as YAML, each key with its meaning as a comment."""
    lines: list[str] = []
    values: dict[str, dict[str, object]] = config.model_dump(mode="json")
    for name in ServerConfig.model_fields:
        section = cast(type[BaseModel], getattr(config, name).__class__)
        lines.append(f"{name}:  # {(section.__doc__ or '').strip()}")
        for key, field in section.model_fields.items():
            value = _without_password(values[name][key])
            shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {key}: {shown}  # {' '.join((field.description or '').split())}")
    return "\n".join(lines) + "\n"


def _without_password(value: object) -> object:
    """What is printed gets into logs; the password of a URL doesn't."""
    return re.sub(r"(://[^/@:]*:)[^/@]*@", r"\1***@", value) if isinstance(value, str) else value


def main() -> None:
    """Run the command line; errors meant for people are printed without a traceback, with exit code 1."""
    try:
        app()
    except TwinkleError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        sys.exit(1)
