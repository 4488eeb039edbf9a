"""`twinkle-server`: start a server, check its configuration, or say who may use it."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, cast

import typer
import yaml
from pydantic import BaseModel

from twinkle.protocol.errors import TwinkleError
from twinkle.server._version import __version__
from twinkle.server.cli_common import ConfigOption, open_database, print_table
from twinkle.server.cli_models import models
from twinkle.server.config import ModelEntry, ServerConfig, load_config

app = typer.Typer(
    name="twinkle-server",
    help="Training as a service for LoRA: base models, many tenants' adapters, over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

keys = typer.Typer(
    help="Who may use the server: make, list and revoke API keys, also while it runs.", no_args_is_help=True
)
app.add_typer(keys, name="keys")
app.add_typer(models, name="models")


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
    from twinkle.server.serve.launch import checks

    faults: list[str] = []
    for check in [*checks(loaded), lambda: _print_plans(loaded)]:
        try:
            check()
        except TwinkleError as error:
            faults.append(error.message)
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def _print_plans(config: ServerConfig) -> None:
    """As comments, so that all that is printed is YAML."""
    from twinkle.server.backends.hf.kernel_packages import describe_installed
    from twinkle.server.serve.fleet_plan import plan_file

    print(f"# {describe_installed()}")
    for plan in plan_file(config):
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

    with open_database(load_config(config)) as database:
        row, key = create_key(database, tenant, role, label)
    print(f"Key {row.id} of tenant {row.tenant}. It is not shown again:", file=sys.stderr)
    print(key)


@keys.command(name="list")
def list_keys(config: ConfigOption) -> None:
    """List all keys that were ever made, revoked ones too: id, tenant, role, times, label."""
    with open_database(load_config(config)) as database:
        rows = database.keys()
    table = [("ID", "TENANT", "ROLE", "CREATED", "REVOKED", "LABEL")]
    table += [
        (str(row.id), row.tenant, row.role, _day(row.created_at), _day(row.revoked_at), row.label or "")
        for row in rows
    ]
    print_table(table)


@keys.command(name="revoke")
def revoke_key(
    key_id: Annotated[int, typer.Argument(metavar="ID", help="As `keys list` shows it.", show_default=False)],
    config: ConfigOption,
) -> None:
    """Revoke a key, and the tokens that were given for it. A running server knows within seconds."""
    from twinkle.server.keys import revoke_key

    with open_database(load_config(config)) as database:
        row = revoke_key(database, key_id)
        left = database.keys(valid_only=True)
    print(f"Key {row.id} of tenant {row.tenant} is revoked.")
    if not left:
        print(
            "That was the last one: nobody is let in until another is made (or `auth: {mode: open}` is in the "
            "configuration).",
            file=sys.stderr,
        )


def _day(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def describe(config: ServerConfig) -> str:
    """The configuration as YAML, each key with its meaning as a comment."""
    lines: list[str] = []
    values: dict[str, Any] = config.model_dump(mode="json")
    for name in ServerConfig.model_fields:
        if name == "models":
            lines += _describe_models(config)
        elif name != "model" or not config.models:
            section = cast(type[BaseModel], getattr(config, name).__class__)
            lines.append(f"{name}:  # {_words(section.__doc__)}")
            lines += _describe_keys(section, values[name], "  ")
    return "\n".join(lines) + "\n"


def _describe_models(config: ServerConfig) -> list[str]:
    """What the keys mean is said once."""
    if not config.models:
        return [
            "models: []  # Instead of `model`, for several base models: a list of entries with its keys, and more."
        ]
    lines = [f"models:  # {_words(ModelEntry.__doc__)}"]
    for number, entry in enumerate(config.models):
        first, *rest = _describe_keys(
            ModelEntry, entry.model_dump(mode="json"), "    ", with_words=not number
        )
        lines += ["  - " + first.lstrip(), *rest]
    return lines


def _describe_keys(
    section: type[BaseModel], values: dict[str, Any], indent: str, with_words: bool = True
) -> list[str]:
    lines: list[str] = []
    for key, field in section.model_fields.items():
        value = _without_password(values[key])
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines.append(f"{indent}{key}: {shown}" + f"  # {_words(field.description)}" * with_words)
    return lines


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


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
