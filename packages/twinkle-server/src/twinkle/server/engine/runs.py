"""The training runs that take requests, and those that can take none any more."""

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


@dataclass(frozen=True)
class LostRun:
    """A run that was live, and whose state or order can't be known any more.

    Attributes:
        reason: what is said to whoever asks for it.
    """

    run_id: str
    tenant: str
    reason: str

    @property
    def session_id(self) -> str:
        return self.run_id.rpartition(":train:")[0]
