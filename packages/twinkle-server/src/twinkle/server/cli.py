"""`twinkle-server`: start a server, or check its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer
import yaml
from pydantic import BaseModel

from twinkle.protocol.errors import TwinkleError
from twinkle.server._version import __version__
from twinkle.server.config import ServerConfig, load_config

app = typer.Typer(
    name="twinkle-server",
    help="Training as a service for LoRA: one base model, many tenants' adapters, over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", help="YAML file with at least `model: {model_id: ...}`.", show_default=False
    ),
]


@app.command()
def launch(config: ConfigOption) -> None:
    """Start the server and serve until Ctrl-C."""
    from twinkle.server.serve.launch import TwinkleServer  # imports ray, which takes seconds

    TwinkleServer.from_config(config).run()


@app.command(name="check-config")
def check_config(config: ConfigOption) -> None:
    """Check a configuration and show every setting, defaults included, with what it means."""
    print(describe(load_config(config)), end="")


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
            shown = yaml.safe_dump(values[name][key], default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {key}: {shown}  # {' '.join((field.description or '').split())}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line; errors meant for people are printed without a traceback, with exit code 1."""
    try:
        app()
    except TwinkleError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        sys.exit(1)
