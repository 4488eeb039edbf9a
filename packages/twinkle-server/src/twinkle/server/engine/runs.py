"""The training runs whose adapters are on the worker."""

from dataclasses import dataclass

from twinkle.server.backends.protocol import AdapterSpec


@dataclass(frozen=True)
class LiveRun:
    """A run that takes requests."""

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    spec: AdapterSpec
